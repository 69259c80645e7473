"""Answers: many prompts in one unpadded stream, a KV cache, greedy or nucleus sampling.

    batches             as many prompts at a time as a budget of cache slots holds
    prefill             a batch's prompts as one stream, a bounded piece of it at a time; what they
                        begin with alike is computed once, as a training group's prompt is
    decode_one_token    one more token for every answer that goes on

Memory is the cache, the activations of one piece, and one layer's scores: a step of decoding copies
nothing of the cache. No tokenizer and no training in here. Shape letters as in model.py: N rows
(answers), H query heads, K key/value heads, D head dim, V vocabulary; and S slots of the cache.
"""
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from configs import BadInput
from model import Llama, LlamaConfig, Segment, SegmentAttention, as_heads, sdpa, varlen_kernel

SLOTS = 64           # the cache grows, and is read, by so many slots
PIECE = 16_384       # tokens of prompts that go through the layers together
QUERIES = 1_024      # of a cut prompt, that a mask is made for at a time
CPU_BUDGET = 32_768  # slots of a batch where nobody says how many: 1.5 GB of SmolLM2's

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
             look: Look | None = None,
             batch_tokens: int = 0,
             progress: Callable[[int], None] | None = None) -> list[list[int]]:
    """Continue each prompt: its new ids, with the stop token where one came.

    An answer without a stop token at its end was cut by max_new_tokens. temperature 0 is greedy.
    generator: on the model's device, for sampling. shared: for each prompt, how many of its first
    tokens others may begin with as well; equal beginnings are computed once. look(i, token, tops)
    is told of each new token of prompt i with (layers, H): where in its row each head's arg-max
    was. batch_tokens: cache slots of a batch, see batches; 0: what memory there is, see
    slots_in_memory. progress(n) is told after each batch that n more answers are there.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise BadInput(f"prompt {i} of {len(prompts)} is empty")
    N = len(prompts)
    if shared is None:
        shared = [0] * N
    budget = batch_tokens or slots_in_memory(model)
    lengths = [len(prompt) for prompt in prompts]
    choose = partial(sample, temperature=temperature, top_p=top_p, generator=generator, N=N)

    # Every batch draws from where the first one did, always for all N rows. So what a row gets
    # depends on its number and the seed alone, and an answer is the same in any batch.
    begin = None
    if generator:
        begin = generator.get_state()
    after = begin
    longest = 0
    answers = [[] for _ in prompts]
    for numbers in batches(lengths, max_new_tokens, budget):
        if generator:
            generator.set_state(begin)
        layout = lay_out(
            [prompts[i] for i in numbers],
            [shared[i] for i in numbers],
        )
        cache = KVCache(model.config, layout, max_new_tokens, watched=look is not None)
        found = answer_batch(model, layout, cache, numbers, max_new_tokens, choose, stop_ids, look)
        for i, ids in zip(numbers, found):
            answers[i] = ids
        if progress:
            progress(len(numbers))
        steps = max(len(ids) for ids in found)
        if generator and steps > longest:
            longest = steps
            after = generator.get_state()
    # What is drawn next goes on after the longest answer, as if all had been one batch.
    if generator:
        generator.set_state(after)
    return answers


def answer_batch(model: Llama, layout: "Layout", cache: "KVCache", numbers: list[int],
                 max_new_tokens: int, choose: Callable, stop_ids: Sequence[int],
                 look: Look | None) -> list[list[int]]:
    """The answers to the prompts of a layout; numbers: what the caller knows these prompts by."""
    answers = {i: [] for i in numbers}
    alive = list(numbers)  # the cache's row r belongs to prompt alive[r]

    logits = prefill(model, layout, cache)
    for step in range(max_new_tokens):
        tokens = choose(logits, alive=alive)
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
            # What has ended leaves the batch: the last long answer does not pay for all the others.
            cache.keep(going)
            tokens = tokens[going]
            alive = [alive[row] for row in going]
        logits = decode_one_token(model, tokens, cache)
    return [answers[i] for i in numbers]


def prefill(model: Llama, layout: "Layout", cache: "KVCache") -> Tensor:
    """Run the prompts, fill the cache: logits (N, V) of each answer's first token, in fp32."""
    weight = model.lm_head.weight
    device = weight.device
    tokens = torch.tensor(layout.tokens, device=device)
    positions = torch.tensor(layout.positions, device=device)
    # Of all the stream's tokens only the last of each prompt predicts something that is asked for.
    N = len(layout.owners)
    C = model.config.hidden_size
    last_states = weight.new_empty(N, C)
    # Mostly one piece is all. But 64K tokens of Llama-3-8B have 5.6 GB of activations in one MLP,
    # and an answer needs nothing of them but keys and values.
    for piece in cut_in_pieces(layout, PIECE):
        attends = cache.prefill_attention(piece, device)
        x = model.hidden_states(
            tokens[piece.tokens],
            positions[piece.tokens],
            attends,
        )
        for row, place in piece.ends:
            last_states[row] = x[place]
    return model.lm_head(last_states).float()


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


