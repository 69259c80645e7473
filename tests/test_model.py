"""model.py against transformers, against other layouts of itself, and against bad folders.

The models here are tiny and their weights large: logits of order 1, attention that is far from uniform, norms
and biases that are not at their initial values. So whatever is left out, a position or a bias, is seen.
"""
import json
import math
import os
import random
import shutil

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import LlamaConfig as HFLlamaConfig
from transformers import MistralConfig as HFMistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model as model_file
from checkpoint import load_pretrained, read_config, save_pretrained
from configs import BadInput
from loss import logo_loss
from model import (
    IGNORE,
    Segment,
    SegmentAttention,
    answer_mask,
    repeat_heads,
    rotary_tables,
    sdpa,
)

WINDOW = 64  # max_position_embeddings of the tiny models
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 256},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
ROPES = {kind: {"rope_type": kind, "rope_theta": 10000.0, **more} for kind, more in ROPES.items()}
YARN = ROPES["yarn"]
# name: (transformers' classes, settings). Of Qwen3's heads, 64 / 4 is not the head dim.
FAMILIES = {
    "llama": ((HFLlamaConfig, LlamaForCausalLM), {}),
    "mistral": ((HFMistralConfig, MistralForCausalLM), {"sliding_window": None}),
    "qwen2": ((Qwen2Config, Qwen2ForCausalLM), {}),
    "qwen3": ((Qwen3Config, Qwen3ForCausalLM), {"head_dim": 24}),
}


