"""What a model folder can do, before and after: needles, questions, perplexity, LongBench, preferences.

    python eval.py needle      MODEL [key=value]      facts hidden in long contexts, by length and depth
    python eval.py qa          MODEL [key=value]      questions over passages: right answers and F1, by number and place
    python eval.py perplexity  MODEL [key=value]      of texts, by context length; and where a long context helps
    python eval.py longbench   MODEL [key=value]      the official files and prompts in a local folder
    python eval.py preferences MODEL [key=value]      margins and accuracy on pairs
    python eval.py questions   MODEL CONFIG [key=value]  a training config's fresh questions, as train_logo.py counts them

Each prints a table and writes it to out/eval/COMMAND.json and, where matplotlib is installed, COMMAND.png. compare=FOLDER
measures a second model beside the first. Generation is greedy, at ordinary contiguous positions.
"""
import json
import math
import os
import random
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import load_pretrained
from configs import load_config, run_file, with_arguments
from corpus import Corpus, Examples, files_of, read_examples
from data import chunk, collate, encode_group, exit_on_bad_input, prompt_around
from longbench import GROUPS, METRICS, qa_f1, score_dataset
from loss import logo_loss
from model import BadInput, write_json
from pairs import is_right, load_pairs
from tokenizer import load_tokenizer

COMMON = dict(
    compare="",              # a second model folder, measured in the same way
    out="out/eval",          # folder of the results
    template="auto",         # chat template, as in configs/default.py
    dtype="float32",         # or bfloat16
    threads=0,               # CPU threads; 0: PyTorch's choice
    batch=8,                 # prompts generated together
    seed=0)
OPTIONS = {
    "needle": dict(
        **COMMON,
        tasks="single",      # of single, multikey, multivalue, multiquery, variables; comma-separated
        lengths=[512, 1024, 2048, 4096],  # tokens of the context
        depths=[0, 25, 50, 75, 100],      # where the needle lies, in per cent of the context
        samples=4,           # in each cell
        haystack="",         # text files or a folder; empty: generated; a .py with needle(task, size, depth, seed)
        prompt_tail="",      # around the question; empty: the task's own
        max_new_tokens=40,
        window=0,            # mark this window in the picture; 0: the first model's own
        retrieval=False),    # also which attention heads copied (App. B, Eq. 5)
    "qa": dict(
        **COMMON,
        examples="",         # a corpus of passages, see corpus.py
        passages=[1, 4, 8, 16],
        questions=100,       # the last of the shuffled corpus: pairs are built from its head
        prompt_tail="Answer this question in a few words: {question}?",
        max_new_tokens=64),
    "perplexity": dict(
        **COMMON,
        text="",             # text files, or a folder of them
        lengths=[256, 512, 1024, 2048],  # tokens that a prediction may look back on
        stride=256,          # tokens scored in each window
        tokens=8192,         # of each document, from its beginning
        documents=8,
        gain=2.0),           # nats that a long context has to gain on a token for LongPPL
    "longbench": dict(
        **COMMON,
        data="",             # folder with dataset.jsonl files, dataset2prompt.json and dataset2maxlen.json
        datasets="",         # comma-separated; empty: all that are there
        limit=0,             # examples of each; 0: all
        max_length=3500),    # tokens of a prompt; the middle of a longer one is cut out
    "preferences": dict(**COMMON, pairs="", config="", last=64),  # last: so many pairs of the file; 0: all
}


# -------------------------------------------------------------------------------------------------- what all share

class Subject:
    """A model folder that is asked things."""

    def __init__(self, folder, options):
        self.name, self.options = os.path.basename(os.path.normpath(folder)), options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_pretrained(folder, getattr(torch, options["dtype"]), self.device)
        self.tokenizer = load_tokenizer(folder, options["template"])

    def prompt(self, context, head, tail):
        """(token ids of a user's turn around a context, how many of them do not depend on the tail)."""
        prefix, suffix, _ = self.tokenizer.chat(head, tail)
        ids = prefix + self.tokenizer.encode(context)
        return ids + suffix, len(ids)

    def answers(self, prompts, max_new_tokens, look=None):
        """Greedy answers to (ids, shared) prompts, in batches of similar lengths; equal contexts are computed once.

        look(i, token, tops): what Llama.generate's look is told, of prompt i.
        """
        stops, out = self.tokenizer.chat("", "")[2], [None] * len(prompts)
        order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0])), self.options["batch"]
        for some in (order[i:i + size] for i in range(0, len(order), size)):
            found = self.model.generate([prompts[i][0] for i in some], max_new_tokens, stop_ids=stops,
                                        shared=[prompts[i][1] for i in some],
                                        look=look and (lambda row, *seen, some=some: look(some[row], *seen)))
            for i, ids in zip(some, found):
                out[i] = self.tokenizer.decode([t for t in ids if t not in stops])
        return out


