"""Whole runs of train_logo.py on the tiny model: repeatable, independent of the number of processes, usable elsewhere."""
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import guard
import report
from checkpoint import load_pretrained
from configs import BadInput, load_config
from data import load_pairs
from loss import logo_loss
from pairs.answers import normalize
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny"
LORA = ("lora_r=8", "train_also=embed,norm")
# All weights at a larger RoPE base, where nothing else is said: whatever trains can be wrong. The file's own way is LoRA.
EVERYTHING = ["lora_r=0", "lora_alpha=16", "lora_targets=q_proj,k_proj,v_proj,o_proj", "yarn_factor=0", "rope_theta=3e5", "lr=1.5e-3", "sft_weight=0.5"]
AS_IN_THE_FILE = ("lora_r=16", "lora_targets=q_proj,k_proj", "yarn_factor=8", "rope_theta=0")
SMALL = [*EVERYTHING, "n_examples=40", "steps=4", "batch_size=8", "micro_batch=4", "held_out=4", "eval_interval=2", "fresh_sizes=[104]",
         "fresh_questions=10", "threads=1"]


def command(*args, processes=1, script="train_logo.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return {"args": [sys.executable, *launcher, script, *args], "cwd": ROOT, "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def launch(*args, processes=1, script="train_logo.py", **how):
    return subprocess.run(**command(*args, processes=processes, script=script), capture_output=True, **how)


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

    train.pairs = shared
    train()
    return train


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [m["loss"] for m in metrics(folder)] + [m["held_out"]["loss"] for m in metrics(folder) if "held_out" in m]


def test_the_same_command_gives_the_same_numbers(run):
    for a, b in zip(metrics(run()), metrics(run(again=1)), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert (run() / "hf" / "model.safetensors").read_bytes() == (run(again=1) / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("mode", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("args, processes", [
    (("micro_batch=1",), 1),
    ((), 2),
    (("compile=True",), 1),
    (("micro_batch=2", "checkpointing=True", "offload_activations=True"), 2),
    (("micro_batch=2", "shard_size=2"), 4),
    (("micro_batch=1", "checkpointing=True", "offload_params=True"), 4)])
def test_losses_do_not_depend_on_processes_accumulation_or_memory(run, mode, args, processes):
    one, other = run(*mode), run(*mode, *args, processes=processes)
    assert len(losses(one)) == len(losses(other)) == 6 and len(set(losses(one))) == 6
    assert losses(one) == pytest.approx(losses(other), abs=2e-4)
    norms = [[m["grad_norm"] for m in metrics(folder)] for folder in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # AdamW after clipping would hide a wrong scale


def test_the_learning_rate_by_hand(run):
    """One step of warm-up (a tenth of four, rounded up), then a cosine from the peak: 1, 3/4, 1/4, and 0 after the last."""
    assert [row["lr"] / 1.5e-3 for row in metrics(run())] == pytest.approx([1, 1, 0.75, 0.25])


def test_training_lowers_the_loss_and_the_result_says_so(run):
    result = json.loads((run() / "result.json").read_text())
    assert result["after"]["held_out"]["loss"] < result["before"]["held_out"]["loss"]
    assert result["before"]["right_answers"]["104"][1] == result["after"]["right_answers"]["104"][1] == 10
    assert result["config"]["steps"] == 4 and result["processes"] == 1 and set(result["seconds"]) >= {"pairs", "train"}
    assert (run() / "source" / "train_logo.py").read_text() == (ROOT / "train_logo.py").read_text()


@pytest.mark.parametrize("how", [(), AS_IN_THE_FILE], ids=["all weights, theta", "LoRA, YaRN"])
def test_the_export_opens_in_transformers(run, how):
    transformers = pytest.importorskip("transformers")
    folder = run(*how) / "hf"
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), load_pretrained(folder)
    tokens = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours.logits(tokens), atol=2e-5)
    assert theirs.config.max_position_embeddings == 1024
    base, query = load_pretrained(TINY), "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(base.get_parameter(query), ours.get_parameter(query))


@pytest.mark.parametrize("how", [(), AS_IN_THE_FILE], ids=["all weights, theta", "LoRA, YaRN"])
def test_the_first_loss_is_the_papers_formula_on_transformers_logits(run, how):
    """Held-out loss before any step, from full rows, transformers' logits, and Eq. 2 and 3 written out in float64."""
    transformers = pytest.importorskip("transformers")
    result = json.loads((run(*how) / "result.json").read_text())
    cfg = result["config"]
    settings = transformers.AutoConfig.from_pretrained(ROOT / cfg["model"])
    if cfg["rope_theta"]:
        settings.rope_parameters["rope_theta"] = cfg["rope_theta"]
    if cfg["yarn_factor"]:
        settings.rope_parameters.update(rope_type="yarn", factor=cfg["yarn_factor"],
                                        original_max_position_embeddings=settings.max_position_embeddings)
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / cfg["model"], config=settings, dtype=torch.float64)
    tokenizer, total = load_tokenizer(ROOT / cfg["model"]), 0.0
    pairs = load_pairs(cfg["pairs"], cfg, tokenizer)[-cfg["held_out"]:]
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
    for path in (TINY).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(content)
    return f"model={folder}"


def test_a_token_that_the_model_does_not_have_is_refused_before_any_step(tmp_path):
    """A tokenizer with an added word, as finetunes have; on a GPU an assert without a place."""
    given, pairs = tmp_path / "given", tmp_path / "pairs.jsonl"
    given.mkdir()
    spec = json.loads((TINY / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 600, "content": "<|more|>"})
    model = corrupt(given, "tokenizer.json", json.dumps(spec).encode())
    words = ["configs/tiny.py", *SMALL, "fresh_questions=0", f"out={tmp_path / 'run'}", model, f"pairs={pairs}"]
    built = subprocess.run([sys.executable, "-m", "pairs", *words], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    lines = pairs.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "chosen" in json.loads(line))
    row = json.loads(lines[place])
    row["chunks"][0][0] = 600
    lines[place] = json.dumps(row)
    pairs.write_text("\n".join(lines) + "\n")
    done = launch(*words, processes=0)
    assert done.returncode == 1 and "has the token id 600, the model in" in done.stderr, done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("case, message", [
    (lambda d: "gama=2", "unknown key 'gama', did you mean 'gamma'?"),
    (lambda d: f"model={d}/nowhere", "nowhere"),
    (lambda d: corrupt(d, "config.json", b"{"), "config.json: expected a JSON object, found"),
    (lambda d: corrupt(d, "model.safetensors", b"nothing"), "model.safetensors: not a readable safetensors file"),
    (lambda d: f"examples={d}/none.jsonl", "none.jsonl: no such file"),
    (lambda d: "window=100", "lower n_chunks or chunk_size"),
    (lambda d: "micro_batch=3", "batch_size is 8, expected a multiple of"),
    (lambda d: "held_out=40", "held_out is 40, expected less than n_examples=40"),
    (lambda d: "evals=['nedle']", "evals: 'nedle': expected: python -m evals needle|"),
    (lambda d: "evals=['needle\\tlength=[5]']", "unknown key 'length', did you mean 'lengths'?"),
    (lambda d: "evals=['questions\\tconfigs/none.py']", "configs/none.py: no such file"),
    (lambda d: "evals=['\"']", "No closing quotation"),
    (lambda d: "lora_r=8 lora_targets=query", "lora_targets='query': expected some of q_proj,"),
    (lambda d: f"lora_r=8 adapter={d}", "adapter_config.json: cannot be read"),
    (lambda d: "shard_size=3", "shard_size is 3, expected a divisor of 1 processes"),
    (lambda d: "checkpointing=False offload_activations=True", "expected False where checkpointing=False"),
    (lambda d: "out=/proc/nowhere", "/proc/nowhere: cannot be written"),
])
def test_bad_input_ends_with_one_line_and_leaves_nothing(tmp_path, case, message):
    given = tmp_path / "given"
    given.mkdir()
    done = launch("configs/tiny.py", *SMALL, f"out={tmp_path / 'run'}", *case(given).split(), processes=0)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.stderr
    assert not (tmp_path / "run" / "pairs.jsonl").exists() and not (tmp_path / "run" / "hf").exists()


def test_a_file_that_is_no_configuration_ends_with_one_line():
    done = launch("README.md", processes=0)
    assert done.returncode == 1 and done.stderr == "error: README.md: expected a Python file, as configs/tiny.py\n"


def test_under_torchrun_the_cause_stands_at_both_ends_of_its_report():
    done = launch("configs/tiny.py", "gama=2", processes=2)
    first, last = done.stderr.index("unknown key 'gama'"), done.stderr.rindex("unknown key 'gama'")
    assert done.returncode == 1 and done.stderr.index("error: ") < first
    assert "this is the cause" in done.stderr and "python train_logo.py" in done.stderr
    after = done.stderr[last:].splitlines()  # torchrun's report ends with it, on the line before its border
    assert first < done.stderr.index("FAILED") < last and len(after) == 2 and set(after[1]) == {"="}


@pytest.mark.parametrize("when", ["right answers", "pairs"])
def test_ctrl_c_before_training_is_one_line_and_the_same_command_goes_on(tmp_path, when):
    words = ("configs/tiny.py", *SMALL, "workers=1", "build_batch=2", f"out={tmp_path}", "fresh_sizes=[104,1000]")
    going = subprocess.Popen(**command(*words, processes=0), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    path = tmp_path / "pairs.jsonl"
    while going.poll() is None:
        if when == "pairs" and path.exists() and len(path.read_text().splitlines()) > 5:
            break
        if when != "pairs" and "right answers" in going.stdout.readline():
            break
        time.sleep(0.01)
    going.send_signal(signal.SIGINT)
    _, err = going.communicate()
    lines = [line for line in err.splitlines() if " so far" not in line]  # progress, on a slow machine
    assert going.returncode == 130 and len(lines) == 1 and "the same command goes on" in lines[0], err
    written = path.read_text().splitlines() if path.exists() else []
    assert len(written) < 41 and bool(written) == (when == "pairs")
    done = launch(*words, "fresh_questions=0", processes=0)
    assert done.returncode == 0, done.stderr
    assert path.read_text().splitlines()[:len(written)] == written and len(path.read_text().splitlines()) == 41


# ------------------------------------------------------------------------------------------------ kill and resume

def arguments(run, folder, *more):
    return ("configs/tiny.py", *SMALL, "fresh_questions=0", f"pairs={run.pairs}", f"out={folder}", *more)


def same_run(a, b):
    """Every step once, with the same numbers, and the same exported bytes."""
    for one, other in zip(metrics(a), metrics(b), strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert (a / "hf" / "model.safetensors").read_bytes() == (b / "hf" / "model.safetensors").read_bytes()


def kill(process):
    """kill -9 of a launcher and all that it started (torchrun's workers lead sessions of their own)."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(path.parent.name))
        except (OSError, IndexError):  # gone meanwhile
            continue
    family = [process.pid]
    for pid in family:
        family += parents.get(pid, [])
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(run, tmp_path, processes):
    """kill -9 of all processes, in start-up, steps and saving. NANOLOGO_KILLS=20 for the long form."""
    kills, rng = int(os.environ.get("NANOLOGO_KILLS", 2)), random.Random(processes)
    more = (f"steps={20 * kills}", "save_interval=1", *LORA)
    reference = launch(*arguments(run, tmp_path / "alone", *more), processes=processes)
    assert reference.returncode == 0, reference.stderr
    folder, log, seen = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl", []
    for number in range(kills):
        before = log.read_bytes() if log.exists() else b""
        going = subprocess.Popen(**command(*arguments(run, folder, *more, "resume=auto"), processes=processes),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while going.poll() is None and (log.read_bytes() if log.exists() else b"") in (before, b""):
            time.sleep(0.01)  # until it steps
        time.sleep(rng.random() * 0.6)
        while number % 2 and going.poll() is None and not list(folder.glob("step_*.tmp")):
            continue  # every second one dies while it saves
        kill(going)
        seen.append((len(metrics(folder)) if log.read_bytes().endswith(b"\n") else -1,
                     bool(list(folder.glob("*.tmp"))), going.communicate()[1][-300:]))
    done = launch(*arguments(run, folder, *more, "resume=auto"), processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    print([(steps, "in saving" if tmp else "") for steps, tmp, _ in seen])
    assert "resumed from" in done.stdout, seen
    same_run(tmp_path / "alone", folder)
    assert len(list(folder.glob("step_*"))) <= 3 and not list(folder.glob("*.tmp"))  # the last two and the best


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_when_asked(run, tmp_path, number):
    folder, more = tmp_path / "stopped", ("steps=30", "save_interval=0")
    going = subprocess.Popen(**command(*arguments(run, folder, *more), processes=0), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while going.poll() is None and not ((folder / "metrics.jsonl").exists() and len(metrics(folder)) >= 3):
        time.sleep(0.01)
    going.send_signal(number)
    out, err = going.communicate()
    assert going.returncode == 0 and not err and "resume=auto goes on from" in out, (going.returncode, out, err)
    saved = int(list(folder.glob("step_*"))[0].name[5:])
    assert [m["step"] for m in metrics(folder)] == list(range(1, saved + 1)) and saved < 30
    again = launch(*arguments(run, folder, *more), processes=0)
    assert again.returncode == 1 and "resume=auto goes on from it" in again.stderr and len(again.stderr.splitlines()) == 1
    done = launch(*arguments(run, folder, *more, "resume=auto"), processes=0)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert [m["step"] for m in metrics(folder)] == list(range(1, 31))


@pytest.mark.parametrize("mode", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1), (2, 4)])
def test_another_number_of_processes_goes_on_with_the_same_losses(run, tmp_path, mode, first, then):
    more = ("save_interval=2", "steps=6", "keep=9", "micro_batch=1", *mode)
    done = launch(*arguments(run, tmp_path, *more), processes=first)
    assert done.returncode == 0, done.stderr
    alone = losses(tmp_path)
    for name in ("step_000006", "step_000004"):
        shutil.rmtree(tmp_path / name)
    done = launch(*arguments(run, tmp_path, *more, "resume=auto"), processes=then)
    assert done.returncode == 0 and "step_000002" in done.stdout, done.stderr
    assert losses(tmp_path) == pytest.approx(alone, abs=2e-4) and len(set(alone)) == len(alone) == 9


@pytest.fixture(scope="module")
def checkpointed(run, tmp_path_factory):
    """A finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("checkpointed")
    done = launch(*arguments(run, folder, "save_interval=2", *LORA), processes=1)
    assert done.returncode == 0, done.stderr
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(path):
    path.write_bytes(path.read_bytes().replace(b'"step": 4', b'"step": 3'))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage, name", [(truncate, "shard_0_of_1.safetensors"), (flip, "shard_0_of_1.safetensors"),
                                          (edit, "state.json"), (truncate, "state.json"), (os.remove, "shard_0_of_1.safetensors"),
                                          (os.remove, "state.json")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, checkpointed, tmp_path, damage, name):
    folder = shutil.copytree(checkpointed, tmp_path / "run")
    damage(folder / "step_000004" / name)
    done = launch(*arguments(run, folder, "save_interval=2", *LORA, "resume=auto"), processes=0)
    warnings = [text for text in done.stdout.splitlines() if text.startswith("warning")]
    assert done.returncode == 0 and len(warnings) == 1 and f"step_000004/{name}" in warnings[0], done.stdout + done.stderr
    assert "resumed from" in done.stdout and "step_000002" in done.stdout
    same_run(checkpointed, folder)


@pytest.mark.parametrize("change, message", [
    (("lr=0.1",), "was saved with lr=0.0015, now it is 0.1"),
    (("steps=9",), "was saved with steps=4, now it is 9"),
    (("lora_r=4",), "was saved with lora_r=8, now it is 4"),
    (("resume=nowhere",), "nowhere/state.json: cannot be read"),
    (("pairs=PAIRS",), "not the pairs that")])
def test_a_changed_config_is_refused_and_nothing_is_touched(run, checkpointed, tmp_path, change, message):
    other = tmp_path / "pairs.jsonl"
    other.write_text(run.pairs.read_text().replace("carves", "bakes"))
    change = [text.replace("PAIRS", str(other)) for text in change]
    files = {path: path.read_bytes() for path in checkpointed.rglob("*") if path.is_file()}
    done = launch(*arguments(run, checkpointed, "save_interval=2", *LORA, "resume=auto", *change), processes=0)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in checkpointed.rglob("*") if path.is_file() and path.name != "config.json"} == {
        path: content for path, content in files.items() if path.name != "config.json"}


@pytest.mark.parametrize("key", ["before", "held_out", "pairs", "skipped", "updates"])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, key):
    cfg = load_config(["configs/tiny.py"])
    state = dict.fromkeys(("before", "held_out", "pairs", "skipped", "updates")) | {"config": cfg}
    guard.check_resumable("step_000002", state, cfg)
    del state[key]
    with pytest.raises(BadInput, match=f"^step_000002: '{key}' is not in its state.json"):
        guard.check_resumable("step_000002", state, cfg)


def test_a_checkpoint_of_before_a_key_was_is_one_of_its_default():
    cfg = {**load_config(["configs/tiny.py"]), "yarn_factor": 0.0}
    state = dict.fromkeys(("before", "held_out", "pairs", "skipped", "updates")) | {"config": dict(cfg)}
    del state["config"]["yarn_factor"]
    guard.check_resumable("step_000002", state, cfg)
    with pytest.raises(BadInput, match="^step_000002: was saved with yarn_factor=0.0, now it is 8.0"):
        guard.check_resumable("step_000002", state, {**cfg, "yarn_factor": 8.0})


def test_a_run_resumed_at_its_end_elsewhere_asks_what_was_not_asked(run, checkpointed, tmp_path):
    """It has no metrics of its own to draw, and no count before of questions that its first part did not ask."""
    done = launch(*arguments(run, tmp_path / "b", "save_interval=2", *LORA, f"resume={checkpointed}/step_000004", "fresh_sizes=[60]",
                             "fresh_questions=2"), processes=0)
    assert done.returncode == 0 and "no picture of the run: " in done.stdout, done.stderr
    assert re.search(r"right answers, context 60 +not asked +\d of 2", done.stdout), done.stdout
    assert json.loads((tmp_path / "b" / "result.json").read_text())["after"]["right_answers"]["60"][1] == 2


def test_a_run_without_held_out_pairs_resumes_and_ends(run, tmp_path):
    how = arguments(run, tmp_path, "save_interval=2", "held_out=0", *LORA)
    assert launch(*how, processes=0).returncode == 0
    for name in ("step_000004", "hf"):
        shutil.rmtree(tmp_path / name)
    for _ in range(2):  # from the middle, and from the end
        done = launch(*how, "resume=auto", processes=0)
        assert done.returncode == 0 and "Where everything lies:" in done.stdout, done.stderr


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(run, checkpointed, tmp_path):
    """A limit on the size of files stands for the disk: of step 4's checkpoint and of the export, nothing is left."""
    folder = shutil.copytree(checkpointed, tmp_path / "run")
    for name in ("hf", "adapter", "step_000004"):
        shutil.rmtree(folder / name)
    small = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))}
    full = launch(*arguments(run, folder, "save_interval=2", *LORA, "resume=auto"), processes=0, **small)
    warnings = [text for text in full.stdout.splitlines() if text.startswith("warning")]
    assert len(warnings) == 1 and "step_000004: cannot be written" in warnings[0], full.stdout + full.stderr
    assert full.returncode == 1 and len(full.stderr.splitlines()) == 1, full.stderr
    assert full.stderr.startswith("error: ") and "adapter: cannot be written" in full.stderr
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["source", "step_000002"]
    done = launch(*arguments(run, folder, "save_interval=2", *LORA, "resume=auto"), processes=0)
    assert done.returncode == 0, done.stderr
    same_run(checkpointed, folder)


