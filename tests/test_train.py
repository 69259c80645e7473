"""Whole runs of train_logo.py on the tiny model: repeatable, independent of the number of processes, usable elsewhere."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from model import Llama
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SMALL = ["n_examples=40", "steps=4", "batch_size=8", "micro_batch=4", "held_out=4", "eval_interval=2", "recall_sizes=[104]",
         "recall_questions=10", "threads=1"]


def launch(*args, processes=1, script="train_logo.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]
    command = [sys.executable, script] if processes == 0 else command
    return subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that trains (once for the same arguments) and returns the run's folder. Pairs are built by the first."""
    shared, folders = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", {}

    def train(*args, processes=1, again=0):
        key = (args, processes, again)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("run")
            done = launch("configs/tiny.py", *SMALL, f"pairs={shared}", f"out={folders[key]}", *args, processes=processes)
            assert done.returncode == 0, done.stderr[-2000:]
        return folders[key]

    return train


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [m["loss"] for m in metrics(folder)] + [m["held_out"]["loss"] for m in metrics(folder) if "held_out" in m]


def test_the_same_command_gives_the_same_numbers(run):
    for a, b in zip(metrics(run()), metrics(run(again=1)), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert (run() / "hf" / "model.safetensors").read_bytes() == (run(again=1) / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("args, processes", [((), 2), (("micro_batch=1",), 1), (("micro_batch=2", "checkpointing=True"), 2)])
def test_losses_do_not_depend_on_processes_or_accumulation(run, args, processes):
    one, other = losses(run()), losses(run(*args, processes=processes))
    assert len(one) == len(other) == 6 and len(set(one)) == 6
    assert one == pytest.approx(other, abs=2e-4)
    norms = [[m["grad_norm"] for m in metrics(folder)] for folder in (run(), run(*args, processes=processes))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # AdamW after clipping would hide a wrong scale


def test_training_lowers_the_loss_and_the_result_says_so(run):
    result = json.loads((run() / "result.json").read_text())
    assert result["after"]["held_out"]["loss"] < result["before"]["held_out"]["loss"]
    assert result["before"]["recall"]["104"][1] == result["after"]["recall"]["104"][1] == 10
    assert result["config"]["steps"] == 4 and result["processes"] == 1 and set(result["seconds"]) >= {"pairs", "train"}
    assert (run() / "source" / "train_logo.py").read_text() == (ROOT / "train_logo.py").read_text()


def test_the_export_opens_in_transformers(run):
    transformers = pytest.importorskip("transformers")
    folder = run() / "hf"
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), Llama.from_pretrained(folder)
    tokens = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours.logits(tokens), atol=2e-5)
    assert theirs.config.max_position_embeddings == 1024
    base = Llama.from_pretrained(ROOT / "models" / "tiny")
    assert not torch.equal(base.lm_head.weight, ours.lm_head.weight)


def test_the_first_loss_is_the_papers_formula_on_transformers_logits(run):
    """Held-out loss before any step, from full rows, transformers' logits, and Eq. 2 and 3 written out in float64."""
    transformers = pytest.importorskip("transformers")
    result = json.loads((run() / "result.json").read_text())
    cfg = result["config"]
    settings = transformers.AutoConfig.from_pretrained(ROOT / cfg["model"])
    settings.rope_parameters["rope_theta"] = cfg["rope_theta"]
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / cfg["model"], config=settings, dtype=torch.float64)
    tokenizer, total = load_tokenizer(ROOT / cfg["model"]), 0.0
    pairs = data.load_pairs(cfg["pairs"], 2)[-cfg["held_out"]:]
    for pair in pairs:
        prompt = tokenizer.encode(f"\nQuestion: {pair['question']}\nAnswer:")
        prompt = [tokenizer.bos_id, *(int(t) for chunk in pair["chunks"] for t in chunk), *prompt]
        placed = data.encode_group(pair, tokenizer, cfg).positions[:len(prompt) - 1].tolist()
        rewards = []
        for text in (pair["chosen"], *pair["rejected"]):
            answer = [*tokenizer.encode(text), tokenizer.eos_id]
            positions = torch.tensor([placed + [placed[-1] + 1 + i for i in range(len(answer) + 1)]])
            causal = torch.full((1, 1, len(prompt + answer), len(prompt + answer)), float("-inf"), dtype=torch.float64).triu(1)
            with torch.no_grad():  # an explicit mask: transformers takes gaps for packed sequences
                logits = model(torch.tensor([prompt + answer]), position_ids=positions, attention_mask=causal).logits[0]
            logps = logits.log_softmax(-1)[len(prompt) - 1:-1].gather(1, torch.tensor(answer)[:, None])
            rewards.append(float(logps.mean()))
        z = cfg["beta"] * (rewards[0] - sum(rewards[1:]) / 2) - cfg["gamma"]
        total += math.log1p(math.exp(-z)) - cfg["sft_weight"] * rewards[0]
    assert result["before"]["held_out"]["loss"] == pytest.approx(total / len(pairs), rel=1e-5)


def corrupt(folder, name, content):
    for path in (ROOT / "models" / "tiny").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(content)
    return f"model={folder}"


@pytest.mark.parametrize("case, message", [
    (lambda d: "gama=2", "unknown key 'gama', did you mean 'gamma'?"),
    (lambda d: f"model={d}/nowhere", "nowhere"),
    (lambda d: corrupt(d, "config.json", b"{"), "config.json: expected a JSON object, found"),
    (lambda d: corrupt(d, "model.safetensors", b"nothing"), "model.safetensors: not a readable safetensors file"),
    (lambda d: f"examples={d}/none.jsonl", "none.jsonl: no such file"),
    (lambda d: "window=100", "lower n_chunks or chunk_size"),
    (lambda d: "micro_batch=3", "batch_size=8 is no multiple of"),
])
def test_bad_input_ends_with_one_line_and_leaves_nothing(tmp_path, case, message):
    given = tmp_path / "given"
    given.mkdir()
    done = launch("configs/tiny.py", *SMALL, f"out={tmp_path / 'run'}", case(given), processes=0)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.stderr
    assert not (tmp_path / "run" / "pairs.jsonl").exists() and not (tmp_path / "run" / "hf").exists()
