"""Corpora as people have them, read into examples one at a time.

    a row                                                                       its examples
    {"context", "question", "answers"}        a text, or a list of passages     one
    {"question", "answers", "title", "text"}  the passage that answers          one, among passages of other rows
    {"conversations": [{"role", "content"}]}  a document and its first question in the first user turn,
                                              more questions after it           one a question (long-llm-data)
    {"instruction", "output"}                 the same in one turn              one (LongAlpaca)
    {"text"}, or a .txt file                  a document alone                  `questions`, which the policy writes
    {"prompt", "chosen", "rejected"}          preference pairs that exist       one, ready (texts, or TRL's messages)

Rows come from .jsonl, .json (lines, or one array), these with .gz, a folder of such files, or - for standard input.
Every row is read twice: at the start, to name what is wrong with it and to note where it lies; later, when its turn
comes. In between, a few integers of it are in memory, so a corpus may be larger than that.
"""
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from array import array


from configs import BadInput, run_file
from data import random_stream

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt")
# LongAlpaca frames its documents; long-llm-data sets the question apart by rules of hyphens, or by an empty line alone.
FRAME = re.compile(r"\A(?:Below is|There are two) [^\n]*\n(?:\s*The (?:first )?paper begins\.\s*)?")
QUESTION_FOLLOWS = re.compile(r"\n\s*Now the (?:second )?(?:paper|material|book) ends\.|\n-{8,}\n|\n\s*\n")


# ------------------------------------------------------------------------------------------ a row -> its examples

def text_of(row, key, cfg):
    """row[key], a text that is not empty."""
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"{key!r} is {repr(text)[:60]}, expected a text that is not empty")
    return text


def examples_of(row, cfg):
    """The examples of a row. BadInput, without file and line, says what is wrong with it."""
    if not isinstance(row, dict):
        raise BadInput(f"expected a JSON object, found {repr(row)[:40]}")
    if "chosen" in row or "rejected" in row:
        return [ready(row, cfg)]
    if "instruction" in row:
        answer = [{"role": "assistant", "content": row["output"]}] if row.get("output") else []
        text = "\n\n".join(part for part in (text_of(row, "instruction", cfg), row.get("input")) if part)
        return conversation([{"role": "user", "content": text}, *answer], cfg)
    if turns := row.get("conversations") or row.get("messages"):
        return conversation(turns, cfg)
    if "question" not in row and "text" in row:
        return [{"document": text_of(row, "text", cfg)}] * cfg["questions"]
    answers = row.get("answers", [row["answer"]] if row.get("answer") else [])
    if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise BadInput(f"'answers' is {repr(answers)[:60]}, expected a list of texts that are not empty")
    example = {"question": text_of(row, "question", cfg), "answers": answers}
    if "text" in row:
        return [{**example, "passage": f"{row.get('title') or ''}\n{text_of(row, 'text', cfg)}".strip()}]
    passages = row["context"] if isinstance(row.get("context"), list) and row["context"] else [row.get("context")]
    texts = [text_of({"context": passage}, "context", cfg) for passage in passages]
    return [{**example, "context": texts if isinstance(row["context"], list) else texts[0]}]


def turns_of(messages):
    """[(role, text), ...] with the roles system, user, assistant, from {"role", "content"} or {"from", "value"}."""
    names, turns = {"human": "user", "gpt": "assistant"}, []
    for message in messages if isinstance(messages, list) else [messages]:
        found = message if isinstance(message, dict) else {}
        role, text = found.get("role", found.get("from")), found.get("content", found.get("value"))
        if names.get(role, role) not in ("system", "user", "assistant") or not isinstance(text, str):
            raise BadInput(f"a message is {repr(message)[:60]}, expected {{'role': user or assistant, 'content': a text}}")
        turns.append((names.get(role, role), text))
    return turns


