"""From examples to batches: everything before the model sees a tensor.

    example        {"context": str or [passage, ...], "question": str, "answers": [str, ...]}
      chunk          -> chunks, lists of token ids; their borders stay in token ids from here on
      score, select  -> which chunks the chosen, the rejected and the training prompt see      Sec. 3.2.2
      generate       -> chosen and M rejected answers, by the policy itself
    pairs.jsonl    {"id", "question", "answers", "chunks", "scores", "chosen", "rejected"}   text above, integers below
      encode_group   -> tokens, targets, segments of a prompt and its M + 1 answers            the only shift
      synthesize     -> positions spread over the window                                       Eq. 4
    batch          one packed stream of groups, a function of (seed, step) alone

    python data.py configs/NAME.py key=value      builds the pairs, or goes on building them
"""
import json
import os
import re
import sys
import time
from collections import Counter
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from configs import load_config, run_file
from checkpoint import load_pretrained
from model import IGNORE, BadInput
from tokenizer import load_tokenizer


PADDING = 1024  # tokens by which prompts that are answered together may differ in length


# --------------------------------------------------------------------------------------------------- examples

def read_lines(path):
    """(line number, dict) of a JSON-lines file; BadInput names the line that is not one."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise BadInput(f"{path}, line {number}: not JSON ({e})") from e
            if not isinstance(row, dict):
                raise BadInput(f"{path}, line {number}: expected a JSON object, found {line.strip()[:40]!r}")
            yield number, row


def read_examples(cfg, split, size=None):
    """Examples for the pairs (split "train") or fresh ones to count recall on (split "recall"); never both.

    size: passages around the question, or tokens of context where the corpus is a .py with
    examples(count, size, seed). A corpus file is shuffled once by the seed; "train" takes its head, "recall" its end.
    """
    path, size = cfg["examples"], size or cfg["context_size"]
    train, count = cfg["n_examples"], cfg["recall_questions"]
    if path.endswith(".py"):
        if not train:
            raise BadInput(f"n_examples is 0, expected how many to take from {path}: a generated corpus has no end")
        seed = cfg["seed"] * 1_000_003 + (size + 1 if split == "recall" else 0)
        return list(run_file(path).examples(train if split == "train" else count, size, seed))
    rows = [checked_example(row, f"{path}, line {number}") for number, row in read_lines(path)]
    order = np.random.default_rng(cfg["seed"]).permutation(len(rows))
    train = min(train or len(rows), len(rows))
    if split == "recall" and train + count > len(rows):
        raise BadInput(f"{path}: {len(rows)} examples, expected {train} for pairs + {count} for recall_questions")
    rows = [rows[i] for i in (order[:train] if split == "train" else order[len(rows) - count:])]
    return [with_distractors(i, rows, size, cfg["seed"]) if "text" in row else row for i, row in enumerate(rows)]


def checked_example(row, where):
    for key in ("question", "text" if "text" in row else "context"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise BadInput(f"{where}: {key!r} is {row.get(key)!r}, expected a text that is not empty")
    answers = row.get("answers", [row["answer"]] if row.get("answer") else [])
    if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise BadInput(f"{where}: 'answers' is {answers!r}, expected a list of texts that are not empty")
    return {**row, "answers": answers}


def with_distractors(i, rows, size, seed):
    """Row i with its passage among size - 1 passages of other rows, in random order."""
    rng = np.random.default_rng([seed, i])
    if size > len(rows):
        raise BadInput(f"context_size is {size} passages, the corpus has {len(rows)}")
    others = [j for j in rng.permutation(len(rows))[:size] if j != i][:size - 1]
    passages = [f"{rows[j].get('title', '')}\n{rows[j]['text']}".strip() for j in rng.permutation([i, *others])]
    return {"question": rows[i]["question"], "answers": rows[i]["answers"], "context": passages}


def normalize(text):
    """Lower case, no articles, no punctuation, single spaces: how answers are compared."""
    return " ".join(re.sub(r"\b(a|an|the)\b|[^\w\s]|_", " ", text.lower()).split())


def is_right(text, answers):
    """Whether a generated text contains one of the reference answers."""
    text = f" {normalize(text)} "
    return any(f" {normalize(answer)} " in text for answer in answers)


# ---------------------------------------------------------------------------------- chunks, scores, selection

COMMON = set("""a about after again against all also although an and another any are as at be because been before
being below between both but by came can come could did do does doing done down during each else even ever every few
first for from gave give going good had has have having he her here hers him himself his how i if in into is it its
itself just know last less like made make many may me more most much must my name never next no nor not now of off on
once only or other our out over own same she should since so some still such take than that the their them then there
these they thing this those through time to too under until up upon us used very want was we well went were what when
where which while who whom whose why will with within without would year yes you your yours""".split())


def words_evaluator(text):
    """The built-in evaluator: names, numbers and uncommon words of a text, lower-cased. text -> set of str.

    An evaluator is any function of this form; the paper uses spaCy's entities (Sec. 3.2.2).
    """
    words = set(re.findall(r"\w+(?:[.,]\d+)*", text))
    return {w.lower() for w in words if w.lower() not in COMMON and (w[0].isdigit() or w[0].isupper() or len(w) > 3)}


def chunk(context, tokenizer, size):
    """Token ids of equal chunks. A context that comes as passages is cut at their borders as well."""
    texts = [context] if isinstance(context, str) else [passage + "\n\n" for passage in context]
    encoded = [tokenizer.encode(text) for text in texts]
    return [ids[i:i + size] for ids in encoded for i in range(0, len(ids), size)]


class Selection(NamedTuple):
    """Chunk indices in document order."""
    chosen: list    # critical chunks only
    rejected: list  # one list for each dis-preferred answer
    training: list  # C', which all answers share


def select(scores, n_chunks, delta, max_critical, n_rejected, rng):
    """Which chunks each prompt sees (Sec. 3.2.2); None, with the reason, where a document has no two sides.

    A document without a chunk above delta counts its best chunk, if that shares anything at all, as critical.
    Dis-preferred prompts alternate between irrelevant chunks only, and a mix: the weaker half of the critical
    chunks and the nearest misses, filled up with irrelevant ones. The strongest evidence is in neither.
    """
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    critical = [i for i in ranked if scores[i] > delta][:max_critical or n_chunks]
    critical = critical or [i for i in ranked[:1] if scores[i] > 0]
    if not critical:
        return None, "no critical chunk"
    rest = [i for i in ranked if i not in critical and scores[i] <= delta]  # never evidence that the cap left over
    if not rest:
        return None, "no irrelevant chunk"
    near = (critical[(len(critical) + 1) // 2:] + rest)[:max(1, n_chunks // 2)]
    far = [i for i in rest[len(rest) // 2:] if i not in near] or rest[-1:]

    def some(pool, n):
        return [pool[i] for i in rng.permutation(len(pool))[:n]]

    irrelevant = [i for i in rest[-max(n_chunks, len(rest) // 2):] if i not in near] or rest[-1:]
    rejected = [sorted(some(irrelevant, n_chunks) if j % 2 == 0 else near + some(far, n_chunks - len(near)))
                for j in range(n_rejected)]
    training = critical + [i for i in near if i not in critical][:(n_chunks - len(critical) + 1) // 2]
    training += some([i for i in rest if i not in training], n_chunks - len(training))
    return Selection(sorted(critical), rejected, sorted(training)), None


# ------------------------------------------------------------------------------------------------------ pairs

BUILD_KEYS = """model template seed examples context_size n_examples chunk_size n_chunks delta max_critical score_with
prompt_head prompt_tail n_rejected candidates require_correct max_new_tokens temperature top_p build_batch""".split()


def pairs_path(cfg):
    return cfg["pairs"] or os.path.join(run_folder(cfg), "pairs.jsonl")


def run_folder(cfg):
    return cfg["out"] or os.path.join("out", cfg["name"])


def prompt_around(cfg, tokenizer, question):
    """(prefix, suffix, stops): the token ids before and after a prompt's chunks, and those that end an answer."""
    return tokenizer.chat(cfg["prompt_head"], cfg["prompt_tail"].format(question=question))


