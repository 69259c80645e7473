"""What commands say beside their results: help, near words, how far they are, one line at the end."""
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import console
from configs import BadInput, default_groups, load_config, nearest

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
