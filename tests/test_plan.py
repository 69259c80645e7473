"""The estimate against PyTorch's own counters and against hand arithmetic."""
from types import SimpleNamespace

import pytest
import torch
from test_model import family_model
from torch.utils.flop_counter import FlopCounterMode

from bench.plan import (
    DATASHEET,
    SHAPES,
    Load,
    Shape,
    block_activations,
    flash_backward,
    load_of,
    peak_flops,
    peak_memory,
)
from checkpoint import load_pretrained, start_lora
from model import (
    IGNORE,
    Llama,
    LlamaConfig,
    Segment,
    SegmentAttention,
    count_parameters,
    step_flops,
)

CFG = {"dtype": "bfloat16", "checkpointing": True, "offload_activations": False, "offload_params": False,
       "n_rejected": 2, "micro_batch": 1, "lora_r": 0}


def model_of(tmp_path, lora, family="llama"):
    family_model(family, num_hidden_layers=3).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    if lora:
        model.train_only(4, 16, "q_proj,down_proj", "norm")
        with torch.no_grad():
            start_lora(model, 0)
    return model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_flops_are_those_that_pytorch_counts(tmp_path, family, lora):
    """Of the matrices; attention, which PyTorch counts as a whole square, is held against hand arithmetic below."""
    model = model_of(tmp_path, lora, family)
    prompt, scored = 28, 12
    tokens = torch.arange(prompt + scored)
    targets = tokens.where(tokens >= prompt, IGNORE)
    segments = [Segment(0, prompt), Segment(prompt, prompt + scored, 0, prompt)]
    with FlopCounterMode(display=False) as counter:
        sums, _ = model(tokens, tokens, targets, segments)
        sums.sum().backward()
    products = ("aten.mm", "aten.addmm")
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) in products)
    logits_again = 2 * model.lm_head.weight.numel() * scored  # backward makes them anew, which is not needed work
    pairs_of_tokens = prompt * (prompt + 1) // 2 + scored * prompt + scored * (scored + 1) // 2
    attention = 12 * 3 * model.config.num_attention_heads * model.config.head_dim * pairs_of_tokens
    assert counted - logits_again == step_flops(model, segments, scored) - attention > 0


def test_the_papers_group_costs_what_the_method_says():
    """8,192 prompt, 3 x 512 answers: 9,728 tokens instead of 26,112, and 2.65 times less work."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(**SHAPES["llama3_8b"]))
    P, n = 8192, 512
    shared, rows = Shape(P, n, 2, 8), Shape(P, n, 2, 8, naive=True)
    assert shared.segments()[-1].end == 9728 and rows.segments()[-1].end == 26112
    less = step_flops(model, rows.segments(), 3 * n) / step_flops(model, shared.segments(), 3 * n)
    assert less == pytest.approx(2.65, abs=0.05)
    weights = sum(p.numel() for p in model.parameters()) - 2 * 128256 * 4096
    attention = 12 * 32 * 4096 * (P * (P + 1) // 2 + 3 * (n * P + n * (n + 1) // 2))
    assert step_flops(model, shared.segments(), 0) == pytest.approx(6 * weights * 9728 + attention, rel=1e-4)


@pytest.mark.parametrize("published, sizes", [
    (7_615_616_512, dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                         num_attention_heads=28, num_key_value_heads=4, head_dim=128, qkv_bias=True)),
    (8_190_735_360, dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128, qk_norm=True)),
], ids=["Qwen2.5-7B", "Qwen3-8B"])
def test_qwen_has_as_many_parameters_as_published(published, sizes):
    with torch.device("meta"):
        model = Llama(LlamaConfig(**sizes, max_position_embeddings=32768))
    assert count_parameters(model) == (published, 0)
    full = peak_memory(model, CFG, 9728, 1536, 8, accumulating=True)
    assert full["gradients"] * 8 == 4 * published
    segments = Shape(8192, 512, 2, 8).segments()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # norms and biases: no work that counts
    matrices = published - vectors - 2 * sizes["vocab_size"] * sizes["hidden_size"]
    D, H, layers = sizes["head_dim"], sizes["num_attention_heads"], sizes["num_hidden_layers"]
    pairs = 8192 * 8193 // 2 + 3 * (512 * 8192 + 512 * 513 // 2)
    assert step_flops(model, segments, 0) == 6 * matrices * 9728 + 12 * layers * H * D * pairs


def test_memory_of_llama3_8b_by_hand():
    with torch.device("meta"):
        model = Llama(LlamaConfig(**SHAPES["llama3_8b"]))
    total = 8_030_261_248
    assert count_parameters(model) == (total, 0)
    full = peak_memory(model, CFG, 9728, 1536, 8, accumulating=True)
    assert [full[key] * 8 for key in ("weights", "gradients", "moments")] == [4 * total, 4 * total, 8 * total]
    assert full["activations"] == 32 * 9728 * 4096 * 2
    model.train_only(32, 16, "q_proj,k_proj,v_proj,o_proj", "embed,norm")
    adapters = 32 * 32 * ((4096 + 4096) * 2 + (4096 + 1024) * 2)
    trained = adapters + 128256 * 4096 + 65 * 4096
    assert count_parameters(model) == (trained, total + adapters - trained)
    lora = peak_memory(model, CFG, 9728, 1536, 8)
    assert lora["moments"] * 8 == 8 * trained
    assert lora["weights"] * 8 == 4 * trained + 2 * (total + adapters - trained)
    host = peak_memory(model, {**CFG, "offload_params": True, "offload_activations": True}, 9728, 1536, 8)
    assert host["weights"] == host["moments"] == host["activations"] == 0 < host["working"] == lora["working"]


def test_flash_attentions_own_buffers_by_hand():
    """Llama-3-8B, 4 sequences: 9,728 queries over 8,192 + 3 x 8,704 keys. Without GQA only dq's float32 remains."""
    config = LlamaConfig(**SHAPES["llama3_8b"])
    load = load_of({**CFG, "n_rejected": 2}, 9728, 1536, naive=False)
    assert load == Load(9728, 2, 8192 + 3 * 8704, 4)
    dq_accum, softmax_d = 4 * (9728 + 4 * 128) * 32 * 128, 4 * (9728 + 4 * 128) * 32
    dk_and_dv = 2 * 2 * 34304 * 32 * 128
    assert flash_backward(config, load) == dq_accum + softmax_d + dk_and_dv
    assert flash_backward(LlamaConfig(**SHAPES["llama2_7b"]), load) == dq_accum + softmax_d
    assert flash_backward(config, load_of({**CFG, "dtype": "float32"}, 9728, 1536, naive=False)) == 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_blocks_activations_are_what_autograd_keeps(tmp_path, family, lora):
    model = model_of(tmp_path, lora, family)
    block, T, C = model.model.layers[1], 64, model.config.hidden_size
    x = torch.randn(T, C, requires_grad=True)
    cos = sin = torch.ones(T, 1, model.config.head_dim)
    weights = {p.untyped_storage().data_ptr() for p in (*block.parameters(), cos)}
    kept = {}

    def pack_hook(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        out = block(x, cos, sin, SegmentAttention([Segment(0, T)], "cpu"))
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    predicted = block_activations(model, Load(T, 4))[0]
    assert out.shape == x.shape and measured == pytest.approx(predicted, rel=0.15 if lora else 0.01), (measured, predicted)


def test_the_datasheet_knows_a_device_by_a_part_of_its_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "Abacus": None}
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(SimpleNamespace(type="cuda")) == flops
    assert DATASHEET["A100"] == DATASHEET["A800"] == 312e12