def conversation(messages, cfg):
    """An example for each question of a conversation about the document in its first user turn."""
    turns = [turn for turn in turns_of(messages) if turn[0] != "system"]
    if not turns or [role for role, _ in turns] != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise BadInput(f"roles are {[role for role, _ in turns][:6]}, expected user and assistant in turn, user first")
    first = text_of({"first user turn": turns[0][1]}, "first user turn", cfg)
    breaks = list(QUESTION_FOLLOWS.finditer(first.rstrip()))
    marked = [b for b in breaks if b.group().strip()]
    end = (marked or breaks or [None])[-1]
    context, question = (FRAME.sub("", first[:end.start()]).strip(), first[end.end():].strip()) if end else ("", "")
    if not context or not question or len(question) > 4000:
        raise BadInput("the first user turn ends with no question, expected document, empty line, question")
    questions = [question] + [text for _, text in turns[2::2]]
    answers = [text for _, text in turns[1::2]]
    return [{"context": context, "question": q.strip(), "answers": [a for a in answers[i:i + 1] if a.strip()]}
            for i, q in enumerate(questions) if q.strip()]


def ready(row, cfg):
    """A pair that exists: {"prompt", "system", "chosen", "rejected": [...]}, from texts or from messages as in TRL."""
    rejected = row.get("rejected")
    many = isinstance(rejected, list) and rejected and not isinstance(rejected[0], dict)
    answers = [row.get("chosen"), *(rejected if many else [rejected])]
    for key, answer in zip(("chosen", *["rejected"] * len(answers)), answers):
        if not answer or not isinstance(answer, (str, list)):
            raise BadInput(f"{key!r} is {repr(answer)[:60]}, expected a text, or a list of messages")
    if all(isinstance(answer, str) for answer in answers):
        prompt = turns_of(row["prompt"]) if isinstance(row.get("prompt"), list) else [("user", text_of(row, "prompt", cfg))]
    else:
        answers = [turns_of(answer) for answer in answers]
        prompt = turns_of(row["prompt"]) if isinstance(row.get("prompt"), list) else answers[0][:-1]
        if isinstance(row.get("prompt"), str) and not prompt:
            prompt = [("user", row["prompt"])]
        if any(answer[:-1] not in ([], prompt) or answer[-1][0] != "assistant" for answer in answers):
            raise BadInput("expected chosen and rejected to be one assistant message after the same prompt")
        answers = [answer[-1][1] for answer in answers]
    system = [text for role, text in prompt if role == "system"]
    if [role for role, _ in prompt[len(system):]] != ["user"] or len(system) > 1:
        raise BadInput(f"the prompt has the roles {[role for role, _ in prompt][:6]}, expected one user turn (after a system turn)")
    if not all(answer.strip() for answer in answers) or answers[0] in answers[1:]:
        raise BadInput("expected chosen and rejected that are not empty and not the same")
    return {"prompt": text_of({"prompt": prompt[-1][1]}, "prompt", cfg), "system": system[0] if system else None,
            "chosen": answers[0], "rejected": answers[1:]}


# ------------------------------------------------------------------------------------------- files, row by row

def files_of(path):
    """The files of a corpus: itself, or all below a folder whose ending is one of ours."""
    if os.path.isdir(path):
        found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path)
                       for name in names if name.endswith(ENDINGS))
        if not found:
            raise BadInput(f"{path}: no file in it ends with {', '.join(ENDINGS)}")
        return found
    if path != "-" and not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    return [path]


def open_rows(path):
    """A file open for reading at any place, a row a line: itself, or a temporary file with what it unpacks to."""
    plain = gzip.open(path) if path.endswith(".gz") else sys.stdin.buffer if path == "-" else open(path, "rb")
    array_of_rows = path.removesuffix(".gz").endswith(".json") and plain.read(1) == b"["  # not one row a line
    if path.removesuffix(".gz").endswith(".json"):
        plain.seek(0)
    if plain.seekable() and not path.endswith(".gz") and not array_of_rows:
        return plain
    spool = tempfile.TemporaryFile()
    with plain:
        if array_of_rows:
            spool.writelines(json.dumps(row).encode() + b"\n" for row in json.load(plain))
        else:
            shutil.copyfileobj(plain, spool)
    spool.flush()
    spool.seek(0)
    return spool