def test_an_export_that_cannot_be_written_ends_all_processes_with_the_cause(run, tmp_path):
    """The disk refuses the adapter: the other process must not go on to gather the merged model, alone."""
    small = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))}
    done = launch(*arguments(run, tmp_path, "save_interval=0", *LORA), processes=2, timeout=120, **small)
    assert done.returncode == 1 and "adapter: cannot be written" in done.stderr, done.stderr
    assert "gloo" not in done.stderr and "SIGABRT" not in done.stderr, done.stderr
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "hf").exists()


def pairs_as_if_built_with(run, folder, **changed):
    """A copy of the pairs whose header names another policy: for tests that need no answers of its own."""
    header, *lines = run.pairs.read_text().splitlines()
    settings = {**json.loads(header)["settings"], **changed}
    path = folder / "pairs.jsonl"
    path.write_text("\n".join([json.dumps({"settings": settings}), *lines]) + "\n")
    return path


def untied(run, folder, change=lambda weights: None):
    """Arguments of a run on a copy of the tiny model whose head is a tensor of its own, with the same pairs."""
    model = shutil.copytree(TINY, folder / "model", ignore=lambda *_: ["world.py", "make.py", "__pycache__"])
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    change(weights)
    save_file(weights, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    pairs = pairs_as_if_built_with(run, folder, model=str(model))
    return ("configs/tiny.py", *SMALL, "fresh_questions=0", f"model={model}", f"pairs={pairs}", f"out={folder / 'run'}")


# ----------------------------------------------------------------------------------------- pairs at fault

def poison(token, weights):
    weights["model.embed_tokens.weight"][token].fill_(math.nan)


def poisoned(run, folder, holders_wanted):
    """(arguments of a run, ids): an embedding that is NaN, of a token that so many training pairs hold, these ids, and no
    held-out one; the first step has one of them."""
    cfg, tokenizer = load_config(["configs/tiny.py", *SMALL]), load_tokenizer(TINY)
    train, held_out = data.split_pairs(load_pairs(run.pairs, cfg, tokenizer), cfg["held_out"])
    first = {train[sample.pair]["id"] for sample in data.step_samples(len(train), cfg, 0)}
    holders = {}
    for pair in train + held_out:
        for token in set(data.encode_group(pair, tokenizer, cfg).tokens.tolist()):
            holders.setdefault(token, set()).add(pair["id"])
    seen = {pair["id"] for pair in held_out}
    for token, ids in sorted(holders.items()):
        if holders_wanted(ids, len(train) + len(held_out)) and (ids & first) and (len(ids) > 9 or not ids & seen):
            return untied(run, folder, partial(poison, token)), ids
    raise AssertionError("no such token")


def few(ids, n):
    return len(ids) in (2, 3)


def everybody(ids, n):
    return len(ids) == n


FAULTY = ("steps=16", "save_interval=4", "keep=9")


@pytest.fixture(scope="module")
def faulty(run, tmp_path_factory):
    """A finished run with some pairs that are not finite: (arguments, ids, folder of the model, of the run)."""
    folder = tmp_path_factory.mktemp("faulty")
    arguments, ids = poisoned(run, folder, few)
    done = launch(*arguments, *FAULTY, "log_interval=100", processes=0)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return arguments, ids, folder, done.stdout


def test_a_pair_that_is_not_finite_is_left_out_by_name_and_the_run_goes_on(faulty):
    _, ids, folder, out = faulty
    steps = metrics(folder / "run")
    found = [i for m in steps for i in m.get("skipped", [])]
    assert sorted(found) == sorted(ids) and "skipped" in steps[0]  # each pair once, all of them, no others
    assert all(math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]) for m in steps)
    named = [line for line in out.splitlines() if "not finite" in line]
    assert len(named) == sum("skipped" in m for m in steps) and str(steps[0]["skipped"]) in named[0]
    states = [json.loads((folder / "run" / f"step_{step:06d}" / "state.json").read_text()) for step in (4, 16)]
    assert states[1]["skipped"] == sorted(ids) == json.loads((folder / "run" / "result.json").read_text())["skipped"]
    assert set(states[0]["skipped"]) == {i for m in steps[:4] for i in m.get("skipped", [])}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_held_out_pair_that_is_not_finite_is_left_out_by_name(run, tmp_path, processes):
    """Of the means alone: they are those of the other pairs, before training and after, and a resumed run knows it."""
    cfg, tokenizer = load_config(["configs/tiny.py", *SMALL]), load_tokenizer(TINY)
    train, held_out = data.split_pairs(load_pairs(run.pairs, cfg, tokenizer), cfg["held_out"])
    holders = {}
    for pair in train + held_out:
        for token in set(data.encode_group(pair, tokenizer, cfg).tokens.tolist()):
            holders.setdefault(token, set()).add(pair["id"])
    bad = held_out[-1]["id"]
    token = min(token for token, ids in holders.items() if ids == {bad})
    words = untied(run, tmp_path, partial(poison, token))
    done = launch(*words, "save_interval=2", processes=processes)
    assert done.returncode == 0 and f"left out from here on: held-out pairs [{bad}]" in done.stdout, done.stderr
    assert "held-out (3 pairs)" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["skipped"] == [bad] and all("skipped" not in m for m in metrics(tmp_path / "run"))
    model = load_pretrained(tmp_path / "model")
    model.config.extend(cfg["window"], cfg["rope_theta"], cfg["yarn_factor"])
    alone = []
    for pair in held_out[:-1]:
        group = data.encode_group(pair, tokenizer, cfg)
        with torch.no_grad():
            sums, lengths = model(group.tokens, group.positions, group.targets, group.segments)
        logps = (sums / lengths).view(1, -1)
        alone.append(float(logo_loss(logps[:, 0], logps[:, 1:], cfg["beta"], cfg["gamma"], cfg["sft_weight"])[0]))
    assert result["before"]["held_out"]["loss"] == pytest.approx(sum(alone) / 3, rel=1e-5)
    after = result["after"]["held_out"]
    assert all(math.isfinite(value) for value in after.values())
    shutil.rmtree(tmp_path / "run" / "step_000004")
    done = launch(*words, "save_interval=2", "resume=auto", processes=processes)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["after"]["held_out"] == after


