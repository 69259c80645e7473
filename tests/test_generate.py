"""generate.py against transformers, against recomputation without a cache, and against arithmetic by hand."""
import pytest
import torch
from test_model import WINDOW, family_model, gaps, hf_model, reopen, rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from configs import BadInput
from generate import (
    KVCache,
    attend_one_query,
    decode_one_token,
    generate,
    lay_out,
    prefill,
    sample,
    top_keys,
)

PROMPTS = [[5, 17, 33, 60, 2, 81, 44], [12, 9], [70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82], [3]]


def hf_greedy(hf, prompts, n, stop_ids=()):
    """transformers, row by row."""
    out = []
    for prompt in prompts:
        ids = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                          max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=list(stop_ids) or None)
        out.append(ids[0, len(prompt):].tolist())
    return out


@pytest.mark.parametrize("family, rope", [("llama", "default"), ("llama", "yarn"), ("llama", "llama3"),
                                          ("qwen2", "yarn"), ("qwen3", "default")])
def test_greedy_generation_equals_transformers(tmp_path, family, rope):
    hf = family_model(family, rope)
    hf.generation_config.eos_token_id = None
    ours = reopen(hf, tmp_path)
    free = generate(ours, PROMPTS, 24)
    assert free == hf_greedy(hf, PROMPTS, 24) and all(len(answer) == 24 for answer in free)
    stop_ids = (free[0][5], free[2][9])
    stopped = generate(ours, PROMPTS, 24, stop_ids=stop_ids)
    assert stopped == hf_greedy(hf, PROMPTS, 24, stop_ids)
    assert stopped[0][-1] in stop_ids and len(stopped[0]) <= 6  # the stop token is part of the answer


def test_padded_batch_in_transformers_gives_the_same(tmp_path):
    hf = hf_model()
    hf.generation_config.eos_token_id = None
    T = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = hf.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert generate(reopen(hf, tmp_path), PROMPTS, 24) == theirs[:, T:].tolist()


def test_cached_generation_equals_recomputation(tmp_path):
    ours = reopen(hf_model("yarn"), tmp_path)
    for prompt, answer in zip(PROMPTS, generate(ours, PROMPTS, 24)):
        again = ours.logits(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1:].argmax(-1)
        assert answer == again.tolist()


def test_neighbours_in_a_batch_change_nothing(tmp_path):
    ours = reopen(hf_model(), tmp_path)
    prompts = [*PROMPTS, rows(1, 2 * WINDOW)[0].tolist()]
    assert generate(ours, prompts, 12) == [generate(ours, [prompt], 12)[0] for prompt in prompts]
    with torch.no_grad():
        tokens, near, far = rows(2, 20), gaps(1, 20, 200), gaps(1, 20, 2_000)
        batch, alone = ours.logits(tokens, torch.cat([near, far])), ours.logits(tokens[:1], near)
    assert (batch[0] - alone[0]).abs().max() < 1e-4


def test_prefill_and_decode_give_transformers_logits(tmp_path):
    """Every step's logits, of rows of unequal length, past the cache's rounding to whole steps of slots."""
    hf = hf_model()
    ours = reopen(hf, tmp_path)
    more = rows(4, 70, seed=3)
    with torch.no_grad():
        layout = lay_out(PROMPTS, [0] * 4)
        cache = KVCache(ours.config, layout, 70)
        logits = [prefill(ours, layout, cache)]
        logits += [decode_one_token(ours, more[:, step], cache) for step in range(69)]
        for i, prompt in enumerate(PROMPTS):
            expected = hf(torch.tensor([prompt + more[i, :69].tolist()])).logits[0, len(prompt) - 1:]
            assert (torch.stack(logits)[:, i] - expected).abs().max() < 2e-5


def cache_of(N, K, S, D, seed=0):
    """Keys or values (N, K, S, D) as a layer's cache holds them: a view of (N, S, K, D)."""
    return torch.randn(N, S, K, D, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)


