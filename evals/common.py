"""What the evaluations share: a model folder that is asked things, intervals, pictures."""
import math
import os

import torch

from checkpoint import load_pretrained
from configs import run_file
from generate import generate
from pairs.corpus import Corpus
from tokenizer import load_tokenizer



class Subject:
    """A model folder that is asked things."""

    def __init__(self, folder, options):
        self.name, self.options = os.path.basename(os.path.normpath(folder)), options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_pretrained(folder, getattr(torch, options["dtype"]), self.device)
        self.tokenizer = load_tokenizer(folder, options["template"])

    def prompt(self, context, head, tail):
        """(token ids of a user's turn around a context, how many of them do not depend on the tail)."""
        prefix, suffix, _ = self.tokenizer.chat(head, tail)
        ids = prefix + self.tokenizer.encode(context)
        return ids + suffix, len(ids)

    def answers(self, prompts, max_new_tokens, look=None):
        """Greedy answers to (ids, shared) prompts, in batches of similar lengths; equal contexts are computed once.

        look(i, token, tops): what Llama.generate's look is told, of prompt i.
        """
        stops, out = self.tokenizer.chat("", "")[2], [None] * len(prompts)
        order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0])), self.options["batch"]
        for some in (order[i:i + size] for i in range(0, len(order), size)):
            found = generate(self.model, [prompts[i][0] for i in some], max_new_tokens, stop_ids=stops,
                                        shared=[prompts[i][1] for i in some],
                                        look=look and (lambda row, *seen, some=some: look(some[row], *seen)))
            for i, ids in zip(some, found):
                out[i] = self.tokenizer.decode([t for t in ids if t not in stops])
        return out


def interval(right, asked):
    """95 % Wilson interval of a share."""
    z, p = 1.96, right / asked
    middle, half = p + z * z / (2 * asked), z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return (middle - half) / (1 + z * z / asked), (middle + half) / (1 + z * z / asked)


def pyplot():
    """matplotlib, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def texts(path):
    """The texts of .txt files, of a folder, or of a corpus of documents."""
    if path.endswith(".py"):
        return [example["context"] for example in run_file(path).examples(8, 4096, 0)]
    corpus = Corpus(path, {"strict": True, "questions": 1})
    found = [corpus[i] for i in range(len(corpus))]
    return [example.get("text") or example.get("context") for example in found]


def save_picture(figure, plt, name, options):
    os.makedirs(options["out"], exist_ok=True)
    path = os.path.join(options["out"], f"{name}.png")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)
