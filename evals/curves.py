"""The picture of a run, from its metrics.jsonl alone.

    python -m evals curves out/NAME         write out/NAME/curves.png

A thin line is every step, a thick one the mean of the last twentieth of the run; dots are held-out.
"""
import os

import numpy as np

from configs import BadInput
from console import say
from data import read_lines
from evals.pictures import BLUE_ORANGE, save_panels

BLUE, _, ORANGE = BLUE_ORANGE
# A panel: title, {key of a step: its colour}.
PANELS = {
    "margin (rewards/margins)": {"rewards/margins": BLUE},
    "accuracy (rewards/accuracies)": {"rewards/accuracies": BLUE},
    "log-prob: chosen blue, rejected orange": {"logps/chosen": BLUE, "logps/rejected": ORANGE},
    "nll of chosen": {"nll": BLUE},
    "loss": {"loss": BLUE},
    "learning rate": {"lr": BLUE},
}


def curves(argv: list[str]) -> None:
    """The command."""
    if len(argv) != 1 or not os.path.isdir(argv[0]):
        raise BadInput("expected: python -m evals curves out/NAME, the folder of a run")
    draw_curves(argv[0])


def draw_curves(folder: str) -> None:
    """Write curves.png of a run's folder; without matplotlib, say so."""
    path = os.path.join(folder, "metrics.jsonl")
    steps = []
    for number, row in read_lines(path):
        if type(row.get("step")) is not int:
            raise BadInput(f"{path}, line {number}: 'step' is {row.get('step')!r}, expected a step")
        steps.append(row)
    if not steps:
        raise BadInput(f"{path}: no step in it")
    titles = list(PANELS)

    def paint(axis, number):
        for key, colour in PANELS[titles[number]].items():
            paint_key(axis, steps, key, colour)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)

    try:
        save_panels("curves", {"out": folder}, titles, 4.2, paint, rows=2)
    except ImportError:
        say(f"no picture of the run: pip install matplotlib, python -m evals curves {folder}")
    except (OSError, ValueError, OverflowError) as e:
        say(f"no picture of the run: {e}")


def paint_key(axis, steps: list[dict], key: str, colour: str) -> None:
    """One metric: each step, its running mean, and held-out values as dots."""
    numbers = []
    values = []
    places = []
    dots = []
    for row in steps:
        numbers.append(row["step"])
        values.append(number_of(row, key))
        if isinstance(row.get("held_out"), dict):
            places.append(row["step"])
            dots.append(number_of(row["held_out"], key))
    if key == "lr":  # nothing of chance in it
        axis.plot(numbers, values, color=colour, linewidth=1.8)
        return
    axis.plot(numbers, values, color=colour, alpha=0.3, linewidth=0.8)
    axis.plot(numbers, running_mean(values), color=colour, linewidth=1.8)
    axis.plot(places, dots, color=colour, linestyle="", marker="o", markeredgecolor="black")


def number_of(row: dict, key: str) -> float:
    """A metric; NaN, which leaves a gap, where a row has no number for it."""
    value = row.get(key)
    return value if isinstance(value, int | float) else float("nan")


def running_mean(values: list[float]) -> list[float]:
    """The mean of each value and those before it, a twentieth of all; NaN counts as not there."""
    width = max(1, len(values) // 20)
    means = []
    for i in range(len(values)):
        last = np.array(values[max(0, i + 1 - width):i + 1], dtype=float)
        known = last[np.isfinite(last)]
        means.append(known.mean() if len(known) else float("nan"))
    return means
