"""Model folders, adapters, checkpoints: what is written opens elsewhere, what others wrote opens here,
and what is damaged or not meant for us is refused in one line."""
import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import ROPES, edit_json, family_model, hf_model, rows

import checkpoint
from checkpoint import (
    config_json,
    load_checkpoint,
    load_pretrained,
    merge,
    prune,
    read_adapter,
    read_config,
    read_state,
    save_adapter,
    save_pretrained,
    sha256,
    sha256_of_json,
    start_lora,
)
from configs import BadInput

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def test_a_model_larger_than_a_file_is_cut_and_opens_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    hf = hf_model()
    hf.save_pretrained(tmp_path / "in")
    save_pretrained(load_pretrained(tmp_path / "in"), tmp_path / "out", torch.bfloat16)
    files = sorted(name for name in os.listdir(tmp_path / "out") if name.endswith(".safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    for name, p in theirs.named_parameters():
        assert torch.equal(p, hf.get_parameter(name).bfloat16())


def test_an_export_replaces_the_old_folder_as_a_whole(tmp_path):
    hf_model().save_pretrained(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "SHARD_BYTES", 40_000)
        save_pretrained(ours, tmp_path / "out")
    save_pretrained(ours, tmp_path / "out")  # a stale index would send readers to files that are gone
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def trained_lora(tmp_path, targets="q_proj,v_proj,down_proj", also="embed,norm", **changes):
    """A base folder, and our model on it with LoRA and moved weights."""
    hf_model(**changes).save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base")
    lora = {"lora_r": 4, "lora_alpha": 6, "lora_targets": targets}
    model.train_only(**lora, train_also=also)
    with torch.no_grad():
        start_lora(model, 0)
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"), lora)
    return model


@pytest.mark.parametrize("also", ["", "embed,norm", "lm_head", "layers.1.input_layernorm"])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_mean_the_same_in_peft(tmp_path, tied, also):
    if tied and also == "lm_head":
        pytest.skip("a tied head has no name of its own")
    model = trained_lora(tmp_path, also=also, tie_word_embeddings=tied)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie")  # as PEFT does where a head and its embeddings may part
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = rows(2, 30)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.allclose(model.logits(tokens), expected, atol=2e-5)
        again = load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
        assert torch.equal(again.logits(tokens), model.logits(tokens))
        save_pretrained(again, tmp_path / "merged")
        assert torch.allclose(load_pretrained(tmp_path / "merged").logits(tokens), expected, atol=2e-5)


def test_an_adapter_that_peft_made_opens_here(tmp_path):
    hf = hf_model()
    hf.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"], init_lora_weights=False,
                               modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hf, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = rows(2, 30)
    with torch.no_grad():
        ours = load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter").logits(tokens)
        assert torch.allclose(ours, theirs(tokens).logits, atol=2e-5)


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, "use_dora is True, expected False"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"target_modules": "all-linear"}, "target_modules is 'all-linear', expected a list of names"),
    ({"target_modules": ["q_proj"]}, "not a tensor of this model"),
    ({"r": 8}, "has shape [4, "),
    ({"target_modules": ["query"]}, "expected some of q_proj,k_proj"),
])
def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path, change, words):
    trained_lora(tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadInput, match="^[^\n]*$") as e:
        load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    assert words in str(e.value)


@pytest.mark.parametrize("settings, words", [
    ((0, 16, "q_proj", "embed"), "needs lora_r"),
    ((4, 16, "q_proj,qproj", ""), "expected some of q_proj,k_proj"),
    ((4, 16, "", "embed"), "expected some of q_proj,k_proj"),
    ((4, 16, "q_proj", "embed,head_norm"), "'head_norm' is in no parameter's name"),
    ((4, 16, "q_proj", "self_attn"), "q_proj.weight, which has LoRA"),
])
def test_what_to_train_is_checked(tmp_path, settings, words):
    hf_model().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="^[^\n]*$") as e:
        load_pretrained(tmp_path).train_only(*settings)
    assert words in str(e.value)


