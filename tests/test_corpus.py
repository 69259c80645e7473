"""corpus.py: every form of a row, every kind of file, and what becomes of rows that cannot be used."""
import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from configs import BadInput, load_config
from pairs import convert, corpus

ROOT = Path(__file__).parent.parent


def config(*args):
    return load_config([str(ROOT / "configs" / "tiny.py"), *args])


def read(path, *args, split="train"):
    found = corpus.read_examples(config(f"examples={path}", "n_examples=0", *args), split)
    return [found[i] for i in range(len(found))]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------- forms

PAPER = "Below is a paper. Memorize the paper and answer my question after the paper.\n The paper begins. \n"
BOOK = "Below is some paragraphs in the book, Emma. Memorize the content and answer my question after the book.\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("row, context, question, answers", [
    ({"context": "C.", "question": "Q?", "answer": "A"}, "C.", "Q?", ["A"]),
    ({"context": ["C1", "C2"], "question": "Q?", "answers": ["A", "B"]}, ["C1", "C2"], "Q?", ["A", "B"]),
    ({"context": "C.", "question": "Q?"}, "C.", "Q?", [])])
def test_every_form_gives_its_example(row, context, question, answers):
    assert corpus.example_of(row) == {"context": context, "question": question, "answers": answers}


def test_passages_documents_and_ready_pairs():
    found = corpus.example_of({"question": "Q?", "answers": ["A"], "title": "T", "text": "P."})
    assert found == {"question": "Q?", "answers": ["A"], "passage": "T\nP."}
    assert corpus.example_of({"text": "D."}) == {"text": "D."}
    found = corpus.example_of({"prompt": "P", "chosen": "C", "rejected": ["R1", "R2"]})
    assert found == {"prompt": "P", "system": None, "chosen": "C", "rejected": ["R1", "R2"]}


def test_a_rejected_text_is_one_answer():
    """A text is a sequence of characters as well, but "No." is not the three answers N, o and full stop."""
    found = corpus.example_of({"prompt": "P", "chosen": "Yes.", "rejected": "No."})
    assert found["rejected"] == ["No."]


@pytest.mark.parametrize("row, message", [
    ([1], "expected a JSON object"), ({}, "'question' is None"), ({"question": "Q?"}, "'context' is None"),
    ({"context": " ", "question": "Q?"}, "'context' is ' '"), ({"context": "C", "question": 3}, "'question' is 3"),
    ({"context": ["C", 3], "question": "Q?"}, "'context' is 3"), ({"context": [], "question": "Q?"}, "'context' is []"),
    ({"context": "C", "question": "Q?", "answers": "A"}, "'answers' is 'A'"),
    ({"context": "C", "question": "Q?", "answers": [""]}, "'answers' is"), ({"text": ""}, "'text' is ''"),
    ({"context": "half a character \ud800", "question": "Q?"}, "'context' is"),
    ({"prompt": "P", "chosen": "C", "rejected": " C\n"}, "expected different texts"),
    ({"prompt": "P", "chosen": "C"}, "'rejected' is None"), ({"prompt": "P", "chosen": "C", "rejected": []}, "'rejected' is []"),
    ({"prompt": "P", "chosen": "C", "rejected": ["R", 3]}, "'rejected' is 3"), ({"prompt": "P", "chosen": "C", "rejected": {"a": 1}}, "'rejected' is"),
    ({"prompt": "P", "chosen": "C", "rejected": " "}, "not empty"), ({"prompt": "", "chosen": "C", "rejected": "R"}, "'prompt' is ''"),
    ({"prompt": "P", "system": 3, "chosen": "C", "rejected": "R"}, "'system' is 3"),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "convert trl"),
    ({"conversations": [user("a")]}, "convert long-llm-data"), ({"instruction": "I"}, "convert longalpaca")])
def test_what_is_wrong_with_a_row_is_said_in_one_line(row, message):
    with pytest.raises(BadInput) as error:
        corpus.example_of(row)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- convert

