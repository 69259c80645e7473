"""Tables: what is in a pairs' file (stats), and what chunks and scores come to before that
(score)."""
import os
import resource
import time
from collections import Counter

import numpy as np

from configs import (
    BadInput,
    check_settings,
    checked,
    default_groups,
    load_config,
    reading,
)
from console import Progress
from data import (
    IRRELEVANT,
    NEAR,
    PARTIAL,
    check_fit,
    load_evaluator,
    read_header,
    read_lines,
)
from pairs.answers import REASONS
from pairs.build import Draft, drafts, missing_blocks
from pairs.corpus import read_examples
from pairs.coverage import SAMPLES, coverage, picture, to_uniform
from tokenizer import Tokenizer, load_tokenizer

KEYS = ("id", "question", "chunks", "scores", "chosen", "rejected")  # of a pair
HEADINGS = "                                        least   median     mean     most"


def print_spread(name: str, values: list[float]) -> None:
    if not values:
        print(f"  {name:34} none")
        return
    values = list(map(float, values))  # a file of somebody else may have lists in their place
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has NaN or Infinity")
    low, middle, high = np.percentile(values, [0, 50, 100])
    mean = np.mean(values)
    print(f"  {name:34} {low:8.5g} {middle:8.5g} {mean:8.5g} {high:8.5g}")


def print_share(name: str, values: list[bool | None]) -> None:
    """The share of True among values that are known, which None is not."""
    known = [value for value in values if value is not None]
    if known:
        print(f"  {name:34} {np.mean(list(map(float, known))):8.1%} of {len(known)}")
    else:
        print(f"  {name:34} not known")


def print_reasons(dropped: Counter) -> None:
    for reason, count in dropped.most_common():
        remedy = REASONS.get(reason, "not known")
        print(f"  {count:6d} dropped: {reason}   (to turn: {remedy})")


def read_pairs(path: str) -> tuple[list[dict], Counter]:
    """(rows that are pairs, {reason: how many were dropped}) of a file."""
    pairs = []
    dropped = Counter()
    for number, row in read_lines(path):
        if "dropped" in row:
            dropped[row["dropped"]] += 1
            continue
        if number == 1 and "settings" in row:
            continue
        for key in KEYS:
            if key not in row:
                raise BadInput(f"{path}, line {number}: no {key!r}, expected a pair, or an id and "
                               "why it was dropped")
        pairs.append(row)
    return pairs, dropped


def settings_of(path: str, keys: tuple[str, ...]) -> dict:
    """These settings that a pairs' file was built with, and those that say whose its tokens are."""
    header = read_header(path)
    groups = default_groups()
    defaults = groups["paths"] | groups["build"]
    settings = {}
    for key in ("model", "template", *keys):
        if key not in header:
            raise BadInput(f"{path}, line 1: no {key!r} among its settings, without which nobody "
                           "knows what its token ids say")
        settings[key] = checked(defaults, key, header[key], f"{path}, line 1")
    return settings


def tokenizer_of(path: str, settings: dict) -> Tokenizer:
    """The tokenizer that a pairs' file names in its settings."""
    try:
        return load_tokenizer(settings["model"], settings["template"])
    except BadInput as e:
        raise BadInput(f"{path}, line 1: {e}") from e


# -------------------------------------------------------------------------------------------- stats

def stats(argv: list[str]) -> int:
    """The table of a pairs' file; with a config its positions' too, and their picture."""
    if not argv:
        raise BadInput("expected: python -m pairs stats PAIRS [CONFIG] [key=value]")
    path, *words = argv
    if words and "=" in words[0]:
        # No config of our choice stands in: window and positions are not in the file's header.
        raise BadInput(f"expected a config before {words[0]!r}, as: python -m pairs stats {path} "
                       f"configs/NAME.py {words[0]}")
    cfg = load_config(words) if words else None
    pairs, dropped = read_pairs(path)
    n = len(pairs) + dropped.total()
    print(f"{path}: {len(pairs)} pairs of {n} examples")
    print_reasons(dropped)
    if not pairs:
        return 0
    print(HEADINGS)
    # A file of somebody else, or of an earlier version, may have other things under these names.
    with reading(path):
        print_pairs(pairs)
        print_audits([row["audit"] for row in pairs if "audit" in row])
    if cfg is None:
        print(f"  positions: python -m pairs stats {path} CONFIG, the config that trains on them")
        return 0
    longest = max(pairs, key=prompt_tokens)
    print_positions(path, cfg, [len(ids) for ids in longest["chunks"]])
    return 0


def prompt_tokens(row: dict) -> int:
    """Tokens of a pair's chunks, without question and template."""
    return sum(map(len, row["chunks"]))


def print_pairs(pairs: list[dict]) -> None:
    """Lengths and scores."""
    chosen_words = []
    rejected_words = []
    best_scores = []
    other_scores = []
    for row in pairs:
        chosen_words.append(len(row["chosen"].split()))
        for text in row["rejected"]:
            rejected_words.append(len(text.split()))
        # How far the evidence stands out from what is beside it.
        *others, best = sorted(map(float, row["scores"]))
        best_scores.append(best)
        other_scores.append(np.mean(others or [0]))
    print_spread("prompt tokens, chunks only", list(map(prompt_tokens, pairs)))
    print_spread("words of the chosen", chosen_words)
    print_spread("words of a rejected", rejected_words)
    print_spread("best score of a chunk", best_scores)
    print_spread("mean score of the other chunks", other_scores)


