"""Ask a model folder a question about a file; see the answer as it is written, and where its heads looked.

    python sample.py MODEL "question" [context=FILE] [key=value]

The answer goes to standard output. Below it: the chunks of the file that attention's arg-max fell on most while the answer
was written, over the heads that looked into the file at a token and then wrote that very token (retrieval heads, App. B of
the paper), with the words that were copied from there.
"""
import os
import sys

import torch

from checkpoint import load_pretrained
from configs import BadInput, exit_on_bad_input, with_arguments
from generate import generate
from tokenizer import load_tokenizer

OPTIONS = dict(
    context="",              # a text file; empty: no context
    chunk_size=128,          # tokens of a chunk, in what is shown
    head="",                 # text before the context, inside the user's turn
    tail="\n\nQuestion: {question}",  # text after it
    max_new_tokens=256,
    temperature=0.0,         # 0: greedy
    top_p=0.95,
    seed=0,
    template="auto",
    dtype="float32",
    threads=0)


def main(argv):
    if len(argv) < 2 or "=" in argv[0]:
        raise BadInput('expected: python sample.py MODEL "question" [context=FILE] [key=value]')
    folder, question, *rest = argv
    options = with_arguments(OPTIONS, rest)
    context = ""
    if options["context"]:
        if not os.path.isfile(options["context"]):
            raise BadInput(f"context={options['context']!r}: no such file")
        with open(options["context"], encoding="utf-8", errors="replace") as f:
            context = f.read()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder, options["template"])
    model = load_pretrained(folder, getattr(torch, options["dtype"]), device)
    tail = options["tail"].replace("{question}", question) if context else question
    prefix, suffix, stops = tokenizer.chat(options["head"], tail)
    document = tokenizer.encode(context)
    prompt, written, looked = prefix + document + suffix, [], []

    def look(row, token, tops):
        """Print what is new of the answer; note where heads looked at the token that was written."""
        before = len(tokenizer.decode(written))
        written.append(token)
        if token not in stops:
            print(tokenizer.decode(written)[before:], end="", flush=True)
        copied = tops[(tops < len(prompt)) & (torch.tensor(prompt)[tops.clamp(max=len(prompt) - 1)] == token)]
        looked.extend((int(place) - len(prefix), token) for place in copied.tolist() if 0 <= place - len(prefix) < len(document))

    generator = torch.Generator(device).manual_seed(options["seed"])
    generate(model, [prompt], options["max_new_tokens"], options["temperature"], options["top_p"], stops, generator, look=look)
    print()
    if context:
        print(f"\n{len(document):,} tokens of context; looked at and copied from:", file=sys.stderr)
        print_chunks(document, looked, options["chunk_size"], tokenizer)


def print_chunks(document, looked, size, tokenizer):
    """The three chunks that most was copied from."""
    chunks = {}
    for place, token in looked:
        chunks.setdefault(place // size, []).append(place)
    for c, places in sorted(chunks.items(), key=lambda item: -len(item[1]))[:3]:
        ids = document[c * size:(c + 1) * size]
        words = tokenizer.decode([document[p] for p in sorted(set(places))])
        print(f"  {len(places) / len(looked):4.0%}  chunk {c} ({c * size / max(1, len(document)):.0%} in): "
              f"{' '.join(tokenizer.decode(ids).split())[:160]}\n        {' '.join(words.split())!r}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    main(sys.argv[1:])
