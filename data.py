"""From examples to batches: everything before the model sees a tensor.

    example        {"context": str or [passage, ...], "question": str, "answers": [str, ...]}          corpus.py
      chunk          -> chunks, lists of token ids; their borders stay in token ids from here on
      score, select  -> which chunks the chosen, the rejected and the training prompt see      Sec. 3.2.2
      generate       -> chosen and M rejected answers, by the policy itself                            pairs.py
    pairs.jsonl    {"id", "question", "answers", "chunks", "scores", "chosen", "rejected", "audit"}     text above, integers
      encode_group   -> tokens, targets, segments of a prompt and its M + 1 answers            the only shift
      synthesize     -> positions spread over the window                                       Eq. 4
    batch          one packed stream of groups, a function of (seed, step) alone

    python data.py configs/NAME.py key=value      builds the pairs, or goes on building them
    python data.py stats PAIRS                    what is in them, and (with matplotlib) how positions cover the window
    python data.py show PAIRS 7                   pair 7, to read
    python data.py score configs/NAME.py          what chunks and scores come to, before any answer is written
"""
import os
import re
import sys
import time
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from configs import load_config
from checkpoint import load_pretrained
from model import IGNORE, BadInput
from tokenizer import load_tokenizer


# ---------------------------------------------------------------------------------- chunks, scores, selection

COMMON = set("""a about after again against all also although an and another any are as at be because been before
being below between both but by came can come could did do does doing done down during each else even ever every few
first for from gave give going good had has have having he her here hers him himself his how i if in into is it its
itself just know last less like made make many may me more most much must my name never next no nor not now of off on
once only or other our out over own same she should since so some still such take than that the their them then there
these they thing this those through time to too under until up upon us used very want was we well went were what when
where which while who whom whose why will with within without would year yes you your yours""".split())


def words_evaluator(text):
    """The built-in evaluator: names, numbers and uncommon words of a text, lower-cased. text -> set of str."""
    words = set(re.findall(r"\w+(?:[.,]\d+)*", text))
    return {w.lower() for w in words if w.lower() not in COMMON and (w[0].isdigit() or w[0].isupper() or len(w) > 3)}


def spacy_evaluator(name):
    """spaCy's entities, and the lemmas of nouns and verbs, as in the public code of the paper. text -> set of str."""
    try:
        import spacy
        model = spacy.load(name, exclude=["parser"])
    except ImportError as e:
        raise BadInput("evaluator=spacy needs: pip install spacy") from e
    except OSError as e:
        raise BadInput(f"spacy_model={name!r} is not installed: python -m spacy download {name}") from e
    model.max_length = 1 << 30  # chunks are short; a question may be a paragraph

    @lru_cache(4096)  # a document's chunks come again with each of its questions
    def entities(text):
        doc = model(text)
        lemmas = (token.lemma_ for token in doc if token.pos_ in ("NOUN", "VERB"))
        return frozenset(word.lower() for word in (*(entity.text for entity in doc.ents), *lemmas))

    return entities


def load_evaluator(cfg):
    """The function of a config that finds the entities of a text: text -> set of str (Sec. 3.2.2)."""
    return spacy_evaluator(cfg["spacy_model"]) if cfg["evaluator"] == "spacy" else words_evaluator


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


# --------------------------------------------------------------------------------------------------- settings

def around(cfg, question):
    """The text before and after a prompt's chunks, inside the user's turn; a ready pair's prompt (no question) has none."""
    return ("", "") if question is None else (cfg["prompt_head"], cfg["prompt_tail"].replace("{question}", question))


def prompt_around(cfg, tokenizer, question, system=None):
    """(prefix, suffix, stops): the token ids before and after a prompt's chunks, and those that end an answer."""
    return tokenizer.chat(*around(cfg, question), system)


