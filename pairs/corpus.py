"""Corpora: rows of a few forms, read into examples one at a time.

    a row                                          its examples
    {"context", "question", "answers"}             one: the context is a text, or passages
    {"question", "answers", "title", "text"}       one: a passage that answers, among others
    {"text"}, or a .txt file                       `questions`, which the policy writes about it
    {"prompt", "system", "chosen", "rejected"}     one: a pair that exists; rejected: one or a list

Rows come from .jsonl, .json (lines, or one array), these with .gz, a folder of such files, or - for
standard input. Other forms become these by: python -m pairs convert FORMAT IN OUT

Every row is read twice: at the start, to name what is wrong with it and to note where it lies;
later, when its turn comes. In between, a few integers of it are in memory: a corpus may be larger
than that.

Rows about one text (context, passage, document, prompt) are one *document*. What is trained on and
what is asked afterwards is split by document: else the questions would be about a text that was
read.
"""
import gzip
import hashlib
import json
import os
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache

from configs import BadInput, run_file, saving
from console import Progress
from data import is_text, random_stream

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt")
SPOOLED = -1  # the "file" of rows that had to be unpacked

# Keys by which a row of another form is known, so that the message can say what to do.
CONVERTED = {"conversations": "long-llm-data", "messages": "long-llm-data",
             "instruction": "longalpaca"}


# ------------------------------------------------------------------------------ a row -> an example

def text_at(row: dict, key: str) -> str:
    """row[key], a text that is not empty."""
    text = row.get(key)
    if not is_text(text) or not text.strip():
        raise BadInput(f"{key!r} is {repr(text)[:60]}, expected a text that is not empty")
    return text


def example_of(row: object) -> dict:
    """The example of a row. BadInput, without file and line, says what is wrong with it."""
    if not isinstance(row, dict):
        raise BadInput(f"expected a JSON object, found {repr(row)[:40]}")
    for key, form in CONVERTED.items():
        if key in row:
            raise BadInput(f"has {key!r}: python -m pairs convert {form} IN OUT makes rows of ours")
    # A pair that lacks its other half is a pair with a fault, not a row of another form.
    if "chosen" in row or "rejected" in row:
        return ready_pair(row)
    if "question" not in row and "text" in row:
        return {"text": text_at(row, "text")}
    # A passage answers by itself; a context is where an answer has to be found.
    example = {"question": text_at(row, "question"), "answers": answers_of(row)}
    if "text" in row:
        title = row.get("title") or ""
        return {**example, "passage": f"{title}\n{text_at(row, 'text')}".strip()}
    context = row.get("context")
    passages = context if isinstance(context, list) and context else [context]
    for passage in passages:
        text_at({"context": passage}, "context")
    return {**example, "context": context}


def answers_of(row: dict) -> list[str]:
    """The right answers of a row: "answers", or a single "answer", or none."""
    answers = row.get("answers", [])
    if "answers" not in row and row.get("answer"):
        answers = [row["answer"]]
    if not isinstance(answers, list) or not all(is_text(a) and a.strip() for a in answers):
        raise BadInput(f"'answers' is {repr(answers)[:60]}, expected a list of texts that are not "
                       "empty")
    return answers


def ready_pair(row: dict) -> dict:
    """A pair that exists: {"prompt", "system", "chosen", "rejected": [text, ...]}."""
    rejected = row.get("rejected")
    # A text is a sequence as well: "No." would become the three answers N, o and a full stop.
    if isinstance(rejected, str):
        rejected = [rejected]
    if not isinstance(rejected, list) or not rejected:
        raise BadInput(f"'rejected' is {repr(rejected)[:60]}, expected a text, or a list of texts")
    if isinstance(row.get("chosen"), list) or isinstance(rejected[0], dict):
        raise BadInput("has messages: python -m pairs convert trl IN OUT makes rows of ours")
    chosen = text_at(row, "chosen")
    for text in rejected:
        text_at({"rejected": text}, "rejected")
        if text.strip() == chosen.strip():
            raise BadInput(f"'chosen' and 'rejected' are both {chosen[:40]!r}, expected different "
                           "texts")
    system = None if row.get("system") is None else text_at(row, "system")
    return {"prompt": text_at(row, "prompt"), "system": system, "chosen": chosen,
            "rejected": rejected}


def number_of_document(example: dict, numbers: dict[bytes, int]) -> int:
    """Which of the texts it is about, numbered as they came. numbers: those so far, by digest."""
    for key in ("text", "passage", "prompt", "context"):
        if key in example:
            text = json.dumps(example[key])
            # A digest, since the texts themselves may not fit into memory.
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            return numbers.setdefault(digest, len(numbers))
    raise BadInput("expected a context")


# ------------------------------------------------------------------------------- files, row by row

def files_of(path: str) -> list[str]:
    """The files of a corpus: itself, or all below a folder whose ending is one of ours."""
    if not os.path.isdir(path):
        if path != "-" and not os.path.isfile(path):
            raise BadInput(f"{path}: no such file")
        return [path]
    # In one order on every machine: examples are known by their number.
    found = []
    for folder, _, names in os.walk(path):
        found += [os.path.join(folder, name) for name in names if name.endswith(ENDINGS)]
    if not found:
        raise BadInput(f"{path}: no file in it ends with {', '.join(ENDINGS)}")
    return sorted(found)


