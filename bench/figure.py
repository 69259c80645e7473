"""The method in one picture, drawn from a pair that the tiny model makes.

    python -m bench.figure                  writes models/tiny/method.png; needs matplotlib

Nothing in it is made up: chunks, scores, selection and positions are data.py's, the answers are the
model's own (greedy), and who sees whom is read from the segments of the batch.
"""
import os
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

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
from model import Llama
from pairs.answers import is_right
from tokenizer import Tokenizer, load_tokenizer

TINY = os.path.join(HERE, "models", "tiny")
PICTURE = os.path.join(TINY, "method.png")
CRITICAL = "#e8973a"
OTHER = "#d9dde3"
EDGE = "#7b8494"        # the question, lines and notes
ANSWERS = ("#2f8f5b", "#c0392b", "#8e3a6b")  # chosen, rejected 1, rejected 2
TEXT = "#222222"
WIDTH = 100.0           # of the drawing, in units of its own
Q = 4.6                 # width of a question's box


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


# ------------------------------------------------------------------------------------ what is drawn

class Writer(NamedTuple):
    """Who answers: the tiny model, with what it needs to be asked."""
    model: Llama
    tokenizer: Tokenizer
    cfg: dict

    def answer(self, question: str, chunks: list[list[int]]) -> str:
        """The greedy answer from some chunks."""
        prefix, suffix, stops = prompt_around(self.cfg, self.tokenizer, question)
        prompt = prefix + sum(chunks, []) + suffix
        longest = self.cfg["max_new_tokens"]
        written = generate(self.model, [prompt], longest, stop_ids=stops)[0]
        kept = [token for token in written if token not in stops]
        return self.tokenizer.decode(kept)


def tell(writer: Writer, number: int, example: dict) -> Story | None:
    """The story of an example; None where it makes no pair, or one that shows less."""
    cfg = writer.cfg
    question = example["question"]
    chunks = chunk(example["context"], writer.tokenizer, cfg["chunk_size"])
    wanted = words_evaluator(question + " " + " ".join(example["answers"]))
    scores = importance_scores(chunks, wanted, writer.tokenizer, words_evaluator)
    critical = {c for c, score in enumerate(scores) if score > cfg["delta"]}
    rng = random_stream("selection", cfg["seed"], number)
    selection, _ = select_chunks(
        scores,
        cfg["n_chunks"],
        cfg["delta"],
        cfg["max_critical"],
        cfg["n_rejected"],
        rng,
    )
    # Two critical chunks are the fewest of which one prompt can hold a part.
    if selection is None or len(critical) != 2:
        return None

    answers = []
    for picked in (selection.chosen, *selection.rejected):
        seen = [chunks[c] for c in picked]
        answers.append(writer.answer(question, seen))
    right = [is_right(text, example["answers"]) for text in answers]
    if right != [True, False, False] or len(set(answers)) < 3:
        return None

    # From here on as in training: a line of the pairs' file, and its group at every draw.
    training = [np.array(chunks[c]) for c in selection.training]
    pair = {
        "id": number,
        "question": question,
        "chunks": training,
        "chosen": answers[0],
        "rejected": answers[1:],
    }
    draws = [encode_group(pair, writer.tokenizer, cfg, draw) for draw in range(cfg["draws"])]
    prefix, _, _ = prompt_around(cfg, writer.tokenizer, question)
    return Story(
        question,
        scores,
        critical,
        selection,
        answers,
        draws,
        len(prefix),
        [len(ids) for ids in training],
        cfg["window"],
    )


def find_story() -> Story:
    """The first example of the tiny run with two critical chunks and three unlike answers."""
    cfg = load_config([])
    writer = Writer(load_pretrained(TINY), load_tokenizer(TINY, cfg["template"]), cfg)
    world = run_file(os.path.join(HERE, cfg["examples"]))
    examples = world.examples(cfg["n_examples"], cfg["context_size"], cfg["seed"])
    for number, example in enumerate(examples):
        story = tell(writer, number, example)
        if story:
            return story
    raise LookupError("no example of the tiny run makes such a pair")


# ------------------------------------------------------------------------------------------ drawing

