"""The method's data: from a document to a packed batch. No model, no device, no command in here.

    example        {"context": str or [passage, ...], "question": str, "answers": [str, ...]}
      chunk          -> lists of token ids; their borders stay in token ids from here on
      importance_scores, select_chunks
                     -> which chunks the chosen, each rejected and the training prompt see
      (pairs/)       -> chosen and M rejected answers, written by the policy itself
    pairs.jsonl    {"id", "document", "question", "chunks", "scores", "chosen", "rejected", ...}
      load_pairs     -> pairs, every one checked
      encode_group   -> tokens and targets of one prompt and its M + 1 answers: the shift
      synthesize_positions
                     -> positions spread over the window (Eq. 4)
    Batch          one packed stream of groups; which ones is a function of (seed, step) alone

Words: a *chunk* is a run of tokens of the document; a *critical* chunk shares words with the
question; a *group* is one prompt with its M + 1 answers; a *draw* is one choice of positions for a
group; the *window* is the range that positions may come from; a *slot* is the part of the window
that belongs to one chunk.
"""
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from configs import BadInput
from model import IGNORE, Segment
from tokenizer import Tokenizer

Evaluator = Callable[[str], set[str] | frozenset[str]]


def random_stream(tag: str, *numbers: int) -> np.random.Generator:
    """A generator for one purpose: the same tag always has the same number of numbers behind it.

    The tag is there because numpy pads seeds with zeros: [1, 2] and [1, 2, 0] are one stream. What
    is drawn for one purpose must say nothing about what is drawn for another.
    """
    return np.random.default_rng([zlib.crc32(tag.encode()), *numbers])


# -------------------------------------------------------------------------------- chunks and scores

COMMON_WORDS = """
a about after again against all also although an and another any are as at be because been before
being below between both but by came can come could did do does doing done down during each else
even ever every few first for from gave give going good had has have having he her here hers him
himself his how i if in into is it its itself just know last less like made make many may me more
most much must my name never next no nor not now of off on once only or other our out over own same
she should since so some still such take than that the their them then there these they thing this
those through time to too under until up upon us used very want was we well went were what when
where which while who whom whose why will with within without would year yes you your yours
"""
COMMON = set(COMMON_WORDS.split())
# 3.50 and 1,000 are one word each: their parts would be found in any text with numbers.
WORD = re.compile(r"\w+(?:[.,]\d+)*")


def words_evaluator(text: str) -> set[str]:
    """The built-in evaluator: names, numbers and uncommon words of a text, lower-cased."""
    found = set()
    for word in WORD.findall(text):
        # No list of common words is complete. Most that it lacks are short, and not names.
        telling = word[0].isdigit() or word[0].isupper() or len(word) > 3
        if telling and word.lower() not in COMMON:
            found.add(word.lower())
    return found


def spacy_evaluator(name: str) -> Evaluator:
    """spaCy's entities, and the lemmas of nouns and verbs, as in the public code of the paper."""
    try:
        import spacy  # optional, and slow to import
        model = spacy.load(name, exclude=["parser"])
    except ImportError as e:
        raise BadInput("evaluator=spacy needs: pip install spacy") from e
    except OSError as e:
        raise BadInput(f"spacy_model={name!r} is not installed: "
                       f"python -m spacy download {name}") from e
    # spaCy refuses texts beyond a million letters. Chunks are short, but a question may be a page,
    # and should not end a build.
    model.max_length = 1 << 30

    @lru_cache(4096)  # a document's chunks come again with each of its questions
    def entities(text: str) -> frozenset[str]:
        found = set()
        parsed = model(text)
        for entity in parsed.ents:
            found.add(entity.text.lower())
        for token in parsed:
            if token.pos_ in ("NOUN", "VERB"):
                found.add(token.lemma_.lower())
        return frozenset(found)

    return entities


def load_evaluator(cfg: dict) -> Evaluator:
    """The function of a config that finds the entities of a text (Sec. 3.2.2)."""
    if cfg["evaluator"] == "spacy":
        return spacy_evaluator(cfg["spacy_model"])
    return words_evaluator