def interval(right, asked):
    """95 % Wilson interval of a share."""
    z, p = 1.96, right / asked
    middle, half = p + z * z / (2 * asked), z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return (middle - half) / (1 + z * z / asked), (middle + half) / (1 + z * z / asked)


def pyplot():
    """matplotlib, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def texts(path):
    """The texts of .txt files, of a folder, or of a corpus of documents."""
    if path.endswith(".py"):
        return [example["context"] for example in run_file(path).examples(8, 4096, 0)]
    corpus = Corpus(path, {"strict": True, "max_chars": 0, "questions": 1})
    found = [corpus[i] for i in range(len(corpus))]
    return [example.get("document") or example.get("context") for example in found]


# ---------------------------------------------------------------------------------------------------------- needle

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


def save_picture(figure, plt, name, options):
    os.makedirs(options["out"], exist_ok=True)
    path = os.path.join(options["out"], f"{name}.png")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)


# -------------------------------------------------------------------------------------------------------------- qa

def qa(subjects, options):
    """Rows {"model", "passages", "right", "f1", "n", "by_place"}: answer contained, token F1, by place of the gold passage."""
    corpus = Corpus(options["examples"], {"strict": True, "max_chars": 0, "questions": 1})
    order = np.random.default_rng(options["seed"]).permutation(len(corpus))[-options["questions"]:]
    table = []
    for subject in subjects:
        for passages in options["passages"]:
            # the other questions' passages are the distractors
            examples, asked, places = Examples(corpus, order, min(passages, len(order)), options["seed"]), [], []
            for i in range(len(examples)):
                example, gold = examples[i], corpus[order[i]]["passage"]
                places.append(example["context"].index(gold))
                context = "".join(passage + "\n\n" for passage in example["context"])
                asked.append((subject.prompt(context, "", options["prompt_tail"].replace("{question}", example["question"])), example))
            said = subject.answers([prompt for prompt, _ in asked], options["max_new_tokens"])
            right = [is_right(said[i], example["answers"]) for i, (_, example) in enumerate(asked)]
            f1 = [max(qa_f1(said[i], answer) for answer in example["answers"]) for i, (_, example) in enumerate(asked)]
            low, high = interval(sum(right), len(right))
            thirds = [[r for r, p in zip(right, places) if 3 * p // passages == third] for third in range(3)]
            table.append({"model": subject.name, "passages": passages, "right": float(np.mean(right)), "f1": float(np.mean(f1)),
                          "n": len(right), "by_place": [[sum(t), len(t)] for t in thirds]})
            print(f"{subject.name:20} {passages:3d} passages   right {np.mean(right):.3f} ({low:.3f}..{high:.3f})   F1 {np.mean(f1):.3f}   "
                  f"of {len(right)}   gold passage first / middle / last third: "
                  + " / ".join(f"{sum(t)}:{len(t)}" for t in thirds), flush=True)
    return table, {}


# ------------------------------------------------------------------------------------------------------ perplexity

@torch.no_grad()
def token_losses(model, ids, length, stride):
    """(len(ids) - 1,) nats of each token after the first, which sees between length - stride and length - 1 tokens before it.

    Windows of `length` tokens move on by `stride`, and each scores what the one before has not (Press et al., 2021).
    """
    ids = torch.tensor(ids, device=model.lm_head.weight.device)
    losses, done = [], 0
    for begin in range(0, len(ids) - 1, stride):
        window = ids[begin:begin + length]
        logits = model.logits(window[None])[0, :-1].float()
        each = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        losses.append(each[done - begin:].cpu())
        done = begin + len(window) - 1
        if done == len(ids) - 1:
            break
    return torch.cat(losses)


def perplexity(subjects, options):
    """Rows {"model", "length", "perplexity", "long", "key_tokens"}.

    long: LongPPL, over the tokens alone whose loss falls by more than `gain` nats from the shortest to this length.
    """
    if min(options["lengths"]) < 2 or options["stride"] < 1 or options["stride"] >= min(options["lengths"]):
        raise BadInput(f"stride={options['stride']}: expected at least 1 and less than the shortest of lengths={options['lengths']}")
    found, table = texts(options["text"])[:options["documents"]], []
    for subject in subjects:
        documents = [subject.tokenizer.encode(text)[:options["tokens"]] for text in found]
        documents = [ids for ids in documents if len(ids) > max(options["lengths"])]
        if not documents:
            raise BadInput(f"{options['text']}: no text has more than {max(options['lengths'])} tokens")
        shortest = None
        for length in sorted(options["lengths"]):
            losses = torch.cat([token_losses(subject.model, ids, length, options["stride"]) for ids in documents])
            shortest = losses if shortest is None else shortest
            key = shortest - losses > options["gain"]
            row = {"model": subject.name, "length": length, "perplexity": losses.mean().exp().item(), "tokens": len(losses),
                   "long": losses[key].mean().exp().item() if key.any() else None, "key_tokens": int(key.sum())}
            table.append(row)
            print(f"{subject.name:20} {length:7d} tokens   perplexity {row['perplexity']:8.3f} of {len(losses)}   "
                  + (f"LongPPL {row['long']:.3f} of {row['key_tokens']}" if row["long"] else "no tokens gain"), flush=True)
    if plt := pyplot():
        figure, axis = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
        for name in dict.fromkeys(r["model"] for r in table):
            mine = [r for r in table if r["model"] == name]
            axis.plot([r["length"] for r in mine], [r["perplexity"] for r in mine], marker="o", label=name)
        axis.axvline(subjects[0].model.config.max_position_embeddings, color="black", linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="context, tokens (dashed: the first model's window)", ylabel="perplexity")
        axis.legend()
        save_picture(figure, plt, "perplexity", options)
    return table, {}


# ------------------------------------------------------------------------------------------------------- longbench

def middle_out(ids, tokenizer, most):
    """A prompt of at most `most` tokens, as LongBench cuts it: its two ends, decoded one by one and joined."""
    if len(ids) <= most:
        return tokenizer.decode(ids)
    return tokenizer.decode(ids[:most // 2]) + tokenizer.decode(ids[-(most // 2):])


def longbench(subjects, options):
    """Rows {"model", "dataset", "score", "n"} and group averages; predictions stay in out/eval/longbench/MODEL/DATASET.jsonl."""
    folder = options["data"]
    files = {os.path.basename(path).removesuffix(".jsonl"): path for path in files_of(folder) if path.endswith(".jsonl")}
    settings = []
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        path = next((p for p in (os.path.join(folder, name), os.path.join(folder, "config", name)) if os.path.isfile(p)), None)
        if not path:
            raise BadInput(f"{folder}: expected LongBench's {name} in it, or in its folder config")
        with open(path, encoding="utf-8") as f:
            settings.append(json.load(f))
    wanted = [d.strip() for d in options["datasets"].split(",") if d.strip()] or sorted(d for d in files if d.removesuffix("_e") in METRICS)
    if missing := [d for d in wanted if d not in files or d.removesuffix("_e") not in METRICS]:
        raise BadInput(f"{folder}: no dataset {', '.join(missing)}; there are {', '.join(sorted(files))}")
    table = []
    for subject in subjects:
        for dataset in wanted:
            name = dataset.removesuffix("_e")
            with open(files[dataset], encoding="utf-8") as f:
                rows = [json.loads(line) for line in f][:options["limit"] or None]
            prompts = [bench_prompt(subject, name, settings[0][name].format(**row), options) for row in rows]
            said = subject.answers([(ids, 0) for ids in prompts], settings[1][name])
            kept = os.path.join(options["out"], "longbench", subject.name)
            os.makedirs(kept, exist_ok=True)
            with open(os.path.join(kept, f"{dataset}.jsonl"), "w", encoding="utf-8") as f:
                for row, text in zip(rows, said):
                    f.write(json.dumps({"pred": text, **{k: row.get(k) for k in ("answers", "all_classes", "length")}}, ensure_ascii=False) + "\n")
            score = score_dataset(name, said, [row["answers"] for row in rows], rows[0].get("all_classes"))
            table.append({"model": subject.name, "dataset": dataset, "score": score, "n": len(rows)})
            print(f"{subject.name:20} {dataset:24} {score:6.2f}   of {len(rows)}", flush=True)
        for group, members in GROUPS.items():
            scores = [r["score"] for r in table if r["model"] == subject.name and r["dataset"].removesuffix("_e") in members]
            if scores:
                print(f"{subject.name:20} {group:24} {np.mean(scores):6.2f}   mean of {len(scores)} datasets")
    return table, {}


NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # few-shot and code: continued, not answered


def bench_prompt(subject, dataset, text, options):
    text = middle_out(subject.tokenizer.encode(text), subject.tokenizer, options["max_length"])
    if dataset in NO_CHAT:
        return ([subject.tokenizer.bos_id] if subject.tokenizer.bos_id is not None else []) + subject.tokenizer.encode(text)
    return subject.prompt(text, "", "")[0]


# ----------------------------------------------------------------------------------------------------- preferences

@torch.no_grad()
def preferences(subjects, options):
    """Rows {"model", "margin", "accuracy", "chosen", "rejected"} of mean log-probs on pairs, at their first draw's positions."""
    cfg, table, shown = load_config([options["config"]] if options["config"] else []), [], {}
    pairs = load_pairs(options["pairs"], cfg["n_rejected"])[-options["last"] or None:]
    for subject in subjects:
        rows = []
        for pair in pairs:
            batch = collate([encode_group(pair, subject.tokenizer, cfg)])
            sums, lengths = subject.model(*(x.to(subject.device) for x in batch[:3]), batch.segments)
            rows.append((sums / lengths).cpu())
        logps = torch.stack(rows)
        shown[subject.name] = logps
        _, metrics = logo_loss(logps[:, 0], logps[:, 1:], cfg["beta"], cfg["gamma"], cfg["sft_weight"])
        row = {"model": subject.name, "n": len(pairs), **{key: float(value) for key, value in metrics.items()}}
        table.append(row)
        print(f"{subject.name:20} margin {row['margin']:+.3f}  accuracy {row['accuracy']:.3f}  chosen {row['chosen']:.3f}  "
              f"rejected {row['rejected']:.3f}  of {len(pairs)}", flush=True)
    if plt := pyplot():
        figure, axes = plt.subplots(1, len(shown), figsize=(1 + 4 * len(shown), 3.2), squeeze=False, sharex=True, constrained_layout=True)
        for axis, (name, logps) in zip(axes[0], shown.items()):
            edges = np.linspace(min(float(x.min()) for x in shown.values()), 0, 40)
            axis.hist(logps[:, 0], edges, alpha=0.6, label="chosen")
            axis.hist(logps[:, 1:].flatten(), edges, alpha=0.6, label="rejected")
            axis.set(title=name, xlabel="mean log-prob of an answer")
            axis.legend()
        save_picture(figure, plt, "preferences", options)
    return table, {}