def hf_model(rope="default", classes=(HFLlamaConfig, LlamaForCausalLM), seed=0, **changes):
    """A tiny random transformers model. rope: a key of ROPES, or a dict."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=89, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=WINDOW, rms_norm_eps=1e-2, initializer_range=0.2,
                    bos_token_id=0, eos_token_id=1,
                    rope_parameters=dict(rope if isinstance(rope, dict) else ROPES[rope]))
    hf = classes[1](classes[0](**{**settings, **changes})).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim == 1:  # norms start at one and biases at zero
                p.add_(0.3 * torch.randn_like(p))
    return hf


def family_model(family, rope="default", **changes):
    """hf_model of one of FAMILIES."""
    classes, settings = FAMILIES[family]
    return hf_model(rope, classes, **{**settings, **changes})


def hf_logits(hf, tokens, positions):
    """transformers' logits (N, T, V). The explicit mask keeps it from taking gaps for packed sequences."""
    T = tokens.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    return hf(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits


def reopen(hf, folder, **how):
    hf.save_pretrained(folder, **how)
    return load_pretrained(folder)


def rows(N, T, seed=0):
    return torch.randint(2, 89, (N, T), generator=torch.Generator().manual_seed(seed))


def gaps(N, T, window, seed=0):
    """Positions (N, T): strictly increasing, with gaps, the last one at window - 1."""
    rng = random.Random(seed)
    return torch.tensor([sorted(rng.sample(range(window - 1), T - 1)) + [window - 1] for _ in range(N)])


def assert_same_logits(ours, hf, T=72, tolerance=2e-5):
    """On contiguous positions past the window, then on gaps up to 60,000."""
    tokens = rows(2, T)
    contiguous, spread = torch.arange(T).expand(2, T), gaps(2, T, 60_000)
    with torch.no_grad():
        plain = ours.logits(tokens)
        assert 0.5 < plain.std() < 5
        assert (plain - hf_logits(hf, tokens, contiguous)).abs().max() < tolerance
        gapped = ours.logits(tokens, spread)
        assert (gapped - hf_logits(hf, tokens, spread)).abs().max() < tolerance
        assert (gapped - plain).abs().max() > 0.1  # the positions did count


def edit_json(path, **changes):
    """Rewrite a JSON file; a value of None removes the key."""
    with open(path, encoding="utf-8") as f:
        value = {**json.load(f), **changes}
    with open(path, "w", encoding="utf-8") as f:
        json.dump({k: v for k, v in value.items() if v is not None}, f)


# ------------------------------------------------------------------------------------------ logits, config.json

@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_transformers(tmp_path, rope, tied, kv_heads):
    hf = hf_model(rope, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    assert_same_logits(reopen(hf, tmp_path), hf)


@pytest.mark.parametrize("name, rope, changes", [
    ("head_dim", "default", {"head_dim": 24}),
    ("biases", "default", {"attention_bias": True, "mlp_bias": True}),
    ("theta", {"rope_type": "default", "rope_theta": 500000.0}, {}),
    ("yarn attention_factor", {**YARN, "attention_factor": 1.7}, {}),
    ("yarn mscale", {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}, {}),
    ("yarn ramp", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, {}),
], ids=lambda x: x if isinstance(x, str) else "")
def test_rarer_config_fields_equal_transformers(tmp_path, name, rope, changes):
    hf = hf_model(rope, **changes)
    assert_same_logits(reopen(hf, tmp_path), hf)


def test_mistral_equals_transformers(tmp_path):
    hf = family_model("mistral")
    assert_same_logits(reopen(hf, tmp_path), hf)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_equals_transformers(tmp_path, family, rope, tied, kv_heads):
    hf = family_model(family, rope, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    ours = reopen(hf, tmp_path)
    names = {name for name, _ in ours.named_parameters()}
    assert names == {name for name, _ in hf.named_parameters()}
    added = {"qwen2": {"q_proj.bias", "k_proj.bias", "v_proj.bias"}, "qwen3": {"q_norm.weight", "k_norm.weight"}}
    assert {name.split("self_attn.")[1] for name in names if "self_attn" in name and "proj.weight" not in name} == added[family]
    assert_same_logits(ours, hf)


@pytest.mark.parametrize("family, changes", [("qwen2", {"head_dim": 24}), ("qwen3", {"attention_bias": True})])
def test_rarer_fields_of_qwen_equal_transformers(tmp_path, family, changes):
    hf = family_model(family, **changes)
    assert_same_logits(reopen(hf, tmp_path), hf)


# As published (Qwen2.5-7B-Instruct, Qwen3-8B), with small sizes: a window is named, and not used.
PUBLISHED = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
              "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.2, "intermediate_size": 96,
              "max_position_embeddings": 32768, "max_window_layers": 1, "model_type": "qwen2", "num_attention_heads": 4,
              "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
              "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
              "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
              "use_sliding_window": False, "vocab_size": 89},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
              "eos_token_id": 1, "head_dim": 24, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.2,
              "intermediate_size": 96, "max_position_embeddings": 40960, "max_window_layers": 1, "model_type": "qwen3",
              "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
              "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
              "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 89},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_config_files_as_qwen_publishes_them(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family]))
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    state = {name: p.detach() + 0.3 * torch.randn(p.shape) * (p.ndim == 1) for name, p in hf.named_parameters()}
    hf.load_state_dict(state, strict=False)
    save_file(state, tmp_path / "model.safetensors")
    ours = load_pretrained(tmp_path)
    assert_same_logits(ours, hf)
    save_pretrained(ours, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in PUBLISHED[family].items():
        if key not in ("torch_dtype", "rope_scaling"):
            assert written[key] == value, key
    assert not {"qkv_bias", "qk_norm"} & written.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(hf) and again.config.sliding_window is None
    assert torch.equal(again.model.rotary_emb.inv_freq, hf.model.rotary_emb.inv_freq)
    tokens, positions = rows(2, 40), gaps(2, 40, 60_000)
    assert torch.equal(hf_logits(again, tokens, positions), hf_logits(hf, tokens, positions))


@pytest.mark.parametrize("family, changes, words", [
    ("qwen2", {"use_sliding_window": True}, ("use_sliding_window", "True")),
    ("qwen3", {"use_sliding_window": True}, ("use_sliding_window", "True")),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "sliding_attention")),
    ("llama", {"layer_types": ["chunked_attention"] * 2}, ("layer_types", "chunked_attention")),
    ("qwen2", {"layer_types": 3}, ()),
    ("qwen2", {"attention_bias": True}, ("attention_bias", "True")),
    ("qwen2", {"mlp_bias": True}, ("mlp_bias", "True")),
    ("qwen3", {"mlp_bias": True}, ("mlp_bias", "True")),
    ("qwen3", {"head_dim": None}, ("head_dim", "128")),
    *[("qwen3", {"model_type": name}, ("model_type", repr(name), "llama, mistral, qwen2, qwen3"))
      for name in ("qwen2_moe", "qwen3_moe", "qwen2_vl", "qwen3_5", "qwen", "gemma", "gemma3_text", "phi3", "deepseek_v3")],
], ids=lambda x: x if isinstance(x, str) else next(iter(x)) if isinstance(x, dict) and x else "")
def test_relatives_that_mean_something_else_are_refused_by_name(tmp_path, family, changes, words):
    family_model(family).save_pretrained(tmp_path)
    load_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    refused(tmp_path, "config.json", *words)


@pytest.mark.parametrize("written, read", [("qwen2", "llama"), ("qwen3", "llama"), ("llama", "qwen2"), ("llama", "qwen3")])
def test_weights_of_another_family_are_refused_by_tensor(tmp_path, written, read):
    """A bias or norm too many or too few: a model without it would run and say something else."""
    family_model(written, head_dim=16).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", model_type=read)
    refused(tmp_path, "model.layers.0.self_attn.")


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
@pytest.mark.parametrize("rope", ROPES)
def test_older_config_dialect_means_the_same(tmp_path, rope, spelling):
    hf = hf_model(rope)
    hf.save_pretrained(tmp_path)
    scaling = {spelling if k == "rope_type" else k: v for k, v in ROPES[rope].items() if k != "rope_theta"}
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=10000.0,
              rope_scaling=None if rope == "default" else scaling)
    ours = load_pretrained(tmp_path)
    assert_same_logits(ours, hf)
    save_pretrained(ours, tmp_path / "again")  # and it is written in the dialect it came in
    assert "rope_parameters" not in json.load(open(tmp_path / "again" / "config.json"))
    assert_same_logits(ours, LlamaForCausalLM.from_pretrained(tmp_path / "again"))


