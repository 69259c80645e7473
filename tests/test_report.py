"""What a run says: tables by hand, names as TRL's, the picture of a run, the commands at its end."""
import json
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import report
from configs import BadInput, load_config
from data import encode_group
from evals import curves
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
METRICS = {"loss": 0.5, "rewards/margins": 2.0, "rewards/accuracies": 0.75, "logps/chosen": -0.1, "logps/rejected": -2.1, "nll": 0.1}


def test_the_table_of_changes_by_hand():
    before = {"right_answers": {"104": [3, 4]}, "held_out": METRICS}
    after = {"right_answers": {"104": (4, 4)}, "held_out": {**METRICS, "nll": 0.05}}
    lines = [line.split("  ") for line in report.changes(before, after)]
    lines = [[cell.strip() for cell in line if cell] for line in lines]
    assert lines == [["before", "after"], ["right answers, context 104", "3 of 4", "0.750", "4 of 4", "1.000"],
                     ["held-out rewards/margins", "+2.000", "+2.000"], ["held-out rewards/accuracies", "0.750", "0.750"],
                     ["held-out logps/chosen", "-0.100", "-0.100"], ["held-out logps/rejected", "-2.100", "-2.100"],
                     ["held-out nll", "0.100", "0.050"], ["held-out loss", "0.5000", "0.5000"]]
    before["right_answers_rope"] = {"104": [2, 4]}
    heading, first, *_ = report.changes(before, after)
    assert heading.endswith("longer RoPE alone") and first.endswith("2 of 4  0.500")
    assert list(report.changes({"right_answers": {}, "held_out": {}}, {"right_answers": {}, "held_out": {}}))[1:] == []


def test_questions_before_and_after_are_one_line_each():
    one = {"context": 104, "question": "Who\nis Rosa?", "answers": ["She paints.", "x"], "said": " She \n sings." + "!" * 200, "right": False}
    lines = list(report.said_before_and_after([one], [{**one, "said": "She paints.", "right": True}]))
    assert lines[0] == "Who is Rosa?   (context 104; right: She paints.)"
    assert lines[1].startswith("  before  wrong  She sings.!!!") and len(lines[1]) < 180 and "\n" not in lines[1]
    assert lines[2] == "  now     right  She paints."
    assert list(report.said_before_and_after([], [one])) == []  # a checkpoint of before there were any


def test_a_resumed_run_may_ask_at_other_sizes():
    """What was not asked before has no number, and no answer stands beside that to another question."""
    before = {"right_answers": {"104": [3, 4]}, "right_answers_rope": {"104": [2, 4]}, "held_out": {}}
    lines = list(report.changes(before, {"right_answers": {"104": (4, 4), "232": (1, 4)}, "held_out": {}}))
    assert [line.split()[4:] for line in lines[1:]] == [
        ["3", "of", "4", "0.750", "4", "of", "4", "1.000", "2", "of", "4", "0.500"],
        ["not", "asked", "1", "of", "4", "0.250", "not", "asked"]]
    assert "not asked" in list(report.changes({"right_answers": {}, "held_out": {}}, {"right_answers": {"232": (1, 4)}, "held_out": {}}))[1]
    old = {"context": 104, "question": "Who is Rosa?", "answers": ["She paints."], "said": "She sings.", "right": False}
    new = {**old, "question": "Who is Ida?", "said": "She paints.", "right": True}
    said = list(report.said_before_and_after([old], [new, {**old, "context": 232}, {**old, "said": "No."}]))
    assert said == ["Who is Rosa?   (context 104; right: She paints.)", "  before  wrong  She sings.", "  now     wrong  No."]


@pytest.mark.parametrize("word", ["tail=\nQuestion: {question}\nAnswer:", "it's\n\\n", "plain", "two words", "$x `y` \"z\""])
def test_a_command_reaches_the_program_as_it_was(word):
    line = report.shell_line(["-c", "import sys, json; print(json.dumps(sys.argv[1]))", word])
    assert "\n" not in line
    done = subprocess.run(["bash", "-c", shlex.quote(sys.executable) + line.removeprefix("python")], capture_output=True, text=True)
    assert json.loads(done.stdout) == word, done.stderr


