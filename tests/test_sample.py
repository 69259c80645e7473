"""sample.py: the answer as it is written, and where the heads looked."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")


def run_sample(*words):
    return subprocess.run([sys.executable, "sample.py", *words], cwd=ROOT, capture_output=True, text=True)


def test_sample_answers_and_says_where_it_looked(tmp_path):
    (tmp_path / "c.txt").write_text(" Snow falls in Turin. The old bridge leans. Rosa paints in Naples. Fog drifts in Paris.")
    done = run_sample(TINY, "Who is Rosa?", f"context={tmp_path / 'c.txt'}", "tail=\nQuestion: {question}\nAnswer:", "chunk_size=6")
    assert done.stdout.strip() == "Rosa paints in Naples." and "looked at and copied from" in done.stderr
    first = next(line for line in done.stderr.splitlines() if "chunk" in line)
    assert "Rosa" in first or "Naples" in first


class Characters:
    """A tokenizer whose token is a byte."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["Rosa paints.", "é", "日本語 x", "a😀b"])
def test_what_is_printed_token_by_token_is_the_answer(text, capsys):
    """A token may be half a character: it waits for the other half."""
    writer = sample.Writer(Characters())
    for byte in text.encode():
        writer.add(byte)
    writer.end()
    assert capsys.readouterr().out == text + "\n"


def test_an_answer_cut_within_a_character_shows_it(capsys):
    writer = sample.Writer(Characters())
    for byte in "aé".encode()[:2]:
        writer.add(byte)
    writer.end()
    assert capsys.readouterr().out == "a\ufffd\n"


def test_copies_are_counted_by_the_token_that_was_written():
    """Positions of the arg-max: in the prefix, at the token, at another one, behind the prompt."""
    tops = torch.tensor([[0, 3], [4, 9]])
    assert sample.copied_places([5, 6, 7, 7, 8], range(2, 5), token=7, tops=tops) == [1]
    assert sample.copied_places([5, 6, 7, 7, 8], range(2, 5), token=5, tops=tops) == []


@pytest.mark.parametrize("words, message", [
    ([TINY], "expected: python sample.py"), ([TINY, "Who?", "context=none.txt"], "context=none.txt"),
    (["none", "Who?"], "none"), ([TINY, "Who?", "dtype=nn"], "dtype is 'nn'"),
    ([TINY, "Who?", "seed=100000000000000000000"], "seed is 100000000000000000000"), ([TINY, "Who?", "top_p=0"], "top_p is 0"),
    ([TINY, "Who?", "max_new_tokens=0"], "max_new_tokens is 0"), ([TINY, "Who?", "chunk_size=0"], "chunk_size is 0")])
def test_bad_input_ends_with_one_line(words, message):
    done = run_sample(*words)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_options_are_checked_before_the_model_is_read(monkeypatch):
    monkeypatch.setattr(sample, "load_pretrained", lambda *args: pytest.fail("the model was read"))
    for word in ("seed=99999999999999999999", "dtype=nn", "top_p=2.0"):
        with pytest.raises(sample.BadInput):
            sample.main([TINY, "Who?", word])
