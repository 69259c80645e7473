"""kill -9 at random moments, and full disks, where other tests have none: exports, conversions, evaluations of checkpoints.

Of pairs see test_pairs.py, of training steps test_train.py. NANOLOGO_KILLS=20 for the long form.
"""
import errno
import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from test_train import LORA, arguments, command, kill, launch, run  # noqa: F401  (run is a fixture)

import bench.__main__ as bench_main
import console
import guard
import report
from configs import BadInput, load_config
from evals import __main__ as evals_main
from evals import needle
from pairs import build, corpus
from pairs.build import Draft

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("NANOLOGO_KILLS", 2))


def content(folder):
    """{name: bytes} of what lies below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_at(process, seen, number, longest, rng):
    """Kill a process at a random moment; every second time once something is to be seen. Whether it was still at work."""
    if number % 2:
        while process.poll() is None and not seen():
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
    else:
        time.sleep(rng.random() * longest)
    at_work = process.poll() is None
    kill(process)
    process.communicate()
    return at_work


def begin(how):
    return subprocess.Popen(**how, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):  # noqa: F811
    """A run with LoRA, two checkpoints and their evaluations, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch(*arguments(run, folder, *WITH_EVALS), processes=0)
    assert done.returncode == 0, done.stderr
    return folder


WITH_EVALS = ("save_interval=2", "evals=['needle lengths=[104] depths=[50] samples=1 max_new_tokens=4']", "eval_interval=4", *LORA)


def test_a_merge_killed_at_random_moments_leaves_a_whole_folder_or_none(whole, tmp_path):
    how, rng, killed = command("merge", str(whole / "adapter"), str(tmp_path / "out"), processes=0, script="checkpoint.py"), random.Random(1), 0
    begun = time.time()
    assert launch("merge", str(whole / "adapter"), str(tmp_path / "alone"), processes=0, script="checkpoint.py").returncode == 0
    took = time.time() - begun
    for number in range(KILLS):
        killed += kill_at(begin(how), (tmp_path / "out.tmp").exists, number, took, rng)
        if (tmp_path / "out").exists():
            assert content(tmp_path / "out") == content(tmp_path / "alone")
            for path in (tmp_path / "out").iterdir():
                path.unlink()
            (tmp_path / "out").rmdir()
    done = subprocess.run(**how, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "alone") and not (tmp_path / "out.tmp").exists()
    assert killed