# ------------------------------------------------------------------------------- as train_logo.py counts answers

def recall(model, tokenizer, cfg, size, rank=0, world=1):
    """(right, asked): fresh questions over a context of `size` whose generated answer contains a reference answer.

    With several processes each asks its share and all return the sum.
    """
    examples = read_examples(cfg, "recall", size)
    examples = [examples[i] for i in range(rank, len(examples), world)]
    if not all(example.get("question") and example.get("answers") for example in examples):
        raise BadInput(f"{cfg['examples']}: some examples have no question or no answers, recall_questions needs them")
    prompts, stops = [], ()
    for example in examples:
        prefix, suffix, stops = prompt_around(cfg, tokenizer, example["question"])
        chunks = chunk(example["context"], tokenizer, cfg["chunk_size"])
        prompts.append(prefix + [t for c in chunks for t in c] + suffix)
    right = 0
    for i in range(0, len(prompts), cfg["recall_batch"]):
        answers = model.generate(prompts[i:i + cfg["recall_batch"]], cfg["max_new_tokens"], stop_ids=stops)
        right += sum(is_right(tokenizer.decode(ids), example["answers"]) for ids, example in zip(answers, examples[i:]))
    counts = torch.tensor([right, len(examples)])
    if world > 1:
        counts = counts.to(model.lm_head.weight.device)
        dist.all_reduce(counts)
    return tuple(counts.tolist())


