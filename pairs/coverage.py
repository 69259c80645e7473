"""How synthesized positions cover the window (Sec. 3.2.2, App. D): which are visited, at which
distances.

Wanted are relative distances that are spread uniformly, and as many positions as possible.
Where positions are themselves spread evenly, all pairs have .25 to uniform: near pairs outnumber
far ones.
"""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data import STRATEGIES, kind_of_draw, random_stream, slots, synthesize_positions

SAMPLES = 200
LITERAL = "independent"  # Eq. 4 as printed, to compare with
KINDS = (*STRATEGIES, "mix", LITERAL)
BARS = 64                # of a histogram over the window


class Counts(NamedTuple):
    """How often each position, or each distance 0 .. window - 1, occurs: (window,) each."""
    held: np.ndarray    # positions that a token has
    every: np.ndarray   # distances between any two tokens
    answer: np.ndarray  # distances from the last token to those before the tail


def independent(lengths: list[int], slack: int, rng: np.random.Generator) -> np.ndarray:
    """Eq. 4 as printed: chunk c's bias is from U(1, c (K - k) / N), whatever its neighbours
    drew."""
    placed = []
    for c, (start, length, _) in enumerate(slots(lengths, 0)):
        bias = rng.integers(0, c * slack // len(lengths) + 1)
        placed.append(start + bias + np.arange(length))
    return np.concatenate(placed)


def place(kind: str, lengths: list[int], tail: int, window: int, share: float, sample: int,
          draws: int) -> np.ndarray:
    """Positions of chunks and tail of one sample. Those of LITERAL need not be increasing."""
    example, draw = divmod(sample, draws)
    if kind == "mix":
        kind = kind_of_draw({"positions": "mix", "sparse_share": share}, (0, example, 0), draw)
    if kind == LITERAL:
        rng = random_stream("literal Eq. 4", 0, example, draw)
        placed = independent(lengths, window - sum(lengths) - tail, rng)
        after = placed.max() + 1
    else:
        placed, after = synthesize_positions(lengths, 0, tail, window, kind, draw, draws,
                                             (0, example))
    return np.concatenate([placed, after + np.arange(tail)])


def distances(positions: np.ndarray, tail: int, window: int) -> Counts:
    """The counts of one sample whose last `tail` tokens are question and answer."""
    held = np.bincount(positions, minlength=window)
    # The autocorrelation of 0s and 1s counts pairs by distance; by FFT it takes no T x T table.
    spectrum = np.fft.rfft(held, 2 * window)
    every = np.rint(np.fft.irfft(spectrum * spectrum.conj(), 2 * window)[:window])
    every[0] = 0
    answer = np.bincount(np.abs(positions[-1] - positions[:-tail]), minlength=window)
    return Counts(held, every, answer)


def coverage(lengths: list[int], tail: int, window: int, share: float, draws: int,
             kinds: Sequence[str] = KINDS) -> dict[str, Counts]:
    """{kind: counts over SAMPLES samples}."""
    found = {}
    for kind in kinds:
        total = Counts(np.zeros(window), np.zeros(window), np.zeros(window))
        for sample in range(SAMPLES):
            positions = place(kind, lengths, tail, window, share, sample, draws)
            for sums, counts in zip(total, distances(positions, tail, window)):
                sums += counts
        found[kind] = total
    return found


def to_uniform(counts: np.ndarray) -> float:
    """Total variation distance of counts[1:] to the uniform distribution: 0 is uniform, 1
    disjoint."""
    shares = counts[1:] / counts[1:].sum()
    return 0.5 * np.abs(shares - 1 / len(shares)).sum()


# -------------------------------------------------------------------------------------- the picture

def picture(path: str, cfg: dict, lengths: list[int], tail: int, found: dict[str, Counts]) -> None:
    """Above: one sample's tokens and their positions. Below: where positions and distances fall."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    height = 2 + 1.15 * len(found)
    figure, axes = plt.subplots(1 + len(found), 2, figsize=(11, height), constrained_layout=True)
    ruler = figure.add_subplot(axes[0, 0].get_gridspec()[0, :])
    for axis in axes[0]:
        axis.remove()
    draw_sample(ruler, cfg, lengths, tail, plt.get_cmap("tab20").colors)
    for (kind, counts), (left, right) in zip(found.items(), axes[1:]):
        draw_histogram(left, counts.held, "tab:blue")
        draw_histogram(right, counts.every, "tab:orange")
        draw_histogram(right, counts.answer, "tab:green")
        left.set_ylabel(kind, rotation=0, ha="right", va="center")
    axes[1, 0].set_title(f"positions, {SAMPLES} samples (grey: uniform)")
    axes[1, 1].set_title("distances: any two tokens (orange), from the answer (green)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_sample(axis, cfg: dict, lengths: list[int], tail: int, colours: Sequence) -> None:
    """Lines from where tokens stand in the text to their positions, a colour a chunk."""
    kind = cfg["positions"] if cfg["positions"] in STRATEGIES else "continuous"
    window = cfg["window"]
    positions = place(kind, lengths, tail, window, 0, 0, cfg["draws"])
    start = 0
    for c, length in enumerate([*lengths, tail]):
        colour = "black" if c == len(lengths) else colours[c % 20]
        for token in range(start, start + length, max(1, length // 24)):
            ends = [token * window / len(positions), positions[token]]
            axis.plot(ends, [0, 1], color=colour, linewidth=0.6)
        start += length
    axis.set(xlim=(0, window), ylim=(0, 1))
    axis.set(yticks=[0, 1], yticklabels=["tokens, as read", "positions"],
             title=f"one sample, {kind}: {len(positions):,} tokens over {window:,} positions "
                   "(black: question and answer)")


def draw_histogram(axis, counts: np.ndarray, colour: str) -> None:
    """Counts over the window, as multiples of what a uniform distribution has."""
    window = len(counts)
    edges = np.linspace(0, window, BARS + 1)
    heights = np.histogram(np.arange(window), edges, weights=counts)[0]
    axis.stairs(heights / max(1, heights.sum()) * BARS, edges, color=colour)
    axis.axhline(1, color="grey", linewidth=0.5)
    axis.set(xlim=(0, window), ylim=(0, 4), yticks=[])