def test_a_conversion_killed_at_random_moments_leaves_a_whole_file_or_none(tmp_path):
    rows = [{"prompt": f"Who is {i}?", "chosen": f"Rosa {i}.", "rejected": "Ida."} for i in range(30_000)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how, rng, killed = command("pairs", "convert", "trl", str(source), str(out), processes=0, script="-m"), random.Random(2), 0
    alone = {**how, "args": [*how["args"][:-1], str(tmp_path / "alone.jsonl")]}
    begun = time.time()
    assert subprocess.run(**alone, capture_output=True).returncode == 0
    took = time.time() - begun
    for number in range(KILLS):
        killed += kill_at(begin(how), (tmp_path / "out.jsonl.tmp").exists, number, took, rng)
        if out.exists():
            assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
            out.unlink()
    assert subprocess.run(**how, capture_output=True).returncode == 0
    assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes() and len(out.read_text().splitlines()) == 30_000
    assert killed and sorted(path.name for path in tmp_path.iterdir()) == ["alone.jsonl", "in.jsonl", "out.jsonl"]


def tables(folder):
    """{checkpoint: what was measured of it}, without times and places."""
    return {path.parent.name: json.loads(path.read_text())["table"] for path in sorted(folder.glob("eval/step_*/needle.json"))}


def test_evaluations_and_export_of_a_run_killed_at_random_moments_are_those_of_one_left_alone(run, whole, tmp_path):  # noqa: F811
    """In the evaluation of a checkpoint, and while adapter/ and hf/ are written; the same command goes on."""
    folder, rng, killed = tmp_path / "run", random.Random(3), 0
    how = command(*arguments(run, folder, *WITH_EVALS, "resume=auto"), processes=0)
    for number in range(KILLS):
        # By turns while a checkpoint is evaluated, and while an export is written.
        name = ["eval/step_000002/step_000002*", "adapter.tmp", "eval/step_000004/step_000004*", "hf.tmp"][number % 4]
        killed += kill_at(begin(how), lambda name=name: list(folder.glob(name)), 1, 0, rng)
    done = subprocess.run(**how, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and killed
    assert tables(folder) == tables(whole) and sorted(tables(folder)) == ["step_000002", "step_000004"]
    for name in ("hf", "adapter"):
        assert content(folder / name) == content(whole / name)
    assert not list(folder.rglob("*.tmp")) and not list(folder.glob("eval/step_*/step_*"))


def test_a_checkpoint_is_evaluated_once(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(guard, "evaluate_checkpoint", lambda folder, step, commands: done.append(step))
    monkeypatch.setattr(guard.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(guard.dist, "barrier", lambda: None)
    (tmp_path / "step_000002").mkdir()
    own = str(tmp_path / "step_000002")
    guard.evaluate_rest(own, str(tmp_path), 2, ["needle"])
    guard.evaluate_rest("elsewhere/step_000002", str(tmp_path), 2, ["needle"])
    guard.evaluate_rest(own, str(tmp_path), 2, [])
    assert done == [2]
    (tmp_path / "eval" / "step_000002").mkdir(parents=True)
    (tmp_path / "eval" / "step_000002" / "done.json").write_text("{}")
    guard.evaluate_rest(own, str(tmp_path), 2, ["needle"])
    assert done == [2]


# ---------------------------------------------------------------------------------------- a full disk

def test_a_full_disk_ends_a_build_by_a_server_in_one_line():
    block = [Draft({"id": 3, "question": "Who?"}, dropped="chosen wrong")]
    with pytest.raises(BadInput, match="^/dev/full: cannot be written .No space left on device"):
        build.write_lines("/dev/full", [block], set(), Full())


class Full:
    """A file of a full disk; the bar of a build, which counts."""
    def __init__(self):
        self.file = open(os.devnull, "wb")

    def tell(self):
        return 0

    def flush(self):
        pass

    def update(self, more):
        pass

    def write(self, raw):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_row_of_a_packed_corpus_out(tmp_path, monkeypatch):
    """Rows that could not be unpacked are no bad rows: without them the corpus would be another one."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"context": "a b", "question": "c", "answers": ["d"]}]))
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(BadInput, match=r"\$TMPDIR.*c.json unpacks to: cannot be written .No space left"):
        corpus.Corpus(str(path), {"strict": False, "questions": 1})


def in_the_way(path):
    """What a file is written as before it gets its name is a folder: it can be written by nobody."""
    path.mkdir(parents=True)


def test_what_a_run_says_of_itself_cannot_be_written_in_one_line(tmp_path):
    in_the_way(tmp_path / "config.json.tmp")
    with pytest.raises(BadInput, match=f"^{tmp_path}: cannot be written .Is a directory"):
        guard.save_source(str(tmp_path), load_config([str(ROOT / "configs" / "tiny.py")]))
    in_the_way(tmp_path / "metrics.jsonl.tmp")
    with pytest.raises(BadInput, match=f"^{tmp_path}/metrics.jsonl: cannot be written .Is a directory"):
        report.keep_metrics(str(tmp_path), 2)


def test_a_run_outlives_the_disk_of_its_log_and_its_terminal(monkeypatch, capsys):
    """What it prints goes nowhere; the weights are worth more."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        console.say("step 1")
        assert capsys.readouterr().err == "warning: output cannot be written (No space left on device)\n"
        monkeypatch.setattr("sys.stderr", full)
        console.say("step 2")
        left = []
        monkeypatch.setattr(os, "_exit", left.append)
        console.leave(0)
        assert left == [0]
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or closing it would fail


def test_a_disk_that_has_gone_costs_a_line_of_metrics_and_not_the_run(tmp_path, capsys):
    report.append_metrics(str(tmp_path / "gone"), {"step": 3})
    assert "metrics.jsonl: step 3 is not in it (No such file or directory)" in capsys.readouterr().out


def test_an_evaluation_or_measurement_that_cannot_be_written_says_so_in_one_line(tmp_path, monkeypatch):
    in_the_way(tmp_path / "needle.json.tmp")
    monkeypatch.setattr(needle, "measure", lambda subjects, options: {"table": []})
    with pytest.raises(BadInput, match=f"^{tmp_path}/needle.json: cannot be written .Is a directory"):
        evals_main.main(["needle", str(ROOT / "models" / "tiny"), f"out={tmp_path}"])
    assert not (tmp_path / "needle.json").exists()
    monkeypatch.chdir(tmp_path)
    in_the_way(tmp_path / "out" / "bench" / "plan.json.tmp")
    with pytest.raises(BadInput, match="^out/bench/plan.json: cannot be written"):
        bench_main.main(["plan", str(ROOT / "configs" / "llama3_8b_80k.py"), "gpus=1"])
