"""Answers: many prompts in one unpadded stream, a KV cache, greedy or nucleus sampling.

    prefill             all prompts in one forward; what they begin with alike is computed once,
                        as a training group's prompt is
    decode_one_token    one more token for every answer that goes on

No tokenizer and no training in here. Shape letters as in model.py: N rows (answers), H query heads,
K key/value heads, D head dim, V vocabulary; and S slots of the cache.
"""
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import BadInput
from model import Llama, LlamaConfig, Segment, SegmentAttention

SLOTS = 64  # the cache grows, and is read, by so many slots

Look = Callable[[int, int, Tensor], None]


@torch.no_grad()
def generate(model: Llama,
             prompts: list[list[int]],
             max_new_tokens: int,
             temperature: float = 0.0,
             top_p: float = 1.0,
             stop_ids: Sequence[int] = (),
             generator: torch.Generator | None = None,
             shared: list[int] | None = None,
             look: Look | None = None) -> list[list[int]]:
    """Continue each prompt: its new ids, with the stop token where one came.

    An answer without a stop token at its end was cut by max_new_tokens. temperature 0 is greedy.
    generator: on the model's device, for sampling. shared: for each prompt, how many of its first
    tokens others may begin with as well; equal beginnings are computed once. look(row, token, tops)
    is told of each new token with (layers, H): where in its row each head's arg-max was.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise BadInput(f"prompt {i} of {len(prompts)} is empty")

    N = len(prompts)
    if shared is None:
        shared = [0] * N
    layout = lay_out(prompts, shared)
    cache = KVCache(model.config, layout, max_new_tokens, watched=look is not None)
    answers = [[] for _ in prompts]
    alive = list(range(N))  # the cache's row r belongs to answer alive[r]

    logits = prefill(model, layout, cache)
    for step in range(max_new_tokens):
        tokens = sample(logits, temperature, top_p, generator, alive, N)
        going = []
        for row, token in enumerate(tokens.tolist()):
            i = alive[row]
            answers[i].append(token)
            if look:
                look(i, token, cache.tops_of(row))
            if token not in stop_ids:
                going.append(row)
        # The last token's own keys would be needed for a next one only.
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(alive):
            # What has ended leaves the batch, so the last long answer does not pay for all.
            cache.keep(going)
            tokens = tokens[going]
            alive = [alive[row] for row in going]
        logits = decode_one_token(model, tokens, cache)
    return answers


def prefill(model: Llama, layout: "Layout", cache: "KVCache") -> Tensor:
    """Run the prompts, fill the cache: logits (N, V) of each answer's first token, in fp32."""
    device = model.lm_head.weight.device
    tokens = torch.tensor(layout.tokens, device=device)
    positions = torch.tensor(layout.positions, device=device)
    x = model.hidden_states(tokens, positions, cache.prefill_attention(device))
    # Of all the stream's tokens only the last of each prompt predicts something that is asked for.
    x = x[layout.last_tokens(device)]
    return model.lm_head(x).float()


def decode_one_token(model: Llama, tokens: Tensor, cache: "KVCache") -> Tensor:
    """Append a token (N,) to each row: logits (N, V) of the next one, in fp32."""
    # All rows as one stream: the model knows no batch, and the cache keeps their keys apart.
    device = tokens.device
    positions = cache.lengths.to(device)
    x = model.hidden_states(tokens, positions, cache.decode_attention(device))
    cache.lengths += 1
    return model.lm_head(x).float()


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None,
           alive: Sequence[int], N: int) -> Tensor:
    """The next token of each row of logits (len(alive), V): (len(alive),).

    The best one at temperature 0, else a draw from the nucleus (arXiv 1904.09751): the most likely
    tokens until their mass reaches top_p. alive: which of N rows that there once were these are.
    """
    if temperature == 0:
        # Among equals the first: no noise, so that greedy answers are the same in any batch.
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    probs, order = probs.sort(dim=-1, descending=True)
    mass_before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(mass_before >= top_p, 0)  # the first has none before it: it stays
    # The largest of probs / Exp(1) noise is a draw from probs, without a second pass to normalise.
    # Noise is drawn for all N rows, also for those that have ended: so what a row gets depends on
    # the seed alone, and an answer stays the same whether or not its neighbours stopped early.
    V = logits.shape[1]
    noise = probs.new_empty(N, V)
    noise.exponential_(generator=generator)
    drawn = probs / noise[alive]
    places = drawn.argmax(-1, keepdim=True)
    return order.gather(1, places)[:, 0]


