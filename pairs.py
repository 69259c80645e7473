"""Pairs: the policy's own answers from the right evidence (chosen) and from wrong or partial evidence (rejected).

    example -> chunks, scores, selection        in worker processes, a few blocks ahead
      -> question, chosen, M rejected           from the policy here, or from an OpenAI-compatible server
      -> audit                                  what can be checked of a pair without a judge
      -> a line of pairs.jsonl                  in the examples' order; a pair, or {"id", "dropped": reason}

Where nothing is lost or repeated: an interrupted build goes on at the first example without a line. With the policy
here, the file is a function of config and seed, however often it was interrupted and however many workers there are.
"""
import http.client
import json
import multiprocessing
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from corpus import read_examples
from data import Selection, around, check_settings, chunk, load_evaluator, select, words_evaluator
from model import BadInput

PADDING = 1024    # tokens by which prompts that are answered together may differ in length
LONG_ANSWER = 10  # uncommon words from which on a reference answer need not be repeated word by word
PAUSE = 0.5       # seconds before a failed request's first retry; twice that before the next, ...
UNLUCKY = 20      # examples in a row whose requests failed: then the server is gone
BUILD_KEYS = """model template seed examples context_size n_examples max_chars questions question_prompt chunk_size
n_chunks delta max_critical score_with evaluator spacy_model prompt_head prompt_tail n_rejected candidates chosen_from
require_correct_chosen require_wrong_rejected require_clean_rejected correct_share max_length_ratio max_overlap
max_new_tokens temperature temperature_step top_p build_batch endpoint_model endpoint_api""".split()


# ------------------------------------------------------------------------------------------------ right or wrong

def normalize(text):
    """Lower case, no articles, no punctuation, single spaces: how answers are compared."""
    return " ".join(re.sub(r"\b(a|an|the)\b|[^\w\s]|_", " ", text.lower()).split())


def is_right(text, answers):
    """Whether a generated text contains one of the reference answers."""
    text = f" {normalize(text)} "
    return any(f" {normalize(answer)} " in text for answer in answers)


def gives(text, answers, share):
    """is_right, or for a long reference answer: whether the text has so large a share of its uncommon words."""
    long = [words for words in map(words_evaluator, answers) if len(words) >= LONG_ANSWER]
    return is_right(text, answers) or any(len(words & words_evaluator(text)) >= share * len(words) for words in long)


def overlap(a, b):
    """Words that two texts share, of all their words."""
    a, b = set(normalize(a).split()), set(normalize(b).split())
    return len(a & b) / max(1, len(a | b))


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
        new.evidence = int(np.random.default_rng([cfg["seed"], i, 2]).choice(long or [0]))
        new.dropped = None if len(new.chunks) > 1 else "no irrelevant chunk"
    else:
        score(cfg, tokenizer, evaluator, new)
    return new


def score(cfg, tokenizer, evaluator, new):
    """Fill in scores and selection; let go of the chunks that no prompt will see."""
    wanted = set(evaluator(new.row["question"]))
    if cfg["score_with"] == "question+answer":
        wanted = wanted.union(*(evaluator(answer) for answer in new.row["answers"]))
    scores = [len(wanted & evaluator(tokenizer.decode(ids.tolist()))) for ids in new.chunks]
    if new.evidence is not None:  # what a question was written from is critical whatever the words say, if they say anything
        if not scores[new.evidence]:
            new.dropped, new.chunks = "written question is not about its chunk", None
            return
        scores[new.evidence] = max(*scores, cfg["delta"]) + 1
    new.selection, new.dropped = select(scores, cfg["n_chunks"], cfg["delta"], cfg["max_critical"],
                                        cfg["candidates"] or cfg["n_rejected"],
                                        np.random.default_rng([cfg["seed"], new.row["id"]]))
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


# ------------------------------------------------------------------------------------------ who writes the answers

class Request(NamedTuple):
    """One answer to write: the text before the chunks, their tokens, the text after them."""
    head: str
    tokens: list
    tail: str
    temperature: float
    seed: int


class Failure(str):
    """Why a request has no answer."""


