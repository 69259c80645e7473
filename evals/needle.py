"""Needles: facts hidden in long contexts, by length and depth, as in RULER (arXiv 2404.06654).

A context is filled with sentences of a haystack. One fact, the needle, lies at a given depth; what
else there is to find, or to be confused with, lies anywhere. retrieval=True also tells which
attention heads copied the answer from the needle (evals/heads.py).
"""
import random
import re
from typing import NamedTuple

import numpy as np

from configs import BadInput, refuse, run_file
from evals.common import (
    ASKING,
    COMMON,
    Subject,
    check_list,
    check_options,
    check_path,
    print_row,
    share,
    texts,
)
from evals.heads import RetrievalScores, draw_heads
from evals.pictures import heat_map, save_panels
from pairs.answers import is_right

OPTIONS = dict(
    **COMMON,
    **ASKING,
    tasks="single",          # of TASKS, comma-separated
    lengths=[512, 1024, 2048, 4096],  # tokens of the context
    depths=[0, 25, 50, 75, 100],      # where the needle lies, in per cent of the context
    samples=4,               # in each cell
    haystack="",             # texts to hide in; empty: generated; a .py: its needle(...) makes all
    prompt_tail="",          # around the question; empty: the task's own
    max_new_tokens=40,       # of an answer
    window=0,                # mark this window in the picture; 0: the first model's own
    retrieval=False,         # also which attention heads copied (App. B, Eq. 5)
)
TASKS = ("single", "multikey", "multivalue", "multiquery", "variables")

ADJECTIVES = """amber bold calm dusty eager faint gentle hollow icy jolly keen lively mellow noble
plain quiet rapid silent tall vivid""".split()
NOUNS = """anchor basket candle dragon engine falcon garden harbor island jacket kettle ladder
magnet needle orchid pencil quilt river saddle temple""".split()
NOISE = [
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
]
SENTENCE_ENDS = re.compile(r"(?<=[.?]) ")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def check(options: dict) -> None:
    check_options(options, ("samples", "max_new_tokens"), ("lengths",))
    check_list("depths", options["depths"], lowest=0)
    if max(options["depths"]) > 100:
        refuse("depths", options["depths"], "per cent, at most 100")
    for task in tasks_of(options):
        if task not in TASKS:
            raise BadInput(f"tasks: expected some of {', '.join(TASKS)}, found {task!r}")
    path = options["haystack"]
    if path:
        check_path(options, "haystack")
    if path.endswith(".py") and not callable(getattr(run_file(path), "needle", None)):
        raise BadInput(f"haystack={path}: expected a function needle(task, size, depth, seed) in "
                       "it, as in models/tiny/world.py")


def tasks_of(options: dict) -> list[str]:
    return [task.strip() for task in options["tasks"].split(",")]


# ------------------------------------------------------------------------------------ needles

class Example(NamedTuple):
    """One context that something is hidden in."""
    context: str
    question: str
    answers: list[str]   # all of them have to be given
    needle: str          # the sentence whose place the depth says


def make_facts(task: str, rng: random.Random) -> tuple[list[str], str, list[str]]:
    """(sentences to hide, the first at the depth; the question; its answers) of one of TASKS."""
    keys = []
    for noun in rng.sample(NOUNS, 4):
        keys.append(f"{rng.choice(ADJECTIVES)}-{noun}")
    values = []
    for _ in range(4):
        values.append(str(rng.randrange(1_000_000, 10_000_000)))
    if task == "variables":
        return make_chain(values[0], rng)

    if task == "multivalue":
        # One key has four numbers, all of which are asked for.
        keys = keys[:1] * 4
    facts = []
    for key, value in zip(keys, values):
        facts.append(f"One of the special magic numbers for {key} is: {value}.")

    asked = ", ".join(dict.fromkeys(keys))
    question = f"What are all the special magic numbers for {asked} mentioned in the text above?"
    if task in ("multivalue", "multiquery"):
        return facts, question, values
    # One number is asked for. Under multikey the others are there to be confused with it.
    if task == "single":
        facts = facts[:1]
    question = f"What is the special magic number for {keys[0]} mentioned in the text above?"
    return facts, question, values[:1]


