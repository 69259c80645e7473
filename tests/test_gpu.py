"""What only a GPU can show: flash kernels, bf16 at work, memory. The CPU in fp32 is the reference throughout."""
from pathlib import Path

import pytest
import torch
from test_model import attention_and_gradients, make_groups, pack

import generate as generate_file
import model as model_file
from checkpoint import load_pretrained
from generate import attend_last_slots, generate, scores_of, weighted_values
from model import Llama, LlamaConfig, Segment, SegmentAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"
TINY = Path(__file__).parent.parent / "models" / "tiny"
GROUPS = make_groups([[50, 3, 81], [1, 130, 2], [4, 4, 1]], [300, 64, 2])  # within and across the kernels' tiles


def take_path(monkeypatch, path):
    """Leave SegmentAttention one way to go: flash_attn, torch (its varlen kernel), or sdpa (a segment at a time)."""
    if path == "flash_attn" and model_file.flash_attn_varlen_func is None:
        pytest.skip("flash-attn is not installed")
    if path == "torch":
        monkeypatch.setattr(model_file, "flash_attn_varlen_func", None)
    if path == "sdpa":
        monkeypatch.setattr(model_file, "varlen_kernel", lambda device, dtype: None)


def on_device(groups):
    tokens, positions, targets, segments = pack(groups)
    return tokens.to(DEVICE), positions.to(DEVICE), targets.to(DEVICE), segments


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("path", ["flash_attn", "torch", "sdpa"])
def test_attention_in_bf16_equals_fp32(monkeypatch, path, D):
    """Output and the gradients of q, k, v, within 3% of the largest: a wrong key shows in the first digit."""
    segments = pack(GROUPS)[3]
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(segments[-1][1], heads, D, generator=rng).bfloat16() for heads in (8, 2, 2))
    expected = attention_and_gradients(SegmentAttention(segments, "cpu"), *(x.float() for x in (q, k, v)))
    take_path(monkeypatch, path)
    attend = SegmentAttention(segments, DEVICE)
    ours = attention_and_gradients(attend, *(x.to(DEVICE) for x in (q, k, v)))
    assert ("packed" in vars(attend)) == (path != "sdpa"), "another path was taken"
    for name, x, y in zip("oqkv", ours, expected):
        assert (x.cpu().float() - y).abs().max() < 0.03 * y.abs().max(), name


@pytest.mark.parametrize("path", ["flash_attn", "torch", "sdpa"])
def test_logps_in_bf16_equal_fp32(monkeypatch, path):
    """Mean log-probs of random answers, about -6, within 1%: bf16 keeps 8 bits."""
    with torch.no_grad():
        sums, lengths = load_pretrained(TINY)(*pack(GROUPS))
        take_path(monkeypatch, path)
        ours, _ = load_pretrained(TINY, torch.bfloat16).to(DEVICE)(*on_device(GROUPS))
    assert ((ours.cpu() - sums) / lengths).abs().max() < 0.01 * (sums / lengths).abs().max()


def test_greedy_generation_in_fp32_equals_the_cpu():
    prompts = [prompt for prompt, _, _ in GROUPS]
    model = load_pretrained(TINY)
    expected = generate(model, prompts, 16)
    assert generate(model.to(DEVICE), prompts, 16) == expected


def peak_memory(model, groups):
    """Bytes that a forward and backward take on top of the model and its gradients."""
    batch = on_device(groups)
    for _ in range(2):  # the first makes the gradients
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(*batch)[0].sum().backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("path", ["flash_attn", "torch", "sdpa"])
def test_a_group_takes_less_memory_than_its_rows(monkeypatch, path):
    """4,096 prompt and 3 x 256 answer tokens: 4,863 tokens in a stream, or 13,053 in three."""
    take_path(monkeypatch, path)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=89, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192)
    model = Llama(config).to(DEVICE, torch.bfloat16)
    (prompt, positions, answers), = make_groups([[256] * 3], [4096])
    rows = peak_memory(model, [(prompt, positions, [answer]) for answer in answers])
    assert peak_memory(model, [(prompt, positions, answers)]) < 0.6 * rows


def peak_of(work):
    """Bytes on the device at most while work() runs, on top of what is there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decoding_step_copies_nothing_of_the_cache(dtype):
    N, H, K, S, D = 4, 32, 8, 4096, 128
    keys, values = torch.randn(2, N, K, S, D, device=DEVICE, dtype=dtype)
    q = torch.randn(N, H, D, device=DEVICE, dtype=dtype)
    seen = (torch.arange(S, device=DEVICE) < torch.tensor([[3000], [4096], [1], [77]], device=DEVICE))[:, None, None]

    def attend(q, k, v, seen):
        scores = scores_of(q, k)
        assert scores.dtype == torch.float32
        return weighted_values(scores.masked_fill_(~seen, float("-inf")), v)

    expected = attend(*(x.cpu().float() for x in (q, keys, values)), seen.cpu())
    assert (attend(q, keys, values, seen).cpu().float() - expected).abs().max() < 0.03
    assert peak_of(lambda: attend(q, keys, values, seen)) < 0.2 * keys.numel() * keys.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_queries_of_a_row_see_all_before_them(dtype):
    """A piece of a prompt over the cache: the flash kernel in bf16, masks of QUERIES rows in fp32."""
    T, S, H, K, D = 3000, 5000, 8, 2, 64
    q = torch.randn(T, H, D, device=DEVICE, dtype=dtype)
    keys, values = torch.randn(2, K, S + 64, D, device=DEVICE, dtype=dtype)[:, :, :S]
    expected = attend_last_slots(*(x.cpu().float() for x in (q, keys, values)))
    assert (attend_last_slots(q, keys, values).cpu().float() - expected).abs().max() < 0.03
    assert peak_of(lambda: attend_last_slots(q, keys, values)) < 0.3 * H * T * S * 4


def test_greedy_generation_in_pieces_and_batches_equals_the_cpu(monkeypatch):
    prompts = [prompt for prompt, _, _ in GROUPS]
    model = load_pretrained(TINY)
    expected = generate(model, prompts, 16)
    monkeypatch.setattr(generate_file, "PIECE", 50)
    model.to(DEVICE)
    for budget in (0, 1, 400):
        assert generate(model, prompts, 16, batch_tokens=budget) == expected


def test_a_prompt_in_fp32_takes_no_scores_of_all_its_tokens():
    T, H, K, D = 8192, 8, 2, 64
    q, k, v = (torch.randn(T, heads, D, device=DEVICE) for heads in (H, K, K))
    attend = SegmentAttention([Segment(0, T)], DEVICE)
    assert peak_of(lambda: attend(q, k, v)) < 0.1 * H * T * T * 4


def test_offload_keeps_the_blocks_inputs_off_the_device():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=89, hidden_size=512, intermediate_size=512, num_hidden_layers=32,
                         num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192)
    model = Llama(config).to(DEVICE, torch.bfloat16)
    groups = make_groups([[256] * 3], [4096])
    model.set_checkpointing(True)
    here = peak_memory(model, groups)
    model.set_checkpointing(True, offload=True)
    inputs = 32 * len(pack(groups)[0]) * 512 * 2  # bytes: blocks, tokens, hidden size, bf16
    assert peak_memory(model, groups) < here - 0.7 * inputs
