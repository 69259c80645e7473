"""What the evaluations share: a model folder that is asked things, checks of options, tables."""
import math
import os
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from checkpoint import DTYPES, dtype_named, load_pretrained, read_config
from configs import BadInput, refuse, run_file
from console import Progress
from generate import generate
from model import Llama
from pairs.corpus import Corpus
from tokenizer import load_tokenizer

COMMON = dict(
    compare="",              # a second model folder, measured in the same way
    out="out/eval",          # folder of the results
    dtype="auto",            # auto: the folder's own on a GPU, float32 on a CPU; float32, bfloat16
    threads=0,               # CPU threads; 0: PyTorch's choice
)
ASKING = dict(
    template="auto",         # chat template, as in configs/default.py
    batch_tokens=0,          # of a batch of answers, as in configs/default.py
    seed=0,                  # of the examples
)

# look(i, token, tops): of prompt i, a new token, and where each head's arg-max was, (layers, heads)
Look = Callable[[int, int, torch.Tensor], None]


# ------------------------------------------------------------------------------------ options

def check_options(options: dict, at_least_one: tuple[str, ...], lists: tuple[str, ...]) -> None:
    """What can be said of a command's options before a model is loaded. BadInput names the key."""
    if options["dtype"] not in DTYPES:
        refuse("dtype", options["dtype"], f"one of {', '.join(DTYPES)}")
    # PyTorch's generators take no larger one.
    if options.get("seed", 0) >= 2 ** 63:
        refuse("seed", options["seed"], "less than 2 ** 63")
    for key in at_least_one:
        if options[key] < 1:
            refuse(key, options[key], "at least 1")
    for key in lists:
        check_list(key, options[key])


def check_list(key: str, values: list, lowest: int = 1) -> None:
    """BadInput unless these are one or more different integers from `lowest` on."""
    expected = f"one or more different integers from {lowest} on, as [{lowest},9]"
    if not values:
        refuse(key, values, expected)
    for value in values:
        # Two equal ones would be two rows of the table, and one cell of the picture.
        if type(value) is not int or value < lowest or values.count(value) > 1:
            refuse(key, values, expected)


def check_path(options: dict, key: str) -> None:
    """BadInput unless the key names a file or folder that is there."""
    if not options[key]:
        raise BadInput(f"{key} is empty, expected a file or a folder")
    path = options[key]
    if path != "-" and not os.path.exists(path):
        raise BadInput(f"{key}={path}: no such file or folder")


# ----------------------------------------------------------------------------------- subjects