def test_the_steps_other_pairs_count_alike(faulty):
    """The first step's loss is the mean over the pairs that are left, computed one by one."""
    _, ids, folder, _ = faulty
    cfg = json.loads((folder / "run" / "config.json").read_text())
    tokenizer, model = load_tokenizer(TINY), load_pretrained(folder / "model")
    model.config.extend(cfg["window"], cfg["rope_theta"], cfg["yarn_factor"])
    train, _ = data.split_pairs(load_pairs(cfg["pairs"], cfg, tokenizer), cfg["held_out"])
    losses = []
    for pair, draw, epoch in data.step_samples(len(train), cfg, 0):
        if train[pair]["id"] not in ids:
            group = data.encode_group(train[pair], tokenizer, cfg, draw, epoch)
            with torch.no_grad():
                sums, lengths = model(group.tokens, group.positions, group.targets, group.segments)
            logps = (sums / lengths).view(1, -1)
            losses.append(float(logo_loss(logps[:, 0], logps[:, 1:], cfg["beta"], cfg["gamma"], cfg["sft_weight"])[0]))
    assert 4 < len(losses) < 8 and metrics(folder / "run")[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("processes, more", [(2, ()), (4, ("micro_batch=1",)), (2, ("micro_batch=1", "lora_r=8"))])
def test_all_processes_leave_the_same_pairs_out(faulty, tmp_path, processes, more):
    arguments, ids, folder, _ = faulty
    done = launch(*arguments, *FAULTY, *more, f"out={tmp_path}", processes=processes)
    assert done.returncode == 0, done.stderr
    assert [m.get("skipped") for m in metrics(tmp_path)] == [m.get("skipped") for m in metrics(folder / "run")]
    if "lora_r=8" not in more:
        assert losses(tmp_path) == pytest.approx(losses(folder / "run"), abs=2e-4)


def test_a_resumed_run_leaves_out_what_its_checkpoint_names(faulty, tmp_path):
    arguments, ids, folder, _ = faulty
    again = shutil.copytree(folder / "run", tmp_path / "run")
    for step in (8, 12, 16):
        shutil.rmtree(again / f"step_{step:06d}")
    done = launch(*arguments, *FAULTY, f"out={again}", "resume=auto", processes=0)
    assert done.returncode == 0 and "step_000004" in done.stdout, done.stderr
    same_run(folder / "run", again)


def test_several_steps_in_a_row_that_are_not_finite_end_the_run_in_one_line(run, tmp_path):
    """A token that all pairs hold: then it is not the pairs, and no weight has been touched."""
    arguments, ids = poisoned(run, tmp_path, everybody)
    done = launch(*arguments, "steps=16", "save_interval=1", processes=0)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "in 3 steps in a row a loss or a gradient was not finite" in done.stderr and len(metrics(tmp_path / "run")) == 3
    assert done.stdout.count("not written, since no step has changed a weight") == 2
    assert not list((tmp_path / "run").glob("step_*"))


def test_a_step_without_a_usable_pair_changes_nothing_and_resuming_knows_it(faulty, tmp_path):
    """Steps of one pair: where it is at fault, the weights stay, and AdamW's count of updates falls behind."""
    arguments, ids, _, _ = faulty
    words = ("batch_size=1", "micro_batch=1", "steps=12", "save_interval=1", "keep=99")
    done = launch(*arguments, *words, f"out={tmp_path / 'run'}", processes=0)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "run")
    void = [m["step"] for m in steps if "skipped" in m]
    assert void and len(void) < 4 and all(math.isnan(steps[step - 1]["loss"]) for step in void)
    for step in [step for step in void if step > 1]:
        one, other = (load_file(tmp_path / "run" / f"step_{i:06d}" / "shard_0_of_1.safetensors") for i in (step - 1, step))
        assert all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in range(void[0] + 2, 13):
        shutil.rmtree(again / f"step_{step:06d}")
    done = launch(*arguments, *words, f"out={again}", "resume=auto", processes=0)
    assert done.returncode == 0 and f"step_{void[0] + 1:06d}" in done.stdout, done.stderr
    assert [str(m["loss"]) for m in metrics(again)] == [str(m["loss"]) for m in steps]
    assert (again / "hf" / "model.safetensors").read_bytes() == (tmp_path / "run" / "hf" / "model.safetensors").read_bytes()


