"""The method in one picture, drawn from a pair that the tiny model makes.

    python -m bench.figure                  writes models/tiny/method.png; needs matplotlib

Nothing in it is made up: chunks, scores, selection and positions are data.py's, the answers are the
model's own (greedy), and who sees whom is read from the segments of the batch.
"""
import os
from typing import NamedTuple

import numpy as np

from bench.common import HERE
from checkpoint import load_pretrained
from configs import load_config, run_file
from data import (
    Batch,
    Selection,
    chunk,
    encode_group,
    importance_scores,
    prompt_around,
    random_stream,
    select_chunks,
    words_evaluator,
)
from generate import generate
from pairs.answers import is_right
from tokenizer import Tokenizer, load_tokenizer

TINY = os.path.join(HERE, "models", "tiny")
PICTURE = os.path.join(TINY, "method.png")
CRITICAL, OTHER, EDGE = "#e8973a", "#d9dde3", "#7b8494"
ANSWERS = ("#2f8f5b", "#c0392b", "#8e3a6b")  # chosen, rejected 1, rejected 2
TEXT = "#222222"
WIDTH = 100.0  # of the drawing, in units of its own


class Story(NamedTuple):
    """One pair with all that led to it."""
    question: str
    scores: list[int]
    critical: set[int]
    selection: Selection
    answers: list[str]      # chosen, then the rejected
    draws: list[Batch]      # its group at each draw of positions
    prefix: int             # tokens before the training prompt's chunks
    lengths: list[int]      # tokens of these chunks
    window: int


# -------------------------------------------------------------------------------------- what is drawn

def answer(model, tokenizer: Tokenizer, cfg: dict, question: str, chunks: list[list[int]]) -> str:
    """The model's greedy answer from some chunks."""
    prefix, suffix, stops = prompt_around(cfg, tokenizer, question)
    prompt = prefix + sum(chunks, []) + suffix
    written = generate(model, [prompt], cfg["max_new_tokens"], stop_ids=stops)[0]
    return tokenizer.decode([token for token in written if token not in stops])


def tell(model, tokenizer: Tokenizer, cfg: dict, number: int, example: dict) -> Story | None:
    """The story of an example; None where it makes no pair, or one that shows less."""
    question, answers = example["question"], example["answers"]
    chunks = chunk(example["context"], tokenizer, cfg["chunk_size"])
    wanted = words_evaluator(question).union(*[words_evaluator(text) for text in answers])
    scores = importance_scores(chunks, wanted, tokenizer, words_evaluator)
    critical = {c for c, score in enumerate(scores) if score > cfg["delta"]}
    selection, _ = select_chunks(scores, cfg["n_chunks"], cfg["delta"], 0, cfg["n_rejected"],
                                 random_stream("selection", cfg["seed"], number))
    if selection is None or len(critical) != 2:
        return None
    written = []
    for picked in (selection.chosen, *selection.rejected):
        seen = [chunks[c] for c in picked]
        written.append(answer(model, tokenizer, cfg, question, seen))
    right = [is_right(text, answers) for text in written]
    if right != [True, False, False] or len(set(written)) < 3:
        return None
    training = [chunks[c] for c in selection.training]
    pair = {"id": number, "question": question, "chunks": [np.array(ids) for ids in training],
            "chosen": written[0], "rejected": written[1:]}
    draws = [encode_group(pair, tokenizer, cfg, draw) for draw in range(cfg["draws"])]
    prefix, _, _ = prompt_around(cfg, tokenizer, question)
    lengths = [len(ids) for ids in training]
    return Story(question, scores, critical, selection, written, draws, len(prefix), lengths,
                 cfg["window"])


def find_story() -> Story:
    """The first example of the tiny run with two critical chunks and three unlike answers."""
    cfg = load_config([])
    tokenizer = load_tokenizer(TINY, cfg["template"])
    model = load_pretrained(TINY)
    world = run_file(os.path.join(HERE, cfg["examples"]))
    examples = world.examples(cfg["n_examples"], cfg["context_size"], cfg["seed"])
    for number, example in enumerate(examples):
        story = tell(model, tokenizer, cfg, number, example)
        if story:
            return story
    raise LookupError("no example of the tiny run makes such a pair")


# ------------------------------------------------------------------------------------------- drawing

def box(ax, x: float, y: float, width: float, colour: str, label: object = "",
        height: float = 3.4) -> None:
    """A rectangle, its lower left corner at (x, y), with a label in the middle."""
    ax.add_patch(rectangle(x, y, width, height, colour))
    light = colour in (OTHER, CRITICAL)
    ax.text(x + width / 2, y + height / 2, str(label), ha="center", va="center",
            fontsize=8 if height > 3 else 6.5, color=TEXT if light else "white")


def rectangle(x: float, y: float, width: float, height: float, colour: str):
    from matplotlib.patches import Rectangle
    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1)


def note(ax, x: float, y: float, text: str, **how) -> None:
    how = {"fontsize": 9, "color": TEXT, "va": "center", **how}
    ax.text(x, y, text, **how)