# ----------------------------------------------------------------------------- prompts in a stream

class Layout(NamedTuple):
    """Prompts as one stream of segments."""
    tokens: list[int]
    positions: list[int]
    segments: list[Segment]
    owners: list[int]        # of each prompt: the segment that holds its end

    def append(self, tokens: Sequence[int], prefix: Segment | None = None) -> None:
        """Add a segment, which continues another one or begins at position 0."""
        n = len(tokens)
        start = len(self.tokens)
        position = 0
        segment = Segment(start, start + n)
        if prefix is not None:
            position = prefix.length
            segment = Segment(start, start + n, prefix.start, prefix.end)
        self.tokens.extend(tokens)
        self.positions.extend(range(position, position + n))
        self.segments.append(segment)

    def rows(self) -> list[Segment]:
        """For each prompt the segment that holds its end."""
        return [self.segments[owner] for owner in self.owners]

    def last_tokens(self, device: torch.device) -> Tensor:
        """(N,): where in the stream each prompt's last token is."""
        places = [segment.end - 1 for segment in self.rows()]
        return torch.tensor(places, device=device)


def lay_out(prompts: list[list[int]], shared: list[int]) -> Layout:
    """Equal beginnings once, and what follows them as answers to them; equal prompts once, too."""
    # A prompt's last token is never shared: its own row gives the logits of the first new token.
    splits = []
    for prompt, n in zip(prompts, shared):
        n = min(n, len(prompt) - 1)
        beginning = tuple(prompt[:n])
        end = tuple(prompt[n:])
        splits.append((beginning, end))
    # Two prompts share if they begin alike *and* are said to: cutting every prompt at its longest
    # common beginning with any other would make many small segments for a few tokens saved.
    ends_of = {}
    for beginning, end in splits:
        ends_of.setdefault(beginning, {})[end] = True  # a dict for a set that keeps its order

    layout = Layout([], [], [], [])
    place = {}
    for beginning, ends in ends_of.items():
        prefix = None
        if beginning and len(ends) > 1:
            layout.append(beginning)
            prefix = layout.segments[-1]
        for end in ends:
            place[beginning, end] = len(layout.segments)
            if prefix is None:  # nobody else has this beginning: one segment, one causal call
                layout.append(beginning + end)
            else:
                layout.append(end, prefix)
    for split in splits:
        layout.owners.append(place[split])
    return layout


# --------------------------------------------------------------------------------------- the cache