def test_weight_decay_shrinks_matrices_and_nothing_else(run, tmp_path):
    """With a loss that is constant, decay is all that moves a weight."""
    done = launch(*untied(run, tmp_path), "beta=0", "sft_weight=0", "weight_decay=10", "lora_targets=q_proj", "lora_r=4",
                  "train_also=embed,norm,lm_head,mlp", processes=0)
    assert done.returncode == 0, done.stderr
    base, now = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "run" / "hf"))
    for name, weight in base.items():
        decays = "mlp" in name or "lm_head" in name  # not the norms, not the table of embeddings, not LoRA's base or B
        assert torch.equal(weight, now[name]) != decays, name
        assert now[name].norm() < weight.norm() or not decays


# ------------------------------------------------------------------------------------------------ Qwen

def as_qwen(run, folder, family):
    """Arguments of a run on the tiny model with Qwen2's biases or with Qwen3's norms on q and k, random ones."""
    rng = torch.Generator().manual_seed(0)

    def change(weights):
        for layer in range(3):
            attention = f"model.layers.{layer}.self_attn"
            for name, size in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)) if family == "qwen2" else ():
                weights[f"{attention}.{name}.bias"] = 0.1 * torch.randn(size, generator=rng)
            for name in ("q_norm", "k_norm") if family == "qwen3" else ():
                weights[f"{attention}.{name}.weight"] = 2 + 0.3 * torch.randn(32, generator=rng)

    arguments = untied(run, folder, change)
    path = folder / "model" / "config.json"
    config = {**json.loads(path.read_text()), "model_type": family, "sliding_window": 64, "use_sliding_window": False,
              "architectures": [f"{family.title()}ForCausalLM"]}
    path.write_text(json.dumps(config))
    return arguments


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_trains_alike_sharded_and_its_exports_open(run, tmp_path, family):
    """LoRA on q and v; what train_also names also has the norms on q and k, and the biases are frozen."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    how = (*as_qwen(run, tmp_path, family), "lora_targets=q_proj,v_proj", "lr=0.01", *LORA)
    folders = tmp_path / "one", tmp_path / "two"
    for processes, folder in enumerate(folders, 1):
        done = launch(*how, "micro_batch=2", f"out={folder}", processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(losses(folders[0]))) == 6 and losses(folders[0]) == pytest.approx(losses(folders[1]), abs=2e-4)
    base = load_file(tmp_path / "model" / "model.safetensors")
    now = load_file(folders[1] / "hf" / "model.safetensors")
    assert now.keys() == base.keys()
    for name, weight in base.items():
        moved = any(part in name for part in ("embed", "norm", "q_proj.weight", "v_proj.weight"))
        assert torch.equal(now[name], weight) != moved, name

    merged = transformers.AutoModelForCausalLM.from_pretrained(folders[1] / "hf")
    assert type(merged).__name__ == f"{family.title()}ForCausalLM" and merged.config.sliding_window is None
    config = transformers.AutoConfig.from_pretrained(folders[1] / "adapter")  # the longer window, the larger RoPE base
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config)
    theirs = peft.PeftModel.from_pretrained(theirs, folders[1] / "adapter")
    tokens = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_pretrained(folders[1] / "hf").logits(tokens)
        assert torch.allclose(merged(tokens).logits, logits, atol=2e-5)
        assert torch.allclose(theirs(tokens).logits, logits, atol=2e-5)
        assert (load_pretrained(tmp_path / "model").logits(tokens) - logits).abs().max() > 0.01


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwens_biases_and_norms_do_not_decay(run, tmp_path, family):
    done = launch(*as_qwen(run, tmp_path, family), "beta=0", "sft_weight=0", "weight_decay=10", "lora_r=0", "train_also=",
                  processes=0)
    assert done.returncode == 0, done.stderr
    base, now = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "run" / "hf"))
    for name, weight in base.items():
        decays = "proj.weight" in name or "lm_head" in name
        assert torch.equal(weight, now[name]) != decays, name


# -------------------------------------------------------------------------------------------- LoRA and its exports

def test_lora_trains_what_it_says_and_keeps_moments_of_nothing_else(checkpointed):
    state = load_file(checkpointed / "step_000004" / "shard_0_of_1.safetensors")
    named = {name.removesuffix(".exp_avg").removesuffix(".exp_avg_sq") for name in state}
    assert all("lora_" in name or "embed" in name or "norm" in name for name in named) and len(state) == 3 * len(named)
    base, hf = load_file(TINY / "model.safetensors"), load_file(checkpointed / "hf" / "model.safetensors")
    adapter = load_file(checkpointed / "adapter" / "adapter_model.safetensors")
    for name, weight in base.items():
        A = adapter.get("base_model.model." + name.replace(".weight", ".lora_A.weight"))
        if A is not None:  # frozen below its LoRA: the export is exactly base + alpha / r B A
            B = adapter["base_model.model." + name.replace(".weight", ".lora_B.weight")]
            assert torch.equal(hf[name], weight + 2.0 * (B @ A)) and B.abs().max() > 0
        else:
            assert torch.equal(hf[name], weight) == ("mlp" in name), name


def test_the_adapter_in_peft_gives_the_merged_models_logits(checkpointed):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(checkpointed / "adapter")  # the longer window, the larger RoPE base
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, config=config)
    theirs = peft.PeftModel.from_pretrained(base, checkpointed / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(checkpointed / "hf")
    ours = load_pretrained(checkpointed / "hf")
    tokens = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours.logits(tokens)
        assert torch.allclose(merged(tokens).logits, logits, atol=2e-5)
        # In float64: PEFT adds B A x to W x, the export is (W + B A) x, which round apart by some 4e-5 in float32.
        exact = ours.double().logits(tokens)
        assert torch.allclose(theirs.double()(tokens).logits, exact, atol=1e-5)
        assert not torch.allclose(base.get_base_model()(tokens).logits if hasattr(base, "get_base_model") else
                                  load_pretrained(TINY).logits(tokens), logits, atol=1e-2)
    assert config.max_position_embeddings == 1024 and merged.config.max_position_embeddings == 1024


def test_an_adapter_goes_on_training_and_a_checkpoint_merges(run, checkpointed, tmp_path):
    adapter = f"adapter={checkpointed / 'adapter'}"
    refused = launch(*arguments(run, tmp_path / "other", *LORA, adapter), processes=0)
    assert refused.returncode == 1 and "was built with adapter=''" in refused.stderr  # another policy's answers
    pairs = pairs_as_if_built_with(run, tmp_path, adapter=str(checkpointed / "adapter"))
    done = launch(*arguments(run, tmp_path / "more", *LORA, adapter, f"pairs={pairs}"), processes=0)
    assert done.returncode == 0, done.stderr
    assert f"loss {json.loads((checkpointed / 'result.json').read_text())['after']['held_out']['loss']:.4f}" in done.stdout.split("held-out")[0]
    first, last = (text for text in done.stdout.splitlines() if "|grad|" in text)
    assert done.stdout.index("expected peak memory of a process: ") < done.stdout.index("step     0")
    assert "tokens/s" not in first and "tokens/s" in last and "TFLOP/s" in last and last.endswith("left 0:00:00")
    wrong = launch(*arguments(run, tmp_path / "wrong", "lora_r=4", "train_also=embed,norm", adapter), processes=0)
    assert wrong.returncode == 1 and "was made with lora_r=8, this run has lora_r=4" in wrong.stderr
    # What trains is another thing: said before pairs are built, not when the adapter is filled in.
    for words in (("lora_r=8", "train_also=embed"), (*LORA, "lora_targets=q_proj,v_proj")):
        wrong = launch(*arguments(run, tmp_path / "wrong", *words, adapter, f"pairs={tmp_path / 'none.jsonl'}"), processes=0)
        assert wrong.returncode == 1 and "is not a tensor of this model" in wrong.stderr and not wrong.stdout, wrong.stderr
    assert not (tmp_path / "none.jsonl").exists()
    for source in ("adapter", "step_000004"):
        out = tmp_path / f"merged_{source}"
        merged = launch("merge", str(checkpointed / source), str(out), processes=0, script="checkpoint.py")
        assert merged.returncode == 0, merged.stderr
        for name in ("model.safetensors", "tokenizer.json"):
            assert (out / name).read_bytes() == (checkpointed / "hf" / name).read_bytes(), (source, name)
        assert json.loads((out / "config.json").read_text()) == json.loads((checkpointed / "hf" / "config.json").read_text())


# -------------------------------------------------------------------------------------------- guard.py, and what a run holds

LARGE = """
import subprocess, sys
held = bytearray(b"x") * (640 * 2**20)
subprocess.run([sys.executable, "-c", "import guard, torch; print(guard.peak_memory(torch.device('cpu')))"], check=True)
"""


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    if not os.path.exists("/proc/self/status") or "VmHWM" not in Path("/proc/self/status").read_text():
        pytest.skip("the system does not tell a process's own peak")
    found = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**26 < int(found.stdout) < 640 * 2**20


def test_a_system_that_does_not_tell_the_peak_costs_no_run(monkeypatch):
    monkeypatch.setattr("guard.re.search", lambda pattern, text: None)
    assert guard.peak_memory(torch.device("cpu")) > 2**26


def test_evaluations_never_see_an_older_models_weights(checkpointed, tmp_path, capfd):
    """A killed run's leftovers go first; where the merge fails nothing is measured, and a warning says so."""
    folder = shutil.copytree(checkpointed, tmp_path / "run")
    stale = shutil.copytree(TINY, folder / "eval" / "step_000004" / "step_000004")
    commands = ["needle lengths=[104] depths=[50] samples=1"]
    guard.evaluate_checkpoint(str(folder), 4, commands)
    measured = folder / "eval" / "step_000004" / "needle.json"
    assert measured.exists() and not stale.exists() and "warning" not in capfd.readouterr().out
    measured.unlink()
    shutil.copytree(TINY, stale)
    truncate(folder / "step_000004" / "state.json")
    guard.evaluate_checkpoint(str(folder), 4, commands)
    assert not measured.exists() and not stale.exists() and "merge" in capfd.readouterr().out.split("warning")[1]