@pytest.mark.parametrize("form, row, expected", [
    ("long-llm-data", {"conversations": [user("Story:\n\nPart one.\n\nPart two.\n\nWho?"), assistant("He."), user("Where?"), assistant("Here.")]},
     [("Story:\n\nPart one.\n\nPart two.", "Who?", ["He."]), ("Story:\n\nPart one.\n\nPart two.", "Where?", ["Here."])]),
    ("long-llm-data", {"conversations": [user("Context information is below:\n----------\nA.\n\nB.\n----------\nDo this:\n\nWho?"), assistant("He.")]},
     [("Context information is below:\n----------\nA.\n\nB.", "Do this:\n\nWho?", ["He."])]),
    ("long-llm-data", {"conversations": [{"from": "human", "value": PAPER + "A.\n\nB.\n Now the paper ends. \nWho?"}, {"from": "gpt", "value": "He."}]},
     [("A.\n\nB.", "Who?", ["He."])]),
    ("long-llm-data", {"messages": [{"role": "system", "content": "Be kind."}, user("Doc.\n\nWho?")]}, [("Doc.", "Who?", [])]),
    ("longalpaca", {"instruction": BOOK + "It was.\n\nIt is.\n Now the material ends. Sum it up.", "output": "Was, is.", "input": ""},
     [("It was.\n\nIt is.", "Sum it up.", ["Was, is."])])])
def test_conversations_become_rows(tmp_path, form, row, expected):
    convert.convert([form, str(lines(tmp_path / "in.jsonl", [row])), str(tmp_path / "out.jsonl")])
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(e["context"], e["question"], e["answers"]) for e in found] == expected
    assert all(corpus.example_of(e) == e for e in found)


@pytest.mark.parametrize("explicit", [True, False])
def test_conversational_preferences_mean_what_they_mean_to_trl(explicit):
    from trl.data_utils import maybe_extract_prompt
    prompt, answers = [{"role": "system", "content": "Be kind."}, user("Who?")], (assistant("He."), assistant("She."))
    row = {"chosen": [*prompt, answers[0]], "rejected": [*prompt, answers[1]]}
    theirs = maybe_extract_prompt(row)
    found, = convert.trl(theirs if explicit else row)
    assert corpus.example_of(found) == {"prompt": theirs["prompt"][-1]["content"], "system": theirs["prompt"][0]["content"],
                                        "chosen": theirs["chosen"][0]["content"], "rejected": [theirs["rejected"][0]["content"]]}


@pytest.mark.parametrize("form, row, message", [
    ("long-llm-data", {"conversations": [assistant("A")]}, "roles are"), ("long-llm-data", {}, "a message is None"),
    ("long-llm-data", {"conversations": [user("no question here")]}, "ends with no question"),
    ("long-llm-data", {"conversations": [{"role": "user"}]}, "a message is"), ("long-llm-data", {"conversations": ["x"]}, "a message is"),
    ("long-llm-data", [1], "expected a JSON object"), ("longalpaca", {"instruction": 3}, "'instruction' is 3"),
    ("trl", {"prompt": [user("a"), assistant("b"), user("c")], "chosen": "C", "rejected": "R"}, "expected one user turn"),
    ("trl", {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("c")]}, "after the same prompt"),
    ("trl", {"chosen": [], "rejected": []}, "one assistant message"), ("trl", {"prompt": "P", "chosen": "C"}, "a message is None")])