def box(ax: Axes, x: float, y: float, width: float, colour: str, label: object = "",
        height: float = 3.4) -> None:
    """A rectangle, its lower left corner at (x, y), with a label in the middle."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white"))
    dark = colour not in (OTHER, CRITICAL)
    ax.text(
        x + width / 2,
        y + height / 2,
        str(label),
        ha="center",
        va="center",
        fontsize=8 if height > 3 else 6.5,
        color="white" if dark else TEXT,
    )


def note(ax: Axes, x: float, y: float, text: str, **how) -> None:
    """A text at (x, y), by default small and to the right of it."""
    how = {"fontsize": 9, "color": TEXT, "va": "center", **how}
    ax.text(x, y, text, **how)


def heading(ax: Axes, y: float, title: str, rest: str) -> None:
    """A line over a part of the picture."""
    note(ax, 0, y, title, fontsize=11, fontweight="bold")
    note(ax, WIDTH, y, rest, color=EDGE, ha="right")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str,
          bend: float = 0.0) -> None:
    """An arrow between two points, bent to the left of its way."""
    style = {
        "arrowstyle": "->",
        "color": colour,
        "connectionstyle": f"arc3,rad={bend}",
    }
    ax.annotate("", end, start, arrowprops=style)


def colour_of(story: Story, c: int) -> str:
    return CRITICAL if c in story.critical else OTHER


def draw_document(ax: Axes, story: Story, y: float) -> None:
    """The chunks, each with its score."""
    width = WIDTH / len(story.scores)
    x = 0.0
    for c, score in enumerate(story.scores):
        box(ax, x, y, width, colour_of(story, c), score)
        # Its number below it: by that one finds it again in the prompts.
        note(ax, x + width / 2, y - 1.3, str(c), fontsize=6, color=EDGE, ha="center")
        x += width


def draw_prompts(ax: Axes, story: Story, y: float) -> None:
    """Three prompts, and the answer that the model gives to each."""
    names = ["chosen", "rejected", "rejected"]
    held = ["critical chunks only", *story.selection.evidence]
    prompts = [story.selection.chosen, *story.selection.rejected]
    for i, picked in enumerate(prompts):
        level = y - 5.2 * i
        middle = level + 1.7
        note(ax, 0, middle, held[i], color=EDGE)
        x = 19.0
        for c in picked:
            box(ax, x, level, 3.8, colour_of(story, c), c)
            x += 3.8
        box(ax, x, level, Q, EDGE, "Q")
        arrow(ax, (48, middle), (53, middle), EDGE)
        note(ax, 54, middle, names[i], color=ANSWERS[i], fontweight="bold")
        note(ax, 62, middle, story.answers[i].strip(), color=ANSWERS[i])


def draw_stream(ax: Axes, story: Story, y: float) -> None:
    """The packed stream: the prompt once, then the answers as its branches."""
    group = story.draws[0]
    scale = WIDTH / len(group.tokens)
    prompt, *branches = group.segments
    x = story.prefix * scale
    box(ax, 0, y, x, EDGE)
    for c, length in zip(story.selection.training, story.lengths):
        box(ax, x, y, length * scale, colour_of(story, c), c)
        x += length * scale
    box(ax, x, y, prompt.end * scale - x, EDGE, "Q")

    top = y + 3.4
    names = ["chosen", "rejected 1", "rejected 2"]
    for i, branch in enumerate(branches):
        first = branch.start * scale
        width = branch.length * scale
        box(ax, first, y, width, ANSWERS[i], names[i])
        # Every answer points at the prompt, each at another place only to keep the arrows apart.
        goal = prompt.end * scale * (0.55 - 0.12 * i)
        arrow(ax, (first + width / 2, top), (goal, top), ANSWERS[i], bend=0.09 + 0.02 * i)


def draw_positions(ax: Axes, story: Story, y: float) -> None:
    """Where the prompt's chunks and the answers lie in the window, a row for each draw."""
    scale = WIDTH / story.window
    level = y
    for group in story.draws:
        ax.plot([0, WIDTH], [level, level], color=OTHER, linewidth=1, zorder=0)
        draw_one_draw(ax, story, group, level, scale)
        level -= 3.1
    for position in range(0, story.window + 1, 128):
        x = position * scale
        note(ax, x, level + 1.6, str(position), fontsize=7, color=EDGE, ha="center")


def draw_one_draw(ax: Axes, story: Story, group: Batch, level: float, scale: float) -> None:
    """The chunks, the question and the answers of one draw, at their positions."""
    positions = group.positions.tolist()
    prompt, *branches = group.segments
    token = story.prefix
    for c, length in zip(story.selection.training, story.lengths):
        # Continuous placing: from its first position on, a chunk takes the next ones in turn.
        first = positions[token] * scale
        box(ax, first, level, length * scale, colour_of(story, c), c, 2.1)
        token += length
    first = positions[token] * scale
    end = (positions[prompt.end - 1] + 1) * scale
    box(ax, first, level, end - first, EDGE, "", 2.1)
    for i, branch in enumerate(branches):
        first = positions[branch.start] * scale
        width = branch.length * scale
        # One over the other, since they share their positions.
        box(ax, first, level + 1.4 - 0.7 * i, width, ANSWERS[i], "", 0.7)


def draw(story: Story, path: str) -> None:
    """All four parts, one under the other."""
    figure, ax = pyplot.subplots(figsize=(11, 7.4))
    ax.set_xlim(-0.5, WIDTH + 0.5)
    ax.set_ylim(-2.5, 68)
    ax.axis("off")

    asked = f"words shared with \"{story.question}\" and its answer"
    heading(ax, 66, "1  A document in chunks", f"number: {asked}; orange: critical")
    draw_document(ax, story, 60)

    heading(ax, 55, "2  Three prompts, answered by the model itself",
            "right evidence, none, half of it")
    draw_prompts(ax, story, 49)

    heading(ax, 33, "3  One packed stream",
            "the prompt is computed once; an answer sees it and itself, never another answer")
    draw_stream(ax, story, 21)

    spread = f"{sum(story.lengths)} tokens spread over {story.window}"
    heading(ax, 16, "4  Positions over the window",
            f"{spread}, a row for each draw; all answers at the same positions")
    draw_positions(ax, story, 10.5)

    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(path)


if __name__ == "__main__":
    pyplot.switch_backend("Agg")
    draw(find_story(), PICTURE)
