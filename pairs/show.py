"""python -m pairs show: one pair, to read."""
import re
import sys

from configs import BadInput
from data import load_evaluator, read_header
from pairs.answers import normalize
from pairs.stats import read_pairs
from tokenizer import load_tokenizer

WORD = re.compile(r"\w+(?:[.,]\d+)*")


def show(argv: list[str]) -> int:
    """Print the pair with an id. Words of the question or of its right answers are bright."""
    if len(argv) != 2 or not argv[1].isdigit():
        raise BadInput("expected: python -m pairs show PAIRS ID")
    path, number = argv[0], int(argv[1])
    pairs, _ = read_pairs(path)
    found = [row for row in pairs if row["id"] == number]
    if not found:
        first = [row["id"] for row in pairs[:8]]
        raise BadInput(f"{path}: no pair has the id {number}; the first ids are {first}")
    settings = read_header(path)
    for key in ("model", "template", "evaluator", "spacy_model"):
        if key not in settings:
            raise BadInput(f"{path}, line 1: no {key!r} in its settings, which tell the tokenizer")
    tokenizer = load_tokenizer(settings["model"], settings["template"])
    print_pair(found[0], tokenizer, load_evaluator(settings))
    return 0


def print_pair(row: dict, tokenizer, evaluator) -> None:
    answers = row.get("answers", [])
    wanted = evaluator(row["question"] or "")
    for answer in answers:
        wanted = wanted | evaluator(answer)
    chunks = [tokenizer.decode(ids) for ids in row["chunks"]]
    context = " ".join(chunks)
    for c, text in enumerate(chunks):
        print(f"--- chunk {c}: {len(row['chunks'][c])} tokens, score {row['scores'][c]}")
        print(bright(text.strip(), wanted))
    print(f"\nquestion   {row['question'] or '(a ready pair: the chunks are its prompt)'}")
    for answer in answers:
        print(f"reference  {answer}")
    print(f"\nchosen     {bright(row['chosen'].strip(), wanted)}{invented(row['chosen'], context)}")
    for j, text in enumerate(row["rejected"]):
        note = ""
        if "audit" in row:
            note = f"   [{row['audit']['evidence'][j]} chunks: {row['audit']['error'][j]}]"
        print(f"rejected   {bright(text.strip(), wanted)}{invented(text, context)}{note}")


def bright(text: str, words: set[str]) -> str:
    """The text with these words in bold, on a terminal."""
    if not sys.stdout.isatty():
        return text

    def mark(word):
        return f"\033[1;33m{word.group()}\033[0m" if word.group().lower() in words else word.group()

    return WORD.sub(mark, text)


def invented(answer: str, context: str) -> str:
    """Names and numbers of an answer that its prompt does not have."""
    known = set(normalize(context).split())
    words = []
    # Not the first word, which is upper case whatever it is.
    for word in re.findall(r"\w+", answer)[1:]:
        telling = word[0].isupper() or word[0].isdigit()
        if telling and word.lower() not in known and word not in words:
            words.append(word)
    return f"   (not in the prompt: {', '.join(words)})" if words else ""
