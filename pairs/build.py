"""Pairs: the policy's own answers from the right evidence (chosen) and from wrong or partial evidence (rejected).

    example -> chunks, scores, selection        in worker processes, a few blocks ahead
      -> question, chosen, M rejected           from the policy here, or from an OpenAI-compatible server
      -> audit                                  what can be checked of a pair without a judge
      -> a line of pairs.jsonl                  in the examples' order; a pair, or {"id", "dropped": reason}

Where nothing is lost or repeated: an interrupted build goes on at the first example without a line. With the policy
here, the file is a function of config and seed, however often it was interrupted and however many workers there are.
"""
import json
import multiprocessing
import os
import re
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

from configs import BadInput, check_settings, default_groups, pairs_path
from data import (Selection, check_fit, chunk, importance_scores, load_evaluator, random_stream, read_lines,
                  select_chunks, text_around)
from pairs.answers import audit, fault_of_chosen, is_right, keep_rejected
from pairs.corpus import read_examples
from pairs.policy import Endpoint, Failure, Request, local

UNLUCKY = 20      # examples in a row whose requests failed: then the server is gone


# ---------------------------------------------------------------------------------- what each prompt will see

@dataclass
class Draft:
    """An example on its way to a line."""
    row: dict                    # the line so far
    chunks: object = None        # token ids of the chunks, by number
    evidence: int = None         # the chunk that a question is written from
    selection: Selection = None  # None as well for ready pairs
    saw: list = field(default_factory=list)  # whether the prompts of chosen and rejected hold the evidence; None: not known
    dropped: str = None          # why it makes no pair
    failed: str = None           # why it has no line yet: the next build asks again

    def open(self):
        return not self.dropped and not self.failed


def draft(cfg, tokenizer, evaluator, i, example):
    """Chunks, scores and selection of an example; where no pair can come of it, dropped says why."""
    new = Draft({"id": i, "question": example.get("question"), "answers": example.get("answers", [])})
    text = next(example[key] for key in ("prompt", "document", "context") if key in example)
    new.chunks = [np.array(ids, dtype=np.int32) for ids in chunk(text, tokenizer, cfg["chunk_size"])]
    if "prompt" in example:
        new.row.update(system=example["system"], chunks=new.chunks, scores=[0] * len(new.chunks), chosen=example["chosen"],
                       rejected=example["rejected"][:cfg["n_rejected"]])
        new.dropped = ("prompt longer than n_chunks" if len(new.chunks) > cfg["n_chunks"] else
                       "fewer than M rejected answers" if len(example["rejected"]) < cfg["n_rejected"] else None)
    elif "document" in example:
        long = [c for c, ids in enumerate(new.chunks) if 2 * len(ids) >= cfg["chunk_size"]]
        new.evidence = int(random_stream("chunk that a question is about", cfg["seed"], i).choice(long or [0]))
        new.dropped = None if len(new.chunks) > 1 else "no irrelevant chunk"
    else:
        score(cfg, tokenizer, evaluator, new)
    return new


def score(cfg, tokenizer, evaluator, new):
    """Fill in scores and selection; let go of the chunks that no prompt will see."""
    wanted = set(evaluator(new.row["question"]))
    if cfg["score_with"] == "question+answer":
        wanted = wanted.union(*(evaluator(answer) for answer in new.row["answers"]))
    scores = importance_scores(new.chunks, wanted, tokenizer, evaluator)
    if new.evidence is not None:  # what a question was written from is critical whatever the words say, if they say anything
        if not scores[new.evidence]:
            new.dropped, new.chunks = "written question is not about its chunk", None
            return
        scores[new.evidence] = max(*scores, cfg["delta"]) + 1
    new.selection, new.dropped = select_chunks(
        scores, cfg["n_chunks"], cfg["delta"], cfg["max_critical"], cfg["candidates"] or cfg["n_rejected"],
        random_stream("selection", cfg["seed"], new.row["id"]))
    if new.selection is None:
        new.chunks = None
        return
    seen = {c for picked in (new.selection.chosen, new.selection.training, *new.selection.rejected) for c in picked}
    new.chunks = {c: new.chunks[c] for c in seen}
    new.row.update(chunks=[new.chunks[c] for c in new.selection.training], scores=[scores[c] for c in new.selection.training])
    answers = new.row["answers"]
    for picked in (new.selection.chosen, *new.selection.rejected):
        held = new.evidence in picked if new.evidence is not None else None
        text = tokenizer.decode([t for c in picked for t in new.chunks[c].tolist()]) if answers else ""
        new.saw.append(is_right(text, answers) if answers else held)