def test_a_prompt_is_shown_as_the_model_gets_it(capsys):
    cfg, tokenizer = load_config([]), load_tokenizer(ROOT / "models" / "tiny")
    chunks = [tokenizer.encode(" Rosa paints in Naples."), tokenizer.encode(" Snow falls in Turin.")]
    pair = {"id": 3, "question": "Who is Rosa?", "chunks": chunks, "chosen": "Rosa paints in Naples.", "rejected": ["Rosa sings.", "Ida sings."]}
    group = encode_group(pair, tokenizer, cfg)
    report.show_group(group, tokenizer)
    out = capsys.readouterr().out
    prefix, suffix, _ = tokenizer.chat("", "\nQuestion: Who is Rosa?\nAnswer:")
    prompt = [*prefix, *chunks[0], *chunks[1], *suffix]
    assert f"with 1 BOS: {' '.join(map(str, prompt))}\n" in out and prompt.count(tokenizer.bos_id) == 1
    assert " Rosa paints in Naples. Snow falls in Turin.\nQuestion: Who is Rosa?\nAnswer:\n" in out
    positions = [int(n) for n in out.split("positions: ")[1].split("\n")[0].split()]
    assert positions == sorted(set(positions)) and len(positions) == len(prompt) and positions[0] == 0 and positions[-1] < 1024
    assert f"from position {positions[-1] + 1} on" in out
    lengths = [len(tokenizer.encode(text)) + 1 for text in (pair["chosen"], *pair["rejected"])]
    assert f"answers of {lengths[0]}, {lengths[1]}, {lengths[2]} tokens follow" in out


def test_a_long_prompt_is_shown_without_its_middle():
    assert report.shortened("a" * 50 + "b" * 10 + "c" * 50, 50) == "a" * 50 + "\n[... 10 characters ...]\n" + "c" * 50
    assert report.listed(list(range(500))).split()[98:104] == ["98", "99", "[...", "300", "...]", "400"]
    assert report.listed([1, 2]) == "1 2"


# ------------------------------------------------------------------------------------------- curves

def test_names_are_those_of_trl():
    shown = report.as_trl({**METRICS, "lr": 0.1, "grad_norm": 1.0, "step": 3, "skipped": [1], "held_out": METRICS})
    assert shown.keys() >= {"train/loss", "train/learning_rate", "train/grad_norm", "train/nll_loss", "eval/nll_loss", "eval/loss"}
    trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    source = Path(trl.__file__).read_text()
    for name in shown:
        own = name.split("/", 1)[1]
        if own not in ("loss", "learning_rate", "grad_norm"):  # the Trainer's own
            assert f'metrics[f"{{prefix}}{own}"]' in source, name
    assert "train/step" not in shown and "train/skipped" not in shown


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_hosted_tracker_is_told_of_the_run_and_of_each_step(package, monkeypatch, tmp_path):
    calls = []
    double = types.SimpleNamespace(
        init=lambda project, name, config: calls.append(("init", project, name, config["lr"])),
        log=lambda metrics, step: calls.append(("log", step, metrics)), finish=lambda: calls.append(("finish",)))
    monkeypatch.setitem(sys.modules, package, double)
    cfg = {**load_config([]), "log": package}
    tracker = report.open_tracker(cfg, str(tmp_path), 0)
    report.Report(str(tmp_path), cfg, 1, None, tracker).step(
        {**METRICS, "step": 1, "lr": 0.1, "grad_norm": 1.0, "seconds": 1.0, "tokens": 8.0, "tflop": 1.0}, {})
    tracker.close()
    assert calls[0] == ("init", "nanologo", "tiny", cfg["lr"]) and calls[-1] == ("finish",)
    assert calls[1][:2] == ("log", 1) and calls[1][2]["train/rewards/margins"] == 2.0


class BrokenTracker(report.Tracker):
    def log(self, metrics, step):
        raise OSError(28, "No space left on device")

    def close(self):
        raise RuntimeError("no network")


def test_a_tracker_that_fails_costs_the_curves_and_not_the_run(tmp_path, capsys):
    cfg = {**load_config([]), "log": "tensorboard"}
    lines = report.Report(str(tmp_path), cfg, 1, None, BrokenTracker())
    for step in (1, 2, 3):
        lines.step({**METRICS, "step": step, "lr": 0.1, "grad_norm": 1.0, "seconds": 1.0, "tokens": 8.0, "tflop": 1.0}, {})
    lines.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    report.Report(str(tmp_path), cfg, 1, None, BrokenTracker()).close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: log=tensorboard")]
    assert len(warnings) == 2 and "No space left" in warnings[0] and "no network" in warnings[1]


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = {**load_config([]), "log": "tensorboard"}
    for start in (0, 2):  # killed after step 4, resumed from the checkpoint of step 2
        tracker = report.open_tracker(cfg, str(tmp_path), start)
        for step in range(start + 1, 5 + start):
            tracker.log({"train/loss": float(step + start)}, step)
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7), (6, 8)]