@pytest.mark.parametrize("K", [1, 2, 8])
def test_grouped_queries_equal_attention_with_repeated_keys(K):
    """The formula that it replaces, and the definition with every key head written out for its query heads."""
    N, H, S, D = 3, 8, 96, 16
    q, k, v = torch.randn(N, H, D), cache_of(N, K, S, D), cache_of(N, K, S, D, seed=1)
    seen = (torch.arange(S) < torch.tensor([[5], [96], [40]]))[:, None, None]
    ours = attend_one_query(q, k, v, seen)
    before = scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen, enable_gqa=True)[:, :, 0]
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    scores = (q[:, :, None] @ k.transpose(2, 3) / D ** 0.5).masked_fill(~seen, float("-inf"))
    defined = (scores.softmax(-1) @ v)[:, :, 0]
    assert (ours - before).abs().max() < 1e-5 and (ours - defined).abs().max() < 1e-5


class Allocations(TorchDispatchMode):
    """The largest number of elements that an operator made memory for, views left out."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.numel())
        return out


def test_a_decoding_step_copies_nothing_of_the_cache():
    N, H, K, S, D = 2, 8, 2, 256, 16
    q, k, v = torch.randn(N, H, D), cache_of(N, K, S, D), cache_of(N, K, S, D, seed=1)
    seen = torch.ones(N, 1, 1, S, dtype=torch.bool)
    with Allocations() as made:
        attend_one_query(q, k, v, seen)
    assert 0 < made.largest <= max(q.numel(), seen.numel()) < k.numel() / 8
    with Allocations() as made:  # and a copy would be seen
        attend_one_query(q, k.contiguous(), v, seen)
    assert made.largest >= k.numel()


def test_not_even_the_math_kernel_repeats_the_cache_for_each_query_head():
    """What GPUs may fall back to. It copies keys once, as they do not lie as it wants them, but never H / K times."""
    N, H, K, S, D = 2, 8, 2, 256, 16
    q, k, v = torch.randn(N, H, D), cache_of(N, K, S, D), cache_of(N, K, S, D, seed=1)
    with sdpa_kernel(SDPBackend.MATH), Allocations() as made:
        attend_one_query(q, k, v, torch.ones(N, 1, 1, S, dtype=torch.bool))
    assert made.largest <= k.numel()


def test_the_arg_max_takes_fp32_scores():
    """A score of 257 is 256 in bf16: the first of the two keys would win."""
    q = torch.ones(1, 2, 8, dtype=torch.bfloat16)
    keys = torch.full((1, 1, 2, 8), 32.0, dtype=torch.bfloat16)
    keys[0, 0, 1, 7] = 33
    assert (q @ keys[0].transpose(1, 2)).float().tolist() == [[[256.0, 256.0]] * 2]
    assert top_keys(q, keys, torch.ones(1, 1, 1, 2, dtype=torch.bool)).tolist() == [[1, 1]]


def test_heads_look_where_transformers_heads_look(tmp_path):
    """Rows of unequal length, of which some share a beginning: (layers, heads) places of each row's newest token."""
    hf = hf_model()
    hf.set_attn_implementation("eager")
    ours = reopen(hf, tmp_path)
    prompts = [*PROMPTS, PROMPTS[0][:4] + [9, 9]]
    seen = [[] for _ in prompts]
    answers = generate(ours, prompts, 12, shared=[4] * 5, look=lambda row, token, tops: seen[row].append(tops))
    for prompt, answer, tops in zip(prompts, answers, seen):
        attentions = hf(torch.tensor([prompt + answer]), output_attentions=True).attentions  # (1, H, T, T) a layer
        for step, found in enumerate(tops):
            expected = torch.stack([a[0, :, len(prompt) + step - 1].argmax(-1) for a in attentions])
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shared, stream, expected", [
    ([0, 0, 0, 0], 3 + 4 + 2, [(0, 3, 0, 0), (3, 7, 0, 0), (7, 9, 0, 0)]),        # equal prompts once
    ([2, 2, 2, 0], 2 + 1 + 2 + 2, [(0, 2, 0, 0), (2, 3, 0, 2), (3, 5, 0, 2), (5, 7, 0, 0)]),
    # never a prompt's last token: of [5, 6] only the 5 can be shared
    ([9, 1, 9, 9], 3 + 1 + 3 + 1, [(0, 3, 0, 0), (3, 4, 0, 0), (4, 7, 3, 4), (7, 8, 3, 4)]),
])
def test_prompts_in_a_stream_by_hand(shared, stream, expected):
    prompts = [[5, 6, 7], [5, 6, 8, 9], [5, 6, 7], [5, 6]]
    layout = lay_out(prompts, shared)
    assert layout.segments == expected and len(layout.tokens) == len(layout.positions) == stream
    for prompt, owner in zip(prompts, layout.owners):
        segment = layout.segments[owner]
        row = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, segment.end)]
        assert [layout.tokens[i] for i in row] == prompt
        assert [layout.positions[i] for i in row] == list(range(len(prompt)))