def chunk(context: str | list[str], tokenizer: Tokenizer, size: int) -> list[list[int]]:
    """Token ids of equal chunks. A context of passages is cut at their borders as well."""
    texts = [context]
    if not isinstance(context, str):
        texts = [passage + "\n\n" for passage in context]
    chunks = []
    for text in texts:
        # Encoded as a whole, then cut: decoding and encoding again would move the borders.
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), size):
            chunks.append(ids[start:start + size])
    return chunks


def importance_scores(chunks: list[list[int]], wanted: set[str], tokenizer: Tokenizer,
                      evaluator: Evaluator) -> list[int]:
    """A chunk's score: how many distinct entities it shares with the question (Sec. 3.2.2)."""
    scores = []
    for ids in chunks:
        # A set: a name that a chunk repeats twenty times is still one thing that it knows.
        shared = wanted & evaluator(tokenizer.decode(np.asarray(ids).tolist()))
        scores.append(len(shared))
    return scores


# ---------------------------------------------------------------------------------------- selection

IRRELEVANT = "irrelevant"      # chunks that share little with the question
PARTIAL = "partial evidence"   # the weaker half of the critical chunks, among others
NEAR = "near misses"           # one critical chunk has no half: the best of the others


class Selection(NamedTuple):
    """Chunk numbers in document order: what each prompt of an example sees."""
    chosen: list[int]           # critical chunks only
    rejected: list[list[int]]   # one list for each rejected answer
    evidence: list[str]         # what each rejected prompt holds: IRRELEVANT, PARTIAL or NEAR
    training: list[int]         # C', the prompt that all M + 1 answers share


