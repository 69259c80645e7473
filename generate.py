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
def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int,
             temperature: float = 0.0, top_p: float = 1.0, stop_ids: Sequence[int] = (),
             generator: torch.Generator | None = None, shared: list[int] | None = None,
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
    layout = lay_out(prompts, shared or [0] * len(prompts))
    cache = KVCache(model.config, layout, max_new_tokens, watched=look is not None)
    answers = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # the cache's row r belongs to answer alive[r]

    logits = prefill(model, layout, cache)
    for step in range(max_new_tokens):
        tokens = sample(logits, temperature, top_p, generator, alive, len(prompts))
        for row, token in enumerate(tokens.tolist()):
            answers[alive[row]].append(token)
            if look:
                look(alive[row], token, cache.tops_of(row))
        going = [row for row, i in enumerate(alive) if answers[i][-1] not in stop_ids]
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(alive):
            # What has ended leaves the batch, so the last long answer does not pay for all.
            alive = [alive[row] for row in going]
            tokens = tokens[going]
            cache.keep(going)
        logits = decode_one_token(model, tokens, cache)
    return answers


def prefill(model: Llama, layout: "Layout", cache: "KVCache") -> Tensor:
    """Run the prompts, fill the cache: logits (N, V) of each answer's first token, in fp32."""
    device = model.lm_head.weight.device
    tokens = torch.tensor(layout.tokens, device=device)
    positions = torch.tensor(layout.positions, device=device)
    x = model.hidden_states(tokens, positions, cache.attend_prompts(device))
    last = torch.tensor([layout.segments[i].end - 1 for i in layout.owners], device=device)
    return model.lm_head(x[last]).float()


