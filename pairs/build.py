"""Pairs: the policy's own answers from the right evidence (chosen) and from wrong or partial
(rejected).

    example -> chunks, scores, selection        draft: in worker processes, a few blocks ahead
      -> question, chosen, M rejected           Writer: from the policy here, or from a server
      -> audit                                  what can be checked of a pair without a judge
      -> a file of pairs.jsonl.parts/           a block's lines, until its turn comes
      -> a line of pairs.jsonl                  in the examples' order; a pair, or {"id", "dropped"}

Nothing is lost or repeated: an interrupted build goes on at the first example without a line. With
the policy here, the file is a function of config and seed, however often it was interrupted and
however many processes (parts.py) and workers there are.
"""
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from checkpoint import all_gather
from configs import BadInput, check_settings, default_groups, pairs_path, saving
from console import Progress
from data import (
    Evaluator,
    Selection,
    check_fit,
    chunk,
    importance_scores,
    load_evaluator,
    prompt_around,
    random_stream,
    read_header,
    read_lines,
    select_chunks,
    text_around,
    token_ids,
)
from model import Llama
from pairs.answers import REASONS, audit, fault_of_chosen, is_right, keep_rejected
from pairs.corpus import Examples, read_examples
from pairs.parts import Merge, part_of, parts_of, pause, write_part
from pairs.policy import Endpoint, Failure, Local, Request
from tokenizer import Tokenizer

FAILURES_IN_A_ROW = 20             # examples whose requests failed: then the server is gone
QUESTION = re.compile(r"(?:^|[.:\n*])[\s\"]*([^.:\n*?\"]{8,300}\?)")
FIRST_BYTES = b'{"settings": '     # of a pairs' file


# ------------------------------------------------------------------------ what each prompt will see

@dataclass
class Draft:
    """An example on its way to a line."""
    row: dict                           # the line so far
    chunks: object = None               # token ids of the chunks, by number
    evidence: int | None = None         # the chunk that a question is written from
    selection: Selection | None = None  # None as well for ready pairs
    # Whether the prompts of chosen and rejected hold the evidence; None: not known.
    saw: list[bool | None] = field(default_factory=list)
    dropped: str | None = None          # why it makes no pair
    failed: str | None = None           # why it has no line yet: the next build asks again

    @property
    def open(self) -> bool:
        return not self.dropped and not self.failed


def draft(cfg: dict, tokenizer: Tokenizer, evaluator: Evaluator, i: int, example: dict) -> Draft:
    """Chunks, scores and selection of an example; dropped says why where no pair can come of it."""
    row = {
        "id": i,
        "document": example["document"],
        "question": example.get("question"),
        "answers": example.get("answers", []),
    }
    text = example.get("prompt") or example.get("text") or example.get("context")
    chunks = chunk(text, tokenizer, cfg["chunk_size"])
    # Arrays of int32, since drafts cross from process to process and wait there by the block.
    new = Draft(row, [np.array(ids, dtype=np.int32) for ids in chunks])
    if "prompt" in example:
        take_ready_pair(cfg, new, example)
    elif "text" in example:
        choose_evidence(cfg, new)
    else:
        score(cfg, tokenizer, evaluator, new)
    return new


def first_prompt(cfg: dict, tokenizer: Tokenizer) -> dict:
    """The first example that has a training prompt, as a pair whose answers are not written yet."""
    evaluator = load_evaluator(cfg)
    reasons = Counter()
    for i, example in enumerate(read_examples(cfg, "train")):
        new = draft(cfg, tokenizer, evaluator, i, example)
        if "chunks" in new.row and new.open:
            return {"chosen": "(chosen)", "rejected": ["(rejected)"] * cfg["n_rejected"], **new.row}
        reasons[new.dropped or "its question is not written yet"] += 1
    found = ", ".join(f"{count} times {reason}" for reason, count in reasons.most_common())
    raise BadInput(f"{cfg['examples']}: no example has a prompt: {found}")


def take_ready_pair(cfg: dict, new: Draft, example: dict) -> None:
    """A pair that exists: its prompt is cut into chunks, between which positions can be spread."""
    M = cfg["n_rejected"]
    new.row["system"] = example["system"]
    new.row["chunks"] = new.chunks
    new.row["scores"] = [0] * len(new.chunks)
    new.row["chosen"] = example["chosen"]
    new.row["rejected"] = example["rejected"][:M]
    if len(new.chunks) > cfg["n_chunks"]:
        new.dropped = "prompt longer than n_chunks"
    elif len(example["rejected"]) < M:
        new.dropped = "fewer than M rejected answers"