def check_settings(cfg, tokenizer):
    """Before any work: the settings with a choice, and whether N chunks, a question and an answer fit the window."""
    for key, allowed in (("positions", ("continuous", "sparse", "mix", "none")), ("dtype", ("float32", "bfloat16")),
                         ("score_with", ("question", "question+answer"))):
        if cfg[key] not in allowed:
            raise BadInput(f"{key} is {cfg[key]!r}, expected one of {', '.join(allowed)}")
    for key in ("n_chunks", "chunk_size", "n_rejected", "draws", "batch_size", "micro_batch", "build_batch", "recall_batch",
                "keep"):
        if cfg[key] < 1:
            raise BadInput(f"{key} is {cfg[key]}, expected at least 1")
    if not 0 < cfg["top_p"] <= 1:
        raise BadInput(f"top_p is {cfg['top_p']}, expected more than 0 and at most 1")
    if 0 < cfg["candidates"] < cfg["n_rejected"]:
        raise BadInput(f"candidates is {cfg['candidates']}, expected 0 or at least n_rejected={cfg['n_rejected']}")
    if "{question}" not in cfg["prompt_tail"]:
        raise BadInput(f"prompt_tail is {cfg['prompt_tail']!r}, expected a text with {{question}} in it")
    prefix, suffix, _ = prompt_around(cfg, tokenizer, "")
    left = cfg["window"] - len(prefix) - len(suffix) - cfg["n_chunks"] * cfg["chunk_size"]
    if left < cfg["max_new_tokens"]:
        raise BadInput(f"{cfg['n_chunks']} chunks of {cfg['chunk_size']} tokens leave {left} of window={cfg['window']} "
                       f"for question and answer (max_new_tokens={cfg['max_new_tokens']}): lower n_chunks or chunk_size")


