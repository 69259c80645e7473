"""Needles: facts hidden in long contexts, by length and depth, as in RULER (arXiv 2404.06654).

A context is filled with sentences of a haystack. One fact, the needle, lies at a given depth; what
else there is to find, or to be confused with, lies anywhere. Of the task "association" the question
shares no word with its needle, so that no word leads there (NoLiMa, arXiv 2502.05167).
retrieval=True also tells which attention heads copied the answer from the needle (evals/heads.py).

An answer is right, or has a part of what was asked for; else it tells another needle of the context
("other"), or what no needle says ("invented"), or nothing ("silent": empty, or a refusal).
"""
import random
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from configs import BadInput, refuse, run_file
from evals.common import (
    ASKING,
    COMMON,
    Subject,
    area_by_length,
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
TASKS = ("single", "multikey", "multivalue", "multiquery", "variables", "association")
KINDS = ("right", "part", "other", "invented", "silent")  # of an answer

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

# Needles, and what they are asked by. Between the two lies one step that the reader has to know,
# and no word that is in both. Each question is answered by its own needle alone.
ASSOCIATIONS = [
    ("{} feeds the pigeons below the Eiffel Tower.", "has been to France"),
    ("{} jogs around the Colosseum at dawn.", "lives in Italy"),
    ("{} milks forty cows before breakfast.", "works on a farm"),
    ("{} must never eat gluten.", "has coeliac disease"),
    ("{} played Hamlet three winters in a row.", "is an actor"),
    ("{} reads Braille with two fingers.", "is blind"),
    ("{} drilled a molar this morning.", "is a dentist"),
    ("{} photographed penguins from an icebreaker.", "travelled to Antarctica"),
    ("{} dug for tombs beside the pyramids of Giza.", "spent time in Egypt"),
    ("{} gave up meat, milk and even honey.", "is vegan"),
    ("{} carries an insulin pen everywhere.", "suffers from diabetes"),
    ("{} tunes grand pianos with a fork.", "needs good ears on the job"),
]
PEOPLE = "Amara Bilal Chiyo Dmitri Eluned Farah Goran Hana Ismet Jorun Kofi Leilani".split()
# An answer that says that there is none.
REFUSAL = re.compile(r"\b(?:not (?:mention|provid|stat|specif|giv|found|contain|includ|say|know"
                     r"|sure|able)\w*|do(?:es)?n['’]t (?:know|say|mention|contain|have)"
                     r"|no (?:information|mention|answer|such)|cannot|can['’]t|unable|unknown"
                     r"|sorry|none|nobody)\b", re.IGNORECASE)


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

class Facts(NamedTuple):
    """What is hidden in a context, and what is asked about it."""
    sentences: list[str]  # the first one lies at the depth
    question: str
    answers: list[str]    # all of them have to be given
    others: list[str]     # what the other sentences would answer, which was not asked


class Example(NamedTuple):
    """One context that something is hidden in."""
    context: str
    question: str
    answers: list[str]
    others: list[str]    # as in Facts
    needle: str          # the sentence whose place the depth says


def make_facts(task: str, rng: random.Random) -> Facts:
    """The facts of an example of one of TASKS."""
    if task == "association":
        return make_associations(rng)
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
        return Facts(facts, question, values, [])
    question = f"What is the special magic number for {keys[0]} mentioned in the text above?"
    # One number is asked for. Under multikey the others are there to be confused with it.
    if task == "single":
        return Facts(facts[:1], question, values[:1], [])
    return Facts(facts, question, values[:1], values[1:])


def make_associations(rng: random.Random) -> Facts:
    """Four people, of whom four unlike things are told; one is asked for by what follows of it."""
    chosen = rng.sample(ASSOCIATIONS, 4)
    names = rng.sample(PEOPLE, 4)
    sentences = []
    for name, (sentence, _) in zip(names, chosen):
        sentences.append(sentence.format(name))
    question = f"Which person {chosen[0][1]}? Answer in a single word."
    return Facts(sentences, question, names[:1], names[1:])


def make_chain(value: str, rng: random.Random) -> Facts:
    """Variables that get a value from one another: all of them have it."""
    names = []
    for _ in range(4):
        names.append("".join(rng.choices(LETTERS, k=5)))
    chain = [f"VAR {names[0]} = {value}."]
    for before, name in zip(names, names[1:]):
        chain.append(f"VAR {name} = VAR {before}.")
    question = f"Find all variables that are assigned the value {value} in the text above."
    return Facts(chain, question, names, [])


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
            others=found.get("others", []),
            needle=found["needle"],
        )
    # A text as seed: Python hashes all of it, so that no two cells have one stream.
    rng = random.Random(f"{seed} {task} {size} {depth} {sample}")
    facts = make_facts(task, rng)
    context = hide(facts.sentences, hay, size, depth, tokenizer, rng)
    needle = facts.sentences[0]
    return Example(context, facts.question, facts.answers, facts.others, needle)