def choose_evidence(cfg: dict, new: Draft) -> None:
    """Which chunk of a document without a question it will be asked about."""
    # A document's last chunk may be a few words, which say too little for a question.
    long = []
    for c, ids in enumerate(new.chunks):
        if 2 * len(ids) >= cfg["chunk_size"]:
            long.append(c)
    rng = random_stream("chunk that a question is about", cfg["seed"], new.row["id"])
    new.evidence = int(rng.choice(long or [0]))
    if len(new.chunks) < 2:
        new.dropped = "no irrelevant chunk"


def score(cfg: dict, tokenizer: Tokenizer, evaluator: Evaluator, new: Draft) -> None:
    """Fill in scores and selection; let go of the chunks that no prompt will see."""
    answers = new.row["answers"]
    wanted = set(evaluator(new.row["question"]))
    # A chunk that has only the question's words need not hold the answer (the public code's way).
    if cfg["score_with"] == "question+answer":
        for answer in answers:
            wanted |= evaluator(answer)
    scores = importance_scores(new.chunks, wanted, tokenizer, evaluator)
    if new.evidence is not None:
        # What a question was written from is critical whatever the words say, if they say anything.
        if not scores[new.evidence]:
            new.dropped = "written question is not about its chunk"
            return
        scores[new.evidence] = max(*scores, cfg["delta"]) + 1
    rng = random_stream("selection", cfg["seed"], new.row["id"])
    n_candidates = cfg["candidates"] or cfg["n_rejected"]
    new.selection, new.dropped = select_chunks(scores, cfg["n_chunks"], cfg["delta"],
                                               cfg["max_critical"], n_candidates, rng)
    if new.selection is None:
        new.chunks = None
        return

    training = new.selection.training
    new.row["chunks"] = [new.chunks[c] for c in training]
    new.row["scores"] = [scores[c] for c in training]
    generating = [new.selection.chosen, *new.selection.rejected]
    # A book has hundreds of chunks, of which the prompts see a few dozen.
    seen = set(training).union(*generating)
    new.chunks = {c: new.chunks[c] for c in seen}
    for picked in generating:
        if answers:
            text = tokenizer.decode(tokens_of(new, picked))
            new.saw.append(is_right(text, answers))
        elif new.evidence is not None:
            new.saw.append(new.evidence in picked)
        else:
            new.saw.append(None)


def tokens_of(new: Draft, picked: list[int]) -> list[int]:
    """The token ids of some chunks, one after another."""
    tokens = []
    for c in picked:
        tokens += new.chunks[c].tolist()
    return tokens


# -------------------------------------------------------------------------------- a block's answers