def test_lora_starts_as_its_base_and_is_the_same_for_the_same_seed(tmp_path):
    hf_model().save_pretrained(tmp_path)
    base, first = load_pretrained(tmp_path), load_pretrained(tmp_path)
    first.train_only(4, 16, "q_proj", "")
    with torch.no_grad():
        start_lora(first, 3)
        assert torch.equal(first.logits(rows(1, 9)), base.logits(rows(1, 9)))
        A = first.model.layers[1].self_attn.q_proj.lora_A.weight.clone()
        start_lora(first, 4)
        assert not torch.equal(first.model.layers[1].self_attn.q_proj.lora_A.weight, A)
        start_lora(first, 3)
        assert torch.equal(first.model.layers[1].self_attn.q_proj.lora_A.weight, A)
    assert 0.9 < A.abs().max() * A.shape[1] ** 0.5 <= 1


@pytest.mark.parametrize("keep, left", [(1, [200, 1000000]), (2, [200, 999999, 1000000])])
def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, keep, left):
    for step, loss in ((100, 0.5), (200, 0.1), (300, None), (999_999, 0.3), (1_000_000, 0.4)):
        folder = tmp_path / f"step_{step:06d}"
        folder.mkdir()
        held_out = {"loss": loss} if loss else None
        (folder / "state.json").write_text(json.dumps({"step": step, "held_out": held_out}))
    (tmp_path / "step_000050.tmp").mkdir()  # what a kill left
    prune(tmp_path, keep)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == left