def start_file(path, header):
    """Ids already in the pairs' file. A line cut short by a kill is taken off; other settings are refused."""
    done = set()
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(json.dumps({"settings": header}) + "\n")
        return done
    with open(path, "rb+") as f:
        content = f.read()
        f.truncate(content.rfind(b"\n") + 1)
    if b"\n" not in content:
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


def build_pairs(cfg, policy, tokenizer, evaluator=words_evaluator):
    """Append a line for each example to the pairs' file: a pair, or {"id", "dropped": reason}.

    Examples go through in blocks of build_batch, whose sampling is seeded by the block: an interrupted build that
    goes on writes the same file as one that was left alone. policy: a function that opens the model; it is not
    called where no pair is missing.
    """
    check_settings(cfg, tokenizer)
    path, examples = pairs_path(cfg), read_examples(cfg, "train")
    done = start_file(path, {key: cfg[key] for key in BUILD_KEYS})
    size = cfg["build_batch"]
    with open(path, "a", encoding="utf-8") as f, tqdm(total=len(examples), desc="pairs", disable=None) as bar:
        for start in range(0, len(examples), size):
            ids = range(start, min(start + size, len(examples)))
            if not done.issuperset(ids):
                for row in build_block(cfg, policy(), tokenizer, evaluator, ids, [examples[i] for i in ids]):
                    if row["id"] not in done:
                        f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
            bar.update(len(ids))
    reasons = Counter(row.get("dropped", "") for number, row in read_lines(path) if number > 1)
    print(f"{path}: {reasons.pop('', 0)} pairs of {len(examples)} examples"
          + "".join(f", {n} dropped: {reason}" for reason, n in reasons.most_common()))


def build_block(cfg, model, tokenizer, evaluator, ids, examples):
    """The lines of a block of examples, in order. Rejected answers are only generated where the chosen one holds."""
    planned = [plan(cfg, tokenizer, evaluator, i, e) for i, e in zip(ids, examples)]
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(cfg["seed"] * 1_000_003 + ids[0])
    alive = [(row, selection) for row, selection in planned if not row["dropped"]]
    asked = [(row, selection.chosen) for row, selection in alive]
    for (row, _), text in zip(alive, answer(cfg, model, tokenizer, generator, asked)):
        row["chosen"], row["dropped"] = text, fault_of_chosen(text, row["answers"], cfg["require_correct"])
    alive = [(row, selection) for row, selection in alive if not row["dropped"]]
    asked = [(row, picked) for row, selection in alive for picked in selection.rejected]
    texts = iter(answer(cfg, model, tokenizer, generator, asked))
    for row, selection in alive:
        row["rejected"], row["dropped"] = keep_rejected(row, [next(texts) for _ in selection.rejected], cfg)
        row.update({key: [row[key][i] for i in selection.training] for key in ("chunks", "scores")})
    for row, _ in planned:
        reason = row.pop("dropped")
        yield {"id": row["id"], "dropped": reason} if reason else row


def answer(cfg, model, tokenizer, generator, asked):
    """The policy's answer to each (row, chunk indices); None for one that did not end within max_new_tokens."""
    prompts, stops = [], ()
    for row, picked in asked:
        prefix, suffix, stops = prompt_around(cfg, tokenizer, row["question"])
        prompts.append(prefix + [t for i in picked for t in row["chunks"][i]] + suffix)
    out = [None] * len(prompts)
    for batch in by_length([len(p) for p in prompts]):
        answers = model.generate([prompts[i] for i in batch], cfg["max_new_tokens"], cfg["temperature"], cfg["top_p"], stops,
                                 generator)
        for i, ids in zip(batch, answers):
            out[i] = tokenizer.decode(ids[:-1]) if ids[-1] in stops else None
    return out