def test_a_tracker_that_is_not_installed_is_one_line_and_none_is_a_dummy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="^log=wandb: pip install wandb"):
        report.open_tracker({"log": "wandb", "name": "x"}, str(tmp_path), 0)
    monkeypatch.setenv("RANK", "1")
    for cfg in ({"log": ""}, {"log": "wandb"}):
        tracker = report.open_tracker(cfg, str(tmp_path), 0)
        tracker.log({"train/loss": 1.0}, 1)
        tracker.close()
    assert not list(tmp_path.iterdir())


def test_silence_lasts_ten_seconds_at_most(monkeypatch, tmp_path, capsys):
    """Steps of four seconds, a line every hundred: the first step speaks, then every third one, and the last."""
    now = [1000.0]
    monkeypatch.setattr(report.time, "time", lambda: now[0])
    lines = report.Report(str(tmp_path), {"steps": 10, "log_interval": 100}, 1, None, report.Tracker())
    for step in range(1, 11):
        now[0] += 4
        lines.step({**METRICS, "step": step, "lr": 0.1, "grad_norm": 1.0, "seconds": 4.0, "tokens": 8.0, "tflop": 1.0}, {})
    said = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert said == [1, 4, 7, 10] and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10


# ------------------------------------------------------------------------------- the picture

def write_metrics(folder, steps=30):
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "lr": 1e-3, **METRICS}
        if step % 10 == 0:
            row["held_out"] = METRICS
        rows.append(json.dumps(row))
    rows[4] = rows[4].replace("0.5", "NaN")
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_the_picture_of_a_run_has_all_of_its_metrics(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path)
    drawn = []
    monkeypatch.setattr(curves, "paint_key", lambda axis, steps, key, colour, paint=curves.paint_key: (drawn.append(key), paint(axis, steps, key, colour)))
    curves.curves([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}/curves.png\n" and (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert set(drawn) == {*METRICS, "lr"}


class Axis:
    def __init__(self):
        self.lines = []

    def plot(self, x, y, **how):
        self.lines.append((x, y))


def test_a_panel_has_each_step_its_mean_and_the_held_out_values():
    steps = [{"step": n, "loss": float(n)} for n in range(1, 41)]
    steps[-1]["held_out"] = {"loss": 7.0}
    steps[0]["loss"] = float("nan")
    axis = Axis()
    curves.paint_key(axis, steps, "loss", "blue")
    (x, raw), (_, mean), (places, dots) = axis.lines
    assert x == list(range(1, 41)) and raw[1:] == [float(n) for n in range(2, 41)]
    assert mean[1] == 2 and mean[2] == 2.5 and mean[-1] == 39.5 and places == [40] and dots == [7.0]  # a twentieth: two steps


@pytest.mark.parametrize("content, message", [
    (None, "expected: python -m evals curves out/NAME"), ("", "no step in it"), ("{}\n", "line 1: 'step' is None"), ("[1]\n", "metrics.jsonl")])
def test_what_is_no_run_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(BadInput, match=message):
        curves.curves([str(tmp_path / "none" if content is None else tmp_path)])


def test_without_matplotlib_one_line_says_how(tmp_path, monkeypatch, capsys):
    write_metrics(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    curves.draw_curves(str(tmp_path))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "pip install matplotlib" in said and not (tmp_path / "curves.png").exists()


def test_a_group_of_the_first_prompt_needs_no_model(tmp_path):
    from pairs.build import first_prompt
    cfg, tokenizer = load_config(["n_examples=5"]), load_tokenizer(ROOT / "models" / "tiny")
    pair = first_prompt({**cfg, "examples": str(ROOT / "models" / "tiny" / "world.py")}, tokenizer)
    assert len(pair["rejected"]) == cfg["n_rejected"] and 1 <= len(pair["chunks"]) <= cfg["n_chunks"]
    assert isinstance(encode_group(pair, tokenizer, cfg).tokens, torch.Tensor)
    (tmp_path / "a.jsonl").write_text(json.dumps({"context": "Nothing here.", "question": "Rosa Zelda?", "answers": ["Rosa"]}) + "\n")
    with pytest.raises(BadInput, match="no example has a prompt: 1 times no critical chunk"):
        first_prompt({**cfg, "examples": str(tmp_path / "a.jsonl")}, tokenizer)