# ---------------------------------------------------------------------------------------- batches

def batches(lengths: Sequence[int], max_new_tokens: int, budget: int) -> list[list[int]]:
    """Numbers of prompts of these lengths, in batches of at most `budget` cache slots each.

    By tokens, not by rows: what a batch costs is its cache, and 8 rows of 1,000 tokens are an
    eighth of 8 rows of 8,000. A prompt that needs more than the budget goes alone.
    """
    found = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        # All rows get the room of the longest. In this order that is the one that comes.
        slots = slots_for(lengths[i] + max_new_tokens)
        if not found or (len(found[-1]) + 1) * slots > budget:
            found.append([])
        found[-1].append(i)
    return [sorted(batch) for batch in found]


def slots_in_memory(model: Llama) -> int:
    """Cache slots of a batch: those that half of a GPU's free memory holds; CPU_BUDGET on a CPU."""
    weight = model.lm_head.weight
    if not weight.is_cuda:
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(weight.device)
    # What PyTorch has taken from the GPU and does not use is free for a cache as well.
    free += torch.cuda.memory_reserved(weight.device)
    free -= torch.cuda.memory_allocated(weight.device)
    config = model.config
    # A key and a value in each layer: 131 KB for Llama-3-8B in 16 bits.
    width = config.num_key_value_heads * config.head_dim
    a_slot = 2 * config.num_hidden_layers * width * weight.element_size()
    # The other half is for activations, scores and logits, and for whoever else is on the GPU.
    slots = free // 2 // a_slot
    # Rounded down, so that a few megabytes more or less elsewhere do not make other batches.
    rounded = slots // PIECE * PIECE
    return rounded or slots


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

    def rows_by_segment(self) -> dict[Segment, list[int]]:
        """Which prompts a segment is a part of."""
        found = {segment: [] for segment in self.segments}
        for row, segment in enumerate(self.rows()):
            found[segment].append(row)
            if segment.prefix_end:
                beginning = Segment(segment.prefix_start, segment.prefix_end)
                found[beginning].append(row)
        return found


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


class Part(NamedTuple):
    """Tokens of a piece that belong to one segment, and where in the cache their keys go."""
    tokens: slice
    rows: list[int]
    slots: slice


class Piece(NamedTuple):
    """Tokens of the stream that go through the layers together."""
    tokens: slice
    parts: list[Part]
    segments: list[Segment] | None  # as a stream of its own; None if it needs keys from before it
    ends: list[tuple[int, int]]     # (row, place in the piece) of the prompts that end in it


def cut_in_pieces(layout: Layout, most: int) -> list[Piece]:
    """The stream in pieces of at most so many tokens; segments stay whole where they can."""
    pieces = []
    start = 0
    end = 0
    for segment in layout.segments:
        if end > start and segment.end - start > most:
            pieces.append(piece_of(layout, start, end))
            start = end
        # Alone it may be too long all the same: a prompt of 64K tokens.
        while segment.end - start > most:
            pieces.append(piece_of(layout, start, start + most))
            start += most
        end = segment.end
    pieces.append(piece_of(layout, start, end))
    return pieces


def piece_of(layout: Layout, start: int, end: int) -> Piece:
    """Tokens start:end of the stream."""
    rows = layout.rows_by_segment()
    piece = Piece(slice(start, end), [], [], [])
    alone = True
    for segment in layout.segments:
        first = max(segment.start, start)
        last = min(segment.end, end)
        if first >= last:
            continue
        slot = segment.prefix_length + first - segment.start
        tokens = slice(first - start, last - start)
        slots = slice(slot, slot + last - first)
        piece.parts.append(Part(tokens, rows[segment], slots))
        piece.segments.append(segment.moved(-start))
        # Neither its own beginning nor what it shares with others may lie in an earlier piece.
        # Nor its end in a later one: it would still be right, but be two cases to think of.
        if last - first < segment.length:
            alone = False
        if segment.prefix_end and segment.prefix_start < start:
            alone = False
    for row, segment in enumerate(layout.rows()):
        if start < segment.end <= end:
            piece.ends.append((row, segment.end - 1 - start))
    if alone:
        return piece
    return piece._replace(segments=None)


# --------------------------------------------------------------------------------------- the cache