def decode_one_token(model: Llama, tokens: Tensor, cache: "KVCache") -> Tensor:
    """Append a token (N,) to each row: logits (N, V) of the next one, in fp32."""
    # All rows as one stream: the model knows no batch, and the cache keeps their keys apart.
    positions = cache.lengths.to(tokens.device)
    x = model.hidden_states(tokens, positions, cache.attend_tokens(tokens.device))
    cache.lengths += 1
    return model.lm_head(x).float()


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None,
           alive: Sequence[int], N: int) -> Tensor:
    """The next token of each row of logits (len(alive), V): (len(alive),).

    The best one at temperature 0, else a draw from the nucleus (arXiv 1904.09751): the most likely
    tokens until their mass reaches top_p. alive: which of N rows that there once were these are.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    mass_before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(mass_before >= top_p, 0)  # the first has none before it: it stays
    # The largest of probs / Exp(1) noise is a draw from probs, without a second pass to normalise.
    # Noise is drawn for all N rows, also for those that have ended: so what a row gets depends on
    # the seed alone, and an answer stays the same whether or not its neighbours stopped early.
    noise = probs.new_empty(N, probs.shape[1]).exponential_(generator=generator)
    drawn = (probs / noise[alive]).argmax(-1, keepdim=True)
    return order.gather(1, drawn)[:, 0]


# ----------------------------------------------------------------------------- prompts in a stream

class Layout(NamedTuple):
    """Prompts as one stream of segments."""
    tokens: list[int]
    positions: list[int]
    segments: list[Segment]
    owners: list[int]        # of each prompt: the segment that holds its end

    def append(self, tokens: Sequence[int], prefix: Segment | None = None) -> None:
        """Add a segment, which continues another one or begins at position 0."""
        start = len(self.tokens)
        end = start + len(tokens)
        first = 0
        segment = Segment(start, end)
        if prefix:
            first = prefix.length
            segment = Segment(start, end, prefix.start, prefix.end)
        self.tokens.extend(tokens)
        self.positions.extend(range(first, first + len(tokens)))
        self.segments.append(segment)


def lay_out(prompts: list[list[int]], shared: list[int]) -> Layout:
    """Equal beginnings once, and what follows them as answers to them; equal prompts once, too."""
    # A prompt's last token is never shared: its own row gives the logits of the first new token.
    splits = []
    for prompt, n in zip(prompts, shared):
        n = min(n, len(prompt) - 1)
        splits.append((tuple(prompt[:n]), tuple(prompt[n:])))
    ends_of = {}
    for beginning, end in splits:
        ends = ends_of.setdefault(beginning, [])
        if end not in ends:
            ends.append(end)

    layout = Layout([], [], [], [])
    place = {}
    for beginning, ends in ends_of.items():
        prefix = None
        if beginning and len(ends) > 1:
            layout.append(beginning)
            prefix = layout.segments[-1]
        for end in ends:
            # A beginning that nobody else has is no prefix: one segment, one causal call.
            layout.append(end if prefix else beginning + end, prefix)
            place[beginning, end] = len(layout.segments) - 1
    layout.owners.extend(place[split] for split in splits)
    return layout


# --------------------------------------------------------------------------------------- the cache

class KVCache:
    """Keys and values of N rows, a row being a prompt and the answer that grows behind it.

    layers: of each layer (2, N, S, K, D), the keys and the values. lengths (N,): slots filled; a
    token's slot is its position. tops: if watched, of each layer (N, H): the key that each head's
    newest query scores highest.
    """

    def __init__(self, config: LlamaConfig, layout: Layout, max_new_tokens: int,
                 watched: bool = False):
        self.layout = layout
        self.watched = watched
        lengths = []
        for owner in layout.owners:
            segment = layout.segments[owner]
            lengths.append(segment.prefix_length + segment.length)
        self.lengths = torch.tensor(lengths)
        self.size = slots_for(max(lengths) + max_new_tokens)
        self.layers = [None] * config.num_hidden_layers
        self.tops = [None] * config.num_hidden_layers

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.lengths = self.lengths[rows]
        for layer, cached in enumerate(self.layers):
            self.layers[layer] = cached[:, rows]

    def tops_of(self, row: int) -> Tensor:
        """(layers, H): where each head's newest query of this row looked."""
        return torch.stack([tops[row] for tops in self.tops]).cpu()

    def attend_prompts(self, device: torch.device) -> list[Callable]:
        """Attention of the prefill, for each layer: over the stream's segments, filling the cache."""
        attention = SegmentAttention(self.layout.segments, device)
        layers = range(len(self.layers))
        return [partial(self.prompts, layer, attention) for layer in layers]

    def prompts(self, layer: int, attention: SegmentAttention, q_THD: Tensor, k_TKD: Tensor,
                v_TKD: Tensor) -> Tensor:
        segments = [self.layout.segments[owner] for owner in self.layout.owners]
        cached = k_TKD.new_zeros(2, len(segments), self.size, *k_TKD.shape[1:])
        for row, segment in enumerate(segments):
            P = segment.prefix_length
            end = P + segment.length
            for kind, x in enumerate((k_TKD, v_TKD)):
                # Rows with one beginning part here, each with a copy: from now on each grows alone.
                cached[kind, row, :P] = x[segment.prefix_start:segment.prefix_end]
                cached[kind, row, P:end] = x[segment.start:segment.end]
        self.layers[layer] = cached
        if self.watched:
            last = torch.tensor([segment.end - 1 for segment in segments], device=q_THD.device)
            slots = torch.arange(self.size, device=q_THD.device)
            seen = slots < self.lengths.to(q_THD.device)[:, None]
            self.tops[layer] = top_keys(q_THD[last], cached[0].transpose(1, 2), seen[:, None, None])
        return attention(q_THD, k_TKD, v_TKD)

    def attend_tokens(self, device: torch.device) -> list[Callable]:
        """Attention of one new token a row, for each layer: over all of its row so far."""
        new = self.lengths.to(device)  # the slots that the new keys take
        # As far as the longest row, rounded up: a length that grows by one a step is a new shape a
        # step, for which some GPU kernels plan anew, and whose mask's rows are not aligned.
        S = slots_for(int(self.lengths.max()) + 1)
        seen = torch.arange(S, device=device) <= new[:, None]
        seen = seen[:, None, None]  # (N, 1, 1, S): for all heads and queries alike
        return [partial(self.tokens, layer, new, seen) for layer in range(len(self.layers))]

    def tokens(self, layer: int, new: Tensor, seen: Tensor, q_NHD: Tensor, k_NKD: Tensor,
               v_NKD: Tensor) -> Tensor:
        cached = self.layers[layer]
        rows = torch.arange(len(new), device=new.device)
        cached[0, rows, new] = k_NKD
        cached[1, rows, new] = v_NKD
        S = seen.shape[-1]
        k_NKSD = cached[0, :, :S].transpose(1, 2)
        v_NKSD = cached[1, :, :S].transpose(1, 2)
        if self.watched:
            self.tops[layer] = top_keys(q_NHD, k_NKSD, seen)
        return attend_one_query(q_NHD, k_NKSD, v_NKSD, seen)


def slots_for(n: int) -> int:
    """n tokens' slots, rounded up."""
    return -(-n // SLOTS) * SLOTS


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
    grouped = q.view(N, keys.shape[1], -1, D)
    # In fp32 whatever the model's dtype: bf16 keeps 8 bits of a score, so that near the top whole
    # handfuls of keys are equal, and the arg-max of equals is the first, not the best.
    scores = grouped.float() @ keys.float().transpose(2, 3)  # (N, K, H / K, S)
    return scores.masked_fill(~seen, -math.inf).argmax(-1).view(N, H)
