"""generate.py against transformers, against recomputation without a cache, and against arithmetic by hand."""
import pytest
import torch
from test_model import WINDOW, family_model, gaps, hf_model, reopen, rows, varlen_double
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import generate as generate_file
import model as model_file
from bench.common import peak_bytes
from configs import BadInput
from generate import (
    KVCache,
    attend_last_slots,
    batches,
    cut_in_pieces,
    decode_one_token,
    generate,
    lay_out,
    prefill,
    sample,
    scores_of,
    slots_in_memory,
    top_keys,
    weighted_values,
)
from model import Llama, LlamaConfig

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


# ---------------------------------------------------------------------------------- a step's attention, and its memory

def cache_of(N, K, S, D, seed=0):
    """The first S slots of a layer's keys or values (N, K, more slots, D)."""
    return torch.randn(N, K, S + 64, D, generator=torch.Generator().manual_seed(seed))[:, :, :S]


def attend_one_query(q, k, v, unseen):
    scores = scores_of(q, k)
    return weighted_values(scores.masked_fill_(unseen, float("-inf")), v)


@pytest.mark.parametrize("K", [1, 2, 8])
def test_grouped_queries_equal_attention_with_repeated_keys(K):
    """PyTorch's own attention, and the definition with every key head written out for its query heads."""
    N, H, S, D = 3, 8, 96, 16
    q, k, v = torch.randn(N, H, D), cache_of(N, K, S, D), cache_of(N, K, S, D, seed=1)
    seen = (torch.arange(S) < torch.tensor([[5], [96], [40]]))[:, None, None]
    ours = attend_one_query(q, k, v, ~seen)
    theirs = scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen, enable_gqa=True)[:, :, 0]
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    scores = (q[:, :, None] @ k.transpose(2, 3) / D ** 0.5).masked_fill(~seen, float("-inf"))
    defined = (scores.softmax(-1) @ v)[:, :, 0]
    assert (ours - theirs).abs().max() < 1e-5 and (ours - defined).abs().max() < 1e-5


def test_scores_of_16_bits_are_fp32():
    """Against float64: products of bf16 numbers are exact in fp32; rounded to bf16 they would be off by 2 ** -9."""
    q, k = torch.randn(2, 4, 32).bfloat16(), cache_of(2, 2, 96, 32).bfloat16()
    exact = q.double().view(2, 2, 2, 32) @ k.double().transpose(2, 3) / 32 ** 0.5
    assert scores_of(q, k).dtype == torch.float32 and (scores_of(q, k) - exact).abs().max() < 1e-5 * exact.abs().max()


class Allocations(TorchDispatchMode):
    """The numbers of elements that operators made memory for, views left out; and what operators were called."""

    def __init__(self):
        super().__init__()
        self.sizes, self.called = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.called.append(function)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                self.sizes.append(x.numel())
        return out


def big_model(**more):
    """Two layers whose cache is large beside everything else."""
    shape = dict(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=64, max_position_embeddings=8192)
    return Llama(LlamaConfig(**{**shape, **more})).requires_grad_(False)


@pytest.mark.parametrize("length", [500, 1000, 2000])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("watched", [False, True])
def test_a_step_takes_the_cache_and_the_scores_of_one_layer(length, backend, watched):
    """Every byte that is allocated in a step, with the worst of PyTorch's kernels as well."""
    N, H = 4, 4
    model = big_model()
    layout = lay_out(rows(N, length).remainder(64).tolist(), [0] * N)
    cache = KVCache(model.config, layout, 8, watched)
    prefill(model, layout, cache)
    tokens = torch.arange(N)
    with sdpa_kernel(backend), torch.no_grad():
        taken = peak_bytes(lambda: decode_one_token(model, tokens, cache), "cpu")
    scores = 4 * N * H * cache.size
    small = 4 * N * 128 * 16  # hidden states of N tokens
    # Scores, their softmax; then as much again for what the mask takes.
    assert taken < 3 * scores + small
    assert taken < cache.layers[0].nbytes / 10


