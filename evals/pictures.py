"""Pictures of results. matplotlib is optional, so it is imported where something is drawn."""
import os
from collections.abc import Callable

import numpy as np

from console import say

SEQUENTIAL = "viridis"                          # as light as it is large, also in grey
BLUE_ORANGE = ("#0072b2", "#ffffff", "#e69f00")  # told apart whatever colours one sees


def save_panels(name: str, options: dict, titles: list[str], width: float,
                paint: Callable[..., None], rows: int = 1) -> None:
    """Panels in so many rows, each `width` inches wide and painted by paint(axis, its number)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(
        nrows=rows,
        ncols=len(titles) // rows,
        figsize=(width * len(titles) / rows, (3.6 if rows == 1 else 2.6) * rows),
        squeeze=False,
        constrained_layout=True,
    )
    path = os.path.join(options["out"], f"{name}.png")
    # A figure that is not closed stays in memory, with those of all later calls.
    try:
        for number, axis in enumerate(axes.flat):
            axis.set_title(titles[number])
            paint(axis, number)
        figure.savefig(path, dpi=100)
    finally:
        pyplot.close(figure)
    say(path)


def heat_map(axis, grid: np.ndarray, low: float, high: float, form: str = "",
             difference: bool = False) -> None:
    """A grid (rows, columns) as colours, with the number in each cell where form says how.

    difference: around zero, which is white; what is less is blue, what is more orange.
    """
    from matplotlib.colors import LinearSegmentedColormap
    colours = SEQUENTIAL
    if difference:
        colours = LinearSegmentedColormap.from_list("blue_orange", BLUE_ORANGE)
    image = axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axis.figure.colorbar(image, ax=axis)
    if not form:
        return
    for (row, column), value in np.ndenumerate(grid):
        red, green, blue, _ = image.cmap(image.norm(value))
        # Relative luminance (WCAG 2): below 0.18 white has more contrast with it, above it black.
        luminance = 0.2126 * red ** 2.2 + 0.7152 * green ** 2.2 + 0.0722 * blue ** 2.2
        colour = "black" if luminance > 0.18 else "white"
        axis.text(
            column,
            row,
            format(value, form),
            color=colour,
            fontsize=9,
            ha="center",
            va="center",
        )