def bytes_of(files: list[str]) -> int:
    """How much there is to read; 0 where nobody knows, of what is packed or comes on a pipe."""
    if any(name == "-" or name.endswith(".gz") for name in files):
        return 0
    return sum(map(os.path.getsize, files))


def raw_rows(name: str) -> Iterator[tuple[bytes, bool]]:
    """(row, whether it lies in the file as it is) of a file's rows, empty lines among them."""
    packed = name.endswith(".gz")
    if name == "-":
        file = sys.stdin.buffer
    elif packed:
        file = gzip.open(name)
    else:
        file = open(name, "rb")
    with file:
        if name.endswith(".txt"):
            yield file.read(), True
        elif name.removesuffix(".gz").endswith(".json") and is_array(file):
            # In memory once as a whole; a corpus that does not fit is better in lines.
            for row in json.load(file):
                yield json.dumps(row).encode(), False
        else:
            for raw in file:
                yield raw, not packed and name != "-"


def is_array(file) -> bool:
    """Whether a .json file is one array. long-llm-data has rows in lines under that name."""
    return file.peek(8).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def parse(name: str, raw: bytes) -> object:
    """What a row says, as JSON does. BadInput, without file and line, where it says nothing."""
    try:
        # Some editors begin a file with a byte order mark.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"not UTF-8 (byte {e.start} is {raw[e.start]:#x})") from e
    if name.endswith(".txt"):
        return {"text": text}
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"not JSON ({e})") from e


def warn(text: str) -> None:
    """Say it once, though all processes of torchrun read the same files."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


class Corpus:
    """The examples of a file or folder by number. Bad rows are named and left out; strict=True
    refuses them.

    document_of: the document's number of each example, from 0 in the order of first appearance.
    """

    def __init__(self, path: str, cfg: dict):
        self.strict = cfg["strict"]
        self.questions = cfg["questions"]
        self.files = files_of(path)
        self.spool = tempfile.TemporaryFile()  # one for all that is packed: descriptors are few
        # Integers in arrays: eight bytes each, where a list of tuples takes a hundred an example.
        self.places = array("q")               # file, offset, bytes of each example
        self.document_of = array("q")
        self.is_passage = array("b")
        self.bad = 0
        with Progress(f"reading {path}, bytes", bytes_of(self.files)) as progress:
            self.index_all(progress)
        with saving(f"{tempfile.gettempdir()} ($TMPDIR), for what {path} unpacks to"):
            self.spool.flush()
        if not len(self):
            raise BadInput(f"{path}: no examples in it")
        if self.bad:
            warn(f"{path}: {self.bad} rows left out, {len(self)} examples")

    def refuse(self, message: str) -> None:
        if self.strict:
            raise BadInput(message)
        self.bad += 1
        warn(f"left out: {message}")

    def index_all(self, progress: Progress) -> None:
        numbers = {}
        for file, name in enumerate(self.files):
            try:
                self.index(file, name, numbers, progress)
            except BadInput:
                raise
            except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
                self.refuse(f"{name}: cannot be read ({e})")

    def index(self, file: int, name: str, numbers: dict[bytes, int], progress: Progress) -> None:
        """Note where the examples of a file lie and which documents they are about."""
        end = 0
        for number, (raw, in_place) in enumerate(raw_rows(name), 1):
            place = (file, end, len(raw))
            end += len(raw)
            progress.update(len(raw))
            # An empty line is no row, but an empty text file is a document with a fault.
            if not raw.strip() and not name.endswith(".txt"):
                continue
            try:
                example = example_of(parse(name, raw))
            except BadInput as e:
                self.refuse(f"{name}, line {number}: {e}")
                continue
            if not in_place:
                place = (SPOOLED, self.spool.tell(), len(raw))
                # Not a row that is bad: without it this would be another corpus.
                with saving(f"{tempfile.gettempdir()} ($TMPDIR), for what {name} unpacks to"):
                    self.spool.write(raw)
            # By the text itself: a corpus may have a row a question, in any order.
            document = number_of_document(example, numbers)
            for _ in range(self.questions if "text" in example else 1):
                self.places.extend(place)
                self.document_of.append(document)
                self.is_passage.append("passage" in example)

    def __len__(self) -> int:
        return len(self.document_of)

    def __getitem__(self, i: int) -> dict:
        file, offset, size = self.places[3 * int(i):3 * int(i) + 3]
        if file == SPOOLED:
            # No seek: processes share this file.
            return self.example(i, "", os.pread(self.spool.fileno(), size, offset))
        # Opened anew each time: a folder may have more files than a process may have open.
        name = self.files[file]
        try:
            with open(name, "rb") as f:
                f.seek(offset)
                return self.example(i, name, f.read(size))
        except (OSError, BadInput) as e:
            raise BadInput(f"{name}: has changed since it was read first ({e})") from e

    def example(self, i: int, name: str, raw: bytes) -> dict:
        return {"document": self.document_of[int(i)], **example_of(parse(name, raw))}


# ----------------------------------------------------------------------------------------- examples

class Examples(Sequence):
    """Some of a corpus: example i is read when it is asked for, and its distractors with it.

    order: their numbers in the corpus. Distractors are passages of the other documents among them.
    """

    def __init__(self, corpus: Corpus, order: Sequence[int], size: int, seed: int):
        self.corpus = corpus
        self.order = order
        self.size = size
        self.seed = seed
        self.passages = {}  # document -> one example about it, in this order
        for i in order:
            if corpus.is_passage[i]:
                self.passages.setdefault(corpus.document_of[i], i)
        if 0 < len(self.passages) < size:
            raise BadInput(f"a context of {size} passages needs as many documents, these "
                           f"{len(order)} examples have {len(self.passages)}: lower its size "
                           "(context_size, fresh_sizes) or take more examples")

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict:
        example = self.corpus[self.order[i]]
        if "passage" in example:
            passage = example.pop("passage")
            example["context"] = self.among_distractors(i, example["document"], passage)
        return example

    def among_distractors(self, i: int, document: int, passage: str) -> list[str]:
        """A passage among size - 1 of other documents, in random order."""
        # Of example i alone: it reads the same, whoever asks for it and in what order.
        rng = random_stream("distractors", self.seed, i)
        # By document: one with many questions would be its own distractor.
        shuffled = rng.permutation(list(self.passages))
        others = [other for other in shuffled if other != document][:self.size - 1]
        context = []
        for member in rng.permutation([document, *others]):
            if member == document:
                context.append(passage)
            else:
                context.append(self.corpus[self.passages[member]]["passage"])
        return context


@lru_cache
def open_corpus(path: str, questions: int, strict: bool) -> Corpus:
    """The corpus of a path, the same one for all callers: standard input can be read only once."""
    return Corpus(path, {"questions": questions, "strict": strict})


def generated_examples(path: str, count: int, size: int, seed: int) -> list[dict]:
    """What examples(count, size, seed) of a Python file yields, each with its document's number."""
    generator = getattr(run_file(path), "examples", None)
    if not callable(generator):
        raise BadInput(f"{path}: expected a function examples(count, size, seed) in it")
    try:
        rows = list(generator(count, size, seed))
    except Exception as e:  # the function is the user's, as the file is
        raise BadInput(f"{path}: examples({count}, {size}, {seed}): {type(e).__name__}: {e}") from e
    # Such a file may tell the same text again, with another question.
    numbers = {}
    found = []
    for number, row in enumerate(rows):
        try:
            example = example_of(row)
            document = number_of_document(example, numbers)
        except BadInput as e:
            raise BadInput(f"{path}, example {number}: {e}") from e
        if "passage" in example:
            raise BadInput(f"{path}, example {number}: has a 'text' that answers, expected "
                           "'context', with whatever else there is to read in it")
        found.append({"document": document, **example})
    return found