def test_rows_that_cannot_be_converted_are_named_and_left_out(tmp_path, capsys, form, row, message):
    convert.convert([form, str(lines(tmp_path / "in.jsonl", [row])), str(tmp_path / "out.jsonl")])
    said = capsys.readouterr()
    assert said.err.startswith(f"left out: {tmp_path}/in.jsonl, line 1: ") and message in said.err and said.err.count("\n") == 1
    assert "0 rows" in said.out and (tmp_path / "out.jsonl").read_text() == ""
    with pytest.raises(BadInput, match="out.jsonl: is already there"):
        convert.convert([form, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")])


@pytest.mark.parametrize("name, content", [
    ("a.jsonl.gz", b"not gzip"), ("a.jsonl.gz", gzip.compress(b'{"prompt": "long enough to be cut"}' * 9)[:40]), ("a.json", b'[{"prompt": "P"}')])
def test_a_file_that_breaks_off_is_not_converted(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name}: cannot be converted into .*out.jsonl"):
        convert.convert(["trl", str(tmp_path / name), str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "b.jsonl").write_text('{"prompt": "P", "chosen": "C", "rejected": "R"}')
    with pytest.raises(BadInput, match="b.jsonl: cannot be converted into .*nowhere/out.jsonl"):
        convert.convert(["trl", str(tmp_path / "b.jsonl"), str(tmp_path / "nowhere" / "out.jsonl")])


# -------------------------------------------------------------------------------------------------------- files

ROWS = [{"context": f"Context {i}.", "question": f"Q{i}?", "answers": [f"A{i}"]} for i in range(9)]


def test_every_kind_of_file_gives_the_same_examples(tmp_path):
    want = read(lines(tmp_path / "a.jsonl", ROWS))
    assert sorted(e["question"] for e in want) == [row["question"] for row in ROWS]
    text = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "d.json").write_bytes(text)                         # lines, under the name that long-llm-data gives them
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n\r\n"))  # BOM, empty lines, as Windows has them
    for name in ("b.jsonl.gz", "c.json", "d.json", "e.json.gz", "f.jsonl"):
        assert read(tmp_path / name) == want, name
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    lines(folder / "1.jsonl", ROWS[:4]), lines(folder.parent / "2.jsonl", ROWS[4:])
    (folder / "notes.md").write_text("not a corpus")
    assert sorted(e["question"] for e in read(folder.parent)) == sorted(e["question"] for e in want)


def test_standard_input_is_a_corpus(tmp_path):
    code = "import sys; sys.path.insert(0, '.'); from tests.test_corpus import read; print([e['question'] for e in read('-')])"
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    out = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == str([e["question"] for e in read(lines(tmp_path / "a.jsonl", ROWS))]), out.stderr


def test_text_files_are_documents(tmp_path):
    (tmp_path / "one.txt").write_text("Once.\n\nUpon a time.")
    (tmp_path / "two.txt").write_text("Twice.")
    assert sorted(e["text"] for e in read(tmp_path, "questions=2")) == ["Once.\n\nUpon a time."] * 2 + ["Twice."] * 2


BAD = [b'{"context": "C"', b"[1, 2]", b'{"context": 3, "question": "Q?"}', b'{"context": "", "question": "Q?"}',
       b'{"context": "\xff\xfe", "question": "Q?"}',
       b'{"conversations": []}', b"null", b"[" * 100_000, b"{}"]


def test_bad_rows_are_named_and_the_rest_is_read(tmp_path, capsys):
    good, path = [json.dumps(row).encode() for row in ROWS], tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(row for pair in zip(BAD, good) for row in pair) + b"\n")
    found = read(path)
    assert sorted(e["question"] for e in found) == [row["question"] for row in ROWS]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(": ")[0] for line in said[:-1]] == [f"{path}, line {2 * i + 1}" for i in range(len(BAD))]
    assert max(map(len, said)) < 400 and said[-1] == f"{path}: {len(BAD)} rows left out, {len(ROWS)} examples"
    for text, message in zip(BAD, ("not JSON", "a JSON object", "'context' is 3", "'context' is ''", "not UTF-8",
                                   "convert long-llm-data", "a JSON object", "not JSON", "'question' is None")):
        alone = tmp_path / "alone.jsonl"
        alone.write_bytes(text)
        with pytest.raises(BadInput, match="alone.jsonl, line 1: .*" + message):
            read(alone, "strict=True")
        corpus.open_corpus.cache_clear()


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b"", "no examples in it"), ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "long enough to be cut"}' * 9)[:40], "cannot be read"),
    ("a.json", b'[{"text": "a"}', "cannot be read"), ("none.jsonl", None, "no such file")])
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        read(tmp_path / name, "strict=True")
    assert str(tmp_path / name) in str(error.value)
    corpus.open_corpus.cache_clear()


def test_an_empty_folder_and_too_few_passages_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no file in it ends with"):
        read(tmp_path)
    path = lines(tmp_path / "p.jsonl", [{"question": f"Q{i}?", "text": f"P{i}"} for i in range(3)])
    with pytest.raises(BadInput, match="a context of 4 passages needs as many documents, these 3 examples have 3: lower its size .context_size"):
        read(path, "context_size=4")
    with pytest.raises(BadInput, match="of 3 passages needs .* these 2 examples have 2: .* or take more examples"):
        read(path, "context_size=3", "n_examples=2")


def test_fresh_questions_are_never_training_questions(tmp_path):
    rows = [{"question": f"q{i}", "answers": [f"a{i}"], "title": "t", "text": f"text a{i}"} for i in range(30)]
    path = lines(tmp_path / "passages.jsonl", rows)
    args = ("n_examples=20", "fresh_questions=10", "context_size=4")
    train, fresh = read(path, *args), read(path, *args, split="fresh")
    assert len({e["question"] for e in train + fresh}) == 30
    for e in train + fresh:
        assert len(e["context"]) == len(set(e["context"])) == 4
        assert sum(e["answers"][0] in passage.split() for passage in e["context"]) == 1
    with pytest.raises(BadInput, match="30 examples of 30 documents, expected 20 for pairs"):
        read(path, "n_examples=20", "fresh_questions=11", "context_size=4", split="fresh")


