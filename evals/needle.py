"""Needles: facts hidden in long contexts, by length and depth; and which attention heads copied them."""
import random

import numpy as np
import torch

from configs import BadInput, run_file
from evals.common import interval, pyplot, save_picture, texts
from pairs.answers import is_right

ADJECTIVES = "amber bold calm dusty eager faint gentle hollow icy jolly keen lively mellow noble plain quiet rapid silent tall vivid".split()
NOUNS = "anchor basket candle dragon engine falcon garden harbor island jacket kettle ladder magnet needle orchid pencil quilt river saddle temple".split()
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.".split(". ")


def sentences_of(path):
    """Sentences of the haystack, one after another."""
    if not path:
        return [sentence.rstrip(".") + "." for sentence in NOISE]
    found = [s.strip() for text in texts(path) for s in text.replace("\n", " ").replace("? ", "?|").replace(". ", ".|").split("|")]
    return [s for s in found if s]


def needles(task, rng):
    """(needle sentences, the first of them where the depth says; question; answers that all have to be given). As in RULER."""
    keys = [f"{rng.choice(ADJECTIVES)}-{noun}" for noun in rng.sample(NOUNS, 4)]
    values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in range(4)]
    fact = "One of the special magic numbers for {} is: {}.".format
    if task == "variables":
        names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(4)]
        chain = [f"VAR {names[0]} = {values[0]}."] + [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:])]
        return chain, f"Find all variables that are assigned the value {values[0]} in the text above.", names
    if task == "multivalue":
        return [fact(keys[0], v) for v in values], f"What are all the special magic numbers for {keys[0]} mentioned in the text above?", values
    if task == "multiquery":
        asked = ", ".join(keys)
        return [fact(*kv) for kv in zip(keys, values)], f"What are all the special magic numbers for {asked} mentioned in the text above?", values
    others = [fact(*kv) for kv in zip(keys[1:], values[1:])] if task == "multikey" else []
    return [fact(keys[0], values[0]), *others], f"What is the special magic number for {keys[0]} mentioned in the text above?", values[:1]


def hide(needle, hay, size, depth, tokenizer, rng):
    """A context of some `size` tokens: consecutive sentences of the hay, needle[0] at depth per cent, the others anywhere."""
    left = size - sum(len(tokenizer.encode(" " + s)) for s in needle)
    at, sentences = rng.randrange(len(hay)), []
    while left > 0:
        sentence = hay[(at + len(sentences)) % len(hay)]
        left -= len(tokenizer.encode(" " + sentence))
        sentences.append(sentence)
    places = sorted(rng.randrange(len(sentences) + 1) for _ in needle[1:])
    if "VAR " in needle[0]:  # a chain keeps its order
        places = sorted([round(depth / 100 * len(sentences)), *places])
        for place, sentence in sorted(zip(places, needle), key=lambda x: -x[0]):
            sentences.insert(place, sentence)
        return " ".join(sentences)
    for place, sentence in zip(reversed(places), needle[1:]):
        sentences.insert(place, sentence)
    sentences.insert(round(depth / 100 * len(sentences)), needle[0])
    return " ".join(sentences)


def needle_example(task, size, depth, sample, options, hay, tokenizer):
    """(context, question, answers, the needle's sentence that retrieval heads should copy from)."""
    if options["haystack"].endswith(".py"):
        found = run_file(options["haystack"]).needle(task, size, depth, [options["seed"], sample])
        return found["context"], found["question"], found["answers"], found["needle"]
    rng = random.Random(f"{options['seed']} {task} {size} {depth} {sample}")
    facts, question, answers = needles(task, rng)
    return hide(facts, hay, size, depth, tokenizer, rng), question, answers, facts[0]


def given(text, answers):
    """Share of the answers that a text contains."""
    return sum(is_right(text, [answer]) for answer in answers) / len(answers)


def needle(subjects, options):
    """Rows {"model", "task", "length", "depth", "score", "n"}; the score is the mean share of the answers that were given."""
    tasks = [task.strip() for task in options["tasks"].split(",")]
    if unknown := set(tasks) - {"single", "multikey", "multivalue", "multiquery", "variables"}:
        raise BadInput(f"tasks: expected some of single, multikey, multivalue, multiquery, variables, found {', '.join(unknown)}")
    hay = [] if options["haystack"].endswith(".py") else sentences_of(options["haystack"])
    tail = options["prompt_tail"] or "\n\n{question}"
    table, heads = [], {}
    for subject in subjects:
        seen = Copies(subject) if options["retrieval"] else None
        for task in tasks:
            for length in options["lengths"]:
                cells, asked = [], []
                for depth in options["depths"]:
                    for sample in range(options["samples"]):
                        context, question, answers, fact = needle_example(task, length, depth, sample, options, hay, subject.tokenizer)
                        cells.append((depth, answers))
                        asked.append((*subject.prompt(context, "", tail.replace("{question}", question)), fact))
                look = seen and seen.watching([(ids, fact) for ids, _, fact in asked])
                said = subject.answers([(ids, n) for ids, n, _ in asked], options["max_new_tokens"], look)
                for depth in options["depths"]:
                    scores = [given(text, answers) for text, (d, answers) in zip(said, cells) if d == depth]
                    table.append({"model": subject.name, "task": task, "length": length, "depth": depth,
                                  "score": sum(scores) / len(scores), "n": len(scores)})
                row = [r for r in table if (r["model"], r["task"], r["length"]) == (subject.name, task, length)]
                mean, n = np.mean([r["score"] for r in row]), sum(r["n"] for r in row)
                low, high = interval(mean * n, n)
                print(f"{subject.name:20} {task:10} {length:7d}  " + " ".join(f"{r['score']:5.2f}" for r in row)
                      + f"   mean {mean:.3f} ({low:.3f}..{high:.3f}) of {n}", flush=True)
        if seen:
            heads[subject.name] = seen.scores()
            print_heads(subject.name, heads[subject.name])
    for task in tasks:
        needle_picture([s.name for s in subjects], [r for r in table if r["task"] == task], task,
                       options["window"] or subjects[0].model.config.max_position_embeddings, options)
    if heads:
        heads_picture(heads, options)
    return table, {"heads": {name: scores.tolist() for name, scores in heads.items()}}