class Corpus:
    """The examples of a file or folder by number; bad rows are named and left out, or refused with strict=True."""

    def __init__(self, path, cfg):
        self.cfg, self.bad = cfg, 0
        self.files, self.place, self.is_passage = [], array("q"), array("b")  # place: file, offset, bytes, part
        for name in files_of(path):
            try:
                self.files.append((name, open_rows(name)))
                self.index(*self.files[-1])
            except (OSError, EOFError, zlib.error, ValueError) as e:
                if isinstance(e, BadInput):
                    raise
                self.refuse(f"{name}: cannot be read ({e})")
        if not len(self):
            raise BadInput(f"{path}: no examples in it")
        if self.bad:
            print(f"{path}: {self.bad} rows left out, {len(self)} examples", file=sys.stderr, flush=True)

    def refuse(self, message):
        if self.cfg["strict"]:
            raise BadInput(message)
        self.bad += 1
        print(f"left out: {message}", file=sys.stderr)

    def index(self, name, file):
        offset = 0
        for number, raw in enumerate([file.read()] if name.endswith(".txt") else file, 1):
            if raw.strip() or name.endswith(".txt"):
                try:
                    found = examples_of(self.parse(name, raw), self.cfg)
                except ValueError as e:
                    self.refuse(f"{name}, line {number}: {e}")
                else:
                    for part, example in enumerate(found):
                        self.place.extend((len(self.files) - 1, offset, len(raw), part))
                        self.is_passage.append("passage" in example)
            offset += len(raw)

    def parse(self, name, raw):
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise BadInput(f"not UTF-8 (byte {e.start} is {raw[e.start]:#x})") from e
        if name.endswith(".txt"):
            return {"text": text}
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            raise BadInput(f"not JSON ({e})") from e

    def __len__(self):
        return len(self.is_passage)

    def __getitem__(self, i):
        file, offset, size, part = self.place[4 * int(i):4 * int(i) + 4]
        name, opened = self.files[file]
        raw = os.pread(opened.fileno(), size, offset)  # no seek: processes may share the file
        return examples_of(self.parse(name, raw), self.cfg)[part]


# ---------------------------------------------------------------------------------------------------- examples

class Examples:
    """A split of a corpus, a sequence: example i is read when it is asked for, and its distractors with it."""

    def __init__(self, corpus, order, size, seed):
        self.corpus, self.order, self.size, self.seed = corpus, order, size, seed
        if 0 < (passages := sum(corpus.is_passage[i] for i in order)) < size:
            raise BadInput(f"context_size is {size} passages, the corpus has {passages}")

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        example = self.corpus[self.order[i]]
        return self.with_distractors(i, example) if "passage" in example else example

    def with_distractors(self, i, example):
        """Example i's passage among size - 1 passages of other rows, in random order."""
        rng = random_stream("distractors", self.seed, i)
        order = [j for j in rng.permutation(len(self)) if j != i and self.corpus.is_passage[self.order[j]]][:self.size - 1]
        passages = {j: self.corpus[self.order[j]]["passage"] for j in order} | {i: example.pop("passage")}
        return {**example, "context": [passages[j] for j in rng.permutation([i, *order])]}


opened = {}  # standard input can be read once only


def read_examples(cfg, split, size=None):
    """Examples for the pairs (split "train") or fresh ones to count recall on (split "fresh"); never both.

    size: passages around the question, or tokens of context where the corpus is a .py with
    examples(count, size, seed). A corpus is shuffled once by the seed; "train" takes its head, "fresh" its end.
    """
    path, size = cfg["examples"], size or cfg["context_size"]
    train, count = cfg["n_examples"], cfg["fresh_questions"]
    if path.endswith(".py"):
        if not train:
            raise BadInput(f"n_examples is 0, expected how many to take from {path}: a generated corpus has no end")
        seed = cfg["seed"] * 1_000_003 + (size + 1 if split == "fresh" else 0)
        return list(run_file(path).examples(train if split == "train" else count, size, seed))
    key = (path, cfg["questions"], cfg["strict"])
    if key not in opened:
        opened[key] = Corpus(path, cfg)
    rows = opened[key]
    order = random_stream("split of the corpus", cfg["seed"]).permutation(len(rows))
    train = min(train or len(rows), len(rows))
    if split == "fresh" and train + count > len(rows):
        raise BadInput(f"{path}: {len(rows)} examples, expected {train} for pairs + {count} for fresh_questions")
    return Examples(rows, order[:train] if split == "train" else order[len(rows) - count:], size, cfg["seed"])