def test_sharded_folder_equals_single_file(tmp_path):
    hf = hf_model()
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([n for n in os.listdir(tmp_path) if n.endswith(".safetensors")]) > 2
    assert_same_logits(load_pretrained(tmp_path), hf)


def test_dtype_is_the_callers_choice(tmp_path):
    hf = hf_model().to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ours = reopen(hf, tmp_path) if dtype == torch.float32 else load_pretrained(tmp_path, dtype)
        assert {p.dtype for p in ours.parameters()} == {dtype}
        assert torch.equal(ours.lm_head.weight.bfloat16(), hf.lm_head.weight)
        assert ours.logits(rows(1, 5)).dtype == dtype


@pytest.mark.parametrize("rope", [
    {"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}], ids=lambda rope: rope["rope_type"])
def test_frequencies_of_llama3_8b_equal_transformers_to_the_bit(tmp_path, rope):
    """One unit in the last place is 0.004 radians at position 60,000: it shows in the second digit of a logit."""
    hf = hf_model({"rope_theta": 500_000.0, **rope}, head_dim=128, max_position_embeddings=8192)
    hf.config.save_pretrained(tmp_path)
    config = read_config(tmp_path / "config.json")
    frequencies, _ = model_file.rope_frequencies(config)
    assert torch.equal(frequencies, hf.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("factor", [4.0, 8.0, 10.0, 3.3])
@pytest.mark.parametrize("head_dim", [24, 64, 80, 128])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_frequencies_of_any_shape_equal_transformers_to_the_bit(kind, head_dim, factor):
    """Qwen's base and window among them (1e6, 32768). Another order of the divisions fails in one of five shapes."""
    for theta in (10_000.0, 500_000.0, 1_000_000.0):
        for window in (64, 8192, 32768):
            rope = {**ROPES[kind], "rope_theta": theta, "factor": factor}
            if kind != "linear":
                rope["original_max_position_embeddings"] = window
            theirs = Qwen3Config(head_dim=head_dim, max_position_embeddings=8 * window, rope_parameters=dict(rope))
            expected, expected_scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
            config = model_file.LlamaConfig(89, 64, 96, 2, 4, 2, head_dim, 8 * window, rope=rope)
            frequencies, scale = model_file.rope_frequencies(config)
            assert torch.equal(frequencies, expected) and scale == expected_scale, (theta, window)


@pytest.mark.parametrize("rope_theta", [0.0, 300_000.0])
@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_yarn_by_a_key_is_transformers_yarn(tmp_path, kind, rope_theta):
    """In place of the checkpoint's scaling, from the window of its pre-training."""
    hf_model(ROPES[kind], max_position_embeddings=128).config.save_pretrained(tmp_path)
    config = read_config(tmp_path / "config.json")
    own = ROPES[kind].get("original_max_position_embeddings", 128)
    config.extend(1024, rope_theta, yarn_factor=4.0)
    rope = {"rope_type": "yarn", "rope_theta": rope_theta or 10000.0, "factor": 4.0, "original_max_position_embeddings": own}
    assert config.rope == rope and config.max_position_embeddings == 1024
    again = read_config(tmp_path / "config.json")
    again.extend(64, rope_theta, yarn_factor=4.0)  # the window that YaRN makes, shorter than 1,024 or longer than the file's
    assert again.max_position_embeddings == 4 * own
    theirs = hf_model(rope, max_position_embeddings=1024).model.rotary_emb
    frequencies, scale = model_file.rope_frequencies(config)
    assert torch.equal(frequencies, theirs.inv_freq) and scale == theirs.attention_scaling


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_angles_are_exact_at_position_60000_in_bf16(tmp_path, rope, autocast):
    """bf16 keeps 8 bits: an angle of 60,000 held in it would be off by up to 128 radians."""
    hf_model(rope).config.save_pretrained(tmp_path)
    config = read_config(tmp_path / "config.json")
    positions = torch.tensor([0, 7, 4_001, 59_999])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cos, sin = rotary_tables(config, positions, torch.bfloat16)
        frequencies, scale = model_file.rope_frequencies(config)
    angles = positions[:, None].double() * frequencies.double()
    assert frequencies.dtype == torch.float32 and cos.dtype == sin.dtype == torch.bfloat16
    for table, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert (table[:, 0, :8].double() - exact * scale).abs().max() < 0.01
        assert torch.equal(table[:, 0, :8], table[:, 0, 8:])


# ------------------------------------------------------------------------------------------------------- export

@pytest.mark.parametrize("kind", ["untied", "tied", "biases", "llama3", "mistral", "sharded", "qwen2", "qwen3"])
def test_export_reopens_in_transformers_with_identical_logits(tmp_path, kind):
    changes = {"tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True, "mlp_bias": True}}.get(kind, {})
    hf = family_model(kind if kind in FAMILIES else "llama", "llama3" if kind == "llama3" else "default", **changes)
    how = {"max_shard_size": "40KB"} if kind == "sharded" else {}
    save_pretrained(reopen(hf, tmp_path / "in", **how), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(hf) and again.dtype == torch.float32
    assert again.config.architectures == [type(hf).__name__]
    tokens, positions = rows(2, 40), gaps(2, 40, 60_000)
    assert torch.equal(hf_logits(again, tokens, positions), hf_logits(hf, tokens, positions))
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]  # no .tmp left


def test_export_says_the_dtype_it_holds(tmp_path):
    """Older files spell the key torch_dtype; a stale one would have readers round fp32 weights to bf16."""
    hf = hf_model()
    hf.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", dtype=None, torch_dtype="bfloat16")
    save_pretrained(load_pretrained(tmp_path), tmp_path / "out")
    written = json.load(open(tmp_path / "out" / "config.json"))
    assert {written[key] for key in ("dtype", "torch_dtype") if key in written} == {"float32"}


# ------------------------------------------------------------------------------------- branches equal full rows

def make_groups(answer_lengths, prompt_lengths, window=60_000, seed=0):
    """[(prompt, its positions, answers)] of random tokens. answer_lengths: a list of M + 1 for each group."""
    rng = random.Random(seed)
    return [([rng.randrange(2, 89) for _ in range(length)], sorted(rng.sample(range(window - 64), length)),
             [[rng.randrange(2, 89) for _ in range(n)] for n in lengths])
            for length, lengths in zip(prompt_lengths, answer_lengths)]


def pack(groups):
    """The stream: [prompt minus its last token | branch | branch ...] of every group, as Llama.forward takes it."""
    tokens, positions, targets, segments = [], [], [], []
    for prompt, prompt_positions, answers in groups:
        start, end = len(tokens), len(tokens) + len(prompt) - 1
        segments.append(Segment(start, end))
        tokens += prompt[:-1]
        positions += prompt_positions[:-1]
        targets += [IGNORE] * (len(prompt) - 1)
        for answer in answers:
            segments.append(Segment(len(tokens), len(tokens) + len(answer), start, end))
            tokens += [prompt[-1], *answer[:-1]]
            positions += range(prompt_positions[-1], prompt_positions[-1] + len(answer))
            targets += answer
    return torch.tensor(tokens), torch.tensor(positions), torch.tensor(targets), segments


def branch_logps(model, groups):
    """Mean log-prob (N, M + 1) of every answer, by branches."""
    sums, lengths = model(*pack(groups))
    assert lengths.tolist() == [len(answer) for _, _, answers in groups for answer in answers]
    return (sums / lengths).view(len(groups), -1)


def row_logps(logits, groups):
    """The same by M + 1 full rows a group. logits: a function of tokens (1, T) and positions (1, T)."""
    out = []
    for prompt, prompt_positions, answers in groups:
        for answer in answers:
            row = torch.tensor([prompt + answer])
            last = prompt_positions[-1]
            positions = torch.tensor([[*prompt_positions, *range(last + 1, last + len(answer) + 1)]])
            predicted = logits(row[:, :-1], positions[:, :-1])[0, len(prompt) - 1:]
            out.append(predicted.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean())
    return torch.stack(out).view(len(groups), -1)


def loss_and_gradients(module, logps):
    module.zero_grad()
    loss, _ = logo_loss(logps[:, 0], logps[:, 1:], beta=2.0, gamma=0.5, sft_weight=0.1)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same_loss_and_gradients(ours, theirs, tolerance):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.abs().max() > 1e-4, f"{name} gets no gradient: the test would not see it"
        assert (ours[1][name] - gradient).abs().max() < tolerance * gradient.abs().max(), name


def in_double(hf):
    """transformers' RMSNorm rounds to fp32 in a float64 model; torch's own is the same function in float64."""
    hf = hf.double()
    for module in list(hf.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return hf


GROUPS = {  # M: three groups of unequal lengths; answers of one token too
    1: make_groups([[5, 3], [1, 6], [4, 4]], [17, 9, 2], seed=1),
    2: make_groups([[5, 3, 8], [1, 6, 2], [4, 4, 1]], [17, 9, 2], seed=2),
    4: make_groups([[5, 3, 8, 1, 2], [1, 6, 2, 7, 4], [4, 4, 1, 9, 3]], [17, 9, 2], seed=4),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("M", GROUPS)
def test_branches_equal_full_rows(tmp_path, monkeypatch, M, dtype, tolerance, checkpointing):
    """Loss and every gradient; the rows go through transformers, and through Llama.logits."""
    monkeypatch.setattr(model_file, "HEAD_CHUNK", 7)  # so that the head works in several chunks
    hf = hf_model()
    hf.save_pretrained(tmp_path)
    hf = in_double(hf) if dtype == torch.float64 else hf
    ours = load_pretrained(tmp_path, dtype)
    ours.set_checkpointing(checkpointing)
    branches = loss_and_gradients(ours, branch_logps(ours, GROUPS[M]))
    for module, logits in ((hf, lambda *x: hf_logits(hf, *x)), (ours, ours.logits)):
        full_rows = loss_and_gradients(module, row_logps(logits, GROUPS[M]))
        assert_same_loss_and_gradients(branches, full_rows, tolerance)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_branches_of_qwen_equal_full_rows(tmp_path, family, checkpointing):
    """Also the gradients of the biases, and of the norms on q and k."""
    hf = family_model(family)
    hf.save_pretrained(tmp_path)
    hf, ours = in_double(hf), load_pretrained(tmp_path, torch.float64)
    ours.set_checkpointing(checkpointing)
    branches = loss_and_gradients(ours, branch_logps(ours, GROUPS[2]))
    for module, logits in ((hf, lambda *x: hf_logits(hf, *x)), (ours, ours.logits)):
        assert_same_loss_and_gradients(branches, loss_and_gradients(module, row_logps(logits, GROUPS[2])), 1e-9)


@pytest.mark.parametrize("rope, tied", [("linear", False), ("yarn", True), ("llama3", True)])
def test_branches_equal_full_rows_under_scaled_rope_and_tied_head(tmp_path, rope, tied):
    reopen(hf_model(rope, tie_word_embeddings=tied), tmp_path)
    ours = load_pretrained(tmp_path, torch.float64)
    branches = loss_and_gradients(ours, branch_logps(ours, GROUPS[2]))
    assert_same_loss_and_gradients(branches, loss_and_gradients(ours, row_logps(ours.logits, GROUPS[2])), 1e-9)


def test_gradients_equal_finite_differences(tmp_path):
    """Without any other implementation: one direction in the space of all parameters, float64."""
    reopen(hf_model(), tmp_path)
    ours = load_pretrained(tmp_path, torch.float64)

    def loss():
        logps = branch_logps(ours, GROUPS[2])
        return logo_loss(logps[:, 0], logps[:, 1:], beta=2.0, gamma=0.5, sft_weight=0.1)[0]

    loss().backward()
    rng = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in ours.parameters()]
    expected = sum((p.grad * d).sum() for p, d in zip(ours.parameters(), direction)).item()
    sides = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):  # from 0 to +1e-6, from there to -1e-6
            for p, d in zip(ours.parameters(), direction):
                p.add_(step * d)
            sides.append(loss().item())
    assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------- what changes nothing

@pytest.mark.parametrize("rope", ROPES)
def test_shifting_all_positions_changes_nothing(tmp_path, rope):
    """Angles are fp32 whatever the weights are: near 5,000 they are good to 3e-4 radians, hence the tolerance."""
    ours = reopen(hf_model(rope), tmp_path)
    groups = make_groups([[5, 3, 8], [1, 6, 2]], [17, 9], window=1_000)
    tokens, positions, targets, segments = pack(groups)
    with torch.no_grad():
        before, _ = ours(tokens, positions, targets, segments)
        after, _ = ours(tokens, positions + 4_000, targets, segments)
        apart, _ = ours(tokens, positions + 4_000 * (targets != IGNORE), targets, segments)
    assert (after - before).abs().max() < 2e-3
    assert (apart - before).abs().max() > 0.1  # only the answers shifted: that is another distance


@pytest.mark.parametrize("rope", ROPES)
def test_another_group_changes_nothing(tmp_path, rope):
    ours = reopen(hf_model(rope), tmp_path)
    near, other = make_groups([[5, 3, 8]], [17], window=200), make_groups([[1, 6, 2]], [9], window=2_000, seed=1)
    with torch.no_grad():
        alone = branch_logps(ours, near)[0]
        first, second = branch_logps(ours, near + other), branch_logps(ours, other + near)
    assert (first[0] - alone).abs().max() < 1e-4 and (second[1] - alone).abs().max() < 1e-4
    assert (first[1] - second[0]).abs().max() < 1e-4  # an angle of 2,000 is good to 1e-4 in fp32


def test_another_branch_changes_nothing(tmp_path):
    ours = reopen(hf_model(), tmp_path)
    (prompt, positions, answers), = make_groups([[5, 3, 8]], [17])
    with torch.no_grad():
        before = branch_logps(ours, [(prompt, positions, answers)])[0]
        for j in range(3):
            changed = [answer if i == j else answer[::-1] + [7] for i, answer in enumerate(answers)]
            after = branch_logps(ours, [(prompt, positions, changed)])[0]
            assert (after[j] - before[j]).abs() < 1e-5
        after = branch_logps(ours, [(prompt[::-1], positions, answers)])[0]
    assert ((after - before).abs() > 1e-2).all()  # the prompt is what every branch does see


def test_the_answers_mask_by_hand():
    """Prompt of 2 (p), answers of 2 (a) and 1 (b): columns p p a a b. No row of it belongs to the prompt."""
    seen = answer_mask(2, [2, 1]) == 0
    assert seen.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert answer_mask(2, [2, 1])[~seen].eq(-math.inf).all() and answer_mask(7, []).shape == (0, 7)


def test_a_prompt_of_any_length_has_no_mask(monkeypatch):
    """The prompt's own attention is a causal call without one; only the answers' rows are ever masked."""
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        masks.append((q.shape[2], is_causal, None if attn_mask is None else tuple(attn_mask.shape)))
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q = torch.randn(500 + 3 + 4, 2, 8)
    SegmentAttention([Segment(0, 500), Segment(500, 503, 0, 500), Segment(503, 507, 0, 500)], "cpu")(q, q, q)
    assert masks == [(500, True, None), (7, False, (7, 507))]


def test_repeated_key_heads_are_grouped_heads():
    q, k, v = (torch.randn(1, heads, 9, 8) for heads in (6, 2, 2))
    repeated = sdpa(q, repeat_heads(k, 6), repeat_heads(v, 6), is_causal=True)
    assert (repeated - sdpa(q, k, v, is_causal=True)).abs().max() < 1e-6


def test_segments_move_with_their_prefix():
    assert Segment(2, 5).moved(10) == (12, 15, 0, 0)  # no prefix stays no prefix
    assert Segment(7, 9, 2, 5).moved(10) == (17, 19, 12, 15)


def test_prompt_tokens_are_not_scored(tmp_path):
    """The prompt reaches the loss through attention only: its own logits are nowhere in it."""
    ours = reopen(hf_model(), tmp_path)
    tokens, positions, targets, segments = pack(GROUPS[2])
    seen = []
    head = ours.token_logps
    ours.token_logps = lambda x, t: seen.append(len(t)) or head(x, t)
    sums, lengths = ours(tokens, positions, targets, segments)
    assert sum(seen) == lengths.sum() == (targets != IGNORE).sum()


def test_log_probs_are_fp32_whatever_the_weights(tmp_path):
    """Of bf16 logits, as a bf16 model makes them, but in fp32 from there on: bf16 sums would be off by percents."""
    hf_model().save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, torch.bfloat16)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(7)
    logits = (x @ ours.lm_head.weight.T).double()
    by_hand = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    found = ours.token_logps(x, targets)
    assert found.dtype == torch.float32 and (found - by_hand).abs().max() < 1e-5
    tokens, positions, targets, segments = pack(GROUPS[2])
    assert ours(tokens, positions, targets, segments)[0].dtype == torch.float32


def varlen_double(q, k, v, cu_q, cu_k, max_q, max_k):
    """What flash-attn >= 2.1 documents, in fp32 on the CPU; both flash functions run the same kernel.

    Sequence i has queries cu_q[i]:cu_q[i + 1] and keys cu_k[i]:cu_k[i + 1]; causal is aligned at the bottom right;
    with 4 query heads and 2 key heads, query heads 0 and 1 read key head 0.
    """
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256
    for cu, n, longest in ((cu_q, len(q), max_q), (cu_k, len(k), max_k)):
        assert cu.dtype == torch.int32 and cu.device == q.device and cu[0] == 0 and cu[-1] == n
        assert (cu.diff() >= 0).all() and isinstance(longest, int) and longest >= cu.diff().max()
    assert len(cu_q) == len(cu_k)
    out = []
    for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) / math.sqrt(q.shape[2])
        hidden = torch.ones(b - a, d - c).triu(d - c - (b - a) + 1).bool()
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), values))
    return torch.cat(out).to(q.dtype)