def test_rows_of_different_forms_may_be_mixed(tmp_path):
    rows = [{"question": f"q{i}", "answers": [], "text": f"p{i}"} for i in range(6)] + ROWS[:3] + [{"text": "A document."}]
    found = read(lines(tmp_path / "mixed.jsonl", rows), "context_size=3")
    kinds = [next(key for key in ("text", "context") if key in e) for e in found]
    assert kinds.count("text") == 1 and len(found) == 10
    assert all(set(e["context"]) <= {f"\np{i}".strip() for i in range(6)} for e in found if isinstance(e.get("context"), list))


# ---------------------------------------------------------------------------------------------------- documents

def three_questions_each(path, form):
    """300 documents with 3 questions each: as rows of their own, in another order, or as conversations."""
    def question(d, q):
        return {"question": f"Question {q} about {d}?", "answers": [f"Answer {d} {q}"]}
    if form == "conversations":
        found = []
        for d in range(300):
            turns = [user(f"Document {d} tells this.\n\nQuestion 0 about {d}?"), assistant(f"Answer {d} 0")]
            for q in (1, 2):
                turns += [user(f"Question {q} about {d}?"), assistant(f"Answer {d} {q}")]
            found.append({"conversations": turns})
        convert.convert(["long-llm-data", str(lines(path.with_name("in.jsonl"), found)), str(path)])
        return path
    text = "context" if form == "contexts" else "text"
    return lines(path, [{text: f"Document {d} tells this.", **question(d, q)} for q in range(3) for d in range(300)])


def document_of(example):
    """The document's number in the question, which the test put there."""
    return int(example["question"].split()[-1].strip("?"))


@pytest.mark.parametrize("form", ["contexts", "passages", "conversations"])
def test_no_document_is_trained_on_and_asked_about(tmp_path, form):
    path = three_questions_each(tmp_path / "c.jsonl", form)
    args = ("n_examples=700", "fresh_questions=90", "context_size=4")
    train, fresh = read(path, *args), read(path, *args, split="fresh")
    assert len(train) == 700 and len(fresh) == 90
    in_train, in_fresh = ({document_of(e) for e in part} for part in (train, fresh))
    assert not in_train & in_fresh and len(in_fresh) == 30
    numbers = {}
    for example in train + fresh:
        assert numbers.setdefault(example["document"], document_of(example)) == document_of(example)
        if form == "passages":           # nor is a distractor from the other side, nor is a passage there twice
            told = [int(passage.split()[1]) for passage in example["context"]]
            assert len(set(told)) == 4 and document_of(example) in told
            assert set(told) <= (in_train if example in train else in_fresh)
    assert len(numbers) == len(in_train | in_fresh)
    with pytest.raises(BadInput, match="900 examples of 300 documents, expected 811 for pairs . 90 for fresh_questions"):
        read(path, "n_examples=811", "fresh_questions=90", "context_size=4", split="fresh")


def test_questions_written_about_one_text_share_its_number(tmp_path):
    found = read(lines(tmp_path / "d.jsonl", [{"text": "A."}, {"text": "B."}, {"text": "A."}]), "questions=2")
    assert sorted((e["text"], e["document"]) for e in found) == [("A.", 0)] * 4 + [("B.", 1)] * 2


def test_a_generated_corpus_has_documents_too(tmp_path):
    (tmp_path / "c.py").write_text("def examples(count, size, seed):\n    for i in range(count):\n"
                                   "        yield {'context': f'Text {i // 3}.', 'question': 'Q?', 'answers': []}\n")
    assert [e["document"] for e in read(tmp_path / "c.py", "n_examples=7")] == [0, 0, 0, 1, 1, 1, 2]
    (tmp_path / "d.py").write_text("config = {}\n")
    with pytest.raises(BadInput, match="d.py: expected a function examples"):
        read(tmp_path / "d.py", "n_examples=7")


def test_more_files_than_a_process_may_open(tmp_path, capsys):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"Text {i}.")
        (tmp_path / f"{i:02}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": f"Packed {i}."}).encode()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        found = {e["text"] for e in read(tmp_path)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == {f"Text {i}." for i in range(60)} | {f"Packed {i}." for i in range(60)}
    assert "left out" not in capsys.readouterr().err


def test_a_file_that_goes_or_changes_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", ROWS)
    found = corpus.read_examples(config(f"examples={path}", "n_examples=0"), "train")
    path.write_text("x" * 1000)
    with pytest.raises(BadInput, match="a.jsonl: has changed since it was read first"):
        found[0]
    path.unlink()
    with pytest.raises(BadInput, match="a.jsonl: has changed since it was read first"):
        found[0]