class Writer:
    """Takes blocks of drafts to their ends. Rejected answers come after a good chosen one."""

    def __init__(self, cfg: dict, tokenizer: Tokenizer, evaluator: Evaluator,
                 source: Local | Endpoint):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.evaluator = evaluator
        self.source = source

    def finish(self, block: list[Draft]) -> list[Draft]:
        """All answers of a block: each draft is a pair, or dropped, or failed."""
        first = block[0].row["id"]
        self.source.begin_block(self.cfg["seed"] * 1_000_003 + first)
        self.write_questions([new for new in block if new.open and new.evidence is not None])
        self.write_chosen(still_open(block))
        self.write_rejected(still_open(block))
        for new in block:
            self.close(new)
        return block

    def ask(self, drafts: list[Draft], requests: list[Request]) -> list[str | None]:
        """The texts that answer the drafts' requests. One without an answer fails its draft."""
        # It stays without a line, so that the next build asks again.
        texts = self.source.answers(requests)
        for new, text in zip(drafts, texts):
            if isinstance(text, Failure):
                new.failed = text
        return texts

    def request(self, new: Draft, picked: list[int], j: int) -> Request:
        """Answer j of a draft from some of its chunks."""
        head, tail = text_around(self.cfg, new.row["question"])
        return Request(head, tokens_of(new, picked), tail, self.seed_of(new, j))

    def seed_of(self, new: Draft, j: int) -> int:
        """A server's seed for request j of an example: another one for each, below 2^31."""
        example = self.cfg["seed"] * 1_000_003 + new.row["id"]
        return (example * 64 + j) % (1 << 31)

    def write_questions(self, drafts: list[Draft]) -> None:
        """A question about one chunk of each document. With it, the chunks can be scored."""
        head = self.cfg["prompt_head"]
        tail = "\n\n" + self.cfg["question_prompt"]
        requests = []
        for new in drafts:
            tokens = tokens_of(new, [new.evidence])
            requests.append(Request(head, tokens, tail, self.seed_of(new, 63)))
        for new, text in zip(drafts, self.ask(drafts, requests)):
            if new.failed:
                continue
            new.row["question"] = question_in(text)
            if new.row["question"]:
                score(self.cfg, self.tokenizer, self.evaluator, new)
            else:
                new.dropped = "no question written"

    def write_chosen(self, drafts: list[Draft]) -> None:
        """The answer from critical chunks only."""
        if self.cfg["chosen_from"] == "reference":
            # The corpus' word against the model's: what the chosen prompt holds does not matter
            # then.
            for new in drafts:
                if new.row["answers"]:
                    _, suffix, _ = prompt_around(self.cfg, self.tokenizer, new.row["question"])
                    answer = new.row["answers"][0]
                    new.row["chosen"] = self.tokenizer.as_answer(answer, suffix)
                else:
                    new.dropped = "no reference answer"
            return
        requests = [self.request(new, new.selection.chosen, 0) for new in drafts]
        for new, text in zip(drafts, self.ask(drafts, requests)):
            if not new.failed:
                new.row["chosen"] = text
                new.dropped = fault_of_chosen(text, new.row, self.cfg)

    def write_rejected(self, drafts: list[Draft]) -> None:
        """The answers from irrelevant chunks and from partial evidence, and the audit."""
        owners = []
        requests = []
        for new in drafts:
            for j, picked in enumerate(new.selection.rejected, 1):
                owners.append(new)
                requests.append(self.request(new, picked, j))
        # All at once, whatever the draft: a batch is fast because it is large.
        candidates = {new.row["id"]: [] for new in drafts}
        texts = self.ask(owners, requests)
        for new, text in zip(owners, texts):
            candidates[new.row["id"]].append(text)
        for new in drafts:
            if not new.failed:
                self.choose_rejected(new, candidates[new.row["id"]])

    def choose_rejected(self, new: Draft, candidates: list[str | None]) -> None:
        """The first M usable candidates; the kinds of prompts alternate in their order."""
        kept, new.dropped = keep_rejected(new.row, candidates, self.cfg)
        if new.dropped:
            return
        new.row["rejected"] = [candidates[j] for j in kept]
        saw = [new.saw[0]]
        evidence = []
        for j in kept:
            saw.append(new.saw[1 + j])
            evidence.append(new.selection.evidence[j])
        new.row["audit"] = audit(self.cfg, self.evaluator, new.row, saw, evidence)

    def close(self, new: Draft) -> None:
        """Leave of a draft what its line needs."""
        if new.open and self.length(new.row) > self.cfg["window"]:
            new.dropped = "longer than window"
        if new.open:
            new.row["chunks"] = [ids.tolist() for ids in new.row["chunks"]]
        new.chunks = None
        new.selection = None

    def length(self, row: dict) -> int:
        """Positions that a pair needs: a long question or reference answer may not fit."""
        prefix, suffix, answers = token_ids(row, self.tokenizer, self.cfg)
        chunks = sum(map(len, row["chunks"]))
        return len(prefix) + chunks + len(suffix) + max(map(len, answers))


def still_open(block: list[Draft]) -> list[Draft]:
    """The drafts that wait for answers. Ready pairs, which have no selection, need none."""
    return [new for new in block if new.open and new.selection]


def question_in(text: str | None) -> str | None:
    """The question in what was written on being asked for one, or None."""
    found = QUESTION.search(text or "")
    return found.group(1).strip() if found else None


# ------------------------------------------------------------------------------------------ workers

def ahead(pool: Executor, work: Callable, items: Iterable, depth: int) -> Iterator:
    """work(item) of each item, in order, with up to `depth` of them under way."""
    # Not map(), which would take all items, and so hold the drafts of the whole corpus in memory.
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def draft_block(ids: Iterable[int]) -> list[Draft]:
    """In a worker: the drafts of a block of examples. All else was there before the fork."""
    cfg, tokenizer, evaluator, examples = draft_block.given
    return [draft(cfg, tokenizer, evaluator, i, examples[i]) for i in ids]


