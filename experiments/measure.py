"""What is measured of a model folder: a column each."""
import math
from collections.abc import Callable, Iterable

import torch

from checkpoint import load_pretrained
from configs import run_file
from evals.common import texts
from evals.perplexity import token_losses
from evals.questions import answered
from experiments.worlds import alike, gone
from model import Llama
from pairs.answers import is_right
from pairs.corpus import read_examples
from tokenizer import load_tokenizer

Judge = Callable[[dict, str], bool]

TIMES = {104: 1, 232: 2, 488: 4, 1000: 8, 2024: 16}  # windows of a context, by its tokens
TEMPERATURES = (1.0, 0.7, 0.5)
SAMPLED = {104: 200, 1000: 100}   # questions that are answered at each temperature, by context
PROBES = 200                      # questions without evidence, and among look-alikes
GONE_SIZE = 104
ALIKE_SIZE = 232
PERPLEXITY_LENGTHS = (64, 1024)
PERPLEXITY_TOKENS = 2049          # of each of the world's texts


def measure(folder: str, cfg: dict) -> dict:
    """Columns of a model folder: shares, perplexities.

    right_1x .., invented_1x ..: of fresh questions over 1 window of context and more, greedy.
    invented_t1_1x, invented_t07_1x ..: of fewer of these, sampled at temperature 1, 0.7 ..
    states_gone: of questions about a person whose fact is not there, answers that give one all the
    same. right_alike: of questions among look-alikes. ppl_64 ..: of the world's text, in windows of
    so many tokens.
    """
    torch.set_num_threads(cfg["threads"])
    model = load_pretrained(folder, torch.float32, "cpu")
    tokenizer = load_tokenizer(folder, cfg["template"])
    found = {}
    for size in cfg["fresh_sizes"]:
        times = TIMES[size]
        examples = read_examples(cfg, "fresh", size)
        answers = list(answered(model, tokenizer, cfg, examples))
        found[f"right_{times}x"] = share(right, answers)
        found[f"invented_{times}x"] = share(invents, answers)
    for size, count in SAMPLED.items():
        fewer = {**cfg, "fresh_questions": min(count, cfg["fresh_questions"])}
        for temperature in TEMPERATURES:
            examples = read_examples(fewer, "fresh", size)
            generator = torch.Generator().manual_seed(cfg["seed"])
            answers = answered(model, tokenizer, cfg, examples, temperature, generator)
            column = f"invented_t{temperature:g}_{TIMES[size]}x".replace(".", "")
            found[column] = share(invents, answers)
    world = run_file(cfg["examples"])
    count = min(PROBES, cfg["fresh_questions"])
    for name, questions, size, judge in (
            ("states_gone", gone, GONE_SIZE, states),
            ("right_alike", alike, ALIKE_SIZE, right)):
        examples = list(questions(world, count, size, cfg["seed"]))
        found[name] = share(judge, answered(model, tokenizer, cfg, examples))
    documents = [tokenizer.encode(text)[:PERPLEXITY_TOKENS] for text in texts(cfg["examples"])]
    found.update(perplexities(model, documents, PERPLEXITY_LENGTHS))
    return found


def perplexities(model: Llama, documents: list[list[int]], lengths: Iterable[int]
                 ) -> dict[str, float]:
    """{"ppl_64": perplexity of all documents' tokens, in windows of 64}, a column a length."""
    found = {}
    for length in lengths:
        losses = []
        # A mean over all tokens, as token_losses gives them, then exp: not a mean of perplexities.
        for ids in documents:
            losses.append(token_losses(model, ids, length, length // 2))
        found[f"ppl_{length}"] = round(math.exp(torch.cat(losses).mean()), 4)
    return found


def share(judge: Judge, answers: Iterable[tuple[dict, str]]) -> float:
    """The share of (example, answer) that a judge(example, answer) finds true."""
    verdicts = [judge(example, answer) for example, answer in answers]
    return sum(verdicts) / len(verdicts)


def right(example: dict, answer: str) -> bool:
    """As train_logo.py counts them."""
    return is_right(answer, example["answers"])


def invents(example: dict, answer: str) -> bool:
    """Whether an answer says something of somebody that its document does not say.

    The world tells a fact in one sentence, and answers repeat such sentences: one that is not in
    the document gives a person a job or a city that the document does not give.
    """
    # Whole sentences, not words: "Rosa sings" is invented where it is Ida who sings.
    told = set(sentences(example["context"]))
    return any(sentence not in told for sentence in sentences(answer))


def states(example: dict, answer: str) -> bool:
    """Whether an answer says of the person who was asked about what the document does not say."""
    told = set(sentences(example["context"]))
    for sentence in sentences(answer):
        if sentence.split()[0] == example["name"] and sentence not in told:
            return True
    return False


def sentences(text: str) -> list[str]:
    """The sentences of a text, without full stops."""
    return [part.strip() for part in text.split(".") if part.strip()]