def test_a_shared_beginning_changes_no_answer(tmp_path):
    ours = reopen(hf_model(), tmp_path)
    prompts = [PROMPTS[2], PROMPTS[2][:6] + [7, 9], PROMPTS[2][:6] + [7], PROMPTS[1], PROMPTS[2]]
    alone = [generate(ours, [prompt], 12)[0] for prompt in prompts]
    for shared in ([6] * 5, [6, 6, 0, 1, 6], [99] * 5):
        assert generate(ours, prompts, 12, shared=shared) == alone


def test_sampling_repeats_under_its_seed(tmp_path):
    ours = reopen(hf_model(), tmp_path)

    def draw(seed, **how):
        return generate(ours, PROMPTS, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed), **how)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_p=1e-6) == generate(ours, PROMPTS, 12)  # a nucleus of one token is greedy


def test_answers_to_one_prompt_share_its_prefill(tmp_path):
    ours = reopen(hf_model(), tmp_path)
    streams, hidden_states = [], ours.hidden_states
    ours.hidden_states = lambda tokens, *rest: streams.append(len(tokens)) or hidden_states(tokens, *rest)
    assert generate(ours, [PROMPTS[1], PROMPTS[0], PROMPTS[1]], 6) == [generate(ours, [PROMPTS[i]], 6)[0] for i in (1, 0, 1)]
    assert streams[0] == len(PROMPTS[0]) + len(PROMPTS[1])


def test_what_a_row_draws_does_not_depend_on_rows_that_ended(tmp_path):
    ours = reopen(hf_model(), tmp_path)
    rows = []
    for i in range(40):  # until some answers stop early and others do not
        free, stopped = (generate(ours, PROMPTS, 24, 1.0, 1.0, stops, torch.Generator().manual_seed(i)) for stops in ((), (7, 8)))
        for a, b in zip(free, stopped):
            assert b == a[:len(b)] and (len(b) == 24 or b[-1] in (7, 8))
            rows.append(len(b))
    assert len(set(rows)) > 5


@pytest.mark.parametrize("temperature, top_p, expected", [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
    (1.0, 0.7, [0, 0.625, 0, 0.375]),              # 0.5 is not enough, 0.5 + 0.3 is
    (0.5, 1.0, [0.0616, 0.6849, 0.0068, 0.2466]),  # squares, normalised
    (0.0, 0.7, [0, 1, 0, 0]),
])
def test_sample_draws_from_the_nucleus(temperature, top_p, expected):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20_000, 4)
    drawn = sample(logits, temperature, top_p, torch.Generator().manual_seed(0), range(20_000), 20_000)
    assert torch.allclose(drawn.bincount(minlength=4) / 20_000, torch.tensor(expected).float(), atol=0.015)


def test_empty_prompt_is_refused(tmp_path):
    assert generate(reopen(hf_model(), tmp_path), [[5], [6]], 0) == [[], []]
    with pytest.raises(BadInput, match="prompt 1 of 2 is empty"):
        generate(reopen(hf_model(), tmp_path), [[5], []], 4)