def check_settings(cfg, tokenizer):
    """Before any work: the settings with a choice, and whether N chunks, a question and an answer fit the window."""
    for key, allowed in (("positions", (*STRATEGIES, "mix")), ("dtype", ("float32", "bfloat16")),
                         ("score_with", ("question", "question+answer")), ("evaluator", ("words", "spacy")),
                         ("chosen_from", ("generated", "reference")), ("endpoint_api", ("chat", "completions"))):
        if cfg[key] not in allowed:
            raise BadInput(f"{key} is {cfg[key]!r}, expected one of {', '.join(allowed)}")
    for key in ("n_chunks", "chunk_size", "n_rejected", "draws", "batch_size", "micro_batch", "build_batch", "recall_batch",
                "keep", "questions", "endpoint_requests"):
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


# -------------------------------------------------------------------------------------------------- positions

def slots(lengths, slack):
    """(start, length, room) of each chunk's own stretch of the window: its length, and 1/N of the slack as room."""
    start, N = 0, len(lengths)
    for c, length in enumerate(lengths):
        room = (c + 1) * slack // N - c * slack // N
        yield start, length, room
        start += length + room


def continuous(lengths, slack, draw, draws, shared, own):
    """Each chunk moves as a whole within its slot. Draw d of an example falls into its own share of every slot."""
    spans = []
    for start, length, room in slots(lengths, slack):
        stratum = shared.permutation(draws)[draw]         # the same permutation for every draw of the example
        spans.append(start + int((stratum + own.random()) / draws * (room + 1)) + np.arange(length))
    return np.concatenate(spans)


def sparse(lengths, slack, draw, draws, shared, own):
    """Each chunk's tokens are spread over its slot."""
    return np.concatenate([start + np.sort(own.choice(length + room, length, replace=False))
                           for start, length, room in slots(lengths, slack)])


def pose(lengths, slack, draw, draws, shared, own):
    """PoSE (arXiv 2309.10400) with two pieces: from a random token on, everything skips ahead at random."""
    n = sum(lengths)
    return np.arange(n) + (np.arange(n) >= own.integers(1, max(2, n))) * own.integers(0, slack + 1)


def randpos(lengths, slack, draw, draws, shared, own):
    """RandPOS (arXiv 2305.16843): sorted random positions for all tokens."""
    n = sum(lengths)
    return np.sort(own.choice(n + slack, n, replace=False))


def none(lengths, slack, draw, draws, shared, own):
    """0, 1, 2, ..."""
    return np.arange(sum(lengths))


STRATEGIES = {f.__name__: f for f in (continuous, sparse, pose, randpos, none)}


def synthesize_positions(chunk_lengths, prefix, tail, window, kind, draw, draws, seed):
    """Positions of prefix + chunks, and of the first token after them: (int64 array, int). Eq. 4 and App. D.

    The prefix sits at 0.., question and answers (tail tokens in all) follow the last chunk without a gap. In between,
    chunk c owns a slot of its own length plus 1/N of the window's slack, so that order is kept:

        0 prefix | slot 0: ..[chunk 0].... | slot 1: [chunk 1]...... | ... | tail            < window

    kind: one of STRATEGIES; pose and randpos are there to compare with. draw, draws: draw d of so many of an example.
    Strictly increasing, below the window. A pure function; seed: int or sequence of ints, without the draw.
    """
    used = prefix + sum(chunk_lengths) + tail
    if used > window:
        raise BadInput(f"{len(chunk_lengths)} chunks, question and answer need {used} positions, window is {window}: "
                       "lower n_chunks or chunk_size")
    shared, own = np.random.default_rng(seed), np.random.default_rng([*np.atleast_1d(seed), draw])
    placed = STRATEGIES[kind](chunk_lengths, window - used, draw, draws, shared, own)
    positions = np.concatenate([np.arange(prefix), prefix + placed])
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
    prefix, suffix, stops = prompt_around(cfg, tokenizer, pair["question"], pair.get("system"))
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


def main(argv):
    import look
    from pairs import build_pairs
    if argv[:1] in (["score"], ["stats"], ["show"]):
        return getattr(look, argv[0])(argv[1:])
    cfg = load_config(argv)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = cache(lambda: load_pretrained(cfg["model"], getattr(torch, cfg["dtype"]), device, cfg["adapter"]))
    return int(build_pairs(cfg, policy, tokenizer) > 0)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    sys.exit(main(sys.argv[1:]))