def test_files_are_readable_by_the_group_as_the_umask_says(tmp_path):
    trained_lora(tmp_path)
    old = os.umask(0o022)
    try:
        save_pretrained(load_pretrained(tmp_path / "base"), tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert load_file(tmp_path / "out" / "model.safetensors")


# ------------------------------------------------------------------------------------------------ prune

def make_checkpoints(folder, steps):
    for step in steps:
        (folder / f"step_{step:06d}").mkdir()
        (folder / f"step_{step:06d}" / "state.json").write_text(json.dumps({"step": step}))


def test_prune_leaves_what_is_not_its_own(tmp_path, capsys):
    make_checkpoints(tmp_path, (10, 20))
    for name in ("step_000010.mine", "step_000010.old.mine", "step_5", "step_best", "step_00001٠", "step_000030"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "note").write_text("mine")
    for name in ("step_000010.mine", "step_000010.old.mine", "step_5", "step_best", "step_00001٠"):
        shutil.copytree(tmp_path / "elsewhere" / name, tmp_path / name)
    for name in ("step_000020.tar.gz", "step_000030.tmp", "step_000040"):
        (tmp_path / name).write_text("a file, not a folder")
    (tmp_path / "step_000050").symlink_to(tmp_path / "elsewhere" / "step_000030")
    (tmp_path / "step_000060.old").symlink_to(tmp_path / "elsewhere" / "step_000030")
    (tmp_path / "step_000005.old").mkdir()
    (tmp_path / "step_000005.tmp").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    prune(str(tmp_path), 1)
    assert before - {path.name for path in tmp_path.iterdir()} == {"step_000005.old", "step_000005.tmp", "step_000010"}
    assert (tmp_path / "elsewhere" / "step_000030" / "note").exists() and not capsys.readouterr().out


def test_what_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    def full(path, *_):
        raise OSError(16, "Device or resource busy")

    make_checkpoints(tmp_path, (10, 20))
    monkeypatch.setattr(shutil, "rmtree", full)
    prune(tmp_path, 1)
    assert "warning" in capsys.readouterr().out
    monkeypatch.undo()
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000020"]
    make_checkpoints(tmp_path, (10,))
    monkeypatch.setattr(os, "rename", full)
    prune(tmp_path, 1)
    out = capsys.readouterr().out
    assert out == f"warning: {tmp_path}/step_000010: cannot be removed (Device or resource busy)\n"


@pytest.mark.parametrize("loss", [float("nan"), "0.1", None, True])
def test_a_loss_that_is_no_number_is_not_the_best(tmp_path, loss):
    make_checkpoints(tmp_path, (10, 20, 30))
    for step, value in ((10, loss), (20, 0.5), (30, 0.7)):
        content = json.dumps({"step": step, "held_out": {"loss": value}})
        (tmp_path / f"step_{step:06d}" / "state.json").write_text(content)
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000020", "step_000030"]


# ------------------------------------------------------------------------------------------------ config.json

def refused(function, *words):
    with pytest.raises(BadInput) as e:
        function()
    message = str(e.value)
    assert "\n" not in message and all(word in message for word in words), message


NAN = float("nan")


@pytest.mark.parametrize("key, values", [
    ("vocab_size", ["89", True, 0, -1, 1.5, [], 1 << 40]),
    ("hidden_size", ["64", True, 0, -64, 64.0]),
    ("num_hidden_layers", ["2", False, 0, -1]),
    ("num_attention_heads", [0, -4, 3, True]),
    ("num_key_value_heads", [0, -2, 3, 8, "2", True]),
    ("head_dim", [0, -16, 15, "16", 16.0]),
    ("max_position_embeddings", [0, -1, "64", 1e9, True]),
    ("rms_norm_eps", [-1e-5, 0, NAN, "1e-5", True]),
    ("tie_word_embeddings", ["false", 0, 1, []]),
    ("attention_bias", ["false", 0]),
    ("mlp_bias", ["no"]),
    ("rope_scaling", ["linear", 2.0, [1], True, 0, ""]),
    ("rope_parameters", ["linear", 2.0, [1], True, 0, ""]),
    ("rope_theta", [0, -1.0, 1.0, NAN, float("inf"), "10000", True]),
    ("sliding_window", [4096, 0, "none"]),
    ("hidden_act", ["gelu", 3, []]),
    ("partial_rotary_factor", [0.5]),
    ("model_type", ["gemma", 3, []]),
])
def test_a_value_that_is_none_is_refused_by_key(tmp_path, key, values):
    hf_model().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters=None, head_dim=None)
    load_pretrained(tmp_path)
    for value in values:
        shutil.copy(tmp_path / "config.json", tmp_path / "good.json")
        edit_json(tmp_path / "config.json", **{key: value})
        refused(lambda: load_pretrained(tmp_path), str(tmp_path / "config.json"), key, repr(value))
        shutil.copy(tmp_path / "good.json", tmp_path / "config.json")


@pytest.mark.parametrize("key, value", [
    *[("factor", value) for value in (0, -2.0, NAN, "8", None, True)],
    *[("rope_theta", value) for value in (0, -1, NAN, 1.0, "10000", True)],
    *[("original_max_position_embeddings", value) for value in (0, NAN, "64")],
    ("rope_type", "dynamic"), ("rope_type", "longrope"), ("rope_type", 3), ("rope_type", []),
    ("partial_rotary_factor", 0.5), ("full_attention", {"rope_type": "default"}),
])
@pytest.mark.parametrize("kind, dialect", [("llama3", "rope_parameters"), ("yarn", "rope_scaling")])
def test_a_rope_that_would_turn_wrong_is_refused_by_key(tmp_path, kind, dialect, key, value):
    path = tmp_path / "config.json"
    hf_model(kind).config.save_pretrained(tmp_path)
    edit_json(path, **{"rope_parameters": None, dialect: {**ROPES[kind], key: value}})
    refused(lambda: read_config(path), str(path), key, repr(value))


@pytest.mark.parametrize("given, kind", [
    ({"type": None, "rope_type": "yarn"}, "yarn"), ({"type": "yarn"}, "yarn"),
    ({"type": "yarn", "rope_type": "default"}, "yarn")])
