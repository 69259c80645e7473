"""Ask a model folder a question about a file; see the answer as it is written, and its sources.

    python sample.py MODEL "question" [context=FILE] [key=value]
    python sample.py out/tiny/hf "Who is Rosa?" context=rosa.txt

The answer goes to standard output. Below it, on standard error: the chunks of the file that the
attention heads copied from most. A head copies where its arg-max lies on a token of the file in the
very step that writes this token (retrieval heads, App. B of the paper).
"""
import sys

import torch

from checkpoint import DTYPES, dtype_named, load_pretrained
from configs import BadInput, exit_on_bad_input, refuse, with_arguments
from console import asked_for_help, print_help
from generate import generate
from tokenizer import Tokenizer, load_tokenizer

OPTIONS = dict(
    context="",              # a text file; empty: no context
    chunk_size=128,          # tokens of a chunk, in what is shown
    head="",                 # text before the context, inside the user's turn
    tail="\n\nQuestion: {question}",  # text after it
    max_new_tokens=256,      # longest answer
    temperature=0.0,         # 0: greedy
    top_p=0.95,              # nucleus of the sampling
    seed=0,                  # of the sampling
    template="auto",         # chat template, as in configs/default.py
    dtype="auto",            # auto: the folder's own on a GPU, float32 on a CPU; float32, bfloat16
    threads=0,               # CPU threads; 0: PyTorch's choice
)
SHOWN = 3                    # chunks


def check(options: dict) -> None:
    """Before the model is read. BadInput names the key."""
    if options["dtype"] not in DTYPES:
        refuse("dtype", options["dtype"], f"one of {', '.join(DTYPES)}")
    # PyTorch's generators take no larger one.
    if options["seed"] >= 2 ** 63:
        refuse("seed", options["seed"], "less than 2 ** 63")
    if not 0 < options["top_p"] <= 1:
        refuse("top_p", options["top_p"], "more than 0 and at most 1")
    for key in ("max_new_tokens", "chunk_size"):
        if options[key] < 1:
            refuse(key, options[key], "at least 1")


def read_context(path: str) -> str:
    """The text of a file; bytes that are no UTF-8 show as U+FFFD to the model as well."""
    if not path:
        return ""
    try:
        # A book with a few bytes in another encoding is still worth a question.
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError as e:
        raise BadInput(f"context={path}: cannot be read ({e.strerror})") from e


class Writer:
    """Prints an answer as it grows."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids = []
        self.printed = 0     # characters

    def add(self, token: int) -> None:
        self.ids.append(token)
        # Decoded as a whole: alone, a token may lack its space. One that ends within a character
        # shows as U+FFFD there, and what follows will change that.
        text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        self.show(text)

    def show(self, text: str) -> None:
        print(text[self.printed:], end="", flush=True)
        self.printed = max(self.printed, len(text))

    def end(self) -> None:
        self.show(self.tokenizer.decode(self.ids))
        print()


def copied_places(prompt: list[int], document: range, token: int, tops: torch.Tensor) -> list[int]:
    """Where in the document heads copied a new token from, once for each such head.

    document: where its tokens lie in the prompt. tops: (layers, heads), place of each arg-max.
    """
    places = []
    for place in tops.flatten().tolist():
        if place in document and prompt[place] == token:
            places.append(place - document.start)
    return places


def main(argv: list[str]) -> None:
    if asked_for_help(argv) or not argv:
        print_help(__doc__, {"keys:": OPTIONS}, __file__)
        sys.exit(0 if argv else 2)
    if len(argv) < 2 or "=" in argv[0]:
        raise BadInput('expected: python sample.py MODEL "question" [context=FILE] [key=value]')
    folder, question, *words = argv
    options = with_arguments(OPTIONS, words)
    check(options)
    context = read_context(options["context"])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder, options["template"])
    model = load_pretrained(folder, dtype_named(options["dtype"], folder, device), device)

    tail = options["tail"].replace("{question}", question) if context else question
    prefix, suffix, stops = tokenizer.chat(options["head"], tail)
    document = tokenizer.encode(context)
    prompt = prefix + document + suffix
    place = range(len(prefix), len(prefix) + len(document))
    writer = Writer(tokenizer)
    copied = []

    def look(row, token, tops):
        if token not in stops:
            writer.add(token)
        copied.extend(copied_places(prompt, place, token, tops))

    generator = torch.Generator(device).manual_seed(options["seed"])
    generate(
        model,
        [prompt],
        options["max_new_tokens"],
        options["temperature"],
        options["top_p"],
        stops,
        generator,
        look=look,
    )
    writer.end()
    # On standard error, so that the answer alone can be piped on.
    if context:
        heading = f"\n{len(document):,} tokens of context; looked at and copied from:"
        print(heading, file=sys.stderr)
        print_chunks(document, copied, options["chunk_size"], tokenizer)


def print_chunks(document: list[int], copied: list[int], size: int, tokenizer: Tokenizer) -> None:
    """The chunks that most was copied from, and the words that were."""
    by_chunk = {}
    for place in copied:
        by_chunk.setdefault(place // size, []).append(place)
    # By how often, not by how many tokens: two heads on one token are two votes for its chunk.
    most = sorted(by_chunk.items(), key=lambda item: -len(item[1]))[:SHOWN]
    for number, places in most:
        text = tokenizer.decode(document[number * size:(number + 1) * size])
        words = tokenizer.decode([document[place] for place in sorted(set(places))])
        share = len(places) / len(copied)
        depth = number * size / len(document)
        print(f"  {share:4.0%}  chunk {number} ({depth:.0%} in): {' '.join(text.split())[:160]}",
              file=sys.stderr)
        print(f"        {' '.join(words.split())!r}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    main(sys.argv[1:])
