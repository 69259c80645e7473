"""What bench/ compares computes the same, and its counters count: against hand arithmetic and PyTorch's formulas."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import hf_model
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from bench import common, generate, limit, plan, step
from bench.plan import Shape
from configs import BadInput, load_config
from model import Segment, step_flops

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama whose activations outweigh its weights, with the tiny model's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    hf_model(num_hidden_layers=6).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((ROOT / "models" / "tiny" / name).read_bytes())
    return str(path)


def settings(folder, **changes):
    return {**step.OPTIONS, "model": folder, "prompt": 40, "answer": 6, "M": 2, "way": "ours", **changes}


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way, M", [("naive", 2), ("transformers", 2), ("trl", 1)])
def test_every_way_computes_the_same_loss(folder, tmp_path, monkeypatch, way, M, lora_r, checkpointing):
    pytest.importorskip("trl" if way == "trl" else "peft")
    monkeypatch.chdir(tmp_path)
    s = settings(folder, M=M, lora_r=lora_r, checkpointing=checkpointing)
    found = []
    for build in (step.ours, step.WAYS[way]):
        model, optimizer, loss = build(s, "cpu")
        value = loss()
        value.backward()
        gradient = {name.split("layers.2.")[-1].replace(".default", ""): p.grad for name, p in model.named_parameters()
                    if "layers.2." in name and p.requires_grad}
        found.append((value.item(), gradient))
    (a, ours), (b, theirs) = found
    assert a == pytest.approx(b, abs=1e-5)
    assert ours.keys() == theirs.keys() and len(ours) == (8 if lora_r else 9)
    for name in ours:
        if "lora" not in name:  # LoRA's A starts from other numbers there
            assert torch.allclose(ours[name], theirs[name], atol=1e-5 * ours[name].abs().max().item()), name


def test_peak_bytes_counts_what_is_held_at_once():
    def work():
        a = torch.empty(1 << 20)
        del a
        b = torch.empty(1 << 19)
        c = torch.empty(3 << 18)
        del b, c
    assert common.peak_bytes(work, "cpu") == 4 * ((1 << 19) + (3 << 18))


@pytest.mark.parametrize("change", [{}, {"M": 8}, {"checkpointing": True}, {"lora_r": 4},
                                    {"lora_r": 4, "checkpointing": True}])
def test_the_memory_model_is_within_15_percent_of_what_is_measured(folder, change):
    found = step.measure(settings(folder, prompt=400, answer=20, **change))
    assert found["state"] + found["peak"] == pytest.approx(found["expected"], rel=0.15)


def test_attention_is_counted_as_pytorch_counts_it():
    q, k = (1, 4, 16, 8), (1, 4, 24, 8)
    assert limit.attention_flops(q, k, k) == sdpa_flop_count(q, k, k)
    assert limit.attention_backward_flops(q, q, k, k, q, q, 0.0, False) == sdpa_backward_flop_count(q, q, k, k)
    assert limit.attention_flops(q, q, q, 0.0, True) == 4 * 4 * 8 * (16 * 17 // 2)


@pytest.mark.parametrize("change", [{}, {"checkpointing": True}, {"lora_r": 4}])
def test_a_step_executes_little_more_than_the_least(folder, change):
    found = limit.measure({**limit.OPTIONS, "model": folder, "prompt": 300, "answer": 10, "repeats": 1, **change})
    excess = (found["counted"] - sum(found["again"].values())) / found["least"]
    assert 0.97 < excess <= 1.05  # below 1: the first block has no gradient to pass on where its weights are frozen
    assert len(found["costliest"]) == 10


def test_our_answers_are_those_of_transformers(folder):
    pytest.importorskip("transformers")
    s = {**generate.OPTIONS, "model": folder, "prompt": 60, "prompts": 3, "answer": 8}
    ours, theirs = (generate.measure({**s, "way": way}) for way in ("ours", "transformers"))
    assert ours["answers"] == theirs["answers"] and len(ours["answers"]) == 6


PAPER = str(ROOT / "configs" / "llama3_8b_80k.py")


def paper_plan(M, shards, naive):
    cfg = load_config([PAPER])
    return plan.plan_of(plan.planned_model(cfg, ""), cfg, Shape(8192, 512, M, shards, naive))


def test_the_plan_knows_what_the_paper_met():
    """Sec. 4: 8 x 80 GB take M = 2 with the prompt repeated, and M = 3 does not fit."""
    assert paper_plan(2, 8, naive=True)[2]["total"] < 80e9 < paper_plan(3, 8, naive=True)[2]["total"]
    assert paper_plan(3, 8, naive=False)[2]["total"] < 24e9
    tokens, flops, _ = paper_plan(2, 8, naive=False)
    rows, more, _ = paper_plan(2, 8, naive=True)
    assert (tokens, rows) == (9728, 26112) and 2.6 < more / flops < 2.9
    model = plan.planned_model(load_config([PAPER]), "")
    segments = [Segment(0, 8192)]
    segments += [Segment(8192 + 512 * i, 8704 + 512 * i, 0, 8192) for i in range(3)]
    assert flops == step_flops(model, segments, 1536)


def test_what_is_said_to_fit_fits_and_one_more_does_not():
    cfg = load_config([PAPER])
    model = plan.planned_model(cfg, "")
    shape = Shape(8192, 512, 2, 8)
    found = plan.what_fits(model, cfg, shape, 38e9)
    for most, more in ((shape._replace(M=found["M"]), shape._replace(M=found["M"] + 1)),
                       (shape._replace(prompt=found["prompt"]), shape._replace(prompt=found["prompt"] + 1))):
        assert plan.plan_of(model, cfg, most)[2]["total"] <= 38e9 < plan.plan_of(model, cfg, more)[2]["total"]


def test_the_largest_that_fits():
    assert plan.largest(lambda n: n <= 77, 1000) == 77
    assert plan.largest(lambda n: n == 0, 1000) == 0 and plan.largest(lambda n: True, 1000) == 1000


@pytest.mark.parametrize("args, message", [
    (["speed"], "found speed"),
    (["step", "promt=[1]"], "unknown key 'promt', did you mean 'prompt'?"),
    (["step", "prompt"], "expected key=value, found 'prompt'"),
    (["step", "prompt=512"], "prompt is 512, expected list"),
    (["step", "model=nowhere"], "model='nowhere': no config.json there"),
    (["step", "model=models/tiny", "ways=ours,theirs"], "expected some of ours,naive,transformers,trl, found theirs"),
    (["plan"], "plan: expected a config file"),
    (["plan", "configs/llama3_8b_80k.py", "gpu=abacus"], "gpu='abacus': expected one of"),
])
def test_bad_input_ends_in_one_line(args, message):
    done = subprocess.run([sys.executable, "-m", "bench", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_way_that_fails_does_not_end_the_others(folder, capsys):
    rows = step.run({**settings(folder), "prompt": [20], "answer": [4], "M": [1], "ways": "ours,naive", "repeats": 1,
                     "dtype": "float99"})
    assert [row["way"] for row in rows] == ["ours", "naive"] and all("float99" in row["error"] for row in rows)


def test_a_gpus_own_name_comes_before_a_longer_one():
    assert plan.flops_by_name("H100") == 989e12 and plan.flops_by_name("PCIe") == 756e12


def test_plan_of_an_unknown_model_says_what_it_knows():
    cfg = load_config(["configs/tiny.py", "model=nowhere"]) | {"name": "other"}
    with pytest.raises(BadInput, match="shape= is one of llama3_8b"):
        plan.planned_model(cfg, "")


def test_ours_need_not_be_named_first(folder):
    """The ratios to ours are there whatever the order of ways=."""
    rows = step.run({**settings(folder), "prompt": [20], "answer": [4], "M": [1], "ways": "naive,ours", "repeats": 1})
    assert rows[0]["way"] == "naive" and rows[0]["total_ratio"] > 0 and rows[1]["total_ratio"] == 1


def test_the_picture_of_the_method_shows_a_pair_as_it_is_made(tmp_path):
    figure = pytest.importorskip("bench.figure", reason="needs matplotlib")
    story = figure.find_story()
    assert story.answers[0] not in story.answers[1:] and len(story.answers) == 3
    assert set(story.selection.chosen) == story.critical <= set(story.selection.training)
    for picked in story.selection.rejected:
        assert not story.critical <= set(picked)
    figure.pyplot.switch_backend("Agg")
    figure.draw(story, str(tmp_path / "method.png"))
    assert (tmp_path / "method.png").stat().st_size > 10_000