def select_chunks(scores: list[int], n_chunks: int, delta: int, max_critical: int, n_rejected: int,
                  rng: np.random.Generator) -> tuple[Selection | None, str | None]:
    """Which chunks each prompt sees (Sec. 3.2.2): (selection, None), or (None, why there is none).

    n_chunks: N, most chunks of a prompt. A chunk above delta is critical; at most max_critical of
    them count (0: n_chunks). No prompt holds a chunk twice, no rejected prompt holds the best one.
    """
    critical, others = by_importance(scores, delta, min(max_critical or n_chunks, n_chunks))
    if not critical:
        return None, "no critical chunk"
    if not others:
        return None, "no irrelevant chunk"

    # First kind of rejected prompt: irrelevant text only. It tends to give evasive or off-topic
    # answers, since the policy has nothing to answer from. The weaker half of a long document, but
    # enough chunks for a full prompt: a lone chunk would be too easy to tell from real evidence.
    irrelevant = others[-max(n_chunks, len(others) // 2):]

    # Second kind: half right. It has part of the evidence, though never the best chunk, and tends
    # to give confident wrong answers. One critical chunk has no part to give: the nearest misses
    # take its place, and the prompt is called by that name.
    half = max(1, n_chunks // 2)
    weaker_half = critical[(len(critical) + 1) // 2:]
    near_misses = others[:min(half, (len(others) + 1) // 2)]
    half_right = (weaker_half + near_misses)[:half]
    fill = [c for c in others[len(others) // 2:] if c not in half_right]
    if not weaker_half and len(others) <= n_chunks:
        fill = []  # in so short a document, filled up it would be the irrelevant prompt once more

    rejected = []
    evidence = []
    for j in range(n_rejected):
        if j % 2 == 0:
            picked = draw_some(irrelevant, n_chunks, rng)
            evidence.append(IRRELEVANT)
        else:
            picked = half_right + draw_some(fill, n_chunks - len(half_right), rng)
            evidence.append(PARTIAL if weaker_half else NEAR)
        rejected.append(sorted(picked))

    # The training prompt: all the evidence, and near misses, which are what tempts, in half of the
    # places left. Any other text fills the rest: in use, most of a long prompt matters little.
    places_left = n_chunks - len(critical)
    training = critical + near_misses[:(places_left + 1) // 2]
    unused = [c for c in others if c not in training]
    training += draw_some(unused, n_chunks - len(training), rng)
    return Selection(sorted(critical), rejected, evidence, sorted(training)), None


def by_importance(scores: list[int], delta: int, most: int) -> tuple[list[int], list[int]]:
    """(critical chunks, at most so many; the chunks that are none), both with the best first."""
    # Of equal chunks the earlier one comes first: the same document gives the same pair anywhere.
    ranked = sorted(range(len(scores)), key=lambda c: (-scores[c], c))
    critical = [c for c in ranked if scores[c] > delta]
    # A cap leaves evidence over. It must not stand in for irrelevant text, so no prompt gets it.
    others = [c for c in ranked if scores[c] <= delta]
    if not critical and ranked and scores[ranked[0]] > 0:
        # A short question shares few words with anything. Its best chunk is the evidence there is.
        critical = ranked[:1]
        others = ranked[1:]
    return critical[:most], others


def draw_some(pool: list[int], n: int, rng: np.random.Generator) -> list[int]:
    """n members of a pool, or all of a smaller one, in random order."""
    return [pool[i] for i in rng.permutation(len(pool))[:n]]


# ---------------------------------------------------------------------------------------- positions

def slots(lengths: list[int], slack: int) -> Iterator[tuple[int, int, int]]:
    """(start, length, room) of each chunk's slot: its length, and 1/N of the slack as room."""
    N = len(lengths)
    start = 0
    for c, length in enumerate(lengths):
        # Differences of a running sum, rounded: so the rooms add up to the slack, to the token.
        room = (c + 1) * slack // N - c * slack // N
        yield start, length, room
        start += length + room


class Placing(NamedTuple):
    """What a strategy places: chunks of these lengths on 0 .. sum(lengths) + slack - 1."""
    lengths: list[int]
    slack: int                     # positions of the window that no token needs
    draw: int                      # draw d of `draws` of the example
    draws: int
    shared: np.random.Generator    # the same numbers for all draws of the example
    own: np.random.Generator       # numbers of this draw alone


def continuous(p: Placing) -> np.ndarray:
    """Each chunk moves as a whole within its slot: neighbours stay neighbours, as in real text.

    The draws of an example are stratified: the slot's room is cut into `draws` strata, and each
    draw gets another one, so that few draws reach near and far offsets alike.
    """
    placed = []
    for start, length, room in slots(p.lengths, p.slack):
        stratum = p.shared.permutation(p.draws)[p.draw]
        share = (stratum + p.own.random()) / p.draws  # uniform in [0, 1) over all draws
        offset = int(share * (room + 1))
        placed.append(start + offset + np.arange(length))
    return np.concatenate(placed)


def sparse(p: Placing) -> np.ndarray:
    """Each chunk's tokens are spread over its slot, in order, in random strides.

    No text has such strides, but distances within a chunk occur that `continuous` never shows.
    """
    placed = []
    for start, length, room in slots(p.lengths, p.slack):
        # Distinct and sorted: tokens stay in order, and no two share a position.
        places = p.own.choice(length + room, length, replace=False)
        placed.append(start + np.sort(places))
    return np.concatenate(placed)


def pose(p: Placing) -> np.ndarray:
    """PoSE (arXiv 2309.10400), two pieces: from a random token on, all skip ahead at random."""
    tokens = np.arange(sum(p.lengths))
    # The first piece has a token at least, or the whole sample would move and nothing be skipped.
    cut = p.own.integers(1, max(2, len(tokens)))
    skip = p.own.integers(0, p.slack + 1)
    return tokens + (tokens >= cut) * skip


def randpos(p: Placing) -> np.ndarray:
    """RandPOS (arXiv 2305.16843): sorted random positions for all tokens."""
    n = sum(p.lengths)
    return np.sort(p.own.choice(n + p.slack, n, replace=False))


def none(p: Placing) -> np.ndarray:
    """0, 1, 2, ...: what the model would see without any synthesis."""
    return np.arange(sum(p.lengths))


STRATEGIES = {
    "continuous": continuous,
    "sparse": sparse,
    "pose": pose,
    "randpos": randpos,
    "none": none,
}


def synthesize_positions(chunk_lengths: list[int], prefix: int, tail: int, window: int, kind: str,
                         draw: int, draws: int, seed: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Positions of prefix + chunks, and of the first token after them: (int64 array, int). Eq. 4.

    The prefix sits at 0.., question and answers (tail tokens in all) follow the last chunk without
    a gap. Between them each chunk owns a slot of its own length plus 1/N of the window's slack:

        0 prefix | slot 0: ..[chunk 0].... | slot 1: [chunk 1]...... | ... | tail        < window

    Eq. 4 read literally draws every chunk's bias on its own, up to c times (K - k) / N, so that a
    later chunk can land before an earlier one, or on it. Slots (App. D) keep positions distinct and
    strictly increasing.

    kind: one of STRATEGIES; pose and randpos are there to compare with. seed: without the draw.
    The result is a function of the arguments alone.
    """
    used = prefix + sum(chunk_lengths) + tail
    if used > window:
        raise BadInput(f"{len(chunk_lengths)} chunks, question and answer need {used} positions, "
                       f"window is {window}: lower n_chunks or chunk_size")
    # Draws that are to share out a slot's strata must agree on who gets which: hence two streams.
    shared = random_stream("positions of an example", *seed)
    own = random_stream("positions of a draw", *seed, draw)
    placed = STRATEGIES[kind](Placing(chunk_lengths, window - used, draw, draws, shared, own))
    positions = np.concatenate([np.arange(prefix), prefix + placed])
    return positions, int(positions[-1]) + 1


def kind_of_draw(cfg: dict, seed: tuple[int, ...], draw: int) -> str:
    """The strategy of one sample. "mix" is sparse for sparse_share of them, else continuous."""
    if cfg["positions"] != "mix":
        return cfg["positions"]
    # 9 : 1 in the paper. Continuous keeps text as text is; some sparse samples add the distances
    # within a chunk, which a model that only saw whole chunks would not know at all.
    chance = random_stream("sparse or continuous", *seed, draw).random()
    return "sparse" if chance < cfg["sparse_share"] else "continuous"


# ------------------------------------------------------------------------------------------ prompts

def text_around(cfg: dict, question: str | None) -> tuple[str, str]:
    """The text before and after a prompt's chunks, inside the user's turn.

    A pair that came ready made has no question: its chunks are the whole of the user's turn.
    """
    if question is None:
        return "", ""
    return cfg["prompt_head"], cfg["prompt_tail"].replace("{question}", question)


def prompt_around(cfg: dict, tokenizer: Tokenizer, question: str | None,
                  system: str | None = None) -> tuple[list[int], list[int], list[int]]:
    """(prefix, suffix, stops): token ids before and after the chunks, and what ends an answer."""
    head, tail = text_around(cfg, question)
    return tokenizer.chat(head, tail, system)


def check_fit(cfg: dict, tokenizer: Tokenizer) -> None:
    """Before any work: N chunks and an answer of max_new_tokens fit the window."""
    # Questions are not known yet. load_pairs looks again, at each pair's own.
    prefix, suffix, _ = prompt_around(cfg, tokenizer, "")
    left = cfg["window"] - len(prefix) - len(suffix) - cfg["n_chunks"] * cfg["chunk_size"]
    if left < cfg["max_new_tokens"]:
        raise BadInput(f"{cfg['n_chunks']} chunks of {cfg['chunk_size']} tokens leave {left} of "
                       f"window={cfg['window']} for question and answer "
                       f"(max_new_tokens={cfg['max_new_tokens']}): lower n_chunks or chunk_size")


# ------------------------------------------------------------------------------- groups and batches

@dataclass(frozen=True)
class Batch:
    """A packed stream of groups: what Llama.forward takes.

    It checks itself, since a model trains on a wrong segment in silence.
    """
    tokens: torch.Tensor     # (T,) int64
    positions: torch.Tensor  # (T,) int64
    targets: torch.Tensor    # (T,) int64: the token to predict, or IGNORE where nothing is scored
    segments: list[Segment]

    def __post_init__(self) -> None:
        T = len(self.tokens)
        assert self.positions.shape == self.targets.shape == (T,)
        end = 0
        for segment in self.segments:
            assert segment.start == end, "segments cover the stream in order"
            assert segment.end > segment.start, "a segment has tokens"
            assert segment.prefix_end <= segment.start, "a prompt lies before its answers"
            end = segment.end
        assert end == T, "segments cover all of the stream"


def token_ids(pair: dict, tokenizer: Tokenizer,
              cfg: dict) -> tuple[list[int], list[int], list[list[int]]]:
    """(prefix, suffix, answers): what stands around the chunks; chosen and M rejected, ended."""
    prefix, suffix, stops = prompt_around(cfg, tokenizer, pair["question"], pair.get("system"))
    # Its end is a token of an answer, scored like the others: a model has to learn to stop as well.
    answers = []
    for text in [pair["chosen"], *pair["rejected"][:cfg["n_rejected"]]]:
        answers.append(tokenizer.encode(text) + stops[:1])
    return prefix, suffix, answers


def encode_group(pair: dict, tokenizer: Tokenizer, cfg: dict, draw: int = 0,
                 epoch: int = 0) -> Batch:
    """One prompt and its M + 1 answers as a Batch of one group. Branch 0 is the chosen answer.

        stream     [ prompt - its last | last of prompt, chosen - its last | last of prompt, ... ]
        targets    [ IGNORE ...        | chosen                            | rejected 1 ...      ]

    Each branch begins with a copy of the prompt's last token, the one that predicts the first
    answer token. So that needs no special case: everywhere, a target is the token after.
    """
    prefix, suffix, answers = token_ids(pair, tokenizer, cfg)
    chunk_lengths = [len(ids) for ids in pair["chunks"]]
    # The answers share the prompt's positions, so the longest says how much slack there is.
    longest = max(len(answer) for answer in answers)
    # By the pair's id, not its place in the list: one more in the file moves no other's positions.
    seed = (cfg["seed"], pair["id"], epoch)
    kind = kind_of_draw(cfg, seed, draw)
    placed, after = synthesize_positions(chunk_lengths, len(prefix), len(suffix) + longest,
                                         cfg["window"], kind, draw, cfg["draws"], seed)

    prompt = np.concatenate([prefix, *pair["chunks"], suffix]).astype(np.int64)
    prompt_positions = np.concatenate([placed, after + np.arange(len(suffix))])
    P = len(prompt) - 1  # the last prompt token opens the branches instead
    tokens = [prompt[:P]]
    positions = [prompt_positions[:P]]
    targets = [np.full(P, IGNORE)]
    segments = [Segment(0, P)]
    for answer in answers:
        start = segments[-1].end
        tokens.append(np.array([prompt[P], *answer[:-1]]))
        # All answers sit at the same positions: each goes on from the prompt, not from another.
        positions.append(prompt_positions[P] + np.arange(len(answer)))
        # The shift: the target of a branch's token is the answer's token after it.
        targets.append(np.array(answer))
        segments.append(Segment(start, start + len(answer), 0, P))
    return Batch(as_tensor(tokens), as_tensor(positions), as_tensor(targets), segments)


def as_tensor(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def collate(groups: list[Batch]) -> Batch:
    """Groups one after another in one stream. No padding: only the segments move."""
    tokens = torch.cat([group.tokens for group in groups])
    positions = torch.cat([group.positions for group in groups])
    targets = torch.cat([group.targets for group in groups])
    segments = []
    offset = 0
    for group in groups:
        for segment in group.segments:
            segments.append(segment.moved(offset))
        offset += len(group.tokens)
    return Batch(tokens, positions, targets, segments)


# --------------------------------------------------------------------------------- order of samples

class Sample(NamedTuple):
    """One group of a step: which pair, at which draw of its positions, in which pass over all."""
    pair: int
    draw: int
    epoch: int


def step_samples(n_pairs: int, cfg: dict, step: int) -> list[Sample]:
    """The batch_size samples of a step, from (seed, step) alone: resuming needs no loader state.

    An epoch is a permutation of all pairs x draws; steps go through it and into the next one
    without a seam, so that a batch may hold the end of one epoch and the beginning of another.
    """
    # Counted in samples since the start, not in batches of an epoch: so another batch size, or
    # another number of processes, goes through the same samples in the same order.
    n = n_pairs * cfg["draws"]
    orders = {}
    samples = []
    for i in range(step * cfg["batch_size"], (step + 1) * cfg["batch_size"]):
        epoch, place = divmod(i, n)
        if epoch not in orders:
            orders[epoch] = random_stream("order of an epoch", cfg["seed"], epoch).permutation(n)
        pair, draw = divmod(int(orders[epoch][place]), cfg["draws"])
        samples.append(Sample(pair, draw, epoch))
    return samples


def split_pairs(pairs: list[dict], held_out: int) -> tuple[list[dict], list[dict]]:
    """(pairs to train on, the last `held_out` pairs).

    Nothing of a document with a held-out question is trained on: else the model would be tested on
    text that it has read. Such pairs before the border are in neither list.
    """
    border = max(0, len(pairs) - held_out)
    kept_back = pairs[border:]
    unseen = {document_of(pair) for pair in kept_back}
    train = []
    for pair in pairs[:border]:
        if document_of(pair) not in unseen:
            train.append(pair)
    return train, kept_back


def document_of(pair: dict) -> tuple[str, int]:
    """What tells a pair's document from others. Pairs that name none each count as one."""
    if pair.get("document") is None:
        return "pair", pair["id"]
    return "document", pair["document"]


# ---------------------------------------------------------------------------------- the pairs' file

def read_lines(path: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a JSON-lines file of ours."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            for number, line in enumerate(f, 1):
                yield number, parsed(line, f"{path}, line {number}")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from e


def parsed(line: str, where: str) -> dict:
    """The JSON object in a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: not JSON ({e})") from e
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected a JSON object, found {shown(row)}")
    return row


def read_header(path: str) -> dict:
    """The settings that a pairs' file was built with, from its first line; {} if it has no such."""
    for _, row in read_lines(path):
        settings = row.get("settings", {})
        if not isinstance(settings, dict):
            raise BadInput(f"{path}, line 1: {unlike(row, 'settings', 'a JSON object')}")
        return settings
    return {}


def load_pairs(path: str, cfg: dict, tokenizer: Tokenizer) -> list[dict]:
    """The pairs of a file, every one checked: "chunks" as int32 arrays, "tokens" of their groups.

    BadInput names file, line and key of the first that could not be trained on. It is said here,
    before any work: a pair that fails hours later, at its turn, fails again after each resume.
    """
    # Ids of another tokenizer are within the vocabulary mostly, and train to nonsense in silence.
    built_with = read_header(path).get("tokenizer", tokenizer.digest)
    if built_with != tokenizer.digest:
        raise BadInput(f"{path}: its token ids are of the tokenizer with digest {built_with!r}, "
                       f"the one here has {tokenizer.digest!r}: build pairs with this model")
    pairs = []
    line_of = {}
    for number, row in read_lines(path):
        where = f"{path}, line {number}"
        if is_text(row.get("dropped")) or (number == 1 and "settings" in row):
            continue
        try:
            pair = checked_pair(row, cfg, tokenizer)
        except BadInput as e:
            raise BadInput(f"{where}: {e}") from e
        first = line_of.setdefault(pair["id"], number)
        if first != number:
            raise BadInput(f"{where}: 'id' is {pair['id']}, which line {first} has already: "
                           "expected another one for each pair")
        pairs.append(pair)
    if not pairs:
        raise BadInput(f"{path}: no pairs in it; python -m pairs stats {path} says why, and what "
                       "to turn")
    return pairs


def checked_pair(row: dict, cfg: dict, tokenizer: Tokenizer) -> dict:
    """A line of a pairs' file as a pair. BadInput, without file and line, says what is wrong."""
    check_numbers(row)
    check_chunks(row, cfg["n_chunks"], tokenizer.vocab_size)
    check_texts(row, cfg["n_rejected"])
    chunks = []
    for ids in row["chunks"]:
        chunks.append(np.array(ids, dtype=np.int32))
    pair = {"question": None, "system": None, **row, "chunks": chunks}

    prefix, suffix, answers = token_ids(pair, tokenizer, cfg)
    prompt = len(prefix) + sum(len(ids) for ids in chunks) + len(suffix)
    longest = max(len(answer) for answer in answers)
    # The last prompt token opens the answers' branches. A segment of no token would be left of one.
    if prompt < 2:
        raise BadInput("the prompt is one token long, expected two or more")
    if prompt + longest > cfg["window"]:
        raise BadInput(f"a prompt of {prompt} tokens and an answer of {longest} need "
                       f"{prompt + longest} positions, window is {cfg['window']}: raise window, or "
                       "build pairs with a lower n_chunks, chunk_size or max_new_tokens")
    # Of its group in a stream: the prompt's last token is in each answer's branch instead.
    pair["tokens"] = prompt - 1 + sum(len(answer) for answer in answers)
    return pair


def check_numbers(row: dict) -> None:
    """id, and document where there is one: each a number that can seed a stream of random ones."""
    keys = ["id"]
    if row.get("document") is not None:
        keys.append("document")
    for key in keys:
        value = row.get(key)
        # Python counts True as an integer. And numpy cuts seeds into words of 32 bits: a larger
        # number would be two of them, and no longer tell one stream from another.
        if type(value) is not int or not 0 <= value < 1 << 32:
            raise unlike(row, key, "a whole number from 0 to 2**32 - 1")


def check_chunks(row: dict, n_chunks: int, vocab_size: int) -> None:
    """1 to n_chunks lists of token ids.

    On a GPU, an id past the vocabulary ends the run in an assertion that names no place.
    """
    chunks = row.get("chunks")
    if not isinstance(chunks, list) or not 1 <= len(chunks) <= n_chunks:
        raise unlike(row, "chunks", f"a list of 1 to n_chunks={n_chunks} lists of token ids")
    for number, ids in enumerate(chunks):
        # A set of types, not a loop in Python: a file may hold a hundred million ids.
        if not isinstance(ids, list) or set(map(type, ids)) != {int}:
            raise BadInput(f"chunk {number} is {shown(ids)}, expected a list of token ids")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise BadInput(f"chunk {number} has token ids from {min(ids)} to {max(ids)}, expected "
                           f"0 to {vocab_size - 1}: was it built with another tokenizer?")


def check_texts(row: dict, n_rejected: int) -> None:
    """Question and system may be missing. Answers are not empty, no rejected one is the chosen."""
    for key in ("question", "system"):
        if row.get(key) is not None and not is_text(row[key]):
            raise unlike(row, key, "a text or null")
    chosen = row.get("chosen")
    if not is_text(chosen) or not chosen.strip():
        raise unlike(row, "chosen", "a text that is not empty")
    rejected = row.get("rejected")
    if not isinstance(rejected, list) or len(rejected) < n_rejected:
        raise unlike(row, "rejected", f"a list of n_rejected={n_rejected} or more texts")
    for text in rejected:
        if not is_text(text) or not text.strip():
            raise BadInput(f"'rejected' has {shown(text)}, expected texts that are not empty")
        # The loss would push one answer up and down at once. A space more is no other answer.
        if text.strip() == chosen.strip():
            raise BadInput(f"'rejected' has {shown(text)}, expected texts other than 'chosen'")


def is_text(value: Any) -> bool:
    """A str that UTF-8 can hold. JSON can spell halves of characters, which no tokenizer knows."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def unlike(row: dict, key: str, expected: str) -> BadInput:
    """The message about a key that is missing or is not as expected."""
    found = "missing"
    if key in row:
        found = shown(row[key])
    return BadInput(f"{key!r} is {found}, expected {expected}")


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    return repr(value)[:60]
