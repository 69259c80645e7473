"""Right answers by length of context, a line a cell, with intervals. matplotlib is optional."""
import os
import sys

from evals.pictures import save_panels


def draw(cells: dict[str, dict[int, tuple[float, float | None]]], path: str) -> None:
    """cells: {name: {windows of context: (mean, half its 95 % interval; None with one seed)}}.

    Without matplotlib one line says so, and nothing is drawn.
    """
    def paint(axis, _):
        # Beside each other and not on each other: intervals overlap.
        for number, (name, points) in enumerate(cells.items()):
            places = []
            means = []
            halves = []
            for times, (mean, half) in points.items():
                places.append(times * 1.03 ** number)
                means.append(mean)
                halves.append(half or 0.0)
            axis.errorbar(
                places,
                means,
                halves,
                marker="o",
                capsize=3,
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
        axis.set_xlabel("context, in windows of the model")
        axis.set_ylabel("right answers")
        axis.set_ylim(0, 1.02)
        axis.legend(loc="lower left")

    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    try:
        save_panels(name.removesuffix(".png"), {"out": folder}, [""], 6, paint)
    except ImportError:
        print(f"{path}: not drawn, it needs pip install matplotlib", file=sys.stderr)