@pytest.fixture(params=["flash_attn", "torch"])
def varlen_calls(request, monkeypatch):
    """model.py takes the CPU for an Ampere GPU, with doubles of both flash functions; yields the list of calls."""
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False):
        assert causal and dropout_p == 0 and softmax_scale is None
        calls.append("flash_attn")
        return varlen_double(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0) and (enable_gqa or query.shape[1] == key.shape[1])
        calls.append("torch")
        return varlen_double(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    choose = model_file.varlen_kernel
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    installed = flash_attn_varlen_func if request.param == "flash_attn" else None
    monkeypatch.setattr(model_file, "flash_attn_varlen_func", installed)
    monkeypatch.setattr(model_file, "varlen_attn", varlen_attn)
    monkeypatch.setattr(model_file, "varlen_kernel", lambda device, dtype: choose("cuda", dtype))
    yield calls
    assert set(calls) == {request.param}


def attention_and_gradients(attend, q, k, v):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


def test_varlen_attention_equals_sdpa(varlen_calls):
    """Output and gradients, within 2% of the largest: bf16 keeps 8 bits. A wrong key shows in the first digit."""
    segments = pack(GROUPS[2])[3]
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(segments[-1][1], heads, 16, generator=rng).bfloat16() for heads in (4, 2, 2))
    attend = SegmentAttention(segments, "cpu")
    ours = attention_and_gradients(attend, q, k, v)
    assert len(varlen_calls) == 1
    sdpa = attention_and_gradients(attend, *(x.float() for x in (q, k, v)))
    assert len(varlen_calls) == 1, "flash kernels refuse fp32: that goes through SDPA"
    for name, x, y in zip("oqkv", ours, sdpa):
        assert (x.float() - y).abs().max() < 0.02 * y.abs().max(), name


