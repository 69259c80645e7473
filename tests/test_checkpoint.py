"""Model folders, adapters, rows: what is written opens elsewhere, and what others wrote opens here."""
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from test_model import hf_model, rows

import checkpoint
from checkpoint import load_pretrained, save_adapter, save_pretrained, start_lora
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
    checkpoint.prune(tmp_path, keep)
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