class KVCache:
    """Keys and values of N rows, a row being a prompt and the answer that grows behind it.

    layers: of each layer (2, N, S, K, D), the keys and the values. lengths (N,): slots filled; a
    token's slot is its position. tops: if watched, of each layer (N, H): the key that each head's
    newest query scores highest. Head behind slot, since that is how tokens come: nothing is turned
    when a token is added, and attention reads the turned view.
    """

    def __init__(self, config: LlamaConfig, layout: Layout, max_new_tokens: int,
                 watched: bool = False):
        self.layout = layout
        self.watched = watched
        lengths = []
        for segment in layout.rows():
            lengths.append(segment.prefix_length + segment.length)
        # On the CPU: the host decides by them how much of the cache a step reads.
        self.lengths = torch.tensor(lengths)
        # All rows get the room of the longest. Whoever asks sorts prompts by length beforehand.
        longest = max(lengths) + max_new_tokens
        self.size = slots_for(longest)
        self.layers = [None] * config.num_hidden_layers
        self.tops = [None] * config.num_hidden_layers

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.lengths = self.lengths[rows]
        # One layer at a time: while it is copied, only that layer is there twice.
        for layer, cached in enumerate(self.layers):
            self.layers[layer] = cached[:, rows]

    def tops_of(self, row: int) -> Tensor:
        """(layers, H): where each head's newest query of this row looked."""
        of_row = [tops[row] for tops in self.tops]
        return torch.stack(of_row).cpu()

    def prefill_attention(self, device: torch.device) -> list[Callable]:
        """For each layer: attention over the stream of prompts, which also fills the cache."""
        attention = SegmentAttention(self.layout.segments, device)
        attends = []
        for layer in range(len(self.layers)):
            attends.append(partial(self.attend_prefill, layer, attention))
        return attends

    def attend_prefill(self, layer: int, attention: SegmentAttention,
                       q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        _, K, D = k_TKD.shape
        N = len(self.lengths)
        cached = k_TKD.new_zeros(2, N, self.size, K, D)
        keys, values = cached
        for row, segment in enumerate(self.layout.rows()):
            # Rows with one beginning part here, each with a copy: from now on each grows alone.
            prefix = slice(segment.prefix_start, segment.prefix_end)
            own = slice(segment.start, segment.end)
            n = segment.prefix_length + segment.length
            keys[row, :n] = torch.cat([k_TKD[prefix], k_TKD[own]])
            values[row, :n] = torch.cat([v_TKD[prefix], v_TKD[own]])
        self.layers[layer] = cached

        if self.watched:
            # The first new token comes from the prompt's last row: that is the query to look at.
            device = q_THD.device
            q_NHD = q_THD[self.layout.last_tokens(device)]
            seen = self.seen(self.size, self.lengths - 1, device)
            self.tops[layer] = top_keys(q_NHD, keys.transpose(1, 2), seen)
        return attention(q_THD, k_TKD, v_TKD)

    def decode_attention(self, device: torch.device) -> list[Callable]:
        """For each layer: attention of one new token a row over all of its row so far."""
        new = self.lengths.to(device)  # the slots that the new keys take
        # As far as the longest row, rounded up: a length that grows by one a step is a new shape a
        # step, for which some GPU kernels plan anew, and whose mask's rows are not aligned.
        longest = int(self.lengths.max()) + 1
        S = slots_for(longest)
        seen = self.seen(S, self.lengths, device)
        attends = []
        for layer in range(len(self.layers)):
            attends.append(partial(self.attend_decode, layer, new, seen))
        return attends

    def attend_decode(self, layer: int, new: Tensor, seen: Tensor,
                      q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        keys, values = self.layers[layer]
        rows = torch.arange(len(new), device=new.device)
        keys[rows, new] = k_NKD
        values[rows, new] = v_NKD
        S = seen.shape[-1]
        k_NKSD = keys[:, :S].transpose(1, 2)
        v_NKSD = values[:, :S].transpose(1, 2)
        if self.watched:
            # Flash kernels keep no scores. They are made once more, for whoever wants to see them.
            self.tops[layer] = top_keys(q_NHD, k_NKSD, seen)
        return attend_one_query(q_NHD, k_NKSD, v_NKSD, seen)

    def seen(self, S: int, last: Tensor, device: torch.device) -> Tensor:
        """(N, 1, 1, S): True for the slots of each row up to its last (N,), for all heads alike."""
        slots = torch.arange(S, device=device)
        last = last.to(device).view(-1, 1, 1, 1)
        return slots <= last


def slots_for(n: int) -> int:
    """n tokens' slots, rounded up."""
    blocks = math.ceil(n / SLOTS)
    return blocks * SLOTS


def attend_one_query(q_NHD: Tensor, k_NKSD: Tensor, v_NKSD: Tensor, seen: Tensor) -> Tensor:
    """(N, H, D): one query of each row and head over the row's seen keys (N, 1, 1, S)."""
    N, H, D = q_NHD.shape
    K = k_NKSD.shape[1]
    # H / K query heads read the same key head. As that many queries of one head they are ordinary
    # attention with K heads, and the cache is read as it lies. With enable_gqa and a mask, GPUs
    # would fall back to a kernel that repeats the keys for each query head, in fp32.
    q = q_NHD.view(N, K, H // K, D)
    out = F.scaled_dot_product_attention(q, k_NKSD, v_NKSD, attn_mask=seen)
    return out.reshape(N, H, D)


def top_keys(q: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """(N, H): which of the seen keys (N, K, S, D) each head's query (N, H, D) scores highest."""
    N, H, D = q.shape
    K = keys.shape[1]
    # In fp32 whatever the model's dtype: bf16 keeps 8 bits of a score, so that near the top whole
    # handfuls of keys are equal, and the arg-max of equals is the first, not the best.
    q = q.view(N, K, H // K, D).float()
    keys = keys.float().transpose(2, 3)
    scores = q @ keys  # (N, K, H / K, S)
    scores = scores.masked_fill(~seen, -math.inf)
    return scores.argmax(-1).view(N, H)