def questions(folder, argv):
    cfg = load_config(argv)
    if not cfg["recall_sizes"] or not cfg["recall_questions"]:
        raise BadInput("recall_sizes and recall_questions are empty: nothing to ask")
    torch.set_num_threads(cfg["threads"] or torch.get_num_threads())
    subject = Subject(folder, cfg)
    for size in cfg["recall_sizes"]:
        start = time.time()
        right, asked = recall(subject.model, subject.tokenizer, cfg, size)
        print(f"context {size:6d}  right {right:4d} of {asked:4d}  {right / asked:.3f}  {time.time() - start:.1f}s")


COMMANDS = {"needle": needle, "qa": qa, "perplexity": perplexity, "longbench": longbench, "preferences": preferences}
NEEDED = {"qa": "examples", "perplexity": "text", "longbench": "data", "preferences": "pairs"}


def main(argv):
    if len(argv) < 2 or argv[0] not in (*COMMANDS, "questions"):
        raise BadInput(f"expected: python eval.py {'|'.join(COMMANDS)}|questions MODEL [key=value]")
    command, folder, *rest = argv
    if command == "questions":
        return questions(folder, rest)
    options = with_arguments(OPTIONS[command], rest)
    if command in NEEDED and not options[NEEDED[command]]:
        raise BadInput(f"{command}: {NEEDED[command]} is empty, expected a file or a folder")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    subjects = [Subject(path, options) for path in (folder, options["compare"]) if path]
    if len(subjects) == 2:
        subjects[0].name, subjects[1].name = os.path.normpath(folder), os.path.normpath(options["compare"])
    start = time.time()
    table, more = COMMANDS[command](subjects, options)
    os.makedirs(options["out"], exist_ok=True)
    path = os.path.join(options["out"], f"{command}.json")
    write_json({"command": ["eval.py", *argv], "options": options, "seconds": round(time.time() - start, 1), "table": table, **more}, path)
    print(path)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    main(sys.argv[1:])
