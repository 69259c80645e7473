"""Answers: many prompts in one unpadded stream, a KV cache, greedy or nucleus sampling.

Prompts that begin alike are computed once, as a training group's prompt is. No tokenizer and no training in here.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from configs import BadInput
from model import Segment, SegmentAttention, group_spans


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=(), generator=None, shared=None, look=None):
    """Continue each prompt; lists of ids in, lists of new ids out, with the stop token where one came.

    An answer without a stop token at its end was cut by max_new_tokens. temperature 0 is greedy;
    generator: a torch.Generator on the model's device, for sampling. shared: for each prompt, how many of its first
    tokens others may begin with as well: what is equal is computed once, as a training group's prompt is.
    look(row, token, tops): told of each new token with (layers, heads), where in its row each head's arg-max was.
    """
    if not all(len(p) for p in prompts):
        raise BadInput(f"prompt {[len(p) for p in prompts].index(0)} of {len(prompts)} is empty")
    device = model.lm_head.weight.device
    tokens, positions, segments, owners = lay_out(prompts, shared or [0] * len(prompts))
    cache = KVCache(model.config, segments, owners, max_new_tokens, watched=look is not None)
    tokens, positions = (torch.tensor(x, device=device) for x in (tokens, positions))
    x = model.trunk(tokens, positions, group_spans(positions, segments), cache.prefill(device))
    x = x[torch.tensor([segments[i].end - 1 for i in owners], device=device)]  # the last token of each prompt
    out, alive = [[] for _ in prompts], list(range(len(prompts)))
    for step in range(max_new_tokens):
        tokens = sample(model.lm_head(x).float(), temperature, top_p, generator, alive, len(prompts))
        for row, (i, token) in enumerate(zip(alive, tokens.tolist())):
            out[i].append(token)
            if look:
                look(i, token, torch.stack([tops[row] for tops in cache.tops]).cpu())
        going = [row for row, i in enumerate(alive) if out[i][-1] not in stop_ids]
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(alive):  # what has ended leaves the batch
            alive, tokens = [alive[row] for row in going], tokens[going]
            cache.keep(going)
        positions = cache.lengths.to(device) + step
        x = model.trunk(tokens, positions, positions[:, None] + 1, cache.decode(device, step))
    return out

def lay_out(prompts, shared):
    """(tokens, positions, segments, each prompt's segment): equal beginnings once, and what follows as answers to them."""
    tokens, positions, segments, place = [], [], [], {}
    cut = [min(n, len(p) - 1) for p, n in zip(prompts, shared)]
    ends = {}  # beginning -> the different ends that follow it
    for p, n in zip(prompts, cut):
        ends.setdefault(tuple(p[:n]), {}).setdefault(tuple(p[n:]))
    for start, those in ends.items():
        pieces = [start, *those] if len(those) > 1 and start else [start + end for end in those]
        opens, ahead = len(tokens), 0
        for piece, end in zip(pieces, [None, *those] if len(pieces) > len(those) else those):
            begin = len(tokens)
            segments.append(Segment(begin, begin + len(piece), *((opens, opens + ahead) if ahead else ())))
            place[start, end] = len(segments) - 1
            positions += range(ahead, ahead + len(piece))
            tokens += piece
            ahead = len(start) if len(pieces) > len(those) else 0
    return tokens, positions, segments, [place[tuple(p[:n]), tuple(p[n:])] for p, n in zip(prompts, cut)]


def sample(logits, temperature, top_p, generator, alive, N):
    """Next token of each row of logits (len(alive), V): the best at temperature 0, else from the nucleus of mass top_p.

    alive: which of the N rows that there once were these are. Noise is drawn for all N: what a row gets does not
    depend on which others have ended. The largest of probs / Exp(1) noise is a draw from probs.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # always keeps the first
    noise = probs.new_empty(N, probs.shape[1]).exponential_(generator=generator)[alive]
    return order.gather(1, (probs / noise).argmax(-1, keepdim=True))[:, 0]


class KVCache:
    """Keys and values of N rows, each an answer and the prompt that it continues.

    The prompts are prefilled as one unpadded stream of segments; row i's is owners[i]. watched: keep in tops, for each
    layer, (N, heads): the key that each head's newest query scores highest.
    """

    def __init__(self, config, segments, owners, max_new_tokens, watched=False):
        self.segments, self.owners, self.watched = segments, owners, watched
        lengths = [end - start + p_end - p_start for start, end, p_start, p_end in segments]
        self.lengths = torch.tensor([lengths[i] for i in owners])
        self.size = int(self.lengths.max()) + max_new_tokens
        self.layers, self.tops = [None] * config.num_hidden_layers, [None] * config.num_hidden_layers

    def keep(self, rows):
        """Drop all rows but these."""
        self.lengths = self.lengths[rows]
        for i, cached in enumerate(self.layers):
            self.layers[i] = cached[:, rows]

    def prefill(self, device):
        attention = SegmentAttention(self.segments, device)

        def attend(layer, q, k, v):
            self.layers[layer] = cached = k.new_zeros(2, len(self.owners), self.size, *k.shape[1:])  # (2, N, S, K, D)
            for row, owner in enumerate(self.owners):
                start, end, p_start, p_end = self.segments[owner]
                P, T = p_end - p_start, p_end - p_start + end - start
                cached[0, row, :P], cached[1, row, :P] = k[p_start:p_end], v[p_start:p_end]
                cached[0, row, P:T], cached[1, row, P:T] = k[start:end], v[start:end]
            if self.watched:
                last = torch.tensor([self.segments[i].end - 1 for i in self.owners], device=device)
                seen = torch.arange(self.size, device=device) < self.lengths.to(device)[:, None]
                self.tops[layer] = top_keys(q[last], cached[0].transpose(1, 2), seen[:, None, None])
            return attention(q, k, v)

        return [partial(attend, i) for i in range(len(self.layers))]

    def decode(self, device, step):
        rows, slot = torch.arange(len(self.lengths), device=device), self.lengths.to(device) + step
        filled = int(self.lengths.max()) + step + 1
        seen = (torch.arange(filled, device=device) <= slot[:, None])[:, None, None]  # (N, 1, 1, S)

        def attend(layer, q, k, v):
            cached = self.layers[layer]
            cached[0, rows, slot], cached[1, rows, slot] = k, v
            keys, values = cached[:, :, :filled].transpose(2, 3)                      # (N, K, S, D)
            if self.watched:
                self.tops[layer] = top_keys(q, keys, seen)
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen, enable_gqa=True)[:, :, 0]

        return [partial(attend, i) for i in range(len(self.layers))]


def top_keys(q, keys, seen):
    """(N, H): which of the seen keys (N, K, S, D) each head's query (N, H, D) scores highest."""
    N, H, D = q.shape
    scores = q.view(N, keys.shape[1], -1, D) @ keys.transpose(2, 3)  # (N, K, H / K, S)
    return scores.masked_fill(~seen, -math.inf).argmax(-1).view(N, H)
