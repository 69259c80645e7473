"""What commands say beside their results: help, near words, how far they are, one line at the end."""
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import console
from bench import plan
from configs import BadInput, default_groups, load_config, nearest, run_folder
from evals import heads, perplexity
from evals.common import interval, share
from pairs import corpus

ROOT = Path(__file__).parent.parent
EVALS = ("needle", "qa", "perplexity", "preferences")
BENCH = ("step", "limit", "generate", "plan")
SETTINGS = [key for group in default_groups().values() for key in group]


def run(*words, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=env, **more)


def help_of(module, words, capsys):
    """What a command prints on being asked for help, in this process."""
    try:
        importlib.import_module(module).main(words)
    except SystemExit as e:
        assert not e.code or not words
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------- help

def keys_shown(text):
    """{key: value and comment} of a help's lines."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"  (\w+)=(.*)", line)
        if match:
            key = match.group(1)
            found[key] = match.group(2)
        elif found and line.startswith(" " * console.COLUMN):
            found[key] += " " + line.strip()
    return found


def module_of(module, words):
    return module.replace("__main__", words[0]) if "__main__" in module else module


@pytest.mark.parametrize("module, words, keys", [
    ("pairs.__main__", [], SETTINGS), ("pairs.__main__", ["-h"], SETTINGS), ("pairs.__main__", ["score", "--help"], SETTINGS),
    ("evals.__main__", ["questions", "-h"], SETTINGS),
    *[("evals.__main__", [name, "-h"], [*importlib.import_module(f"evals.{name}").OPTIONS]) for name in EVALS],
    *[("bench.__main__", [name, "--help"], [*importlib.import_module(f"bench.{name}").OPTIONS]) for name in BENCH],
    ("sample", [], [*importlib.import_module("sample").OPTIONS]), ("sample", ["-h"], [*importlib.import_module("sample").OPTIONS]),
])
def test_help_shows_every_key_with_its_value_and_comment(module, words, keys, capsys):
    text = help_of(module, words, capsys)
    shown = keys_shown(text)
    assert list(shown) == list(keys)
    values = load_config([]) if keys is SETTINGS else importlib.import_module(module_of(module, words)).OPTIONS
    for key, line in shown.items():
        value = str(values[key]).replace("\n", "\\n")
        assert line.startswith(value) and line[len(value):].strip(), f"{key}: {line}"
    assert "python " in text and max(map(len, text.splitlines())) <= 102


def test_a_keys_help_is_its_comment_with_all_its_lines(tmp_path, capsys):
    path = tmp_path / "options.py"
    path.write_text('OPTIONS = dict(\n    # a heading\n    far=1,   # how far\n             # it goes\n'
                    '    text="a # b",  # what\n    bare=2,\n              # belongs to nobody\n)\n')
    assert console.comments_of(path) == {"far": "how far it goes", "text": "what"}
    console.print_help("what it does", {"keys:": {"far": 3}}, path)
    assert capsys.readouterr().out == f"what it does\n\nkeys:\n{'  far=3':34}how far it goes\n"


@pytest.mark.parametrize("words, usage", [
    (("train_logo.py", "-h"), "torchrun --standalone train_logo.py"), (("-m", "evals"), "python -m evals needle"),
    (("-m", "bench"), "python -m bench step"), (("-m", "pairs", "convert", "-h"), "python -m pairs convert longalpaca"),
    (("-m", "pairs", "stats", "-h"), "python -m pairs stats PAIRS"), (("-m", "evals", "curves", "-h"), "python -m evals curves"),
    (("checkpoint.py",), "python checkpoint.py merge"), (("checkpoint.py", "merge", "--help"), "python checkpoint.py merge"),
    (("-m", "experiments"), "python -m experiments NAME"), (("-m", "experiments", "-h"), "python -m experiments NAME")])
def test_help_is_an_answer_and_nothing_at_all_is_not(words, usage):
    done = run(*words)
    asked = words[-1] in ("-h", "--help")
    assert done.returncode == (0 if asked else 2) and not done.stderr and usage in done.stdout, done.stderr


def test_the_trainers_help_has_the_values_of_the_command_line_and_waits_for_no_library():
    code = "import runpy, sys; sys.argv[1:] = ['configs/smollm2.py', 'lr=0.5', '-h']\n" \
           "try: runpy.run_path('train_logo.py', run_name='__main__')\n" \
           "except SystemExit: print('torch' in sys.modules)"
    done = run("-c", code)
    assert done.stdout.endswith("\nFalse\n"), done.stderr
    shown = keys_shown(done.stdout)
    assert list(shown) == SETTINGS and shown["lr"].split() == ["0.5", "peak", "learning", "rate"]
    assert shown["model"].startswith(load_config([str(ROOT / "configs" / "smollm2.py")])["model"])


def test_a_reader_who_has_seen_enough_ends_help_without_a_traceback():
    done = subprocess.run(f"{sys.executable} train_logo.py -h | head -1", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("LOGO training") and not done.stderr


@pytest.mark.parametrize("words, hint", [
    (("train_logo.py", "configs/smolm2.py"), "configs/smolm2.py: no such file, did you mean 'configs/smollm2.py'?"),
    (("train_logo.py", "stepz=3"), "unknown key 'stepz', did you mean 'steps'?"),
    (("train_logo.py", "examples=nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("-m", "pairs", "stat", "x"), "stat: no command and no file, did you mean 'stats'?"),
    (("-m", "pairs", "configs/tyni.py"), "did you mean 'configs/tiny.py'?"),
    (("-m", "evals", "nedle", "models/tiny"), "did you mean 'needle'?"),
    (("-m", "bench", "stp"), "did you mean 'step'?"),
    (("-m", "experiments", "recip"), "did you mean 'recipe'?")])
def test_a_wrong_word_names_the_nearest_right_one(words, hint):
    done = run(*words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and hint in done.stderr, done.stderr


def test_no_word_is_near_to_everything():
    assert nearest("gama", ["gamma", "beta"]) == ", did you mean 'gamma'?" and nearest("zzz", ["gamma", "beta"]) == ""


# ----------------------------------------------------------------------------------------- progress

def test_a_long_work_tells_how_far_it_is_in_plain_lines(monkeypatch, capsys):
    """Half of the rest is done in some time: the other half will take as long. What was there before counts for nothing."""
    monkeypatch.setattr(console, "SILENT", 0.1)
    with console.Progress("pairs", 1400, done=400) as progress:
        progress.update(500)
        time.sleep(0.35)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) in (2, 3) and lines[0] == "pairs: 900 of 1,400, 0:00:00 so far, about 0:00:00 left"
    assert console.Progress("pairs", 1400, 400).line(60) == "pairs: 400 of 1,400, 0:01:00 so far"
    assert progress.line(3725) == "pairs: 900 of 1,400, 1:02:05 so far, about 1:02:05 left"
    assert console.Progress("export").line(9.6) == "export: 0:00:10 so far"


def test_a_short_work_is_silent_and_only_one_process_speaks(monkeypatch, capsys):
    with console.Progress("pairs", 10):
        time.sleep(0.05)
    monkeypatch.setattr(console, "SILENT", 0.02)
    monkeypatch.setenv("RANK", "1")
    with console.Progress("pairs", 10):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_failing_work_ends_its_progress(monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENT", 0.02)
    with pytest.raises(BadInput), console.Progress("pairs", 10):
        raise BadInput("no")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_generation_tells_of_each_batch():
    """Five prompts in batches of what 64 slots hold: one each."""
    import torch

    from checkpoint import load_pretrained
    from generate import generate
    model = load_pretrained(ROOT / "models" / "tiny", torch.float32, "cpu")
    told = []
    answers = generate(model, [[5, 6, 7 + i] for i in range(5)], 2, batch_tokens=64, progress=told.append)
    assert told == [1] * 5 and len(answers) == 5


@pytest.mark.parametrize("seconds, shown", [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (360000, "100:00:00")])
def test_the_clock_by_hand(seconds, shown):
    assert console.clock(seconds) == shown


# ------------------------------------------------------------------ what new users have stumbled over

def test_rows_that_make_no_pair_are_told_what_to_turn(tmp_path):
    """TRL's rows have one rejected answer, the default is two."""
    rows = [{"prompt": f"Who is {i}?", "chosen": "Rosa.", "rejected": "Ida."} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["configs/tiny.py", f"examples={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'run'}", "n_examples=0", "fresh_questions=0"]
    done = run("train_logo.py", *words)
    assert "0 pairs of 3 examples, 3 dropped: fewer than M rejected answers\n" in done.stdout
    assert "most are dropped: fewer than M rejected answers; to turn: n_rejected, to as many as the rows have" in done.stdout
    path = tmp_path / "run" / "pairs.jsonl"
    assert done.stderr == f"error: {path}: no pairs in it; python -m pairs stats {path} says why, and what to turn\n"
    told = run("-m", "pairs", "stats", str(path))
    assert "3 dropped: fewer than M rejected answers   (to turn: n_rejected" in told.stdout
    built = run("-m", "pairs", *words, "n_rejected=1", f"pairs={tmp_path / 'other.jsonl'}")
    assert "3 pairs of 3 examples\n" in built.stdout and "to turn" not in built.stdout


def test_a_folder_with_slashes_at_its_end_is_the_folder():
    assert run_folder({"out": "out/x//", "name": "tiny"}) == "out/x" and run_folder({"out": "", "name": "tiny"}) == "out/tiny"


def test_no_share_has_an_interval_below_0_or_above_1():
    for asked in range(1, 400):
        for right in (0, asked):
            low, high = interval(right, asked)
            assert 0 <= low <= high <= 1 and "-0.0" not in share(right, asked), (right, asked)


def test_a_small_models_memory_is_no_row_of_zeros():
    memory = {"weights": 4e6, "moments": 0.0, "working": 2.5e6, "total": 6.5e6}
    assert plan.describe(1, 0, 1, memory).endswith("process: 6.20 MiB = weights 3.81 + working 2.38")
    memory = {"weights": 4e9, "moments": 0.0, "total": 4e9}
    assert plan.describe(1, 0, 1, memory).endswith("process: 3.73 GiB = weights 3.73")


class Noted:
    """In the place of Progress: what it was told."""
    all = []

    def __init__(self, what, total=0, done=0):
        self.what, self.total, self.done = what, total, done
        Noted.all.append(self)

    def update(self, n=1):
        self.done += n

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_reading_a_corpus_tells_how_many_bytes_of_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "Progress", Noted)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "Rosa é paints." * 9}) + "\n\n")
    (tmp_path / "c.txt").write_text("Ida sings.")
    corpus.Corpus(str(tmp_path), {"strict": True, "questions": 1})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert Noted.all[-1].total == Noted.all[-1].done == size
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Ida sings."}\n'))
    corpus.Corpus(str(tmp_path), {"strict": True, "questions": 1})
    assert Noted.all[-1].total == 0  # nobody knows


def test_no_picture_of_another_models_heads_stays(tmp_path):
    stale = tmp_path / "retrieval.png"
    stale.write_bytes(b"")
    heads.draw_heads({}, {"out": str(tmp_path)})
    assert not stale.exists()
    heads.draw_heads({}, {"out": str(tmp_path)})


@pytest.mark.parametrize("values", [[5.5, 5.9, 6.6], [5.5, 460.0, 930.0]])
def test_perplexity_has_numbers_on_both_axes(values, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    monkeypatch.setattr(perplexity, "save_panels", lambda name, options, titles, width, paint: paint(axis, 0))
    lengths = [64, 256, 1024]
    rows = [{"model": "a", "length": n, "perplexity": value} for n, value in zip(lengths, values)]
    perplexity.draw({"table": rows, "window": 128}, {"lengths": lengths})
    figure.canvas.draw()
    low, high = axis.get_ylim()
    inside = [label for label in axis.get_yticklabels() if label.get_text() and low <= label.get_position()[1] <= high]
    assert len(inside) >= 2 and [label.get_text() for label in axis.get_xticklabels()] == ["64", "256", "1024"]
    pyplot.close(figure)
