"""python -m pairs show: one pair, to read."""
import re
import sys

from configs import BadInput, reading
from data import Evaluator, load_evaluator
from pairs.answers import normalize
from pairs.stats import read_pairs, settings_of, tokenizer_of
from tokenizer import Tokenizer

WORD = re.compile(r"\w+(?:[.,]\d+)*")


def show(argv: list[str]) -> int:
    """Print the pair with an id. Words of the question or of its right answers are bright."""
    if len(argv) != 2 or not re.fullmatch("[0-9]{1,10}", argv[1]):
        raise BadInput("expected: python -m pairs show PAIRS ID")
    path = argv[0]
    # An id is the number of its example: those that were dropped count as well.
    number = int(argv[1])
    pairs, _ = read_pairs(path)
    found = [row for row in pairs if row["id"] == number]
    if not found:
        first = [row["id"] for row in pairs[:8]]
        raise BadInput(f"{path}: no pair has the id {number}; the first ids are {first}")
    # Token ids mean nothing without their tokenizer; the header says whose they are.
    settings = settings_of(path, ("evaluator", "spacy_model"))
    tokenizer = tokenizer_of(path, settings)
    with reading(path):
        print_pair(found[0], tokenizer, load_evaluator(settings))
    return 0


def print_pair(row: dict, tokenizer: Tokenizer, evaluator: Evaluator) -> None:
    """The training prompt, chunk by chunk with its score; the question; the M + 1 answers."""
    answers = row.get("answers", [])
    question = row["question"]
    # The words that chunks are scored by.
    wanted = evaluator(question or "")
    for answer in answers:
        wanted = wanted | evaluator(answer)

    chunks = [tokenizer.decode(ids) for ids in row["chunks"]]
    for c, text in enumerate(chunks):
        tokens = len(row["chunks"][c])
        print(f"--- chunk {c}: {tokens} tokens, score {row['scores'][c]}")
        print(bright(text.strip(), wanted))
    print(f"\nquestion   {question or '(a ready pair: the chunks are its prompt)'}")
    for answer in answers:
        print(f"reference  {answer}")

    print_answers(row, " ".join(chunks), wanted)


def print_answers(row: dict, context: str, wanted: set[str]) -> None:
    """The chosen and the rejected answers, each with what it tells that is not in the context.

    The rejected ones were written from other chunks than the training prompt has, so that what they
    tell need not be in it. That is what they are rejected for.
    """
    chosen = row["chosen"].strip()
    print(f"\nchosen     {bright(chosen, wanted)}{invented(chosen, context)}")
    found = row.get("audit")
    for j, text in enumerate(row["rejected"]):
        text = text.strip()
        note = ""
        if found:
            evidence = found["evidence"][j]
            error = found["error"][j]
            note = f"   [{evidence} chunks: {error}]"
        print(f"rejected   {bright(text, wanted)}{invented(text, context)}{note}")


def bright(text: str, words: set[str]) -> str:
    """The text with these words in bold, on a terminal."""
    if not sys.stdout.isatty():
        return text

    def mark(match: re.Match) -> str:
        word = match.group()
        if word.lower() not in words:
            return word
        return f"\033[1;33m{word}\033[0m"

    return WORD.sub(mark, text)


def invented(answer: str, context: str) -> str:
    """Names and numbers of an answer that its prompt does not have."""
    known = set(normalize(context).split())
    words = []
    # Not the first word, which is upper case whatever it is.
    _, *others = re.findall(r"\w+", answer) or [""]
    for word in others:
        telling = word[0].isupper() or word[0].isdigit()
        if telling and word.lower() not in known and word not in words:
            words.append(word)
    if not words:
        return ""
    return f"   (not in the prompt: {', '.join(words)})"