def drafts(cfg: dict, tokenizer: Tokenizer, evaluator: Evaluator, examples: Sequence[dict],
           blocks: list[Iterable[int]], neighbours: int) -> Iterator[list[Draft]]:
    """Drafts of blocks of examples, in order, from worker processes a few blocks ahead.

    neighbours: processes of this machine that draft, each with its share of the workers.
    """
    draft_block.given = (cfg, tokenizer, evaluator, examples)
    # More processes than blocks would only be started and stopped.
    share = (cfg["workers"] or os.cpu_count() or 1) // neighbours
    workers = min(share, len(blocks))
    if workers < 2:
        yield from map(draft_block, blocks)
        return
    # Forked, they share the opened corpus. They touch neither torch nor a GPU, which a fork would
    # break.
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, fork, start_worker, (os.getpid(),))
    try:
        yield from ahead(pool, draft_block, blocks, 2 * workers)
    except BrokenProcessPool as e:
        raise BadInput("a worker process was killed, as the kernel does when memory runs out: the "
                       "same command goes on, and needs less memory with "
                       f"workers={workers * neighbours // 2}") from e
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def start_worker(parent: int) -> None:
    """A worker ends when its parent was killed. Ctrl-C, which all get, is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # A worker waits for work on a pipe that its siblings hold open as well: it would wait for ever.
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ----------------------------------------------------------------------------------------- the file

def header(cfg: dict, tokenizer: Tokenizer, endpoint_model: str, examples: Sequence) -> dict:
    """What the pairs are made by: files whose headers differ do not mix."""
    keys = ["model", "adapter", "examples", "dtype", *default_groups()["build"]]
    settings = {key: cfg[key] for key in keys}
    # What a server made of an empty name: tomorrow its first model may be another one.
    settings["endpoint_model"] = endpoint_model
    # Chunks are token ids, which another tokenizer would read as other words.
    settings["tokenizer"] = tokenizer.digest
    # A corpus is shuffled whole. One that has grown is another order, so an id another example.
    settings["corpus_size"] = len(examples.corpus) if isinstance(examples, Examples) else 0
    return settings


def read_built(path: str) -> tuple[dict | None, set[int]]:
    """(settings, ids that have a line) of a pairs' file; (None, set()) where none is begun yet."""
    if not os.path.exists(path):
        return None, set()
    cut_torn_line(path)
    if not os.path.getsize(path):
        return None, set()
    done = set()
    for number, row in read_lines(path):
        if number > 1 and type(row.get("id")) is int:
            done.add(row["id"])
    return read_header(path), done


def cut_torn_line(path: str) -> None:
    """Take off a line that a kill cut short. A file that is none of ours is refused before."""
    try:
        with open(path, "rb+") as f:
            # A mistaken pairs= must not cost the last line of a user's own file.
            start = f.read(len(FIRST_BYTES))
            if start != FIRST_BYTES[:len(start)]:
                raise BadInput(f"{path}: is no file of pairs: name another one with pairs=")
            f.seek(0)
            whole = 0
            for line in f:
                if line.endswith(b"\n"):
                    whole += len(line)
            f.truncate(whole)
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror})") from e


def refuse_other_settings(path: str, built: dict, settings: dict) -> None:
    # Keys of both: a file from an earlier version may have others. One that it lacks is newer than
    # the file, which was built as its default says.
    defaults = default_groups()["build"]
    for key in {**settings, **built}:
        found = built.get(key, defaults.get(key, settings.get(key)))
        if found != settings.get(key):
            raise BadInput(f"{path}: was built with {key}={found!r}, now it is "
                           f"{settings.get(key)!r}: name another file with pairs=, or remove it")


def check_built(cfg: dict, tokenizer: Tokenizer) -> None:
    """BadInput where the pairs' file is there and of other settings. Nothing is written or asked.

    build_pairs looks again. This is for who has work to do before, or will not build at all.
    """
    path = pairs_path(cfg)
    if not os.path.exists(path):
        return
    try:
        built = read_header(path)
    except BadInput:
        return  # a first line that a kill cut short: the build begins anew
    if not built:
        return
    endpoint_model = cfg["endpoint_model"]
    if cfg["endpoint"] and not endpoint_model:
        endpoint_model = built.get("endpoint_model")
    settings = header(cfg, tokenizer, endpoint_model, read_examples(cfg, "train"))
    refuse_other_settings(path, built, settings)