def test_the_oldest_spelling_of_the_scaling_counts_where_it_says_something(tmp_path, given, kind):
    path = tmp_path / "config.json"
    hf_model().config.save_pretrained(tmp_path)
    edit_json(path, rope_parameters=None, rope_scaling={"factor": 8.0, "original_max_position_embeddings": None, **given})
    rope = read_config(path).rope
    assert rope == {"rope_type": kind, "factor": 8.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("given", [{}, {"rope_type": None}, {"rope_type": "default"}])
def test_a_factor_of_no_scaling_is_refused(tmp_path, given):
    """Some file means a longer window, and its model would be trained at the shorter one."""
    path = tmp_path / "config.json"
    hf_model().config.save_pretrained(tmp_path)
    edit_json(path, rope_parameters=None, rope_scaling={"factor": 8.0, **given})
    refused(lambda: read_config(path), str(path), "factor is 8.0", "rope_type")


@pytest.mark.parametrize("key, value", [("attention_factor", 0), ("beta_fast", -1), ("mscale", "1"), ("beta_slow", NAN),
                                        ("truncate", "false"), ("mscale_all_dim", True)])
def test_what_yarn_may_say_is_checked_too(tmp_path, key, value):
    path = tmp_path / "config.json"
    hf_model("yarn").config.save_pretrained(tmp_path)
    edit_json(path, rope_parameters={**ROPES["yarn"], key: value})
    refused(lambda: read_config(path), str(path), key, repr(value))


def test_llama3_bounds_that_meet_are_refused(tmp_path):
    path = tmp_path / "config.json"
    hf_model("llama3").config.save_pretrained(tmp_path)
    edit_json(path, rope_parameters={**ROPES["llama3"], "low_freq_factor": 4.0, "high_freq_factor": 4.0})
    refused(lambda: read_config(path), str(path), "low_freq_factor is 4.0, expected less than high_freq_factor=4.0")


def test_a_mistral_that_does_not_name_its_window_is_refused(tmp_path):
    """Because transformers then takes 4096, unlike here."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config_json(read_config(TINY / "config.json")), "model_type": "mistral"}))
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    refused(lambda: read_config(path), str(path), "sliding_window", "4096")


def test_a_wrong_size_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    hf_model().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", intermediate_size=1 << 30)
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)  # would be called
    refused(lambda: load_pretrained(tmp_path), "model.safetensors", "[96, 64]", str(1 << 30))


def test_whole_numbers_are_no_weights(tmp_path):
    hf_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(lambda: load_pretrained(tmp_path), "model.safetensors", "model.norm.weight", "I8")


def test_a_model_that_came_from_no_folder_is_named_by_its_biases_and_norms(tmp_path):
    for family in ("llama", "qwen2", "qwen3"):
        family_model(family).save_pretrained(tmp_path / family)
        config = read_config(tmp_path / family / "config.json")
        config.raw = {}
        written = config_json(config)
        assert written["model_type"] == family and written["architectures"] == [f"{family.title()}ForCausalLM"]
    config.qkv_bias = True
    refused(lambda: config_json(config), "qkv_bias", "qk_norm")


def both_dialects(folder):
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    edit_json(folder / "config.json", rope_theta=rope["rope_theta"], rope_scaling=scaling)


def older_dialect(folder):
    both_dialects(folder)
    edit_json(folder / "config.json", rope_parameters=None)


@pytest.mark.parametrize("dialect", [lambda folder: None, older_dialect, both_dialects],
                         ids=["transformers 5", "transformers 4", "both"])
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_back_the_base_and_window_that_were_changed(tmp_path, family, kind, dialect):
    """Its own frequencies of what we wrote, against those of a config that was changed by hand in transformers."""
    expected = family_model(family, kind, max_position_embeddings=64)
    expected.save_pretrained(tmp_path / "in")
    dialect(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in")
    ours.config.extend(4096, 500_000.0)
    save_pretrained(ours, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.max_position_embeddings == 4096 and type(theirs) is type(expected)

    config = copy.deepcopy(expected.config)
    config.rope_parameters = {**ROPES[kind], "rope_theta": 500_000.0}
    if kind == "yarn":
        config.rope_parameters.setdefault("original_max_position_embeddings", 64)
    by_hand = type(expected)(config)
    assert torch.equal(theirs.model.rotary_emb.inv_freq, by_hand.model.rotary_emb.inv_freq)
    assert theirs.model.rotary_emb.attention_scaling == by_hand.model.rotary_emb.attention_scaling
    with torch.no_grad():
        tokens = rows(1, 50)
        again = load_pretrained(tmp_path / "out")
        assert torch.equal(again.logits(tokens), ours.logits(tokens))
        assert torch.allclose(ours.logits(tokens), theirs(tokens).logits, atol=2e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {written[key] for key in ("rope_theta",) if key in written} <= {500_000.0}  # no dialect says the old one


TINY = Path(__file__).parent.parent / "models" / "tiny"


@pytest.mark.parametrize("limit, expected", [(128, 512), (512, 512), (1024, 1024), (10 ** 30, 10 ** 30)])
def test_an_export_with_a_longer_window_does_not_let_transformers_cut(tmp_path, limit, expected):
    base = shutil.copytree(TINY, tmp_path / "base")
    edit_json(base / "tokenizer_config.json", model_max_length=limit)
    model = load_pretrained(base)
    model.config.extend(512)
    save_pretrained(model, tmp_path / "out", tokenizer=base)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.model_max_length == expected
    assert len(theirs("a " * 1000, truncation=True)["input_ids"]) == min(expected, len(theirs("a " * 1000)["input_ids"]))
    if limit == expected:
        one, other = (folder / "tokenizer_config.json" for folder in (base, tmp_path / "out"))
        assert one.read_bytes() == other.read_bytes()


# ------------------------------------------------------------------------------------------------ index files

@pytest.mark.parametrize("file", ["/etc/model.safetensors", "../other/model.safetensors", "sub/model.safetensors", "..",
                                  "", "sub\\model.safetensors", "passwd", 3, None, ["model.safetensors"]])
def test_an_index_that_points_out_of_its_folder_is_refused_by_name(tmp_path, file):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    hf_model().save_pretrained(tmp_path / "here")
    for folder in ("other", "here/sub"):
        shutil.copy(tmp_path / "here" / "model.safetensors", tmp_path / folder)
    names = list(load_file(tmp_path / "here" / "model.safetensors"))
    index = tmp_path / "here" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    load_pretrained(tmp_path / "here")
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "model.safetensors"), names[0]: file}}))
    refused(lambda: load_pretrained(tmp_path / "here"), str(index), names[0], repr(file))


# ------------------------------------------------------------------------------------------------ adapter_config.json

@pytest.mark.parametrize("key, values", [
    ("peft_type", [None, "IA3", 3]),
    ("r", [None, 0, -1, True, "4", 4.0]),
    ("lora_alpha", [0, -1, NAN, "6", True, []]),
    ("target_modules", [None, "all-linear", [2], [], [""], {}]),
    ("modules_to_save", [[2], "embed_tokens", [None], [""]]),
    ("init_lora_weights", ["pissa", "olora", "loftq"]),
    ("alora_invocation_tokens", [[1]]),
    ("layer_replication", [[[0, 1]]]),
])
def test_an_adapter_with_a_value_that_is_none_is_refused_by_key(tmp_path, key, values):
    trained_lora(tmp_path)
    config = read_config(tmp_path / "base" / "config.json")
    path = tmp_path / "adapter" / "adapter_config.json"
    good = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps({**good, key: value}))
        refused(lambda: read_adapter(str(path.parent), config), str(path), key, repr(value))
    path.write_text(json.dumps({**good, "lora_alpha": None}))
    refused(lambda: read_adapter(str(path.parent), config), str(path), "lora_alpha is None")
    path.write_text(json.dumps({name: value for name, value in good.items() if name != "peft_type"}))
    refused(lambda: read_adapter(str(path.parent), config), str(path), "peft_type is None, expected 'LORA'")


# ------------------------------------------------------------------------------------------------ state.json, merge

def make_checkpoint(folder, model, cut=3, **changes):
    """A checkpoint's folder as two processes write it, the first with `cut` rows of everything."""
    folder.mkdir()
    shards = {}
    for part in (0, 1):
        tensors = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                for key in ("", ".exp_avg", ".exp_avg_sq"):
                    tensors[name + key] = (p.detach()[:cut] if part == 0 else p.detach()[cut:]).clone()
        file = f"shard_{part}_of_2.safetensors"
        save_file(tensors, folder / file)
        shards[file] = sha256(folder / file)
    settings = {"model": str(TINY), "adapter": "", "dtype": "float32", "window": 256, "rope_theta": 0.0, "lora_r": 0,
                "lora_alpha": 16, "lora_targets": "q_proj", "train_also": ""}
    write_state(folder, {"step": 7, "config": settings, "shards": shards, **changes})


def write_state(folder, state):
    (folder / "state.json").write_text(json.dumps({**state, "sha256": sha256_of_json(state)}))


@pytest.mark.parametrize("change, words", [
    ({"step": None}, ["step is None"]),
    ({"step": "7"}, ["step is '7'"]),
    ({"step": -1}, ["step is -1"]),
    ({"config": []}, ["config is []"]),
    ({"shards": None}, ["shards is None"]),
    ({"shards": {}}, ["shards is {}"]),
    ({"shards": ["shard_0_of_1.safetensors"]}, ["shards is ['shard_0"]),
    ({"shards": {"shard_0_of_2.safetensors": "0"}}, ["shards is", "shard_I_of_1"]),
    ({"shards": {"../shard_0_of_1.safetensors": "0"}}, ["shards is", "../shard_0_of_1"]),
    ({"shards": {"shard_0_of_1.safetensors": 3}}, ["shard_0_of_1.safetensors: no such file"]),
])
def test_a_state_that_was_not_written_here_is_refused_by_key(tmp_path, change, words):
    make_checkpoint(tmp_path / "step_000007", load_pretrained(TINY))
    assert read_state(str(tmp_path / "step_000007"))["step"] == 7
    state = json.loads((tmp_path / "step_000007" / "state.json").read_text())
    del state["sha256"]
    write_state(tmp_path / "step_000007", {**state, **change})
    refused(lambda: read_state(str(tmp_path / "step_000007")), "step_000007", *words)
    write_state(tmp_path / "step_000007", {key: value for key, value in state.items() if key not in change})
    refused(lambda: read_state(str(tmp_path / "step_000007")), "step_000007/state.json", f"{list(change)[0]} is None")


def test_a_checkpoint_of_two_processes_is_loaded_by_one(tmp_path):
    model = load_pretrained(TINY)
    for cut in (0, 1, 3, 127):
        make_checkpoint(tmp_path / f"step_{cut:06d}", model, cut)
        other = load_pretrained(TINY)
        for p in other.parameters():
            p.data.zero_()
        load_checkpoint(str(tmp_path / f"step_{cut:06d}"), read_state(str(tmp_path / f"step_{cut:06d}")), other)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def lose_a_row(tensors):
    tensors["model.norm.weight.exp_avg"] = tensors["model.norm.weight.exp_avg"][1:].clone()


def narrow(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, 1:].clone()


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("damage, word", [
    (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is trained in one of"),
    (lambda tensors: tensors.update(extra=torch.ones(1)), "extra is trained in one of"),
    (lambda tensors: tensors.pop("model.norm.weight.exp_avg"), "model.norm.weight.exp_avg"),
    (lose_a_row, "model.norm.weight.exp_avg has shapes"), (narrow, "model.embed_tokens.weight has shapes")])
def test_shards_that_do_not_make_the_model_are_refused(tmp_path, damage, word, part):
    folder = tmp_path / "step_000007"
    model = load_pretrained(TINY)
    make_checkpoint(folder, model)
    path = folder / f"shard_{part}_of_2.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    state = json.loads((folder / "state.json").read_text())
    refused(lambda: load_checkpoint(str(folder), state, model), str(folder), word)


@pytest.mark.parametrize("change", [{"dtype": "load"}, {"dtype": 3}, {"window": "9"}, {"lora_r": "x"}, {"lora_targets": 3}])
def test_settings_of_a_checkpoint_that_make_no_model_are_refused(tmp_path, change):
    folder = tmp_path / "step_000007"
    make_checkpoint(folder, load_pretrained(TINY))
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    write_state(folder, {**state, "config": {**state["config"], **change}})
    refused(lambda: merge(str(folder), str(tmp_path / "out")), str(folder / "state.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source, out", [("adapter", "out"), ("adapter/", "out/"), ("adapter", "new/folder//"),
                                         ("step_000007/", "./out/")])
def test_merge_takes_folders_with_a_slash(tmp_path, source, out):
    trained_lora(tmp_path)
    make_checkpoint(tmp_path / "step_000007", load_pretrained(TINY))
    script = Path(checkpoint.__file__)
    done = subprocess.run([sys.executable, script, "merge", source, out], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors"} <= set(os.listdir(tmp_path / out))
    assert not list(tmp_path.rglob("*.tmp"))
    load_pretrained(tmp_path / out)
    done = subprocess.run([sys.executable, script, "merge", source, out], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: {os.path.normpath(out)}: is already there\n"


@pytest.mark.parametrize("base", [None, 3, ""])
def test_merge_without_a_base_says_so(tmp_path, base):
    trained_lora(tmp_path)
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=base)
    refused(lambda: merge(str(tmp_path / "adapter"), str(tmp_path / "out")), "base_model_name_or_path", repr(base))


def test_an_adapter_brings_the_rope_base_and_window_of_its_training(tmp_path):
    """To whoever opens it, answers with it or goes on from it: at the base model's its weights mean something else."""
    model = trained_lora(tmp_path)
    with torch.no_grad():
        at_its_own = model.logits(rows(1, 30))
        model.config.extend(4096, 300_000.0)
        logits = model.logits(rows(1, 30))
        save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"), {"lora_r": 4, "lora_alpha": 6, "lora_targets": "q_proj,v_proj,down_proj"})
        assert not torch.allclose(logits, at_its_own, atol=1e-4)
        again = load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
        assert torch.equal(again.logits(rows(1, 30)), logits) and again.config.max_position_embeddings == 4096
    # A run that went on from it, all weights for short, without a rope_theta of its own.
    make_checkpoint(tmp_path / "step_000007", load_pretrained(TINY))
    state = json.loads((tmp_path / "step_000007" / "state.json").read_text())
    del state["sha256"]
    shutil.copytree(TINY, tmp_path / "other", ignore=lambda *_: ["__pycache__"])
    edit_json(tmp_path / "other" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 300_000.0})
    for adapter, theta in ((str(tmp_path / "other"), 300_000.0), ("", 10_000.0)):
        write_state(tmp_path / "step_000007", {**state, "config": {**state["config"], "adapter": adapter}})
        merge(str(tmp_path / "step_000007"), str(tmp_path / f"out{theta}"))
        assert read_config(tmp_path / f"out{theta}" / "config.json").rope["rope_theta"] == theta
    write_state(tmp_path / "step_000007", {**state, "config": {**state["config"], "adapter": "nowhere"}})
    refused(lambda: merge(str(tmp_path / "step_000007"), str(tmp_path / "out")), "nowhere: no such folder")


def test_a_merged_checkpoint_announces_its_window(tmp_path):
    make_checkpoint(tmp_path / "step_000007", load_pretrained(TINY))
    merge(str(tmp_path / "step_000007"), str(tmp_path / "out"))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 256
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()