def local(cfg, policy, tokenizer):
    """Answers by the policy in this process: block seed -> (requests -> texts; None for one that did not end)."""
    def block(seed):
        generator = torch.Generator(policy().lm_head.weight.device).manual_seed(seed)
        return lambda requests: answer(requests, generator)

    def answer(requests, generator):
        around = [tokenizer.chat(request.head, request.tail) for request in requests]
        prompts = [prefix + request.tokens + suffix for request, (prefix, suffix, _) in zip(requests, around)]
        out = [None] * len(requests)
        for temperature in sorted({request.temperature for request in requests}):
            of = [i for i, request in enumerate(requests) if request.temperature == temperature]
            for batch in by_length([len(prompts[i]) for i in of]):
                batch, stops = [of[i] for i in batch], around[0][2]
                answers = policy().generate([prompts[i] for i in batch], cfg["max_new_tokens"], temperature, cfg["top_p"],
                                            stops, generator)
                for i, ids in zip(batch, answers):
                    out[i] = tokenizer.decode(ids[:-1]) if ids[-1] in stops else None
        return out

    return block


def by_length(lengths):
    """Indices in batches of similar lengths: a KV cache is as wide as its longest row."""
    batches = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or lengths[i] - lengths[batches[-1][0]] > PADDING:
            batches.append([])
        batches[-1].append(i)
    return [sorted(batch) for batch in batches]