class KVCache:
    """Keys and values of N rows, a row being a prompt and the answer that grows behind it.

    layers: of each layer (2, N, K, S, D), the keys and the values. lengths (N,): slots filled; a
    token's slot is its position. tops: if watched, of each layer (N, H): the key that each head's
    newest query scores highest. Slot behind head: rows and heads are then one dimension to a
    batched matrix product, which reads them where they lie.
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
        # All rows get the room of the longest, see batches.
        longest = max(lengths) + max_new_tokens
        self.size = slots_for(longest)
        self.layers = [None] * config.num_hidden_layers
        self.tops = [None] * config.num_hidden_layers

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, which are in order."""
        self.lengths = self.lengths[rows]
        n = len(rows)
        for layer, cached in enumerate(self.layers):
            # In place: a row moves up, to where one that has moved or is dropped was.
            for to, row in enumerate(rows):
                if to != row:
                    cached[:, to] = cached[:, row]
            self.layers[layer] = cached[:, :n]

    def tops_of(self, row: int) -> Tensor:
        """(layers, H): where each head's newest query of this row looked."""
        of_row = [tops[row] for tops in self.tops]
        return torch.stack(of_row).cpu()

    # ---- prompts

    def prefill_attention(self, piece: Piece, device: torch.device) -> list[Callable]:
        """For each layer: attention over a piece of the prompts, which also fills the cache."""
        attention = None
        if piece.segments is not None:
            attention = SegmentAttention(piece.segments, device)
        attends = []
        for layer in range(len(self.layers)):
            attends.append(partial(self.attend_prefill, layer, piece, attention))
        return attends

    def attend_prefill(self, layer: int, piece: Piece, attention: SegmentAttention | None,
                       q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if self.layers[layer] is None:
            self.layers[layer] = self.empty_layer(k_TKD)
        keys, values = self.layers[layer]
        for part in piece.parts:
            k_KTD = k_TKD[part.tokens].transpose(0, 1)
            v_KTD = v_TKD[part.tokens].transpose(0, 1)
            # Rows with one beginning part here, each with a copy: from now on each grows alone.
            for row in part.rows:
                keys[row, :, part.slots] = k_KTD
                values[row, :, part.slots] = v_KTD
        if self.watched:
            self.watch_prompts(layer, piece, q_THD)
        if attention is not None:
            return attention(q_THD, k_TKD, v_TKD)

        # What a piece needs of earlier ones is in the cache by now, and so is its own.
        out = []
        for part in piece.parts:
            # All rows of a part have the same keys up to here: any of them will do.
            row = part.rows[0]
            end = part.slots.stop
            k_KSD = keys[row, :, :end]
            v_KSD = values[row, :, :end]
            out.append(attend_last_slots(q_THD[part.tokens], k_KSD, v_KSD))
        return torch.cat(out)

    def empty_layer(self, k_TKD: Tensor) -> Tensor:
        """(2, N, K, S, D) for a layer whose keys are as these."""
        _, K, D = k_TKD.shape
        N = len(self.lengths)
        # Zeros: what is not seen has no weight, but no weight times whatever lay there may be NaN.
        return k_TKD.new_zeros(2, N, K, self.size, D)

    def watch_prompts(self, layer: int, piece: Piece, q_THD: Tensor) -> None:
        """The first new token comes from a prompt's last query: that is the one to look at."""
        keys = self.layers[layer][0]
        if self.tops[layer] is None:
            N = len(self.lengths)
            H = q_THD.shape[1]
            self.tops[layer] = torch.zeros(N, H, dtype=torch.int64, device=q_THD.device)
        # Row by row, since rows are of many lengths, and a few of them need not end in one piece.
        for row, place in piece.ends:
            q_1HD = q_THD[place:place + 1]
            k_1KSD = keys[row:row + 1, :, :self.lengths[row]]
            scores = scores_of(q_1HD, k_1KSD)
            self.tops[layer][row] = top_keys(scores)[0]

    # ---- one token more

    def decode_attention(self, device: torch.device) -> list[Callable]:
        """For each layer: attention of one new token a row over all of its row so far."""
        new = self.lengths.to(device)  # the slots that the new keys take
        rows = torch.arange(len(new), device=device)
        # Here and not in each layer: what is the same for all of them is laid out once a step.
        # As far as the longest row, rounded up: a length that grows by one a step is a new shape a
        # step, for which some GPU kernels plan anew, and whose rows are not aligned.
        longest = int(self.lengths.max()) + 1
        S = slots_for(longest)
        unseen = self.unseen(S, self.lengths, device)
        attends = []
        for layer in range(len(self.layers)):
            attends.append(partial(self.attend_decode, layer, rows, new, unseen))
        return attends

    def attend_decode(self, layer: int, rows: Tensor, new: Tensor, unseen: Tensor,
                      q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        keys, values = self.layers[layer]
        keys[rows, :, new] = k_NKD
        values[rows, :, new] = v_NKD
        S = unseen.shape[-1]
        scores = scores_of(q_NHD, keys[:, :, :S])
        scores.masked_fill_(unseen, -math.inf)
        if self.watched:
            self.tops[layer] = top_keys(scores)
        return weighted_values(scores, values[:, :, :S])

    def unseen(self, S: int, last: Tensor, device: torch.device) -> Tensor:
        """(N, 1, 1, S): False for the slots of each row up to its last (N,), for all heads."""
        slots = torch.arange(S, device=device)
        last = last.to(device).view(-1, 1, 1, 1)
        return slots > last


def slots_for(n: int) -> int:
    """n tokens' slots, rounded up."""
    blocks = math.ceil(n / SLOTS)
    return blocks * SLOTS


# --------------------------------------------------------------------- attention over cached keys

# One query a row: two matrix products, and no scaled_dot_product_attention. That chooses a kernel
# by device, dtype and shape, and where none fits it takes one that copies all keys, in fp32. These
# read the cache as it lies on any device, so there is nothing to be chosen. All that is made is the
# scores of one layer, 1 / 32 of its cache for Llama-3-8B. H / K query heads read the same key head:
# to a product they are as many queries of one head, and no key is repeated for them.

def scores_of(q_NHD: Tensor, k_NKSD: Tensor) -> Tensor:
    """(N, K, H / K, S), fp32 or better: one query a row and head against each key of its row."""
    N, H, D = q_NHD.shape
    _, K, S, _ = k_NKSD.shape
    q = q_NHD.reshape(N * K, H // K, D)
    # view, not reshape: should the cache ever lie otherwise, this fails, and does not copy it.
    k = k_NKSD.view(N * K, S, D)
    k = k.transpose(1, 2)
    # In fp32 whatever the model's dtype: bf16 keeps 8 bits of a score, so that near the top whole
    # handfuls of keys are equal, and the arg-max of equals is the first, not the best.
    if q.dtype not in (torch.bfloat16, torch.float16):
        scores = torch.bmm(q, k)
    elif q.is_cuda:
        scores = torch.bmm(q, k, out_dtype=torch.float32)
    else:
        scores = products_in_fp32(q, k)
    scores *= D ** -0.5
    return scores.view(N, K, H // K, S)


def products_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit batches, for CPUs, whose product would be rounded to 16 bits again."""
    # One at a time: of all the keys in fp32 only one row's and head's exist.
    products = []
    for one, other in zip(a, b):
        products.append(one.float() @ other.float())
    return torch.stack(products)


def weighted_values(scores: Tensor, v_NKSD: Tensor) -> Tensor:
    """(N, H, D): the values, each with the softmax of its score (N, K, H / K, S)."""
    N, K, S, D = v_NKSD.shape
    weights = scores.softmax(-1).to(v_NKSD.dtype)
    weights = weights.view(N * K, -1, S)
    v = v_NKSD.view(N * K, S, D)
    out = torch.bmm(weights, v)
    return out.view(N, -1, D)


def top_keys(scores: Tensor) -> Tensor:
    """(N, H): which key each head's query scores highest."""
    return scores.argmax(-1).flatten(1)


def attend_last_slots(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> Tensor:
    """(T, H, D): causal attention of the last T of S tokens, whose keys are all in the cache."""
    T = len(q_THD)
    S = k_KSD.shape[1]
    device = q_THD.device
    kernel = varlen_kernel(device, q_THD.dtype)
    if kernel is not None:
        # One sequence. Its causal mask is aligned at the end, which is where these queries are.
        queries = torch.tensor([0, T], dtype=torch.int32, device=device)
        keys = torch.tensor([0, S], dtype=torch.int32, device=device)
        k_SKD = k_KSD.transpose(0, 1)
        v_SKD = v_KSD.transpose(0, 1)
        return kernel(q_THD, k_SKD, v_SKD, queries, keys, T, S)

    # Here a mask has to say what a query sees. Never T x S of it: a few queries at a time.
    out = []
    for start in range(0, T, QUERIES):
        q = as_heads(q_THD[start:start + QUERIES])
        n = q.shape[2]
        end = S - T + start + n  # of the slots that the last of these queries sees
        last_seen = torch.arange(end - n, end, device=device)
        seen = torch.arange(end, device=device) <= last_seen[:, None]
        # Slots behind the last one would only be masked: they are not read.
        k = k_KSD[None, :, :end]
        v = v_KSD[None, :, :end]
        out.append(sdpa(q, k, v, attn_mask=seen))
    return torch.cat(out)