def make_chain(value: str, rng: random.Random) -> tuple[list[str], str, list[str]]:
    """Variables that get a value from one another: all of them have it."""
    names = []
    for _ in range(4):
        names.append("".join(rng.choices(LETTERS, k=5)))
    chain = [f"VAR {names[0]} = {value}."]
    for before, name in zip(names, names[1:]):
        chain.append(f"VAR {name} = VAR {before}.")
    question = f"Find all variables that are assigned the value {value} in the text above."
    return chain, question, names


def sentences_of(path: str) -> list[str]:
    """Sentences of the haystack, one after another."""
    if not path:
        return NOISE
    found = []
    for text in texts(path):
        text = text.replace("\n", " ")
        for sentence in SENTENCE_ENDS.split(text):
            if sentence.strip():
                found.append(sentence.strip())
    if not found:
        raise BadInput(f"haystack={path}: found no sentence in it")
    return found


def hide(facts: list[str], hay: list[str], size: int, depth: int, tokenizer,
         rng: random.Random) -> str:
    """A context of some `size` tokens: facts[0] at depth per cent of it, the others anywhere."""
    # What is hidden counts: a context of 512 tokens has 512 with its needles.
    left = size
    for fact in facts:
        left -= tokens_in_text(fact, tokenizer)
    # Sentences that follow each other, from a random one on: text as it is, and another each time.
    sentences = []
    at = rng.randrange(len(hay))
    while left > 0:
        sentence = hay[at % len(hay)]
        left -= tokens_in_text(sentence, tokenizer)
        sentences.append(sentence)
        at += 1

    places = sorted(rng.randrange(len(sentences) + 1) for _ in facts[1:])
    if facts[0].startswith("VAR "):
        # A variable is assigned before it is used: the chain keeps its order, wherever it lies.
        places = sorted([round(depth / 100 * len(sentences)), *places])
        insert_from_the_end(sentences, places, facts)
    else:
        # The needle comes last: its depth counts the other facts as well.
        insert_from_the_end(sentences, places, facts[:0:-1])
        sentences.insert(round(depth / 100 * len(sentences)), facts[0])
    return " ".join(sentences)


def tokens_in_text(sentence: str, tokenizer) -> int:
    """Tokens of a sentence and the space before it, where another one precedes it."""
    # Not those of " " + sentence: SentencePiece would begin that with one more word mark, which for
    # short sentences makes contexts a sixth shorter than their table says.
    twice = tokenizer.encode(f"{sentence} {sentence}")
    return len(twice) - len(tokenizer.encode(sentence))


def insert_from_the_end(sentences: list[str], places: list[int], facts: list[str]) -> None:
    """Each fact at its place; the last first, so that the places before it stay what they were."""
    for place, fact in zip(reversed(places), reversed(facts)):
        sentences.insert(place, fact)


def make_example(task: str, size: int, depth: int, sample: int, options: dict, hay: list[str],
                 tokenizer) -> Example:
    """The example of a cell: a function of (seed, task, size, depth, sample) and the haystack."""
    path = options["haystack"]
    seed = options["seed"]
    if path.endswith(".py"):
        found = run_file(path).needle(task, size, depth, [seed, sample])
        return Example(
            context=found["context"],
            question=found["question"],
            answers=found["answers"],
            needle=found["needle"],
        )
    # A text as seed: Python hashes all of it, so that no two cells have one stream.
    rng = random.Random(f"{seed} {task} {size} {depth} {sample}")
    facts, question, answers = make_facts(task, rng)
    context = hide(facts, hay, size, depth, tokenizer, rng)
    return Example(context, question, answers, facts[0])


# ------------------------------------------------------------------------------------ measure

def given(text: str, answers: list[str]) -> float:
    """Share of the answers that a text contains."""
    right = 0
    for answer in answers:
        right += is_right(text, [answer])
    return right / len(answers)