class Subject:
    """A model folder that is asked things."""

    def __init__(self, folder: str, options: dict):
        self.folder = folder
        self.name = os.path.basename(os.path.normpath(folder))
        self.batch_tokens = options.get("batch_tokens", 0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = dtype_named(options["dtype"], folder, self.device)
        self.config = read_config(os.path.join(folder, "config.json"))
        self.tokenizer = load_tokenizer(folder, options.get("template", "auto"))

    @cached_property
    def model(self) -> Llama:
        """The weights, read when first asked for: all that a user gave is checked by then."""
        with Progress(f"weights of {self.folder}"):
            return load_pretrained(self.folder, self.dtype, self.device)

    def prompt(self, context: str, head: str, tail: str) -> tuple[list[int], range]:
        """(token ids of a user's turn around a context, which of them are the context's)."""
        prefix, suffix, _ = self.tokenizer.chat(head, tail)
        ids = self.tokenizer.encode(context)
        place = range(len(prefix), len(prefix) + len(ids))
        return prefix + ids + suffix, place

    def answers(self, prompts: list[list[int]], shared: list[int], max_new_tokens: int,
                look: Look | None = None) -> list[str]:
        """Greedy answers, in the order of the prompts. shared: see generate."""
        stops = self.tokenizer.chat("", "")[2]
        with Progress(f"answers of {self.name}", len(prompts)) as progress:
            found = generate(
                self.model,
                prompts,
                max_new_tokens,
                stop_ids=stops,
                shared=shared,
                look=look,
                batch_tokens=self.batch_tokens,
                progress=progress.update,
            )
        answers = []
        for ids in found:
            if ids[-1] in stops:
                ids = ids[:-1]
            answers.append(self.tokenizer.decode(ids))
        return answers


def subjects_of(folder: str, options: dict) -> list[Subject]:
    """The model, and the one to compare it with."""
    subjects = [Subject(folder, options)]
    if options["compare"]:
        subjects.append(Subject(options["compare"], options))
        for subject in subjects:
            # Not the last part alone: runs end alike, out/a/hf and out/b/hf.
            subject.name = os.path.normpath(subject.folder)
        if subjects[0].name == subjects[1].name:
            refuse("compare", options["compare"], "another folder than the model's")
    return subjects


# -------------------------------------------------------------------------- characters, tokens

def complete_characters(ids: list[int], n: int, text: str, tokenizer) -> int:
    """How many characters of text = decode(ids) the first n tokens have said in full."""
    said = tokenizer.decode(ids[:n])
    # A last half character shows as U+FFFD, which is where the two stop being equal.
    return len(os.path.commonprefix([said, text]))


def token_span(ids: list[int], start: int, end: int, tokenizer) -> tuple[int, int]:
    """(first, last + 1) of the tokens that say characters start .. end - 1 of decode(ids).

    Tokens cannot be decoded one by one: alone, a SentencePiece piece loses the space it begins
    with, and a byte-level token may be half a character. What the first n say is sure, and grows
    with n, so that a bisection finds the place in some log2(len(ids)) decodings.
    """
    text = tokenizer.decode(ids)
    first = tokens_until(ids, start, text, tokenizer)
    if tokenizer.decode(ids[:first]) != text[:start]:
        first -= 1   # this token says what lies before and the beginning of what is asked for
    return first, tokens_until(ids, end, text, tokenizer)


def tokens_until(ids: list[int], characters: int, text: str, tokenizer) -> int:
    """The fewest tokens that say so many characters in full."""
    low = 0
    high = len(ids)
    while low < high:
        middle = (low + high) // 2
        if complete_characters(ids, middle, text, tokenizer) < characters:
            low = middle + 1
        else:
            high = middle
    return low


# -------------------------------------------------------------------------- texts and tables

def texts(path: str) -> list[str]:
    """The texts of .txt files, of a folder, or of a corpus of documents."""
    if path.endswith(".py"):
        return [example["context"] for example in run_file(path).examples(8, 4096, 0)]
    corpus = Corpus(path, {"strict": True, "questions": 1})
    found = []
    for number in range(len(corpus)):
        example = corpus[number]
        text = example.get("text") or example.get("context")
        if not isinstance(text, str):
            raise BadInput(f"{path}, example {number}: found no text, expected documents")
        found.append(text)
    return found


def interval(right: float, asked: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    # Unlike p +- 1.96 sqrt(p (1 - p) / n) it has a width where all or none are right, and stays
    # within 0 and 1.
    z = 1.96
    p = right / asked
    pull = z * z / asked
    middle = p + pull / 2
    half = z * math.sqrt(p * (1 - p) / asked + pull / asked / 4)
    low = (middle - half) / (1 + pull)
    # Of no right answer it is 0, and all are 1, but for the last bit: -0.000 is none.
    return max(0.0, low), min(1.0, (middle + half) / (1 + pull))


def share(right: float, asked: int) -> str:
    """A share as a table shows it, with its interval."""
    low, high = interval(right, asked)
    return f"{right / asked:.3f} ({low:.3f}..{high:.3f}) of {asked}"


def area_by_length(lengths: list[int], shares: list[float]) -> float:
    """The area under shares over the logarithm of lengths, by trapezoids, per unit of its width.

    So it is a share as well: the mean over all lengths between the shortest and the longest, where
    each doubling counts alike, however the lengths that were asked at are spaced.
    """
    points = sorted(zip(np.log(lengths).tolist(), shares))
    if len(points) == 1:
        return points[0][1]
    area = 0.0
    for (left, low), (right, high) in pairwise(points):
        area += (right - left) * (low + high) / 2
    return area / (points[-1][0] - points[0][0])


def print_row(model: str, *cells: str) -> None:
    """A line of a table: whose it is, then cells that are formatted to be as wide in each line."""
    print("   ".join([f"{model:20}", *cells]).rstrip(), flush=True)