# ------------------------------------------------------------------------------------ measure

def given(text: str, answers: list[str]) -> float:
    """Share of the answers that a text contains."""
    right = 0
    for answer in answers:
        right += is_right(text, [answer])
    return right / len(answers)


def kind_of_answer(text: str, example: Example) -> str:
    """Which of KINDS a generated text is."""
    share = given(text, example.answers)
    if share == 1:
        return "right"
    if share > 0:
        return "part"
    if is_right(text, example.others):
        return "other"
    # Only now: "I cannot find it, but 1234567 is mentioned" tells something.
    if not text.strip() or REFUSAL.search(text):
        return "silent"
    return "invented"


def measure(subjects: list[Subject], options: dict) -> dict:
    """{"table": rows {"model", "task", "length", "depth", "score", "n", "kinds"}, "areas": rows
    {"model", "task", "area"}, "window", "heads", "left_out"}.

    score: mean share of the answers that were given. kinds: how many answers were of each of KINDS.
    area: the mean score over the lengths, see area_by_length. heads: each model's retrieval scores,
    (layers, heads), over the examples whose needle was found in the tokens; left_out: how many had
    none.
    """
    hay = []
    if not options["haystack"].endswith(".py"):
        hay = sentences_of(options["haystack"])
    table = []
    areas = []
    heads = {}
    left_out = {}
    for subject in subjects:
        scores = RetrievalScores(subject) if options["retrieval"] else None
        for task in tasks_of(options):
            rows = []
            for length in options["lengths"]:
                rows += measure_row(subject, task, length, hay, options, scores)
            table += rows
            areas.append(area_of(rows, options))
        if scores:
            scores.print()
            heads[subject.name] = scores.mean().tolist()
            left_out[subject.name] = scores.left_out
    window = options["window"] or subjects[0].config.max_position_embeddings
    return {"table": table, "areas": areas, "window": window, "heads": heads,
            "left_out": left_out}


def area_of(rows: list[dict], options: dict) -> dict:
    """A model's rows of one task as one number, printed where there are lengths to compare."""
    lengths = options["lengths"]
    means = []
    for length in lengths:
        scores = [row["score"] for row in rows if row["length"] == length]
        means.append(sum(scores) / len(scores))
    area = area_by_length(lengths, means)
    model = rows[0]["model"]
    task = rows[0]["task"]
    if len(lengths) > 1:
        print_row(model, f"{task:11} area {area:.3f} over {min(lengths)}..{max(lengths)}")
    return {"model": model, "task": task, "area": area}


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
    kinds = []
    for text, example in zip(said, asked):
        found.append(given(text, example.answers))
        kinds.append(kind_of_answer(text, example))
    rows = []
    cells = f"{task:11} {length:7d} "
    n = options["samples"]
    for i, depth in enumerate(options["depths"]):
        cell = slice(i * n, (i + 1) * n)
        score = sum(found[cell]) / n
        counts = Counter(kinds[cell])
        cells += f" {score:5.2f}"
        rows.append({
            "model": subject.name,
            "task": task,
            "length": length,
            "depth": depth,
            "score": score,
            "n": n,
            "kinds": {kind: counts[kind] for kind in KINDS},
        })
    print_row(subject.name, cells, f"mean {share(sum(found), len(found))}", failures(kinds))
    return rows


def failures(kinds: list[str]) -> str:
    """What was not right, in words: "wrong: 3 invented, 1 other"; nothing where all was right."""
    counts = []
    for kind, count in Counter(kinds).most_common():
        if kind != "right":
            counts.append(f"{count} {kind}")
    if not counts:
        return ""
    return f"wrong: {', '.join(counts)}"


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