def measure(subjects: list[Subject], options: dict) -> dict:
    """{"table": rows {"model", "task", "length", "depth", "score", "n"}, "window", "heads", ...}.

    score: mean share of the answers that were given. heads: each model's retrieval scores, (layers,
    heads), over the examples whose needle was found in the tokens; left_out: how many had none.
    """
    hay = []
    if not options["haystack"].endswith(".py"):
        hay = sentences_of(options["haystack"])
    table = []
    heads = {}
    left_out = {}
    for subject in subjects:
        scores = RetrievalScores(subject) if options["retrieval"] else None
        for task in tasks_of(options):
            for length in options["lengths"]:
                table += measure_row(subject, task, length, hay, options, scores)
        if scores:
            scores.print()
            heads[subject.name] = scores.mean().tolist()
            left_out[subject.name] = scores.left_out
    window = options["window"] or subjects[0].config.max_position_embeddings
    return {"table": table, "window": window, "heads": heads, "left_out": left_out}


def measure_row(subject: Subject, task: str, length: int, hay: list[str], options: dict,
                scores: RetrievalScores | None) -> list[dict]:
    """The rows of one length, one a depth, all asked together."""
    tail = options["prompt_tail"] or "\n\n{question}"
    asked = []
    prompts = []
    places = []
    for depth in options["depths"]:
        for sample in range(options["samples"]):
            example = make_example(task, length, depth, sample, options, hay, subject.tokenizer)
            text = tail.replace("{question}", example.question)
            ids, place = subject.prompt(example.context, "", text)
            asked.append(example)
            prompts.append(ids)
            places.append(place)
    look = None
    if scores:
        look = scores.watch(prompts, places, asked)
    # Prompts share nothing that is known beforehand; should two contexts be equal, once will do.
    shared = [place.stop for place in places]
    said = subject.answers(prompts, shared, options["max_new_tokens"], look)

    # n examples of one depth stand beside each other.
    found = []
    for text, example in zip(said, asked):
        found.append(given(text, example.answers))
    rows = []
    cells = f"{task:10} {length:7d} "
    n = options["samples"]
    for i, depth in enumerate(options["depths"]):
        score = sum(found[i * n:(i + 1) * n]) / n
        cells += f" {score:5.2f}"
        rows.append({
            "model": subject.name,
            "task": task,
            "length": length,
            "depth": depth,
            "score": score,
            "n": n,
        })
    print_row(subject.name, cells, f"mean {share(sum(found), len(found))}")
    return rows


# ------------------------------------------------------------------------------------ picture

def draw(result: dict, options: dict) -> None:
    """A heat map for each task, and of the retrieval scores."""
    for task in tasks_of(options):
        rows = [row for row in result["table"] if row["task"] == task]
        draw_task(task, rows, result["window"], options)
    draw_heads(result["heads"], options)


def draw_task(task: str, rows: list[dict], window: int, options: dict) -> None:
    """Length by depth, a panel a model; of two models also what the second gained."""
    lengths = options["lengths"]
    depths = options["depths"]
    by_model = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row["score"])
    titles = list(by_model)
    grids = []
    for scores in by_model.values():
        # Rows of the table go by length, then depth; the picture's by depth.
        grids.append(np.array(scores).reshape(len(lengths), len(depths)).T)
    if len(grids) == 2:
        grids.append(grids[1] - grids[0])
        titles.append(f"{titles[1]} minus {titles[0]}")
    inside = sum(length <= window for length in lengths)

    def paint(axis, number):
        if number < len(by_model):
            heat_map(axis, grids[number], 0, 1, ".2f")
        else:
            heat_map(axis, grids[number], -1, 1, "+.2f", difference=True)
        axis.set_xlabel("context, tokens")
        axis.set_ylabel("depth, %")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(depths)), depths)
        # A window that all lengths fit, or none, has no place between two columns.
        if 0 < inside < len(lengths):
            # Black on white: a line that is seen on dark cells as well.
            axis.axvline(inside - 0.5, color="white", linewidth=3)
            axis.axvline(inside - 0.5, color="black", linewidth=2, linestyle="--")
            axis.set_xlabel("context, tokens (dashed: the window)")

    width = max(4.5, 1.5 + 0.6 * len(lengths))  # a number needs some 0.6 inches
    save_panels(f"needle_{task}", options, titles, width, paint)
