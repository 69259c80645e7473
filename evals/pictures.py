"""Pictures of results. matplotlib is optional, so it is imported where something is drawn."""
import os
from collections.abc import Callable

import numpy as np

SEQUENTIAL = "viridis"                          # as light as it is large, also in grey
BLUE_ORANGE = ("#0072b2", "#ffffff", "#e69f00")  # told apart whatever colours one sees


def save_panels(name: str, options: dict, titles: list[str], width: float,
                paint: Callable[..., None]) -> None:
    """One panel beside the other, each `width` inches and painted by paint(axis, its number)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(titles), figsize=(width * len(titles), 3.6),
                                   squeeze=False, constrained_layout=True)
    path = os.path.join(options["out"], f"{name}.png")
    try:
        for number, title in enumerate(titles):
            axes[0][number].set_title(title)
            paint(axes[0][number], number)
        figure.savefig(path, dpi=100)
    finally:
        pyplot.close(figure)
    print(path)


def heat_map(axis, grid: np.ndarray, low: float, high: float, difference: bool = False):
    """A grid (rows, columns) as colours; a difference, low = -high, is blue, white and orange."""
    from matplotlib.colors import LinearSegmentedColormap
    colours = SEQUENTIAL
    if difference:
        colours = LinearSegmentedColormap.from_list("blue_orange", BLUE_ORANGE)
    image = axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axis.figure.colorbar(image, ax=axis)
    return image


def write_numbers(axis, image, grid: np.ndarray, form: str) -> None:
    """The number in each cell, black on light colours and white on dark ones."""
    for (row, column), value in np.ndenumerate(grid):
        red, green, blue, _ = image.cmap(image.norm(value))
        # Relative luminance (WCAG 2): below 0.18 white has more contrast with it, above it black.
        luminance = 0.2126 * red ** 2.2 + 0.7152 * green ** 2.2 + 0.0722 * blue ** 2.2
        colour = "black" if luminance > 0.18 else "white"
        axis.text(column, row, format(value, form), color=colour, fontsize=9,
                  ha="center", va="center")
