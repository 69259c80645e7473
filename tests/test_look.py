"""coverage.py, stats.py, show.py: what the table counts, and coverage against counting by hand."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import BadInput, default_groups
from pairs import coverage
from pairs.answers import REASONS
from pairs.show import show
from pairs.stats import score, stats
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")


def test_distances_equal_counting_by_hand():
    positions = np.sort(np.random.default_rng(0).choice(300, 80, replace=False))
    held, every, answer = coverage.distances(positions, 5, 300)
    by_hand = np.zeros(300)
    for i in range(80):
        for j in range(i):
            by_hand[positions[i] - positions[j]] += 1
    assert (every == by_hand).all() and held.sum() == 80 and every.sum() == 80 * 79 / 2
    assert answer.sum() == 75 and answer[positions[-1] - positions[0]] == 1


def test_distance_to_uniform():
    assert coverage.to_uniform(np.array([9, 1, 1, 1, 1])) == 0 and coverage.to_uniform(np.array([0, 4, 0, 0, 0])) == 0.75


def test_the_literal_equation_puts_chunks_out_of_order():
    lengths, out_of_order = [16] * 8, 0
    for sample in range(50):
        positions = coverage.place({"window": 1024, "draws": 1}, "independent", lengths, 8, sample)
        assert 0 <= positions.min() and positions.max() < 1024
        assert (positions[:16] == np.arange(16)).all()           # chunk 0 has no room: U(1, 0)
        out_of_order += (np.diff(positions) <= 0).any()
    assert out_of_order > 25


def test_coverage_of_the_strategies():
    """Sparse is as uniform as RandPOS, continuous nearly; one skip, no skip and independent biases are not."""
    found = coverage.coverage({"window": 8192, "sparse_share": 0.1, "draws": 2}, [64] * 16, 64)
    answer = {name: coverage.to_uniform(counts) for name, (_, _, counts) in found.items()}
    every = {name: coverage.to_uniform(counts) for name, (_, counts, _) in found.items()}
    for distance in (answer, every):
        assert abs(distance["sparse"] - distance["randpos"]) < 0.01
        assert distance["sparse"] <= distance["mix"] <= distance["continuous"] < distance["sparse"] + 0.1
        assert distance["continuous"] + 0.05 < distance["independent"] < distance["pose"] < distance["none"]


def row(i, **change):
    tokenizer = load_tokenizer(TINY)
    return {"id": i, "question": "Who is Rosa?", "answers": ["Naples"], "scores": [2, 0],
            "chunks": [tokenizer.encode(" Rosa paints in Naples."), tokenizer.encode(" Snow falls in Turin.")],
            "chosen": " Rosa paints in Naples.", "rejected": [" Rosa sails in Turin.", " Ida sings in Berlin."],
            "audit": {"chosen_right": True, "chosen_saw_evidence": True, "rejected_right": [False, None], "rejected_saw_evidence": [False, True],
                      "evidence": ["irrelevant", "near misses"], "error": ["hallucination", "unfollowing"], "length_ratio": 1.0, "overlap": [0.3, 0.1]}, **change}


def write(path):
    found = [{"settings": {"model": TINY, "template": "auto", "evaluator": "words", "spacy_model": ""}}, row(0), {"id": 1, "dropped": "chosen wrong"}, row(2), {"id": 3, "dropped": "chosen wrong"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


def test_stats_counts_what_is_there(tmp_path, capsys):
    stats([str(write(tmp_path / "p.jsonl")), str(ROOT / "configs" / "tiny.py")])
    out = capsys.readouterr().out
    for line in ("2 pairs of 4 examples", "2 dropped: chosen wrong", "rejected, from near misses chunks: 2", "continuous"):
        assert line in out, line
    assert [line.split()[-3:] for line in out.splitlines() if "  its prompt held the evidence" in line] == [
        ["100.0%", "of", "2"], ["0.0%", "of", "2"], ["evidence", "not", "known"], ["100.0%", "of", "2"]]
    assert ("p.positions.png" in out) == (tmp_path / "p.positions.png").exists() == ("no picture: pip install matplotlib" not in out)


def test_show_prints_a_pair_and_what_it_invents(tmp_path, capsys):
    show([str(write(tmp_path / "p.jsonl")), "2"])
    out = capsys.readouterr().out
    assert "chunk 0" in out and "Rosa paints in Naples" in out and "(not in the prompt: Berlin)" not in out.split("rejected")[1]
    assert "[near misses chunks: unfollowing]" in out and "sings" in out.split("rejected")[2]
    with pytest.raises(BadInput, match="no pair has the id 1; the first ids are \\[0, 2\\]"):
        show([str(tmp_path / "p.jsonl"), "1"])


def test_score_tells_what_selection_will_do(capsys):
    score([str(ROOT / "configs" / "tiny.py"), "n_examples=30", "workers=2"])
    out = capsys.readouterr().out
    assert "30 examples" in out and "evidence in the critical chunks" in out and "peak memory" in out

    def number(name):
        return float(next(line for line in out.splitlines() if name in line).split("%")[0].split()[-1])

    assert number("evidence in the critical chunks") > 40
    assert number("evidence in irrelevant chunks") == 0


def test_the_commands_end_with_one_line_on_bad_input(tmp_path):
    for args, message in ((["stats", "none.jsonl"], "none.jsonl: no such file"), (["show"], "expected: python -m pairs show"),
                          (["stats"], "expected: python -m pairs stats")):
        done = subprocess.run([sys.executable, "-m", "pairs", *args], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_stats_never_takes_positions_from_a_config_nobody_named(tmp_path, capsys):
    path = str(write(tmp_path / "p.jsonl"))
    stats([path])
    out = capsys.readouterr().out
    assert "2 pairs of 4 examples" in out and "window" not in out and f"python -m pairs stats {path} CONFIG" in out
    with pytest.raises(BadInput, match="expected a config before 'window=512'"):
        stats([path, "window=512"])
    stats([path, str(ROOT / "configs" / "tiny.py"), "window=512"])
    assert "window 512" in capsys.readouterr().out


def test_a_file_without_pairs_tells_why_and_what_to_turn(tmp_path, capsys):
    dropped = ["chosen wrong", "chosen wrong", "no critical chunk", "rejected right"]
    found = [{"settings": {}}] + [{"id": i, "dropped": reason} for i, reason in enumerate(dropped)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    assert stats([str(tmp_path / "p.jsonl")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("0 pairs of 4 examples") and len(out) == 4
    assert "2 dropped: chosen wrong" in out[1] and "chosen_from=reference" in out[1]
    assert "score_with" in " ".join(out) and "candidates" in " ".join(out)


def test_every_reason_has_something_to_turn():
    """Reasons are the texts that the sources give to `dropped`, or return from where faults are found."""
    given = set()
    for name in ("data.py", "pairs/build.py", "pairs/answers.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", "") != "dropped":
                continue
            if isinstance(node, (ast.Assign, ast.Return)):
                values = value.elts if isinstance(value, ast.Tuple) else [value]
                given |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str) and " " in v.value}
    assert given == set(REASONS) and len(given) > 12
    keys = {key for group in default_groups().values() for key in group}
    for reason, remedy in REASONS.items():
        assert set(re.findall(r"\w+_\w+|template|candidates|temperature|window", remedy)) & keys, reason


def test_a_file_that_has_no_pairs_of_ours_is_one_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"settings": {}}\n{"id": 1, "chosen": "a"}\n')
    for command in (stats, lambda argv: show([*argv, "1"])):
        with pytest.raises(BadInput, match="p.jsonl, line 2: no 'question'"):
            command([str(tmp_path / "p.jsonl")])
    (tmp_path / "p.jsonl").write_text(json.dumps(row(0)) + "\n")
    with pytest.raises(BadInput, match="no 'model' among its settings"):
        show([str(tmp_path / "p.jsonl"), "0"])


@pytest.mark.parametrize("change", [{"scores": []}, {"scores": None}, {"chosen": None}, {"rejected": [None]}, {"chunks": 5}, {"audit": {"right": []}}, {"audit": None}])
def test_a_pair_of_another_shape_is_one_line(tmp_path, change):
    path = tmp_path / "p.jsonl"
    settings = {"model": TINY, "template": "auto", "evaluator": "words", "spacy_model": ""}
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"settings": settings}, row(2), row(3, **change))))
    for command in (stats, lambda argv: show([*argv, "3"])):
        if command is not stats and change == {"audit": None}:
            continue                                              # ready pairs have none
        with pytest.raises(BadInput, match="p.jsonl: not as expected") as error:
            command([str(path)])
        assert "\n" not in str(error.value)


def test_help_has_the_commands_and_the_forms():
    done = subprocess.run([sys.executable, "-m", "pairs", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for words in ("python -m pairs score CONFIG", '{"context", "question", "answers"}', "convert longalpaca", '{"prompt", "system", "chosen", "rejected"}'):
        assert words in done.stdout