# ----------------------------------------------------------------------------------------------- a block's lines

def write_block(cfg, tokenizer, evaluator, source, drafts):
    """Take a block of drafts to their ends. Rejected answers are only asked for where the chosen one holds."""
    ask = source(cfg["seed"] * 1_000_003 + drafts[0].row["id"])

    def texts(wanted):
        """(draft, text) of each (draft, Request); a failed request fails its draft."""
        for (new, _), text in zip(wanted, ask([request for _, request in wanted]) if wanted else ()):
            if isinstance(text, Failure):
                new.failed = text
            yield new, text

    def request(new, picked, j=0):
        """Answer j of a draft from some of its chunks."""
        return new, Request(*as_asked(cfg, new, picked), cfg["temperature"], seed_of(cfg, new, j))

    for new, text in texts([(new, question_request(cfg, new)) for new in drafts if new.open() and new.evidence is not None]):
        new.row["question"] = question_in(text)
        if not new.failed and new.row["question"]:
            score(cfg, tokenizer, evaluator, new)
        elif not new.failed:
            new.dropped = "no question written"
    drafts_open = [new for new in drafts if new.open() and new.selection]
    if cfg["chosen_from"] == "reference":
        for new in drafts_open:
            new.row["chosen"] = (new.row["answers"] or [""])[0]
            new.dropped = None if new.row["chosen"] else "no reference answer"
    else:
        for new, text in texts([request(new, new.selection.chosen) for new in drafts_open]):
            new.row["chosen"], new.dropped = text, None if new.failed else fault_of_chosen(text, new.row, cfg)
    drafts_open = [new for new in drafts_open if new.open()]
    wanted = [request(new, picked, j) for new in drafts_open for j, picked in enumerate(new.selection.rejected, 1)]
    candidates = {}
    for new, text in texts(wanted):
        candidates.setdefault(new.row["id"], []).append(text)
    for new in drafts_open:
        if new.open():
            finish(cfg, evaluator, new, candidates[new.row["id"]])
    for new in drafts:
        if new.open():
            new.row["chunks"] = [ids.tolist() for ids in new.row["chunks"]]
        new.chunks = new.selection = None  # only the line goes on
    return drafts


def as_asked(cfg, new, picked):
    head, tail = text_around(cfg, new.row["question"])
    return head, [t for c in picked for t in new.chunks[c].tolist()], tail


def seed_of(cfg, new, j):
    return ((cfg["seed"] * 1_000_003 + new.row["id"]) * 64 + j) % (1 << 31)


def question_request(cfg, new):
    return Request(cfg["prompt_head"], new.chunks[new.evidence].tolist(), "\n\n" + cfg["question_prompt"], cfg["temperature"],
                   seed_of(cfg, new, 63))


def question_in(text):
    """The question in what was written on being asked for one, or None."""
    found = re.search(r"(?:^|[.:\n*])[\s\"]*([^.:\n*?\"]{8,300}\?)", text or "")
    return found and found.group(1).strip()


def finish(cfg, evaluator, new, candidates):
    """Choose the rejected answers, audit the pair, apply the last filter."""
    kept, new.dropped = keep_rejected(new.row, candidates, cfg)
    if new.dropped:
        return
    new.row["rejected"] = [candidates[j] for j in kept]
    new.row["audit"] = audit(cfg, evaluator, new.row, [new.saw[0], *(new.saw[j + 1] for j in kept)],
                                        [new.selection.evidence[j] for j in kept])


# ------------------------------------------------------------------------------------------------------- the file

def header(cfg):
    """What the pairs are made by: two files whose headers differ do not mix."""
    keys = ["model", "adapter", "examples", "dtype", *default_groups()["build"]]
    return {key: cfg[key] for key in keys}


def start_file(path, header):
    """Ids already in the pairs' file. A line cut short by a kill is taken off; other settings are refused."""
    done = set()
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(json.dumps({"settings": header}) + "\n")
        return done
    with open(path, "rb+") as f:
        whole = 0
        for line in f:
            whole += len(line) if line.endswith(b"\n") else 0
        f.truncate(whole)
    if not whole:
        os.remove(path)
        return start_file(path, header)
    for number, row in read_lines(path):
        if number == 1:
            built = row.get("settings", {})
            for key in header:
                if built.get(key) != header[key]:
                    raise BadInput(f"{path}: was built with {key}={built.get(key)!r}, now it is {header[key]!r}: "
                                   "name another file with pairs=, or remove this one")
        else:
            done.add(row.get("id"))
    return done


