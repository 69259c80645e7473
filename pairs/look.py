"""Look at what was built: a table of a pairs' file, one pair to read, and how positions cover the window.

    python -m pairs stats PAIRS [CONFIG] [key=value]    window and positions are the config's; PNGs beside the file
    python -m pairs show PAIRS 7                        evidence is bright on a terminal
    python -m pairs score CONFIG [key=value]            what chunks and scores come to, before any answer is written
"""
import os
import re
import resource
import sys
import time
from collections import Counter

import numpy as np

from configs import BadInput, check_settings, load_config
from data import IRRELEVANT, NEAR, PARTIAL, STRATEGIES, Placing, kind_of_draw, load_evaluator, random_stream, read_lines, slots, synthesize_positions
from pairs.answers import normalize
from pairs.build import drafts
from pairs.corpus import read_examples
from tokenizer import load_tokenizer

SAMPLES = 200  # for coverage


# ------------------------------------------------------------------------------------------------------- coverage

def independent(p):
    """Eq. 4 as printed: a bias for each chunk from U(1, c (K - k) / N), whatever its neighbours drew. To compare with."""
    placed = []
    for c, (start, length, _) in enumerate(slots(p.lengths, 0)):
        bias = p.own.integers(0, c * p.slack // len(p.lengths) + 1)
        placed.append(start + bias + np.arange(length))
    return np.concatenate(placed)


def place(kind, lengths, tail, window, share, sample, draws):
    """Positions of chunks and tail of one sample, by a strategy; "independent" need not be increasing."""
    seed, draw = (0, sample // draws), sample % draws
    if kind == "mix":
        kind = kind_of_draw({"positions": "mix", "sparse_share": share}, (*seed, 0), draw)
    if kind == "independent":
        own = random_stream("literal Eq. 4", *seed, draw)
        placed = independent(Placing(lengths, window - sum(lengths) - tail, draw, draws, None, own))
        return np.concatenate([placed, placed.max() + 1 + np.arange(tail)])
    placed, after = synthesize_positions(lengths, 0, tail, window, kind, draw, draws, seed)
    return np.concatenate([placed, after + np.arange(tail)])


def distances(positions, tail, window):
    """How often each distance 0..window-1 occurs: between any two tokens, and from the last token to the prompt's."""
    held = np.bincount(positions, minlength=window)
    spectrum = np.fft.rfft(held, 2 * window)
    every = np.rint(np.fft.irfft(spectrum * spectrum.conj(), 2 * window)[:window])  # autocorrelation counts pairs
    every[0] = 0
    return held, every, np.bincount(np.abs(positions[-1] - positions[:-tail]), minlength=window)


def to_uniform(counts):
    """Total variation distance of counts[1:] to the uniform distribution: 0 is uniform, 1 is disjoint."""
    shares = counts[1:] / counts[1:].sum()
    return 0.5 * np.abs(shares - 1 / len(shares)).sum()


def coverage(lengths, tail, window, share, draws, kinds=(*STRATEGIES, "mix", "independent")):
    """{kind: (positions held, distances of all pairs, distances of the answer)}, each (window,) counts over SAMPLES samples."""
    return {kind: tuple(sum(part) for part in zip(*(
        distances(place(kind, lengths, tail, window, share, sample, draws), tail, window) for sample in range(SAMPLES))))
        for kind in kinds}


# ---------------------------------------------------------------------------------------------------------- stats

def spread(name, values):
    low, middle, high = np.percentile(values, [0, 50, 100])
    print(f"  {name:34} {low:8.5g} {middle:8.5g} {np.mean(values):8.5g} {high:8.5g}")


def share_of(name, values):
    """A line "share of how many" for values True, False or None (not known)."""
    known = [value for value in values if value is not None]
    print(f"  {name:34} " + (f"{np.mean(known):8.1%} of {len(known)}" if known else "not known"))


def open_file(path):
    """(settings, rows that are pairs, {reason: how many dropped})."""
    rows = [row for _, row in read_lines(path)]
    settings = rows[0].get("settings", {}) if rows else {}
    pairs = [row for row in rows if "chosen" in row]
    if not pairs:
        raise BadInput(f"{path}: no pairs in it")
    return settings, pairs, Counter(row["dropped"] for row in rows if "dropped" in row)


def stats(argv):
    """The table of a pairs' file; with matplotlib also PAIRS.positions.png."""
    if not argv:
        raise BadInput("expected: python -m pairs stats PAIRS [CONFIG] [key=value]")
    path, cfg = argv[0], load_config(argv[1:])
    settings, pairs, dropped = open_file(path)
    print(f"{path}: {len(pairs)} pairs of {len(pairs) + sum(dropped.values())} examples")
    for reason, count in dropped.most_common():
        print(f"  {count:6d} dropped: {reason}")
    print(f"  {'':34} {'least':>8} {'median':>8} {'mean':>8} {'most':>8}")
    spread("prompt tokens, chunks only", [sum(map(len, row["chunks"])) for row in pairs])
    spread("words of the chosen", [len(row["chosen"].split()) for row in pairs])
    spread("words of a rejected", [len(text.split()) for row in pairs for text in row["rejected"]])
    spread("best score of a chunk", [max(row["scores"]) for row in pairs])
    spread("mean score of the other chunks", [np.mean(sorted(row["scores"])[:-1] or [0]) for row in pairs])
    if audits := [row["audit"] for row in pairs if "audit" in row]:
        spread("words chosen : rejected", [a["length_ratio"] for a in audits])
        spread("words in common with the chosen", [x for a in audits for x in a["overlap"]])
        share_of("chosen has the reference answer", [a["chosen_right"] for a in audits])
        share_of("its prompt held the evidence", [a["chosen_saw_evidence"] for a in audits])
        for kind in (IRRELEVANT, PARTIAL, NEAR):
            each = [(a["rejected_right"][j], a["rejected_saw_evidence"][j], a["error"][j]) for a in audits
                    for j, found in enumerate(a["evidence"]) if found == kind]
            print(f"  rejected, from {kind} chunks: {len(each)}")
            share_of("  has the reference answer", [x[0] for x in each])
            share_of("  its prompt held the evidence", [x[1] for x in each])
            for error, count in Counter(x[2] for x in each).most_common():
                print(f"  {'  ' + error:34} {count / len(each):8.1%}")
    lengths = [len(ids) for ids in max(pairs, key=lambda row: sum(map(len, row["chunks"])))["chunks"]]
    print_positions(path, cfg, lengths)


def print_positions(path, cfg, lengths):
    window, tail, shown = cfg["window"], max(8, sum(lengths) // 16), {}  # tail: question and answer, about
    print(f"  positions of {SAMPLES} samples like the longest pair ({sum(lengths)} tokens in {len(lengths)} chunks), "
          f"window {window}:")
    print(f"  {'':12} {'visited':>8}   to uniform: {'all pairs':>10} {'answer to prompt':>17}")
    for kind, (held, every, answer) in coverage(lengths, tail, window, cfg["sparse_share"], cfg["draws"]).items():
        shown[kind] = held, every, answer
        print(f"  {kind:12} {np.mean(held > 0):8.1%}   {'':11} {to_uniform(every):10.3f} {to_uniform(answer):17.3f}"
              + ("   <- this config" if kind == cfg["positions"] else ""))
    try:
        import matplotlib
    except ImportError:
        print("  no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    picture(os.path.splitext(path)[0] + ".positions.png", cfg, lengths, tail, shown)


def picture(path, cfg, lengths, tail, shown):
    """Above: one sample's tokens and their positions. Below: where positions and distances of SAMPLES samples fall."""
    import matplotlib.pyplot as plt
    window, bins = cfg["window"], 64
    figure, axes = plt.subplots(1 + len(shown), 2, figsize=(11, 2 + 1.15 * len(shown)), constrained_layout=True)
    ruler = figure.add_subplot(axes[0, 0].get_gridspec()[0, :])
    for axis in axes[0]:
        axis.remove()
    kind = cfg["positions"] if cfg["positions"] in STRATEGIES else "continuous"
    positions = place(kind, lengths, tail, window, 0, 0, cfg["draws"])
    colours = plt.get_cmap("tab20").colors
    start = 0
    for c, length in enumerate([*lengths, tail]):
        tokens = np.arange(start, start + length)
        colour = "black" if c == len(lengths) else colours[c % 20]
        step = max(1, length // 24)
        for token in tokens[::step]:
            ruler.plot([token * window / len(positions), positions[token]], [0, 1], color=colour, linewidth=0.6)
        start += length
    ruler.set(xlim=(0, window), ylim=(0, 1), yticks=[0, 1], yticklabels=["tokens, as read", "positions"],
              title=f"one sample, {kind}: {len(positions):,} tokens over {window:,} positions (black: question and answer)")
    for (kind, (held, every, answer)), (left, right) in zip(shown.items(), axes[1:]):
        edges = np.linspace(0, window, bins + 1)
        for axis, counts, colour in ((left, held, "tab:blue"), (right, every, "tab:orange"), (right, answer, "tab:green")):
            heights = np.histogram(np.arange(window), edges, weights=counts)[0]
            axis.stairs(heights / max(1, heights.sum()) * bins, edges, color=colour)
            axis.axhline(1, color="grey", linewidth=0.5)
            axis.set(xlim=(0, window), ylim=(0, 4), yticks=[])
        left.set_ylabel(kind, rotation=0, ha="right", va="center")
    axes[1, 0].set_title(f"positions, {SAMPLES} samples (grey: uniform)")
    axes[1, 1].set_title("distances: any two tokens (orange), from the answer (green)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"  {path}")


# ---------------------------------------------------------------------------------------------------------- score

def score(argv):
    """Read, chunk and score a config's whole corpus: how selective it is, how fast this is, and in how much memory."""
    cfg = load_config(argv)
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    check_settings(cfg)
    start = time.time()
    examples, evaluator = read_examples(cfg, "train"), load_evaluator(cfg)
    indexed, size = time.time(), cfg["build_batch"]
    blocks = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
    dropped, best, critical, saw = Counter(), [], [], []
    for block in drafts(cfg, tokenizer, evaluator, examples, blocks):
        for new in block:
            dropped[new.dropped] += 1
            if new.selection:
                best.append(max(new.row["scores"]))
                critical.append(len(new.selection.chosen))
                saw.append(new.saw)
    took, pick = time.time() - indexed, dropped.pop(None, 0)
    print(f"{cfg['examples']}: {len(examples)} examples, indexed in {indexed - start:.1f} s, scored in {took:.1f} s "
          f"({len(examples) / took:.1f} a second)")
    print(f"  {pick} with critical and irrelevant chunks" + "".join(f", {n} {reason}" for reason, n in dropped.most_common()))
    if best:
        print(f"  {'':34} {'least':>8} {'median':>8} {'mean':>8} {'most':>8}")
        spread("best score of a chunk", best)
        spread("critical chunks", critical)
        share_of("evidence in the critical chunks", [s[0] for s in saw])
        share_of("evidence in irrelevant chunks only", [x for s in saw for x in s[1::2]])
        share_of("evidence in the mix", [x for s in saw for x in s[2::2]])
    used = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"  peak memory {used[0]:.2f} GiB, of the largest worker {used[1]:.2f} GiB (in part the same pages)")


# ----------------------------------------------------------------------------------------------------------- show

def show(argv):
    """Print pair number argv[1] (its id) for reading: words shared with the question, or part of its answers, are bright."""
    if len(argv) != 2 or not argv[1].isdigit():
        raise BadInput("expected: python -m pairs show PAIRS ID")
    settings, pairs, _ = open_file(argv[0])
    found = [row for row in pairs if row["id"] == int(argv[1])]
    if not found:
        raise BadInput(f"{argv[0]}: no pair has the id {argv[1]}; the first ids are {[row['id'] for row in pairs[:8]]}")
    row, cfg = found[0], {**load_config([]), **settings}
    tokenizer, evaluator = load_tokenizer(cfg["model"], cfg["template"]), load_evaluator(cfg)
    wanted = set().union(*(evaluator(text) for text in [row["question"] or "", *row.get("answers", [])]))
    context = " ".join(tokenizer.decode(ids) for ids in row["chunks"])
    for c, (ids, score) in enumerate(zip(row["chunks"], row["scores"])):
        print(f"--- chunk {c}: {len(ids)} tokens, score {score}\n{bright(tokenizer.decode(ids).strip(), wanted)}")
    print(f"\nquestion   {row['question'] or '(a ready pair: the chunks are its prompt)'}")
    for answer in row.get("answers", []):
        print(f"reference  {answer}")
    print(f"\nchosen     {bright(row['chosen'].strip(), wanted)}{invented(row['chosen'], context)}")
    for j, text in enumerate(row["rejected"]):
        found = row.get("audit", {})
        print(f"rejected   {bright(text.strip(), wanted)}{invented(text, context)}"
              + (f"   [{found['evidence'][j]} chunks: {found['error'][j]}]" if found else ""))


def bright(text, words):
    """The text with these words in bold, on a terminal."""
    if not sys.stdout.isatty() or not words:
        return text
    mark = lambda m: f"\033[1;33m{m.group()}\033[0m" if m.group().lower() in words else m.group()
    return re.sub(r"\w+(?:[.,]\d+)*", mark, text)


def invented(answer, context):
    """Names and numbers of an answer that its prompt does not have."""
    known = set(normalize(context).split())
    words = [w for w in re.findall(r"\w+", answer)[1:] if (w[0].isupper() or w[0].isdigit()) and w.lower() not in known]
    return f"   (not in the prompt: {', '.join(dict.fromkeys(words))})" if words else ""