class Copies:
    """Retrieval scores (App. B, Eq. 5): for each head, the share of the needle's tokens that it looked at, as its arg-max,
    in the very step that generated them. Mean over the examples."""

    def __init__(self, subject):
        config = subject.model.config
        self.shape, self.tokenizer, self.copied = (config.num_hidden_layers, config.num_attention_heads), subject.tokenizer, []

    def watching(self, asked):
        """A look(...) for generate that notes what is copied from the fact of each (ids, fact)."""
        spans = [span_of(ids, fact, self.tokenizer) for ids, fact in asked]
        mine = [torch.zeros(*self.shape, max(1, end - start), dtype=torch.bool) for start, end in spans]
        self.copied += mine

        def look(i, token, tops):  # tops: (layers, heads) positions of the arg-max key
            start, end = spans[i]
            for place in range(start, end):
                if asked[i][0][place] == token:
                    mine[i][:, :, place - start] |= tops == place
        return look

    def scores(self):
        return torch.stack([hits.float().mean(-1) for hits in self.copied]).mean(0)


def span_of(ids, fact, tokenizer):
    """Where a sentence's tokens lie in a prompt: (start, end); (0, 0) if nowhere."""
    pieces = [tokenizer.decode([t]) for t in ids]  # half a character decodes to U+FFFD, whole facts do not
    ends = np.cumsum([len(piece) for piece in pieces])
    at = "".join(pieces).find(fact)
    if at < 0:
        return 0, 0
    return int(np.searchsorted(ends, at, "right")), int(np.searchsorted(ends, at + len(fact), "left")) + 1


def print_heads(name, scores):
    best = scores.flatten().topk(min(10, scores.numel()))
    H = scores.shape[1]
    print(f"{name}: retrieval heads (score above 0.1): {int((scores > 0.1).sum())} of {scores.numel()}; mean of the best ten "
          f"{best.values.mean():.3f}: " + ", ".join(f"{i // H}.{i % H} {v:.2f}" for v, i in zip(best.values.tolist(), best.indices.tolist())))


def needle_picture(names, rows, task, window, options):
    plt = pyplot()
    if not plt:
        return
    lengths, depths = options["lengths"], options["depths"]
    grids = [np.array([[next(r["score"] for r in rows if (r["model"], r["length"], r["depth"]) == (name, n, d)) for n in lengths]
                       for d in depths]) for name in names]
    titles = list(names)
    if len(names) == 2:
        grids.append(grids[1] - grids[0])
        titles.append(f"{names[1]} minus {names[0]}")
    figure, axes = plt.subplots(1, len(grids), figsize=(1.5 + 4.2 * len(grids), 3.4), squeeze=False, constrained_layout=True)
    for axis, grid, title in zip(axes[0], grids, titles):
        change = "minus" in title
        image = axis.imshow(grid, cmap="RdBu" if change else "RdYlGn", vmin=-1 if change else 0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            axis.text(x, y, f"{value:+.2f}" if change else f"{value:.2f}", ha="center", va="center", fontsize=7)
        if any(n <= window for n in lengths) and any(n > window for n in lengths):
            axis.axvline(sum(n <= window for n in lengths) - 0.5, color="black", linewidth=2, linestyle="--")
        axis.set(title=title, xlabel="context, tokens (dashed: the window)", xticks=range(len(lengths)), xticklabels=lengths,
                 yticks=range(len(depths)), yticklabels=depths, ylabel="depth, %")
        figure.colorbar(image, ax=axis)
    save_picture(figure, plt, f"needle_{task}", options)


def heads_picture(heads, options):
    plt = pyplot()
    if not plt:
        return
    figure, axes = plt.subplots(1, len(heads), figsize=(1 + 3.6 * len(heads), 3.4), squeeze=False, constrained_layout=True)
    for axis, (name, scores) in zip(axes[0], heads.items()):
        image = axis.imshow(scores.numpy(), cmap="viridis", vmin=0, vmax=max(0.1, max(float(s.max()) for s in heads.values())), aspect="auto")
        axis.set(title=f"{name}: retrieval score", xlabel="head", ylabel="layer")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis)
    save_picture(figure, plt, "retrieval", options)