class Endpoint:
    """Answers by an OpenAI-compatible server, as local() gives them; at most endpoint_requests at a time.

    chat: the server's own chat template; completions: our token ids as they are. OPENAI_API_KEY is sent where it is set.
    """

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer, self.url = cfg, tokenizer, cfg["endpoint"].rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {key}"
        self.model = cfg["endpoint_model"]
        try:
            listed = self.reply("/models")["data"]
            self.model = self.model or listed[0]["id"]
        except urllib.error.HTTPError as e:
            if not self.model:  # some servers list nothing, and answer all the same
                raise BadInput(f"endpoint={self.url}: /models answers {e.code}: name a model with endpoint_model=") from e
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
            raise BadInput(f"endpoint={self.url}: cannot be used ({e}), expected an OpenAI-compatible server, as "
                           "http://127.0.0.1:8000/v1") from e
        self.pool = ThreadPool(cfg["endpoint_requests"])

    def __call__(self, seed):
        return lambda requests: self.pool.map(self.answer, requests, chunksize=1)

    def reply(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        with urllib.request.urlopen(request, timeout=self.cfg["endpoint_timeout"]) as answer:
            return json.loads(answer.read())

    def answer(self, request):
        """A text; None for one that did not end within max_new_tokens; a Failure after the last retry."""
        body = {"model": self.model, "max_tokens": self.cfg["max_new_tokens"], "temperature": request.temperature,
                "top_p": self.cfg["top_p"], "seed": request.seed}
        if self.cfg["endpoint_api"] == "chat":
            path, text = "/chat/completions", request.head + self.tokenizer.decode(request.tokens) + request.tail
            body["messages"] = [{"role": "user", "content": text}]
        else:
            prefix, suffix, _ = self.tokenizer.chat(request.head, request.tail)
            path, body["prompt"] = "/completions", prefix + request.tokens + suffix
        for attempt in range(self.cfg["endpoint_retries"] + 1):
            try:
                choice = self.reply(path, body)["choices"][0]
                text = choice["message"]["content"] if "message" in choice else choice["text"]
                if not isinstance(text, str):
                    raise ValueError(f"the answer is {text!r}, expected a text")
                return None if choice.get("finish_reason") == "length" else text
            except urllib.error.HTTPError as e:
                fault = f"HTTP {e.code} {e.reason}: {e.read(200).decode('utf-8', 'replace').strip()}"
                if e.code not in (408, 409, 425, 429) and e.code < 500:
                    break  # asking again would not change it
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
                fault = f"{type(e).__name__}: {e}"
            if attempt < self.cfg["endpoint_retries"]:
                time.sleep(min(30, PAUSE * 2 ** attempt) * random.uniform(0.5, 1))  # not all at the same moment
        return Failure(" ".join(fault.split()))


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
        """Answer j of a draft from some of its chunks; after the first of each pattern, the sampling gets hotter."""
        hotter = cfg["temperature_step"] * max(0, (j - 1) // 2)
        return new, Request(*as_asked(cfg, new, picked), cfg["temperature"] + hotter, seed_of(cfg, new, j))

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
    head, tail = around(cfg, new.row["question"])
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


def fault_of_chosen(text, row, cfg):
    """Why a chosen answer makes no pair, or None."""
    if text is None:
        return "chosen unfinished"
    if not text.strip():
        return "chosen empty"
    if normalize(text) == normalize(row["question"]):
        return "chosen repeats the question"
    wrong = cfg["require_correct_chosen"] and row["answers"] and not gives(text, row["answers"], cfg["correct_share"])
    return "chosen wrong" if wrong else None


def keep_rejected(row, candidates, saw, cfg):
    """(numbers of the first M usable candidates, None), or where fewer are usable the fault of the last that was not."""
    kept, seen, last = [], {normalize(row["chosen"])}, None
    for j, text in enumerate(candidates):
        fault = ("rejected unfinished" if text is None else "rejected empty" if not text.strip() else
                 "rejected equals another answer" if normalize(text) in seen else
                 "rejected right" if cfg["require_wrong_rejected"] and gives(text, row["answers"], cfg["correct_share"]) else
                 "rejected saw the evidence" if cfg["require_clean_rejected"] and saw[j] else
                 "rejected too like the chosen" if overlap(text, row["chosen"]) > cfg["max_overlap"] else None)
        if fault is None:
            kept.append(j)
            seen.add(normalize(text))
        last = fault or last
    return kept[:cfg["n_rejected"]], last if len(kept) < cfg["n_rejected"] else None


def finish(cfg, evaluator, new, candidates):
    """Choose the rejected answers, audit the pair, apply the last filter."""
    kept, new.dropped = keep_rejected(new.row, candidates, new.saw[1:], cfg)
    if new.dropped:
        return
    new.row["rejected"] = [candidates[j] for j in kept]
    new.row["audit"] = found = audit(cfg, evaluator, new.row, [new.saw[0], *(new.saw[j + 1] for j in kept)], kept)
    most = cfg["max_length_ratio"]
    if most and not 1 / most <= found["length_ratio"] <= most:
        new.dropped = "chosen and rejected differ in length"


def audit(cfg, evaluator, row, saw, kept):
    """What can be said of a pair without a judge. None: there is nothing to tell it by.

    error, by entities (App. C): "unfollowing" shares none with the question, "hallucination" shares some and is wrong.
    The paper calls such rules too rough to select by; an answer of one word counts as unfollowing.
    """
    answers, asked = row["answers"], evaluator(row["question"])
    right = [gives(text, answers, cfg["correct_share"]) if answers else None for text in (row["chosen"], *row["rejected"])]
    words = [len(text.split()) for text in (row["chosen"], *row["rejected"])]
    error = ["right" if good else "hallucination" if asked & evaluator(text) else "unfollowing"
             for good, text in zip(right[1:], row["rejected"])]
    return {"chosen_right": right[0], "chosen_saw_evidence": saw[0],
            "rejected_right": right[1:], "rejected_saw_evidence": saw[1:],
            "pattern": ["mix" if j % 2 else "irrelevant" for j in kept], "error": error,
            "length_ratio": round(words[0] * len(words[1:]) / max(1, sum(words[1:])), 3),
            "overlap": [round(overlap(row["chosen"], text), 3) for text in row["rejected"]]}


# ------------------------------------------------------------------------------------------------------- the file

def run_folder(cfg):
    return cfg["out"] or os.path.join("out", cfg["name"])


def pairs_path(cfg):
    return cfg["pairs"] or os.path.join(run_folder(cfg), "pairs.jsonl")


def read_lines(path):
    """(line number, dict) of a JSON-lines file of ours; BadInput names the line that is not one."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise BadInput(f"{path}, line {number}: not JSON ({e})") from e
            if not isinstance(row, dict):
                raise BadInput(f"{path}, line {number}: expected a JSON object, found {line.strip()[:40]!r}")
            yield number, row


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
    check_settings(cfg, tokenizer)
    path, examples, evaluator = pairs_path(cfg), read_examples(cfg, "train"), load_evaluator(cfg)
    done = start_file(path, {key: cfg[key] for key in BUILD_KEYS})
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


def load_pairs(path, n_rejected):
    """Pairs of a file, chunks as int32 arrays. BadInput for a pair that the loss cannot use."""
    pairs = []
    for number, row in read_lines(path):
        if "dropped" in row or "settings" in row:
            continue
        where = f"{path}, line {number}"
        for key in ("id", "chunks", "chosen", "rejected"):
            if row.get(key) in (None, "", []):
                raise BadInput(f"{where}: {key!r} is {row.get(key)!r}, expected something")
        if len(row["rejected"]) < n_rejected or not all(a.strip() for a in [row["chosen"], *row["rejected"]]):
            found = len(row["rejected"])
            raise BadInput(f"{where}: {found} rejected answers, expected {n_rejected}, and no empty answer")
        pairs.append({"question": None, **row, "chunks": [np.array(c, dtype=np.int32) for c in row["chunks"]]})
    if not pairs:
        raise BadInput(f"{path}: no pairs in it")
    return pairs