def by_length(lengths):
    """Indices in batches of similar lengths: a KV cache is as wide as its longest row."""
    batches = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or lengths[i] - lengths[batches[-1][0]] > PADDING:
            batches.append([])
        batches[-1].append(i)
    return [sorted(batch) for batch in batches]


def plan(cfg, tokenizer, evaluator, i, example):
    """(row, Selection) of an example; where there is no Selection, row["dropped"] says why."""
    chunks = chunk(example["context"], tokenizer, cfg["chunk_size"])
    wanted = evaluator(example["question"])
    if cfg["score_with"] == "question+answer":
        wanted = wanted.union(*(evaluator(answer) for answer in example["answers"]))
    scores = [len(wanted & evaluator(tokenizer.decode(c))) for c in chunks]
    selection, reason = select(scores, cfg["n_chunks"], cfg["delta"], cfg["max_critical"],
                               cfg["candidates"] or cfg["n_rejected"], np.random.default_rng([cfg["seed"], i]))
    return {"id": i, "question": example["question"], "answers": example["answers"], "chunks": chunks, "scores": scores,
            "dropped": reason}, selection


def fault_of_chosen(text, answers, require_correct):
    """Why a chosen answer makes no pair, or None."""
    if text is None:
        return "chosen unfinished"
    if not text.strip():
        return "chosen empty"
    return "chosen wrong" if require_correct and answers and not is_right(text, answers) else None


def keep_rejected(row, candidates, cfg):
    """(the first M usable candidates, None); where fewer than M are usable, the fault of the last that was not."""
    kept, seen, last = [], {normalize(row["chosen"])}, None
    for text in candidates:
        fault = ("rejected unfinished" if text is None else "rejected empty" if not text.strip() else
                 "rejected equals another answer" if normalize(text) in seen else
                 "rejected right" if cfg["require_correct"] and is_right(text, row["answers"]) else None)
        if fault is None:
            kept.append(text)
            seen.add(normalize(text))
        last = fault or last
    return kept[:cfg["n_rejected"]], last if len(kept) < cfg["n_rejected"] else None


def load_pairs(path, n_rejected):
    """Pairs of a file, chunks as int32 arrays. BadInput for a pair that the loss cannot use."""
    pairs = []
    for number, row in read_lines(path):
        if "dropped" in row or "settings" in row:
            continue
        where = f"{path}, line {number}"
        for key in ("id", "question", "chunks", "chosen", "rejected"):
            if row.get(key) in (None, "", []):
                raise BadInput(f"{where}: {key!r} is {row.get(key)!r}, expected something")
        if len(row["rejected"]) < n_rejected or not all(a.strip() for a in [row["chosen"], *row["rejected"]]):
            found = len(row["rejected"])
            raise BadInput(f"{where}: {found} rejected answers, expected {n_rejected}, and no empty answer")
        pairs.append({**row, "chunks": [np.array(c, dtype=np.int32) for c in row["chunks"]]})
    if not pairs:
        raise BadInput(f"{path}: no pairs in it")
    return pairs


# -------------------------------------------------------------------------------------------------- positions

def synthesize_positions(chunk_lengths, prefix, tail, window, kind, draw, draws, seed):
    """Positions of prefix + chunks, and of the first token after them: (int64 array, int). Eq. 4 and App. D.

    The prefix sits at 0.., question and answers (tail tokens in all) follow the last chunk without a gap. In between,
    chunk c owns a slot of its own length plus 1/N of the window's slack, so that order is kept:

        0 prefix | slot 0: ..[chunk 0].... | slot 1: [chunk 1]...... | ... | tail            < window

    kind: "continuous": the chunk moves as a whole; "sparse": its tokens are spread over the slot; "none": 0, 1, 2, ...
    draw, draws: draw d of an example falls into its own share of every slot, so that together they cover it.
    Strictly increasing, below the window. A pure function; seed: int or sequence of ints, without the draw.
    """
    N, used = len(chunk_lengths), prefix + sum(chunk_lengths) + tail
    slack = window - used
    if slack < 0:
        raise BadInput(f"{N} chunks, question and answer need {used} positions, window is {window}: "
                       "lower n_chunks or chunk_size")
    if kind == "none":
        return np.arange(used - tail), used - tail
    shared, own = np.random.default_rng(seed), np.random.default_rng([*np.atleast_1d(seed), draw])
    spans, start = [np.arange(prefix)], prefix
    for c, length in enumerate(chunk_lengths):
        room = (c + 1) * slack // N - c * slack // N         # this slot's share of the slack
        if kind == "continuous":
            stratum = shared.permutation(draws)[draw]         # the same permutation for every draw of the example
            offset = int((stratum + own.random()) / draws * (room + 1))
            spans.append(start + offset + np.arange(length))
        else:
            spans.append(start + np.sort(own.choice(length + room, length, replace=False)))
        start += length + room
    positions = np.concatenate(spans)
    return positions, int(positions[-1]) + 1