class Gpu:
    """Takes the branches of a GPU on the CPU, with numbers; and what each product and attention there was given."""

    def __init__(self, monkeypatch, capability):
        self.products, self.attention, self.varlen = [], [], []
        choose, bmm, sdpa = model_file.varlen_kernel, torch.bmm, model_file.F.scaled_dot_product_attention

        def product(a, b, out_dtype=None):
            self.products.append((a.dtype, out_dtype))
            return bmm(a, b) if out_dtype is None else bmm(a.to(out_dtype), b.to(out_dtype))

        def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
            assert q.shape[:2] == k.shape[:2] == v.shape[:2] and not enable_gqa
            self.attention.append((q.shape[2], k.shape[2], is_causal, None if attn_mask is None else tuple(attn_mask.shape)))
            return sdpa(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

        def varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size, enable_gqa):
            assert enable_gqa and window_size == (-1, 0) and k.stride(-1) == v.stride(-1) == 1
            self.varlen.append((k.shape[1], max_q, max_k))
            return varlen_double(q, k, v, cu_q, cu_k, max_q, max_k)

        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch, "bmm", product)
        monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", attention)
        monkeypatch.setattr(model_file, "flash_attn_varlen_func", None)
        monkeypatch.setattr(model_file, "varlen_attn", varlen)
        for file in (model_file, generate_file):
            monkeypatch.setattr(file, "varlen_kernel", lambda device, dtype: choose("cuda", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_copies_nothing_of_the_cache(monkeypatch, dtype):
    """No kernel to choose, no allocation as large as the keys of one row; and the scores are fp32."""
    N, length = 3, 700
    model = big_model().to(dtype)
    layout = lay_out([[number] * length for number in range(N)], [0] * N)
    cache = KVCache(model.config, layout, 8)
    prefill(model, layout, cache)
    gpu = Gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype=None: gpu.products.append((a.dtype, out_dtype)) or a.new_zeros(
        len(a), a.shape[1], b.shape[2], dtype=out_dtype))   # the wrapper's own copies in fp32 are none of ours
    with Allocations() as made, torch.no_grad():
        decode_one_token(model, torch.zeros(N, dtype=torch.int64), cache)
    assert max(made.sizes) <= N * 4 * cache.size < cache.layers[0].numel() / 10
    assert not gpu.attention and not gpu.varlen
    scores = (dtype, None if dtype == torch.float32 else torch.float32)
    assert gpu.products == [scores, (dtype, None)] * 2


def test_rows_that_go_on_stay_where_they_are_or_move_up(tmp_path):
    """No second cache, not of one layer."""
    model = big_model()
    layout = lay_out(rows(5, 300).remainder(64).tolist(), [0] * 5)
    cache = KVCache(model.config, layout, 8)
    prefill(model, layout, cache)
    before = [cached.clone() for cached in cache.layers]
    taken = peak_bytes(lambda: cache.keep([1, 2, 4]), "cpu")
    assert taken < cache.layers[0].nbytes / 100
    for cached, old in zip(cache.layers, before):
        assert torch.equal(cached, old[:, [1, 2, 4]])


def test_the_arg_max_takes_fp32_scores():
    """A score of 257 is 256 in bf16: the first of the two keys would win."""
    q = torch.ones(1, 2, 8, dtype=torch.bfloat16)
    keys = torch.full((1, 1, 2, 8), 32.0, dtype=torch.bfloat16)
    keys[0, 0, 1, 7] = 33
    assert (q @ keys[0].transpose(1, 2)).float().tolist() == [[[256.0, 256.0]] * 2]
    assert top_keys(scores_of(q, keys)).tolist() == [[1, 1]]


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


# ----------------------------------------------------------------------------------------- long prompts, in pieces

@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 13, 100])
@pytest.mark.parametrize("shared", [0, 4])
def test_a_prefill_in_pieces_gives_the_same_logits(tmp_path, monkeypatch, most, shared):
    """Those of one piece, and of transformers: the first token's, and those of steps on the cache that pieces filled.

    In float64: in fp32 products of other shapes add up in another order, which at these weights is up to 2e-5."""
    hf = hf_model("yarn")
    ours = reopen(hf, tmp_path).double()
    prompts = [*PROMPTS, PROMPTS[2][:4] + [9, 9, 8], PROMPTS[2], PROMPTS[2][:4] + [7]]
    more = rows(len(prompts), 6, seed=3)

    def logits(most):
        monkeypatch.setattr(generate_file, "PIECE", most)
        layout = lay_out(prompts, [shared] * len(prompts))
        cache = KVCache(ours.config, layout, 8)
        found = [prefill(ours, layout, cache)]
        return torch.stack(found + [decode_one_token(ours, more[:, step], cache) for step in range(6)])

    with torch.no_grad():
        pieces = logits(most)
        assert (pieces - logits(10 ** 6)).abs().max() < 1e-6
        for i, prompt in enumerate(prompts):
            expected = hf(torch.tensor([prompt + more[i].tolist()])).logits[0, len(prompt) - 1:]
            assert (pieces[:, i] - expected).abs().max() < 5e-5


