"""Pairs files made of another one: fewer pairs, other rejected answers, longer prompts.

What a difference may ask for, in this order:

    built: {key: value}    the pairs are built at these settings: with those of one seed for all,
                           or with more rejected answers, of which a run takes the first ones
    whole: True            the training prompt is the whole document, not a choice of its chunks
    kinds: NAME            rejected answers of one kind of prompt, irrelevant or partial; or both
    negatives: NAME        own: the policy's own wrong answer to the training prompt itself in place
                           of the first rejected answer, where there is one; own_only: it alone, and
                           no pair where there is none; own_where: these pairs as they were
    few: n                 the first n pairs

Held-out pairs, the last ones of the file, keep their answers: so margins mean the same in all runs.
An example that is no pair any more has a line that says so, or the trainer would build it anew.
"""
import json

import torch

from checkpoint import load_pretrained
from configs import BadInput
from data import IRRELEVANT, chunk, encode_group, read_lines
from generate import KVCache, Layout, prefill
from model import Llama
from pairs.answers import fault_of_rejected, normalize
from pairs.corpus import read_examples
from tokenizer import Tokenizer, load_tokenizer

KEYS = ("built", "whole", "kinds", "negatives", "few")
OWN = "the training prompt"  # what an own wrong answer was given to, in a pair's "evidence"
ROWS = 256                   # prompts that are answered together


def remake(source: str, target: str, cfg: dict, difference: dict) -> None:
    """Write the pairs of a file anew, for a run of cfg that differs in these keys."""
    rows = []
    for _, row in read_lines(source):
        rows.append(row)
    header, *rows = rows
    settings = header["settings"]
    # The trainer refuses pairs of other settings than its own. These are meant.
    for key in settings:
        settings[key] = cfg.get(key, settings[key])
    pairs = still_pairs(rows)
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    if difference.get("whole"):
        take_whole_documents(pairs, cfg, tokenizer)
    border = len(pairs) - cfg["held_out"]
    train = pairs[:border]
    if "kinds" in difference:
        keep_kind(train, difference["kinds"], cfg["n_rejected"])
    if "negatives" in difference:
        add_own(train, difference["negatives"], cfg, tokenizer)
    if "few" in difference:
        for row in still_pairs(train)[difference["few"]:]:
            row["dropped"] = "one of the others"
    with open(target, "w", encoding="utf-8") as f:
        for row in [header, *rows]:
            if "dropped" in row:
                row = {"id": row["id"], "dropped": row["dropped"]}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def still_pairs(rows: list[dict]) -> list[dict]:
    """The rows that are not dropped."""
    return [row for row in rows if "dropped" not in row]


def count_own(path: str) -> int:
    """Pairs of a file that have an own wrong answer."""
    found = 0
    for _, row in read_lines(path):
        found += OWN in row.get("evidence", [])
    return found


def take_whole_documents(pairs: list[dict], cfg: dict, tokenizer: Tokenizer) -> None:
    """All chunks of each pair's document, in order. The answers stay."""
    examples = read_examples(cfg, "train")
    for row in pairs:
        row["chunks"] = chunk(examples[row["id"]]["context"], tokenizer, cfg["chunk_size"])
        row["scores"] = [0] * len(row["chunks"])


def keep_kind(pairs: list[dict], kind: str, n: int) -> None:
    """n rejected answers of a kind. Only pairs with n of each: so all kinds have the same ones."""
    for row in pairs:
        irrelevant = []
        partial = []
        for text, evidence in zip(row["rejected"], row["audit"]["evidence"]):
            if evidence == IRRELEVANT:
                irrelevant.append(text)
            else:
                partial.append(text)
        if min(len(irrelevant), len(partial)) < n:
            row["dropped"] = "too few of one kind"
            continue
        # In turn, as select_chunks has them.
        in_turn = []
        for pair in zip(irrelevant, partial):
            in_turn += pair
        of_kind = {"irrelevant": irrelevant, "partial": partial, "both": in_turn}
        if kind not in of_kind:
            raise BadInput(f"kinds is {kind!r}, expected one of {', '.join(of_kind)}")
        row["rejected"] = of_kind[kind][:n]