def start_file(path: str, settings: dict) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(json.dumps({"settings": settings}) + "\n")
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror})") from e


def missing_blocks(cfg: dict, n: int, done: set[int]) -> list[Sequence[int]]:
    """The blocks of examples some of which have no line."""
    size = cfg["build_batch"]
    blocks = []
    for start in range(0, n, size):
        ids = range(start, min(start + size, n))
        if cfg["endpoint"]:
            # A server's answers do not depend on the block: none is asked for twice. Here they do,
            # being drawn from one stream: a block that was cut is written anew, to come out the
            # same.
            ids = [i for i in ids if i not in done]
        if not done.issuperset(ids):
            blocks.append(ids)
    return blocks


def answered(writer: Writer, drafted: Iterator[list[Draft]]) -> Iterator[list[Draft]]:
    """Blocks of one draft each, answered by a server, in order."""
    # It likes many requests at once: each thread takes one example through its answers. More are
    # drafted ahead, so that a slow example at the head of the order keeps nobody waiting.
    at_once = writer.cfg["endpoint_requests"]
    singles = ([new] for block in drafted for new in block)
    pool = ThreadPoolExecutor(at_once)
    try:
        yield from ahead(pool, writer.finish, singles, 2 * at_once)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------ a build

class Work(NamedTuple):
    """What process 0 finds to be done."""
    examples: Sequence[dict]
    done: set[int]                     # examples that have a line
    missing: list[Sequence[int]]       # blocks that are not wholly in the file
    unwritten: list[Sequence[int]]     # those of them that are not in a part's file either
    server: Endpoint | None


def begin(cfg: dict, tokenizer: Tokenizer) -> Work:
    """Read the corpus; begin the file, or see that the one there is of these settings."""
    path = pairs_path(cfg)
    folder = parts_of(path)
    examples = read_examples(cfg, "train")
    built, done = read_built(path)
    missing = missing_blocks(cfg, len(examples), done)

    server = None
    endpoint_model = cfg["endpoint_model"]
    if missing and cfg["endpoint"]:
        server = Endpoint(cfg, tokenizer)
        endpoint_model = server.model
    elif built and cfg["endpoint"] and not endpoint_model:
        # Nothing will be asked of the server. It may be gone by now, to make room for the training.
        endpoint_model = built.get("endpoint_model")
    settings = header(cfg, tokenizer, endpoint_model, examples)
    if built is None:
        start_file(path, settings)
        # Of a file that is no longer there, perhaps of other weights under the same name.
        shutil.rmtree(folder, ignore_errors=True)
    else:
        refuse_other_settings(path, built, settings)

    unwritten = []
    if missing:
        # It is there as long as this process is at work: the others wait for its end.
        os.makedirs(folder, exist_ok=True)
    if not server:
        unwritten = [ids for ids in missing if not os.path.exists(part_of(folder, ids[0]))]
    return Work(examples, done, missing, unwritten, server)


def begin_in_all(cfg: dict, tokenizer: Tokenizer, rank: int,
                 world: int) -> tuple[Work | None, list[Sequence[int]]]:
    """(what process 0 has found, None in the others; the blocks to write). Its bad input is all's.
    """
    work = None
    unwritten = []
    error = None
    if rank == 0:
        try:
            work = begin(cfg, tokenizer)
            unwritten = work.unwritten
        except BadInput as e:
            error = str(e)
    if world > 1:
        # The one collective of a build. The others wait in it while the corpus is read, no longer.
        error, unwritten = all_gather((error, unwritten))[0]
    if error:
        raise BadInput(error)
    return work, unwritten