def kind_of(cfg, seed, draw):
    """"mix" draws sparse for sparse_share of the samples, else continuous (9 : 1 in the paper)."""
    if cfg["positions"] != "mix":
        return cfg["positions"]
    return "sparse" if np.random.default_rng([*seed, draw, 1]).random() < cfg["sparse_share"] else "continuous"


# ----------------------------------------------------------------------------------------- groups and batches

class Batch(NamedTuple):
    """A packed stream of groups, see model.py: what Llama.forward takes, in this order."""
    tokens: torch.Tensor     # (T,) int64
    positions: torch.Tensor  # (T,) int64
    targets: torch.Tensor    # (T,) int64, IGNORE where nothing is scored
    segments: list           # of (start, end, prefix_start, prefix_end)


def encode_group(pair, tokenizer, cfg, draw=0, epoch=0):
    """One prompt and its M + 1 answers as a Batch of one group; branch 0 is the chosen.

        stream     [ prompt - last token | last token, chosen - its last | last token, rejected 1 - its last | ... ]
        targets    [ IGNORE ...          | chosen                        | rejected 1                        | ... ]
    """
    prefix, suffix, stops = prompt_around(cfg, tokenizer, pair["question"])
    answers = [tokenizer.encode(text) + stops[:1] for text in [pair["chosen"], *pair["rejected"][:cfg["n_rejected"]]]]
    seed, tail = (cfg["seed"], pair["id"], epoch), len(suffix) + max(map(len, answers))
    placed, after = synthesize_positions([len(c) for c in pair["chunks"]], len(prefix), tail, cfg["window"],
                                         kind_of(cfg, seed, draw), draw, cfg["draws"], seed)
    prompt = np.concatenate([prefix, *pair["chunks"], suffix]).astype(np.int64)
    positions = np.concatenate([placed, after + np.arange(len(suffix))])
    P, last, next_position = len(prompt) - 1, prompt[-1], positions[-1]
    tokens, places, targets, segments = [prompt[:-1]], [positions[:-1]], [np.full(P, IGNORE)], [(0, P, 0, 0)]
    for answer in answers:
        start = segments[-1][1]
        tokens.append([last, *answer[:-1]])
        places.append(next_position + np.arange(len(answer)))
        targets.append(answer)  # the shift: each branch token's target is the answer token after it
        segments.append((start, start + len(answer), 0, P))
    return Batch(*(torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (tokens, places, targets)), segments)


def collate(groups):
    """Groups one after another in one stream; only the segments move."""
    offsets = np.cumsum([0] + [len(g.tokens) for g in groups]).tolist()
    segments = [tuple(offset + bound for bound in segment)
                for group, offset in zip(groups, offsets) for segment in group.segments]
    return Batch(*(torch.cat([g[i] for g in groups]) for i in range(3)), segments)


def step_samples(n_pairs, cfg, step):
    """The (pair index, draw, epoch) triples of a step: batch_size of them, from (seed, step) alone."""
    n = n_pairs * cfg["draws"]
    out, orders = [], {}
    for i in range(step * cfg["batch_size"], (step + 1) * cfg["batch_size"]):
        epoch, place = divmod(i, n)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([cfg["seed"], epoch]).permutation(n)
        pair, draw = divmod(int(orders[epoch][place]), cfg["draws"])
        out.append((pair, draw, epoch))
    return out


def exit_on_bad_input(kind, error, trace):
    """sys.excepthook: bad input ends with one line and exit code 1, anything else with its traceback."""
    if issubclass(kind, BadInput):
        if int(os.environ.get("RANK", 0)):
            time.sleep(1)  # mostly the first process has met the same: torchrun then ends this one before its line
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    config = load_config(sys.argv[1:])
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    tok = load_tokenizer(config["model"], config["template"])
    check_settings(config, tok)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build_pairs(config, cache(lambda: load_pretrained(config["model"], getattr(torch, config["dtype"]), device,
                                                      config["adapter"])), tok)