# -------------------------------------------------------------------------------- hard negatives

def add_own(pairs: list[dict], how: str, cfg: dict, tokenizer: Tokenizer) -> None:
    """The policy's own wrong answers, greedy, at the positions of the first draw that has one.

    The RoPE is the one that training begins with. With n_rejected one larger than elsewhere, the
    answer comes as one more, and pairs without one keep the answer that it would replace.
    """
    if how not in ("own", "own_only", "own_where"):
        raise BadInput(f"negatives is {how!r}, expected own, own_only or own_where")
    candidates = still_pairs(pairs)
    own = own_wrong(candidates, cfg, tokenizer)
    for row in candidates:
        if row["id"] not in own:
            if how != "own":
                row["dropped"] = "no wrong answer of its own"
            continue
        text = own[row["id"]]
        if how == "own":
            row["rejected"][0] = text
        elif how == "own_only":
            # As often as there are places: its mean is itself.
            row["rejected"] = [text] * cfg["n_rejected"]
        row["evidence"] = [OWN]


def own_wrong(pairs: list[dict], cfg: dict, tokenizer: Tokenizer) -> dict[int, str]:
    """{id: wrong answer} of the pairs that have one at any of their draws."""
    model = load_pretrained(cfg["model"], torch.float32, "cpu", cfg["adapter"])
    model.config.extend(cfg["window"], cfg["rope_theta"], cfg["yarn_factor"])
    found = {}
    for draw in range(cfg["draws"]):
        left = [row for row in pairs if row["id"] not in found]
        for start in range(0, len(left), ROWS):
            rows = left[start:start + ROWS]
            answers = own_answers(model, rows, cfg, tokenizer, draw)
            for row, text in zip(rows, answers):
                # The first rejected answer is the one that it may be equal to: it is replaced.
                seen = {normalize(row["chosen"])}
                for other in row["rejected"][1:]:
                    seen.add(normalize(other))
                if not fault_of_rejected(text, seen, row, cfg):
                    found[row["id"]] = text
    return found


def own_answers(model: Llama, rows: list[dict], cfg: dict, tokenizer: Tokenizer,
                draw: int) -> list[str | None]:
    """Greedy answers to the pairs' training prompts at a draw's positions; None: unfinished."""
    layout = Layout([], [], [], [])
    offsets = []
    for row in rows:
        group = encode_group(row, tokenizer, cfg, draw)
        # The chosen answer's branch begins with the prompt's last token.
        n = group.segments[1].start + 1
        positions = group.positions[:n].tolist()
        layout.append(group.tokens[:n].tolist())
        layout.positions[-n:] = positions
        layout.owners.append(len(offsets))
        offsets.append(positions[-1] + 1 - n)
    stops = tokenizer.chat("", "")[2]
    texts = []
    for ids in greedy_at(model, layout, torch.tensor(offsets), cfg["max_new_tokens"]):
        text = None
        for i, token in enumerate(ids):
            if token in stops:
                text = tokenizer.decode(ids[:i])
                break
        texts.append(text)
    return texts


@torch.no_grad()
def greedy_at(model: Llama, layout: Layout, offsets: torch.Tensor, n: int) -> list[list[int]]:
    """n new tokens of each prompt of a layout. generate() knows only positions 0, 1, 2, ...

    offsets (N,): how far the token after each prompt stands behind its slot in the cache.
    """
    cache = KVCache(model.config, layout, n)
    logits = prefill(model, layout, cache)
    answers = []
    for step in range(n):
        tokens = logits.argmax(-1)
        answers.append(tokens)
        if step < n - 1:
            positions = cache.lengths + offsets
            x = model.hidden_states(tokens, positions, cache.decode_attention(tokens.device))
            cache.lengths += 1
            logits = model.lm_head(x)
    return torch.stack(answers, dim=1).tolist()