def test_pieces_by_hand():
    """A beginning of 4 that two share, their ends of 2 and 1, a prompt of 7; rows 0, 1 and 2."""
    layout = lay_out([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [9] * 7], [4, 4, 0])

    def cut(most):
        return [(piece.tokens.start, piece.tokens.stop, piece.segments is not None, piece.ends,
                 [(part.tokens.start, part.rows, part.slots.start, part.slots.stop) for part in piece.parts])
                for piece in cut_in_pieces(layout, most)]

    whole, = cut_in_pieces(layout, 14)
    assert whole.segments == layout.segments and whole.ends == [(0, 5), (1, 6), (2, 13)]
    assert cut(7) == [(0, 7, True, [(0, 5), (1, 6)], [(0, [0, 1], 0, 4), (4, [0], 4, 6), (6, [1], 4, 5)]),
                      (7, 14, True, [(2, 6)], [(0, [2], 0, 7)])]
    assert cut(4) == [(0, 4, True, [], [(0, [0, 1], 0, 4)]),
                      (4, 7, False, [(0, 1), (1, 2)], [(0, [0], 4, 6), (2, [1], 4, 5)]),
                      (7, 11, False, [], [(0, [2], 0, 4)]), (11, 14, False, [(2, 2)], [(0, [2], 4, 7)])]


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_the_last_queries_of_a_row_see_all_before_them(monkeypatch, queries):
    """Against a mask of all queries and keys, by the definition."""
    monkeypatch.setattr(generate_file, "QUERIES", queries)
    q, k, v = torch.randn(8, 4, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    scores = (q.transpose(0, 1) @ k.repeat_interleave(2, 0).transpose(1, 2)) / 4
    scores = scores.masked_fill(torch.ones(8, 20).triu(13).bool(), float("-inf"))
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 0)).transpose(0, 1)
    assert (attend_last_slots(q, k, v) - expected).abs().max() < 1e-5


def test_heads_look_at_the_same_in_pieces(tmp_path, monkeypatch):
    ours = reopen(hf_model(), tmp_path)

    def looks():
        seen = []
        generate(ours, PROMPTS, 6, look=lambda i, token, tops: seen.append((i, token, tops.tolist())))
        return seen

    whole = looks()
    monkeypatch.setattr(generate_file, "PIECE", 3)
    assert looks() == whole


def test_activations_of_a_long_prompt_are_bounded(monkeypatch):
    """Beyond the cache: twice the prompt takes no more, but for the mask's rows and the tokens' ids."""
    monkeypatch.setattr(generate_file, "PIECE", 256)
    monkeypatch.setattr(generate_file, "QUERIES", 32)
    model = big_model(intermediate_size=1024)

    def taken(length):
        layout = lay_out([[5] * length], [0])
        cache = KVCache(model.config, layout, 8)
        with torch.no_grad():
            peak = peak_bytes(lambda: prefill(model, layout, cache), "cpu")
        return peak - sum(cached.nbytes for cached in cache.layers)

    short, long = taken(1024), taken(4096)
    activations = 4 * 256 * 1024 * 3  # gate, up, and their product
    assert activations / 2 < short < 2 * activations and long < short + 3072 * (8 + 8 + 32 * 8)
    monkeypatch.setattr(generate_file, "PIECE", 10 ** 6)
    assert taken(4096) > 10 * activations


PROMPTS_OF_A_GPU = [[5] * 700, [6] * 300 + [7] * 20, [6] * 300 + [8] * 10]


def prefilled(model):
    layout = lay_out(PROMPTS_OF_A_GPU, [0, 300, 300])
    cache = KVCache(model.config, layout, 8)
    with torch.no_grad():
        logits = prefill(model, layout, cache)
        return logits, decode_one_token(model, logits.argmax(-1), cache)


@pytest.mark.parametrize("dtype, capability", [(torch.float32, (9, 0)), (torch.float16, (7, 5)), (torch.bfloat16, (7, 5))])
@pytest.mark.parametrize("piece", [10 ** 6, 128])
def test_prompts_without_a_flash_kernel_on_a_gpu_make_no_scores(monkeypatch, dtype, capability, piece):
    """What reaches PyTorch's attention: as many key heads as query heads, and no mask but of QUERIES rows or answers'.

    That is what its memory-efficient kernel takes in any dtype. Asked for grouped heads, it would make all T x T scores."""
    model = big_model().to(dtype)
    expected = prefilled(model)
    monkeypatch.setattr(generate_file, "PIECE", piece)
    monkeypatch.setattr(generate_file, "QUERIES", 32)
    gpu = Gpu(monkeypatch, capability)
    for ours, theirs in zip(prefilled(model), expected):
        assert (ours - theirs).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)
    assert len(gpu.attention) > 4 and not gpu.varlen
    for queries, keys, is_causal, mask in gpu.attention:
        if is_causal:
            assert queries == keys and mask is None
        else:
            assert mask == (queries, keys) and queries <= 32