def ahead(submit, items, depth):
    """submit(item).get() of each item, in order, with up to `depth` of them at work."""
    waiting = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) >= depth:
            yield waiting.popleft().get()
    while waiting:
        yield waiting.popleft().get()


def draft_block(ids):
    """In a worker: the drafts of a block of examples. What it works on was there before the fork."""
    return [draft(*draft_block.settings, i, draft_block.examples[i]) for i in ids]


def drafts(cfg, tokenizer, evaluator, examples, blocks):
    """Drafts of blocks of examples, in order, from worker processes a few blocks ahead of whoever takes them."""
    draft_block.settings, draft_block.examples = (cfg, tokenizer, evaluator), examples
    workers = min(cfg["workers"] or os.cpu_count(), len(blocks))
    if workers < 2:
        yield from map(draft_block, blocks)
        return
    fork = multiprocessing.get_context("fork")  # shares the open corpus; the workers touch neither torch nor a GPU
    with fork.Pool(workers, die_with, (os.getpid(),)) as pool:
        yield from ahead(lambda ids: pool.apply_async(draft_block, (ids,)), blocks, 2 * workers)


def die_with(parent):
    """A worker whose parent was killed ends as well."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def build_pairs(cfg, policy, tokenizer):
    """Append a line for each example to the pairs' file: a pair, or {"id", "dropped": reason}.

    policy: a function that opens the model; it is not called where no pair is missing or an endpoint answers.
    Returns how many examples have no line because requests failed; the same call asks for them again.
    """
    check_settings(cfg)
    check_fit(cfg, tokenizer)
    path, examples, evaluator = pairs_path(cfg), read_examples(cfg, "train"), load_evaluator(cfg)
    done = start_file(path, header(cfg))
    size, n = cfg["build_batch"], len(examples)
    blocks = [range(start, min(start + size, n)) for start in range(0, n, size)]
    blocks = [ids for ids in blocks if not done.issuperset(ids)]
    if cfg["endpoint"]:  # its answers do not depend on the block: none is asked for twice
        blocks = [[i for i in ids if i not in done] for ids in blocks]
    failed, unlucky = [], 0
    with open(path, "a", encoding="utf-8") as f, tqdm(total=n, desc="pairs", disable=None) as bar:
        bar.update(n - sum(map(len, blocks)))
        for block in written(cfg, tokenizer, evaluator, policy, drafts(cfg, tokenizer, evaluator, examples, blocks)):
            for new in block:
                unlucky = unlucky + 1 if new.failed else 0 if not new.dropped else unlucky
                if new.failed:
                    failed.append(new.failed)
                elif new.row["id"] not in done:
                    line = {"id": new.row["id"], "dropped": new.dropped} if new.dropped else new.row
                    f.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n")
            f.flush()
            bar.update(len(block))
            if unlucky >= UNLUCKY:
                raise BadInput(f"endpoint={cfg['endpoint']}: {unlucky} examples in a row failed, the last with {failed[-1]}; "
                               f"what is in {path} stays, the same command goes on")
    reasons = Counter(row.get("dropped", "") for number, row in read_lines(path) if number > 1)
    print(f"{path}: {reasons.pop('', 0)} pairs of {n} examples"
          + "".join(f", {count} dropped: {reason}" for reason, count in reasons.most_common()))
    if failed:
        print(f"warning: {len(failed)} examples have no line, requests failed (as {failed[-1]}): the same command asks again")
    return len(failed)


def written(cfg, tokenizer, evaluator, policy, drafted):
    """Blocks of drafts, taken to their ends in order. A server is kept busy with several blocks at once."""
    if not cfg["endpoint"]:
        source = local(cfg, policy, tokenizer)
        return (write_block(cfg, tokenizer, evaluator, source, block) for block in drafted)
    source, at_once = Endpoint(cfg, tokenizer), 1 + cfg["endpoint_requests"] // cfg["build_batch"]
    threads = ThreadPool(at_once)
    job = lambda block: threads.apply_async(write_block, (cfg, tokenizer, evaluator, source, block))
    return ahead(job, drafted, 2 * at_once)