def test_varlen_attention_is_one_call_a_layer(tmp_path, varlen_calls):
    hf_model().save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, torch.bfloat16)
    branch_logps(ours, GROUPS[2]).sum().backward()
    assert len(varlen_calls) == ours.config.num_hidden_layers


def test_varlen_kernel_is_for_16_bits_on_ampere(monkeypatch):
    for major, dtype, device, expected in ((8, torch.bfloat16, "cuda", True), (9, torch.float16, "cuda", True),
                                           (7, torch.float16, "cuda", False), (8, torch.float32, "cuda", False),
                                           (8, torch.bfloat16, "cpu", False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert (model_file.varlen_kernel(device, dtype) is not None) == expected, (major, dtype, device)


# ------------------------------------------------------------------------------------------------------- offload

def test_offload_moves_the_blocks_inputs_and_changes_no_bit(tmp_path, monkeypatch):
    ours, moved = reopen(hf_model(), tmp_path), []

    class Spy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            super().__init__(lambda x: moved.append(x.shape) or x.clone(), lambda x: x)

    monkeypatch.setattr(model_file, "save_on_cpu", Spy)
    ours.set_checkpointing(True)
    here = loss_and_gradients(ours, branch_logps(ours, GROUPS[2]))
    assert moved == []
    ours.set_checkpointing(True, offload=True)
    there = loss_and_gradients(ours, branch_logps(ours, GROUPS[2]))
    T, C = pack(GROUPS[2])[3][-1][1], ours.config.hidden_size
    assert moved == [(T, C)] * ours.config.num_hidden_layers  # and neither cos and sin nor the head's rows
    assert there[0] == here[0] and all(torch.equal(there[1][name], here[1][name]) for name in here[1])


# ---------------------------------------------------------------------------------------------------- bad input

@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    hf_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    hf_model().save_pretrained(folder, max_shard_size="40KB")
    return folder


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def rope(**changes):
    return config(rope_parameters={"rope_theta": 10000.0, **changes})


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def tensors(change):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return damage


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


def refused(folder, *words):
    with pytest.raises(BadInput) as e:
        load_pretrained(folder)
    message = str(e.value)
    assert "\n" not in message
    assert all(word in message for word in (str(folder), *words)), message


NORM = "model.norm.weight"


@pytest.mark.parametrize("damage, words", [
    (text("config.json", "{"), ("config.json", "JSON")),
    (text("config.json", "[]"), ("config.json",)),
    (config(model_type="gemma"), ("config.json", "'gemma'", "llama")),
    (config(model_type=None), ("config.json", "None")),
    (config(sliding_window=4096), ("config.json", "sliding_window", "4096")),
    (config(quantization_config={"bits": 4}), ("config.json", "quantization_config")),
    (config(hidden_act="gelu"), ("config.json", "gelu")),
    (config(vocab_size=None), ("config.json", "vocab_size")),
    (rope(rope_type="longrope"), ("config.json", "longrope", "yarn")),
    (rope(rope_type="dynamic", factor=4.0), ("config.json", "'dynamic'", "yarn")),
    (rope(rope_type="yarn"), ("config.json", "factor")),
    (rope(rope_type="llama3", factor=8.0), ("config.json", "low_freq_factor")),
    (truncated, ("model.safetensors",)),
    (text("model.safetensors", "version https://git-lfs.github.com/spec/v1"), ("model.safetensors",)),
    (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors",)),
    (tensors(lambda state: state.pop(NORM)), (NORM, "missing")),
    (tensors(lambda state: state.update(surprise=torch.zeros(1))), ("surprise",)),
    (tensors(lambda state: state.update({NORM: torch.zeros(3)})), ("model.safetensors", NORM, "[3]", "[64]")),
    (config(vocab_size=90), ("model.safetensors", "[89, 64]", "[90, 64]")),
], ids=["half a config", "config is a list", "other architecture", "no architecture", "sliding window", "quantised",
        "activation", "no vocab_size", "unknown rope", "dynamic rope", "yarn without factor", "llama3 without its factors",
        "truncated weights", "git-lfs pointer", "no weights", "tensor missing", "tensor too many", "tensor misshapen",
        "config and weights disagree"])
def test_bad_folder_is_refused_in_one_line(good_folder, tmp_path, damage, words):
    folder = shutil.copytree(good_folder, tmp_path / "bad")
    damage(folder)
    refused(folder, *words)


def test_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "config.json")


def index(change):
    def damage(folder):
        path = folder / "model.safetensors.index.json"
        value = json.loads(path.read_text())
        change(value["weight_map"])
        path.write_text(json.dumps(value))
    return damage


@pytest.mark.parametrize("damage, words", [
    (lambda folder: next(folder.glob("model-00002-*")).unlink(), ("model-00002-of-",)),
    (index(lambda weight_map: weight_map.pop(NORM)), (NORM, "missing")),
    (index(lambda weight_map: weight_map.update({NORM: weight_map["model.embed_tokens.weight"]})),
     ("safetensors", NORM, "not in this shard")),
    (text("model.safetensors.index.json", "{}"), ("index.json", "weight_map")),
    (text("model.safetensors.index.json", "[]"), ("index.json",)),
], ids=["shard missing", "not in the index", "not in the shard", "no weight_map", "index is a list"])
def test_bad_shards_are_refused_in_one_line(good_shards, tmp_path, damage, words):
    folder = shutil.copytree(good_shards, tmp_path / "bad")
    damage(folder)
    refused(folder, *words)