def print_audits(audits: list[dict]) -> None:
    """Who has the right answer and who saw it; rejected answers by what their prompt held."""
    if not audits:
        return  # ready pairs have none
    overlaps = []
    for found in audits:
        overlaps += found["overlap"]
    print_spread("words chosen : rejected", [found["length_ratio"] for found in audits])
    print_spread("words in common with the chosen", overlaps)
    print_share("chosen has the right answer", [found["chosen_right"] for found in audits])
    print_share("its prompt held the evidence", [found["chosen_saw_evidence"] for found in audits])
    for kind in (IRRELEVANT, PARTIAL, NEAR):
        print_rejected(kind, audits)


def print_rejected(kind: str, audits: list[dict]) -> None:
    """The rejected answers whose prompts held chunks of one kind."""
    right = []
    saw = []
    errors = Counter()
    # Together, a kind that works would hide one that does not.
    for found in audits:
        for j, held in enumerate(found["evidence"]):
            if held == kind:
                right.append(found["rejected_right"][j])
                saw.append(found["rejected_saw_evidence"][j])
                errors[found["error"][j]] += 1
    print(f"  rejected, from {kind} chunks: {len(right)}")
    print_share("  has the right answer", right)
    print_share("  its prompt held the evidence", saw)
    for error, count in errors.most_common():
        share = count / len(right)
        print(f"    {error:32} {share:8.1%}")


def print_positions(path: str, cfg: dict, lengths: list[int]) -> None:
    """How each strategy covers the window, for samples like the longest pair."""
    # Of other pairs the slots have more room, never less: this is the worst case.
    tokens = sum(lengths)
    tail = max(8, tokens // 16)  # question and answer, about
    print(f"  positions of {SAMPLES} samples like the longest pair ({tokens} tokens in "
          f"{len(lengths)} chunks), window {cfg['window']}:")
    print("                visited   to uniform:  all pairs  answer to prompt")
    found = coverage(cfg, lengths, tail)
    for kind, counts in found.items():
        visited = np.mean(counts.held > 0)
        every = to_uniform(counts.every)
        answer = to_uniform(counts.answer)
        here = ""
        if kind == cfg["positions"]:
            here = "   <- this config"
        print(f"  {kind:12} {visited:8.1%}               {every:10.3f} {answer:17.3f}{here}")
    image = os.path.splitext(path)[0] + ".positions.png"
    try:
        picture(image, cfg, lengths, tail, found)
    except ImportError:
        print("  no picture: pip install matplotlib")
    else:
        print(f"  {image}")


# -------------------------------------------------------------------------------------------- score

def score(argv: list[str]) -> int:
    """Read, chunk and score a config's corpus: how selective, how fast, in how much memory."""
    cfg = load_config(argv)
    check_settings(cfg)
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    check_fit(cfg, tokenizer)
    start = time.time()
    examples = read_examples(cfg, "train")
    evaluator = load_evaluator(cfg)
    indexed = time.time()
    # Ready pairs and documents without a question are neither: they wait for answers, or need none.
    dropped = Counter()
    selected = []
    blocks = missing_blocks(cfg, len(examples), set())
    with Progress("scores", len(examples)) as progress:
        for block in drafts(cfg, tokenizer, evaluator, examples, blocks, 1):
            progress.update(len(block))
            for new in block:
                if new.dropped:
                    dropped[new.dropped] += 1
                elif new.selection:
                    selected.append(new)
    took = time.time() - indexed
    rate = len(examples) / took
    # Apart, since a corpus is indexed by one process and scored by many.
    print(f"{cfg['examples']}: {len(examples)} examples, indexed in {indexed - start:.1f} s, "
          f"scored in {took:.1f} s ({rate:.1f} a second)")
    print(f"  {len(selected)} with critical and irrelevant chunks")
    print_reasons(dropped)
    if selected:
        print_selected(selected)
    print_memory()
    return 0


def print_selected(selected: list[Draft]) -> None:
    """How selective the scores are, and whether the evidence, where known, is among the best."""
    best = []
    critical = []
    chosen_saw = []
    rejected_saw = {IRRELEVANT: [], PARTIAL: [], NEAR: []}
    for new in selected:
        best.append(max(new.row["scores"]))
        critical.append(len(new.selection.chosen))
        chosen_saw.append(new.saw[0])
        # The first prompt is the chosen one's; rejected prompts follow in their order.
        for kind, saw in zip(new.selection.evidence, new.saw[1:]):
            rejected_saw[kind].append(saw)
    print(HEADINGS)
    print_spread("best score of a chunk", best)
    print_spread("critical chunks", critical)
    print_share("evidence in the critical chunks", chosen_saw)
    for kind, saw in rejected_saw.items():
        print_share(f"evidence in {kind} chunks", saw)


def print_memory() -> None:
    # ru_maxrss is in KiB.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"  peak memory {own:.2f} GiB, of the largest worker {largest:.2f} GiB "
          "(in part the same pages)")
