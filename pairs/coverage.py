"""How synthesized positions cover the window (Sec. 3.2.2, App. D): which are visited, at which
distances.

Wanted are relative distances that are spread uniformly, and as many positions as possible.
Where positions are themselves spread evenly, all pairs have .25 to uniform: near pairs outnumber
far ones.
"""
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
    """Eq. 4 as printed: chunk c's bias is from U(1, c (K - k) / N), on its own."""
    # Without slack, a slot starts where its chunk would be read.
    placed = []
    for c, (start, length, _) in enumerate(slots(lengths, 0)):
        # A later chunk may move further, but does not have to: it can land before an earlier one.
        most = c * slack // len(lengths)
        bias = rng.integers(0, most + 1)
        placed.append(start + bias + np.arange(length))
    return np.concatenate(placed)


def place(cfg: dict, kind: str, lengths: list[int], tail: int, sample: int) -> np.ndarray:
    """Positions of chunks and tail of one sample. Those of LITERAL need not be increasing.

    cfg: window, draws and sparse_share. tail: tokens of question and answer.
    """
    window = cfg["window"]
    draws = cfg["draws"]
    # Samples are draws of examples, as in training, where the draws of an example are stratified.
    example, draw = divmod(sample, draws)
    if kind == "mix":
        kind = kind_of_draw({**cfg, "positions": "mix"}, (0, example, 0), draw)
    if kind == LITERAL:
        rng = random_stream("literal Eq. 4", 0, example, draw)
        slack = window - sum(lengths) - tail
        placed = independent(lengths, slack, rng)
        after = placed.max() + 1
    else:
        placed, after = synthesize_positions(
            chunk_lengths=lengths,
            prefix=0,
            tail=tail,
            window=window,
            kind=kind,
            draw=draw,
            draws=draws,
            seed=(0, example),
        )
    after_chunks = after + np.arange(tail)
    return np.concatenate([placed, after_chunks])


def distances(positions: np.ndarray, tail: int, window: int) -> Counts:
    """The counts of one sample whose last `tail` tokens are question and answer."""
    held = np.bincount(positions, minlength=window)
    # The autocorrelation of 0s and 1s counts pairs by distance; by FFT it takes no T x T table.
    # Twice the window, for the transform goes round: else far distances would count as near ones.
    spectrum = np.fft.rfft(held, 2 * window)
    power = spectrum * spectrum.conj()
    # What comes back is a float within 1e-9 of an integer.
    every = np.rint(np.fft.irfft(power, 2 * window))
    every = every[:window]
    every[0] = 0  # of a token to itself

    prompt = positions[:-tail]
    # What an answer will look back over: this is the distance that has to work at 64K.
    from_answer = np.abs(positions[-1] - prompt)
    answer = np.bincount(from_answer, minlength=window)
    return Counts(held, every, answer)


def coverage(cfg: dict, lengths: list[int], tail: int) -> dict[str, Counts]:
    """{kind: counts over SAMPLES samples} for chunks of these lengths; cfg as in place."""
    window = cfg["window"]
    found = {}
    for kind in KINDS:
        # Many samples, since one visits a small part of the window.
        total = Counts(*np.zeros((3, window)))
        for sample in range(SAMPLES):
            positions = place(cfg, kind, lengths, tail, sample)
            counts = distances(positions, tail, window)
            for sums, more in zip(total, counts):
                sums += more
        found[kind] = total
    return found


def to_uniform(counts: np.ndarray) -> float:
    """Total variation distance of counts[1:] to the uniform distribution: 0 uniform, 1 disjoint."""
    counts = counts[1:]
    shares = counts / counts.sum()
    uniform = 1 / len(shares)
    return 0.5 * np.abs(shares - uniform).sum()


# -------------------------------------------------------------------------------------- the picture

def picture(path: str, cfg: dict, lengths: list[int], tail: int, found: dict[str, Counts]) -> None:
    """Above: one sample's tokens and their positions. Below: where positions and distances fall."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A row for one sample, and one for each kind.
    rows = 1 + len(found)
    size = (11, 0.85 + 1.15 * rows)
    figure, axes = plt.subplots(rows, 2, figsize=size, constrained_layout=True)
    # The first row is one wide picture in place of two.
    first_row = axes[0, 0].get_gridspec()[0, :]
    for axis in axes[0]:
        axis.remove()
    draw_sample(figure.add_subplot(first_row), cfg, lengths, tail)

    for (kind, counts), (left, right) in zip(found.items(), axes[1:]):
        draw_histogram(left, counts.held, "tab:blue")
        draw_histogram(right, counts.every, "tab:orange")
        draw_histogram(right, counts.answer, "tab:green")
        left.set_ylabel(kind, rotation=0, ha="right", va="center")
    axes[1, 0].set_title(f"positions, {SAMPLES} samples (grey: uniform)")
    axes[1, 1].set_title("distances: any two tokens (orange), from the answer (green)")

    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_sample(axis, cfg: dict, lengths: list[int], tail: int) -> None:
    """Lines from where tokens stand in the text to their positions, a colour a chunk."""
    # Of a mix, the kind that most samples have.
    kind = "continuous" if cfg["positions"] == "mix" else cfg["positions"]
    window = cfg["window"]
    positions = place(cfg, kind, lengths, tail, 0)
    # Both ends of a line are on the same ruler: the text's tokens are stretched over the window.
    stretch = window / len(positions)
    start = 0
    for c, length in enumerate([*lengths, tail]):
        # "C0" to "C9" are matplotlib's own colours. The tail, which is no chunk, is black.
        colour = "black" if c == len(lengths) else f"C{c % 10}"
        # Some 24 lines a chunk: more would be a solid block.
        step = max(1, length // 24)
        for token in range(start, start + length, step):
            axis.plot([token * stretch, positions[token]], [0, 1], color=colour, linewidth=0.6)
        start += length
    axis.set_xlim(0, window)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 1], ["tokens, as read", "positions"])
    axis.set_title(f"one sample, {kind}: {len(positions):,} tokens over {window:,} positions "
                   "(black: question and answer)")


def draw_histogram(axis, counts: np.ndarray, colour: str) -> None:
    """Counts over the window, as multiples of what a uniform distribution has."""
    window = len(counts)
    edges = np.linspace(0, window, BARS + 1)
    places = np.arange(window)
    heights, _ = np.histogram(places, edges, weights=counts)
    uniform = heights.sum() / BARS
    axis.stairs(heights / uniform, edges, color=colour)
    axis.axhline(1, color="grey", linewidth=0.5)
    axis.set_xlim(0, window)
    # Four times uniform is enough to see a peak; near distances would dwarf the rest.
    axis.set_ylim(0, 4)
    axis.set_yticks([])