def test_an_evaluation_finds_the_memory_that_training_has_freed(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    monkeypatch.setattr(guard, "run_script", lambda *words: done.append(words[1]) or True)
    guard.evaluate_checkpoint(str(tmp_path), 4, ["needle lengths=[104]"])
    assert done == ["empty_cache", "merge", "evals"]


def test_a_run_evaluates_its_checkpoints(run, tmp_path):
    words = ("save_interval=4", "evals=['needle lengths=[104] depths=[50] samples=1']", "micro_batch=1")
    done = launch(*arguments(run, tmp_path, *words), processes=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "eval" / "step_000004" / "needle.json").exists() and "warning" not in done.stdout


TIMEOUTS = """
import sys; sys.path.insert(0, sys.argv[1])
import guard, torch, torch.distributed as dist
guard.init_processes(torch.device("cpu"))
mesh, flat = guard.make_mesh("cpu", 4, 2), guard.make_mesh("cpu", 4, 4)
groups = [dist.group.WORLD, *(mesh.get_group(dim) for dim in range(mesh.ndim)), flat.get_group()]
if dist.get_rank() == 3:
    print(mesh.mesh_dim_names, mesh.get_coordinate(), [dist.get_process_group_ranks(group) for group in groups[1:3]],
          {group._get_backend(torch.device("cpu")).options._timeout for group in groups})
"""


def test_no_group_of_a_hybrid_mesh_gives_up_before_the_default_group(tmp_path):
    script = tmp_path / "timeouts.py"
    script.write_text(TIMEOUTS)
    done = launch(str(ROOT), processes=4, script=str(script))
    assert done.stdout == "('replicate', 'shard') (1, 1) [[1, 3], [2, 3]] {datetime.timedelta(days=1)}\n", done.stderr


SPY = """
import gc, json, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
note = sys.argv.pop(1)
import bench.plan, checkpoint, guard
from model import Llama

def spied(folder, *args, **kwargs):
    if str(folder).endswith("hf"):
        alive = [each for each in gc.get_objects() if isinstance(each, Llama)]
        json.dump({"alive": len(alive)}, open(note, "w"))
    return original(folder, *args, **kwargs)

original, checkpoint.load_pretrained = checkpoint.load_pretrained, spied
bench.plan.peak_flops = lambda device: 1e9
runpy.run_path("train_logo.py", run_name="__main__")
"""


def test_the_trained_model_is_gone_before_its_export_is_loaded_and_a_step_names_its_speed(run, tmp_path):
    script, note = tmp_path / "spy.py", tmp_path / "note.json"
    script.write_text(SPY)
    words = arguments(run, tmp_path / "run", "fresh_questions=2", "log_interval=1")
    done = launch(str(ROOT), str(note), *words, processes=0, script=str(script))
    assert done.returncode == 0, done.stderr
    assert json.loads(note.read_text()) == {"alive": 0}
    shown = [line for line in done.stdout.splitlines() if "|grad|" in line]
    assert len(shown) == 4 and "tokens/s" not in shown[0]
    for line, m in list(zip(shown, metrics(tmp_path / "run"), strict=True))[1:]:
        speed, work = m["tokens"] / m["seconds"], m["tflop"] / m["seconds"]  # an imagined device of 1e9 FLOP/s
        assert f"  {speed:7,.0f} tokens/s  {work:6.3g} TFLOP/s  MFU {work * 1e5:.1f}%  left 0:00:" in line
        assert f"  lr {m['lr']:.2e}  " in line


def test_a_steps_speed_by_hand():
    metrics = {"tokens": 8000.0, "tflop": 500.0, "seconds": 2.0}
    assert report.throughput(metrics, None, 8, 3725) == "    4,000 tokens/s     250 TFLOP/s  left 1:02:05"
    assert "  MFU 10.0%" in report.throughput(metrics, 312.5e12, 8, 0)


LOADED = """
import os, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import console
console.leave = lambda code: print("loaded", sorted(name for name in sys.modules if name.split(".")[0] in ("pairs", "evals")))
runpy.run_path("train_logo.py", run_name="__main__")
"""


def test_training_alone_loads_neither_pairs_nor_evaluations(run, checkpointed, tmp_path):
    folder, script = shutil.copytree(checkpointed, tmp_path / "run"), tmp_path / "loaded.py"
    script.write_text(LOADED)
    shutil.rmtree(folder / "step_000004")
    done = launch(str(ROOT), *arguments(run, folder, "save_interval=2", *LORA, "resume=auto"), processes=0, script=str(script))
    pictures = ["evals", "evals.curves", "evals.pictures"]  # of the end
    assert "resumed from" in done.stdout and f"loaded {pictures}" in done.stdout, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------- before and after, a dry run

def test_the_end_says_what_changed_and_what_to_type_and_so_does_the_result(run, tmp_path):
    """The same with two processes and on resume; and what is to be typed runs."""
    words = ("configs/tiny.py", *SMALL, f"pairs={run.pairs}", "fresh_sizes=[104,232]", "fresh_questions=5", "save_interval=2", "micro_batch=1")
    results = []
    for processes, name in ((0, "one"), (2, "two")):
        done = launch(*words, f"out={tmp_path / name}", processes=processes)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    shutil.rmtree(tmp_path / "one" / "step_000004")
    done = launch(*words, f"out={tmp_path / 'one'}", "resume=auto", processes=0)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    results.append(json.loads((tmp_path / "one" / "result.json").read_text()))
    for result in results:
        for when in ("before", "after"):
            assert result[when]["right_answers"] == results[0][when]["right_answers"]
            assert result[when]["said"] == results[0][when]["said"]
    result, said = results[2], done.stdout[done.stdout.index("        before"):]
    assert [each["context"] for each in result["after"]["said"]] == [232] * 3
    for each in result["before"]["said"]:
        assert each["right"] == (normalize(each["answers"][0]) in normalize(each["said"])) and each["question"] in said
    right, asked = result["after"]["right_answers"]["232"]
    assert f"{right} of {asked}  {right / asked:.3f}" in re.search("right answers, context 232 .*", said).group()
    assert f"{result['after']['held_out']['nll']:.3f}" in re.search("held-out nll .*", said).group()
    for path in ("hf", "metrics.jsonl", "result.json"):
        assert f"  {tmp_path / 'one' / path} " in said
    assert said.rstrip().splitlines()[-2:] == [f"  {command}" for command in result["next"]]
    (tmp_path / "FILE").write_text("Rosa paints in Naples.")
    for command in result["next"]:
        command = command.replace("python", sys.executable, 1).replace("context=FILE", f"context={tmp_path / 'FILE'}")
        typed = subprocess.run(["bash", "-c", f"{command} {'threads=1' if 'sample' in command else f'out={tmp_path}'}"], cwd=ROOT,
                               capture_output=True, text=True)
        assert typed.returncode == 0, typed.stderr
    row = json.loads((tmp_path / "preferences.json").read_text())["table"]
    assert [each["n"] for each in row] == [result["config"]["held_out"]] * 2  # and none that was trained on
    after = result["after"]["held_out"]
    assert [row[0][key] for key in ("rewards/margins", "logps/chosen")] == pytest.approx([after[key] for key in ("rewards/margins", "logps/chosen")], rel=1e-3)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_dry_run_shows_the_first_prompt_and_touches_nothing(run, checkpointed, tmp_path, processes):
    folder = shutil.copytree(checkpointed, tmp_path / "run")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for words in ((f"out={tmp_path / 'none'}",), (f"out={folder}", "resume=auto", "save_interval=2")):
        done = launch(*arguments(run, folder, *LORA, *words, "dry_run=True", "micro_batch=1", "fresh_questions=5"), processes=processes)
        assert done.returncode == 0, done.stderr
        assert "right answers" not in done.stdout and "expected peak memory" in done.stdout and "|grad|" not in done.stdout
        assert done.stdout.count("dry run: nothing was trained, nothing was written") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files and not (tmp_path / "none").exists()
    done = launch(*arguments(run, tmp_path / "none", "dry_run=True"), processes=processes)
    cfg, tokenizer = load_config(["configs/tiny.py", *SMALL]), load_tokenizer(TINY)
    train, _ = data.split_pairs(load_pairs(run.pairs, cfg, tokenizer), cfg["held_out"])
    first = data.step_samples(len(train), cfg, 0)[0]
    group = data.encode_group(train[first.pair], tokenizer, cfg, first.draw, first.epoch)
    end = group.segments[0].end + 1
    assert f"with 1 BOS: {' '.join(map(str, group.tokens[:end].tolist()))}\n" in done.stdout
    assert f"positions: {' '.join(map(str, group.positions[:end].tolist()))}\n" in done.stdout


@pytest.mark.parametrize("words", [("dry_run=True",), ("fresh_questions=5",)])
def test_pairs_of_other_settings_are_refused_before_anything_is_asked(run, tmp_path, words):
    done = launch(*arguments(run, tmp_path / "none", "temperature=0.25", *words), processes=0)
    assert done.returncode == 1 and "right answers" not in done.stdout and done.stderr.count("\n") == 1
    assert "was built with temperature=" in done.stderr, done.stderr


def test_a_yarn_that_does_not_reach_the_window_is_said(run, tmp_path):
    done = launch(*arguments(run, tmp_path / "none", *AS_IN_THE_FILE, "yarn_factor=4", "dry_run=True"), processes=0)
    assert done.returncode == 0 and "warning: yarn_factor=4 reaches 512 positions, window is 1024" in done.stdout, done.stderr


def test_a_dry_run_without_pairs_shows_what_they_will_begin_with(tmp_path):
    words = ("configs/tiny.py", *SMALL, f"out={tmp_path / 'run'}")
    done = launch(*words, "dry_run=True", processes=0)
    assert done.returncode == 0 and "no pairs yet" in done.stdout and "dry run: nothing" in done.stdout, done.stderr
    assert "with 1 BOS: " in done.stdout and "expected peak memory of a process" in done.stdout and not (tmp_path / "run").exists()
    damaged = launch(*words, "dry_run=True", corrupt(tmp_path, "model.safetensors", b"nothing"), processes=0)
    assert damaged.returncode == 1 and "not a readable safetensors file" in damaged.stderr and damaged.stderr.count("\n") == 1


def test_a_run_says_which_settings_it_has(run, tmp_path):
    """Own data without a config file would take the tiny example's settings without a word."""
    for words, said in ((("configs/tiny.py",), "settings: configs/tiny.py, then"), ((), "settings: configs/tiny.py (no file is named: that of")):
        done = launch(*words, *arguments(run, tmp_path / "run")[1:], "dry_run=True", processes=0)
        assert done.stdout.startswith(said) and "examples: models/tiny/world.py" in done.stdout, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------- the first look

def variant(tmp_path, *changes, before=""):
    """train_logo.py with some of its text changed, and some code run before it, as a script elsewhere."""
    text = (ROOT / "train_logo.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path / "train_variant.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\n{text}")
    return str(path)


@pytest.mark.parametrize("mode", [(), LORA], ids=["full", "lora"])
def test_the_first_look_changes_no_number(run, tmp_path, mode):
    unseen = variant(tmp_path, ("    first_look(model, optimizer)\n", "    pass\n"))
    done = launch(*arguments(run, tmp_path / "unseen", *mode), script=unseen)
    assert done.returncode == 0 and "verify" not in done.stdout, done.stderr
    done = launch(*arguments(run, tmp_path / "verified", *mode, "verify=True"))
    assert done.returncode == 0 and done.stdout.count("verify: a group is as in full rows") == 1, done.stderr
    same_run(tmp_path / "unseen", tmp_path / "verified")
    assert losses(tmp_path / "unseen") == losses(run(*mode))


OPEN_MASK = """
import model, torch
def open_mask(P, lengths):
    return torch.full((sum(lengths), P + sum(lengths)), float("-inf")).triu_(P + 1)
model.answer_mask = open_mask
"""
LATE_MASK = """
import model, torch
right = model.answer_mask
def late_mask(P, lengths):
    mask = right(P, lengths)
    mask[:, P // 2] = float("-inf") if P > 1 else 0
    return mask
model.answer_mask = late_mask
"""


@pytest.mark.parametrize("plant, processes", [(OPEN_MASK, 0), (LATE_MASK, 0), (LATE_MASK, 2)],
                         ids=["answers see each other", "one token unseen", "two processes"])
def test_a_wrong_layout_is_refused_before_the_first_step(run, tmp_path, plant, processes):
    wrong = variant(tmp_path, before=plant)
    words = arguments(run, tmp_path / "run", "verify=True")
    done = launch(*words, script=wrong, processes=processes)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and metrics(tmp_path / "run") == [], done.stderr
    assert re.match(r"error: verify: (loss|grad_norm) of a group is \d\.\d+ with its prompt shared by its answers, \d\.\d+ in", said[0])
    assert "in full rows, expected the same but for 0.01 % (float32)" in said[0]
    assert processes or len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_right_layout_passes_in_both_precisions_at_a_large_beta(run, tmp_path, dtype):
    done = launch(*arguments(run, tmp_path, "steps=1", "verify=True", "beta=10", "gamma=3", f"pairs={tmp_path}/p.jsonl", f"dtype={dtype}"),
                  processes=0)
    assert done.returncode == 0 and "verify: a group is as in full rows" in done.stdout, done.stderr


LENGTHS = """
import model, torch
forward = model.Llama.forward
def spied(self, tokens, *rest):
    if torch.is_grad_enabled():
        print("forward of", len(tokens), flush=True)
        {what}
    return forward(self, tokens, *rest)
model.Llama.forward = spied
"""


def test_the_longest_groups_of_the_run_come_first(run, tmp_path):
    """Two micro-batches of the longest samples of all steps, counted here from the encoded groups."""
    done = launch(*arguments(run, tmp_path / "run", "steps=3"), script=variant(tmp_path, before=LENGTHS.format(what="")), processes=0)
    assert done.returncode == 0, done.stderr
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())
    tokenizer = load_tokenizer(TINY)
    pairs = load_pairs(cfg["pairs"], cfg, tokenizer)
    assert [pair["tokens"] for pair in pairs] == [len(data.encode_group(pair, tokenizer, cfg).tokens) for pair in pairs]
    train, _ = data.split_pairs(pairs, cfg["held_out"])
    steps = [data.step_samples(len(train), cfg, step) for step in range(3)]
    lengths = sorted((train[sample.pair]["tokens"] for sample in set(sum(steps, []))), reverse=True)
    first, second, *others = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("forward of")]
    assert first == second == sum(lengths[:4]) and len(others) == 6 and max(others) <= first


def test_out_of_memory_is_one_line_before_the_first_step(run, tmp_path):
    full = LENGTHS.format(what="raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')")
    done = launch(*arguments(run, tmp_path / "run"), script=variant(tmp_path, before=full), processes=0)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: out of memory at the longest of the run's groups, up to ") and "checkpointing=True, micro_batch=1" in done.stderr
    assert metrics(tmp_path / "run") == []