def build_pairs(cfg: dict, policy: Callable[[], Llama], tokenizer: Tokenizer, rank: int = 0,
                world: int = 1) -> int:
    """Append a line for each example to the pairs' file: a pair, or {"id", "dropped": reason}.

    policy: opens the model; it is not called where no pair is missing or an endpoint answers.
    rank, world: which process this is, of how many that call this with the same config. Returns, in
    process 0, how many examples have no line because requests failed; the same call asks for them
    again.
    """
    check_settings(cfg)
    check_fit(cfg, tokenizer)
    evaluator = load_evaluator(cfg)
    parent = os.getppid()
    work, unwritten = begin_in_all(cfg, tokenizer, rank, world)
    # Standard input has one reader. A server answers many requests at a time, though of one asker.
    writers = 1 if cfg["examples"] == "-" else world
    # In turn, not in halves: blocks cost more or less, and shares of many come out alike.
    share = unwritten[rank::writers] if rank < writers else []
    if rank:
        if share:
            examples = read_examples(cfg, "train")
            for _ in write_share(cfg, policy, tokenizer, evaluator, examples, share, writers):
                pass
        while os.path.isdir(parts_of(pairs_path(cfg))):
            pause(parent)
        return 0

    path = pairs_path(cfg)
    n = len(work.examples)
    before = n - sum(map(len, work.missing))
    failures = []
    with Progress("pairs", n, before) as bar:
        if work.server:
            writer = Writer(cfg, tokenizer, evaluator, work.server)
            drafted = drafts(cfg, tokenizer, evaluator, work.examples, work.missing, 1)
            failures = write_lines(path, answered(writer, drafted), work.done, bar)
        elif work.missing:
            merge = Merge(path, work.missing, work.done, bar)
            merge.take()
            for _ in write_share(cfg, policy, tokenizer, evaluator, work.examples, share, writers):
                merge.take()
            while merge.waiting:
                pause(parent)
                merge.take()
    if os.path.isdir(parts_of(path)):
        shutil.rmtree(parts_of(path))
    print_summary(path, n)
    if failures:
        print(f"warning: {len(failures)} examples have no line, requests failed "
              f"(as {failures[-1]}): the same command asks again")
    return len(failures)


def write_share(cfg: dict, policy: Callable[[], Llama], tokenizer: Tokenizer, evaluator: Evaluator,
                examples: Sequence[dict], blocks: list[Sequence[int]],
                writers: int) -> Iterator[None]:
    """Answer blocks with the policy here. Each is a part's file when this yields."""
    neighbours = 1
    if writers > 1:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    folder = parts_of(pairs_path(cfg))
    writer = Writer(cfg, tokenizer, evaluator, Local(cfg, policy, tokenizer))
    for block in drafts(cfg, tokenizer, evaluator, examples, blocks, neighbours):
        first = block[0].row["id"]
        lines = [line_of(new) for new in writer.finish(block)]
        write_part(folder, first, lines)
        yield


def write_lines(path: str, blocks: Iterable[list[Draft]], done: set[int],
                bar: Progress) -> list[str]:
    """Append the lines of a server's blocks as they come; why those have none that failed."""
    failures = []
    in_a_row = 0
    with saving(path), open(path, "a", encoding="utf-8") as f:
        for block in blocks:
            for new in block:
                if new.failed:
                    failures.append(new.failed)
                    in_a_row += 1
                    continue
                # A dropped example says nothing of the server: it may never have been asked.
                if not new.dropped:
                    in_a_row = 0
                if new.row["id"] not in done:
                    f.write(line_of(new))
            # A kill costs the block under way, no more.
            f.flush()
            bar.update(len(block))
            if in_a_row >= FAILURES_IN_A_ROW:
                raise BadInput(f"{in_a_row} examples in a row failed, the last with "
                               f"{failures[-1]}; what is in {path} stays, the same command goes on")
    return failures


def line_of(new: Draft) -> str:
    line = new.row
    if new.dropped:
        line = {"id": new.row["id"], "dropped": new.dropped}
    return json.dumps(line, ensure_ascii=False) + "\n"


def print_summary(path: str, n: int) -> None:
    """How many pairs, and what became of the other examples."""
    pairs = 0
    reasons = Counter()
    # From the file, since most of it may be the work of earlier builds.
    for number, row in read_lines(path):
        if "dropped" in row:
            reasons[str(row["dropped"])] += 1
        elif number > 1:
            pairs += 1
    said = f"{path}: {pairs} pairs of {n} examples"
    for reason, count in reasons.most_common():
        said += f", {count} dropped: {reason}"
    print(said)
    # Where little is left, the reason alone would leave its reader to look for the key.
    for reason, count in reasons.most_common(1):
        if count > pairs:
            print(f"most are dropped: {reason}; to turn: {REASONS.get(reason, 'not known')}")