@pytest.mark.parametrize("piece, expected", [
    (10 ** 6, [[(700, 700)]]),
    (256, [[(256, 256)], [(256, 512)], [(188, 700)], [(256, 256)], [(44, 300), (20, 320), (10, 310)]]),
])
def test_prompts_with_a_flash_kernel_on_a_gpu_go_to_it(monkeypatch, piece, expected):
    """One call for a whole stream, or for each part of a cut one; key heads as they are."""
    model = big_model().bfloat16()
    on_cpu = prefilled(model)
    monkeypatch.setattr(generate_file, "PIECE", piece)
    gpu = Gpu(monkeypatch, (8, 0))
    for ours, theirs in zip(prefilled(model), on_cpu):
        assert (ours - theirs).abs().max() < 0.03
    assert not gpu.attention
    assert gpu.varlen == [(2, *sizes) for of_piece in expected for _ in range(2) for sizes in of_piece]


# --------------------------------------------------------------------------------------------------------- batches

def test_batches_by_hand():
    """Slots are lengths and new tokens in whole blocks of 64, of all rows that of the longest."""
    lengths = [100, 10, 60, 50, 500, 20]
    assert batches(lengths, 4, 10 ** 6) == [[0, 1, 2, 3, 4, 5]]
    assert batches(lengths, 4, 4 * 64) == [[1, 2, 3, 5], [0], [4]]    # the last needs 512
    assert batches(lengths, 4, 3 * 64) == [[1, 3, 5], [2], [0], [4]]
    assert batches(lengths, 5, 4 * 64) == [[1, 3, 5], [0, 2], [4]]    # 60 and 5 are more than 64
    assert batches(lengths, 4, 1) == [[1], [5], [3], [2], [0], [4]]
    assert batches([], 4, 100) == []


@pytest.mark.parametrize("budget", [1, 64, 128, 192, 300, 1000])
def test_every_prompt_is_in_one_batch_that_fits(budget):
    lengths = torch.randint(1, 200, (60,), generator=torch.Generator().manual_seed(budget)).tolist()
    found = batches(lengths, 10, budget)
    assert sorted(sum(found, [])) == list(range(60))
    for batch in found:
        slots = max(-(-(lengths[i] + 10) // 64) * 64 for i in batch) * len(batch)
        assert slots <= budget or len(batch) == 1


SPLITS = [1, 64, 128, 200, 256, 320, 512]


def test_answers_are_the_same_for_every_split(tmp_path, monkeypatch):
    """Greedy and sampled, with early ends, shared beginnings, a look, and whatever the pieces of the prompts."""
    ours = reopen(hf_model(), tmp_path)
    prompts = [*PROMPTS, PROMPTS[2][:6] + [7, 9], rows(1, 90)[0].tolist(), PROMPTS[0], PROMPTS[2][:6] + [7]]
    free = generate(ours, prompts, 24)
    stop_ids = (free[0][5], free[2][9], 7, 8)

    def answer(temperature, **more):
        looks, rng = {}, torch.Generator().manual_seed(5)
        found = generate(ours, prompts, 24, temperature, 0.95, stop_ids, rng, [6] * len(prompts),
                         lambda i, token, tops: looks.setdefault(i, []).append((token, tops.tolist())), **more)
        return found, looks, torch.rand(1, generator=rng).item()  # what is drawn next as well

    for temperature in (0.0, 1.0):
        whole = answer(temperature)
        assert len({len(ids) for ids in whole[0]}) > 1
        for budget in SPLITS:
            assert answer(temperature, batch_tokens=budget) == whole
        monkeypatch.setattr(generate_file, "PIECE", 5)
        assert answer(temperature, batch_tokens=256) == whole
        monkeypatch.undo()


def test_a_batch_takes_no_more_than_its_budget():
    """Of memory: with a hundredth of the slots, some hundredth of the cache."""
    model = big_model()
    prompts = [[5] * 100 for _ in range(40)]

    def taken(**more):
        return peak_bytes(lambda: generate(model, prompts, 8, **more), "cpu")

    a_slot = 2 * 2 * 2 * 64 * 4
    assert taken(batch_tokens=40 * 128) > 40 * 128 * a_slot
    assert taken(batch_tokens=4 * 128) < 2 * 4 * 128 * a_slot


def test_a_gpu_says_how_many_slots_there_are(monkeypatch):
    """Llama-3-8B's slot is 131,072 bytes in bf16: 10 GiB free, 2 GiB kept by PyTorch, are 48 K slots by their half."""
    config = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=128, max_position_embeddings=8192)
    weight = torch.empty(1, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 18 << 30)

    class Weight:
        is_cuda, device, element_size = True, "cuda:0", weight.element_size

    class Model:
        lm_head = type("Head", (), {"weight": Weight()})

    model = Model()
    model.config = config
    for free, slots in ((10 << 30, 49_152), ((10 << 30) + (50 << 20), 49_152), (62 << 30, 262_144), (0, 8_192)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        assert slots_in_memory(model) == slots
    Weight.is_cuda = False
    assert slots_in_memory(model) == generate_file.CPU_BUDGET


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