def heading(ax, y: float, number: int, title: str, rest: str) -> None:
    """A numbered line over a part of the picture."""
    ax.text(0, y, f"{number}  {title}", fontsize=11, fontweight="bold", color=TEXT, va="center")
    ax.text(WIDTH, y, rest, fontsize=9, color=EDGE, va="center", ha="right")


def colour_of(story: Story, c: int) -> str:
    return CRITICAL if c in story.critical else OTHER


def draw_document(ax, story: Story, y: float) -> None:
    """The chunks, each with its score."""
    width = WIDTH / len(story.scores)
    for c, score in enumerate(story.scores):
        box(ax, c * width, y, width, colour_of(story, c), score)
        note(ax, (c + 0.5) * width, y - 1.3, str(c), fontsize=6, color=EDGE, ha="center")


def draw_prompts(ax, story: Story, y: float) -> None:
    """Three prompts, and the answer that the model gives to each."""
    selection = story.selection
    rows = [("chosen", selection.chosen, "critical chunks only")]
    for picked, held in zip(selection.rejected, selection.evidence):
        rows.append(("rejected", picked, held))
    for i, (name, picked, held) in enumerate(rows):
        level = y - 5.2 * i
        note(ax, 0, level + 1.7, held, color=EDGE)
        for j, c in enumerate(picked):
            box(ax, 19 + 3.8 * j, level, 3.8, colour_of(story, c), c)
        box(ax, 19 + 3.8 * len(picked), level, 4.6, EDGE, "Q")
        ax.annotate("", (53, level + 1.7), (48, level + 1.7),
                    arrowprops={"arrowstyle": "->", "color": EDGE})
        note(ax, 54, level + 1.7, name, color=ANSWERS[i], fontweight="bold")
        note(ax, 62, level + 1.7, story.answers[i].strip(), color=ANSWERS[i])


def draw_stream(ax, story: Story, y: float) -> None:
    """The packed stream: the prompt once, then the answers as its branches."""
    group = story.draws[0]
    scale = WIDTH / len(group.tokens)
    x = story.prefix * scale
    box(ax, 0, y, x, EDGE)
    for c, length in zip(story.selection.training, story.lengths):
        box(ax, x, y, length * scale, colour_of(story, c), c)
        x += length * scale
    prompt, *branches = group.segments
    box(ax, x, y, prompt.end * scale - x, EDGE, "Q")
    for i, branch in enumerate(branches):
        name = "chosen" if i == 0 else f"rejected {i}"
        box(ax, branch.start * scale, y, (branch.end - branch.start) * scale, ANSWERS[i], name)
        middle = (branch.start + branch.end) / 2 * scale
        bend = {"arrowstyle": "->", "color": ANSWERS[i], "linewidth": 1,
                "connectionstyle": f"arc3,rad={0.09 + 0.02 * i}"}
        ax.annotate("", (prompt.end * scale * (0.55 - 0.12 * i), y + 3.4), (middle, y + 3.4),
                    arrowprops=bend)


def draw_positions(ax, story: Story, y: float) -> None:
    """Where the prompt's chunks and the answers lie in the window, a row for each draw."""
    scale = WIDTH / story.window
    for d, group in enumerate(story.draws):
        level = y - 3.1 * d
        ax.plot([0, WIDTH], [level, level], color=OTHER, linewidth=1, zorder=0)
        start = story.prefix
        for c, length in zip(story.selection.training, story.lengths):
            first = int(group.positions[start]) * scale
            box(ax, first, level, length * scale, colour_of(story, c), c, height=2.1)
            start += length
        prompt, *branches = group.segments
        first = int(group.positions[start])
        last = int(group.positions[prompt.end - 1])
        box(ax, first * scale, level, (last + 1 - first) * scale, EDGE, "", height=2.1)
        for i, branch in enumerate(branches):
            first = int(group.positions[branch.start])
            length = branch.end - branch.start
            box(ax, first * scale, level + 1.4 - 0.7 * i, length * scale, ANSWERS[i], height=0.7)
    for position in range(0, story.window + 1, 128):
        note(ax, position * scale, y - 3.1 * len(story.draws) + 1.6, str(position), fontsize=7,
             color=EDGE, ha="center")


def draw(story: Story, path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, ax = pyplot.subplots(figsize=(11, 7.4))
    ax.set_xlim(-0.5, WIDTH + 0.5)
    ax.set_ylim(-2.5, 68)
    ax.axis("off")
    tokens = sum(story.lengths)
    heading(ax, 66, 1, "A document in chunks",
            f"number: words shared with \"{story.question}\" and its answer; orange: critical")
    draw_document(ax, story, 60)
    heading(ax, 55, 2, "Three prompts, answered by the model itself",
            "right evidence, none, half of it")
    draw_prompts(ax, story, 49)
    heading(ax, 33, 3, "One packed stream",
            "the prompt is computed once; an answer sees it and itself, never another answer")
    draw_stream(ax, story, 21)
    heading(ax, 16, 4, "Positions over the window",
            f"{tokens} tokens spread over {story.window}, a row for each draw; "
            "all answers at the same positions")
    draw_positions(ax, story, 10.5)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(path)


if __name__ == "__main__":
    draw(find_story(), PICTURE)