def read_examples(cfg: dict, split: str, size: int | None = None) -> Sequence[dict]:
    """Examples for the pairs (split "train"), or fresh ones to ask afterwards (split "fresh").

    size: passages around the question, or tokens of context where the corpus is a .py with
    examples(count, size, seed); None: context_size. The documents of a corpus are shuffled once by
    the seed: "train" takes its examples from the head, "fresh" from the end, and no document is in
    both.
    """
    path = cfg["examples"]
    size = size or cfg["context_size"]
    count = cfg["fresh_questions"]
    if path.endswith(".py"):
        if not cfg["n_examples"]:
            raise BadInput(f"n_examples is 0, expected how many to take from {path}: a generated "
                           "corpus has no end")
        seed = cfg["seed"] * 1_000_003
        if split == "fresh":
            return generated_examples(path, count, size, seed + size + 1)
        return generated_examples(path, cfg["n_examples"], size, seed)

    corpus = open_corpus(path, cfg["questions"], cfg["strict"])
    order = by_document(corpus, cfg["seed"])
    train = order[:cfg["n_examples"] or len(order)]
    if split == "train":
        return Examples(corpus, train, size, cfg["seed"])
    # The end of the same order: how many are trained on does not change what is asked.
    fresh = order[max(0, len(order) - count):]
    documents = [{corpus.document_of[i] for i in part} for part in (train, fresh)]
    if len(fresh) < count or documents[0] & documents[1]:
        n_documents = len(set(corpus.document_of))
        raise BadInput(f"{path}: {len(order)} examples of {n_documents} documents, expected "
                       f"{len(train)} for pairs + {count} for fresh_questions, of different "
                       "documents: lower n_examples or fresh_questions")
    return Examples(corpus, fresh, size, cfg["seed"])


def by_document(corpus: Corpus, seed: int) -> list[int]:
    """All examples, those of a document beside each other, the documents shuffled."""
    members = {}
    for i, document in enumerate(corpus.document_of):
        members.setdefault(document, []).append(i)
    order = []
    for document in random_stream("split of the corpus", seed).permutation(len(members)):
        order += members[int(document)]
    return order
