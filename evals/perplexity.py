"""Perplexity of texts, by context length; and LongPPL, of the tokens that a long context decides.

LongPPL (arXiv 2410.23771) is the perplexity over key tokens alone. A token x is a key token if, for
one evaluator model, with l its long and s its truncated context,

    log P(x | l) - log P(x | s) > 2        the long context gains on it          (the paper's alpha)
    log P(x | l) > -2                      and makes it likely                   (the paper's beta)

They are chosen once: each model at each length is judged by the same tokens. Here the evaluator's
long context is the longest of `lengths`, and its truncated one has truncated .. truncated + stride
- 1 tokens, as in the paper's code.
"""
import os

import torch

from configs import BadInput, refuse
from console import Progress
from evals.common import (
    COMMON,
    Subject,
    check_options,
    check_path,
    complete_characters,
    print_row,
    texts,
    token_span,
)
from evals.pictures import save_panels
from model import HEAD_CHUNK, Llama, Segment, SegmentAttention

OPTIONS = dict(
    **COMMON,
    text="",                 # text files, or a folder of them
    lengths=[256, 512, 1024, 2048],  # tokens that a prediction may look back on
    stride=128,              # tokens scored in each window
    tokens=8192,             # of each document, from its beginning
    documents=8,             # so many, the first that are longer than the longest of lengths
    evaluator="",            # model folder that chooses the key tokens; empty: the first model
    truncated=256,           # tokens of its truncated context (the paper: 4,096 of 32,768)
)
GAIN = 2.0
LIKELY = -2.0


def check(options: dict) -> None:
    check_options(options, ("stride", "tokens", "documents", "truncated"), ("lengths",))
    shortest = min(options["lengths"])
    longest = max(options["lengths"])
    if shortest < 2 or options["stride"] >= shortest:
        refuse("stride", options["stride"], f"less than the shortest of lengths, {shortest}")
    # A truncated context that is not the shorter one has nothing to lose.
    stride = options["stride"]
    if options["truncated"] + stride >= longest:
        expected = f"with stride={stride} less than the longest of lengths, {longest}"
        refuse("truncated", options["truncated"], expected)
    check_path(options, "text")


# --------------------------------------------------------------------------------- losses

@torch.no_grad()
def token_losses(model: Llama, ids: list[int], length: int, stride: int) -> torch.Tensor:
    """(len(ids) - 1,) nats, -log P, of each token after the first, given length - stride .. length
    - 1 tokens before it (fewer at the beginning).

    Windows of `length` tokens move on by `stride`, and each scores what the one before has not
    (Press et al., arXiv 2012.15832, Sec. 2). Logits exist for HEAD_CHUNK tokens at a time.
    """
    tokens = torch.tensor(ids, device=model.lm_head.weight.device)
    losses = []
    done = 0          # the last token that is scored; the first never is
    begin = 0
    while done < len(ids) - 1:
        window = tokens[begin:begin + length]
        positions = torch.arange(len(window), device=tokens.device)
        attend = SegmentAttention([Segment(0, len(window))], tokens.device)
        x = model.hidden_states(window, positions, attend)
        # The state of token t predicts token t + 1.
        states = x[done - begin:-1].split(HEAD_CHUNK)
        targets = window[done - begin + 1:].split(HEAD_CHUNK)
        for states_here, targets_here in zip(states, targets):
            losses.append(-model.token_logps(states_here, targets_here).cpu())
        done = begin + len(window) - 1
        begin += stride
    return torch.cat(losses)


# ------------------------------------------------------------------------------ key tokens

def key_tokens(evaluator: Subject, ids: list[int], options: dict) -> torch.Tensor:
    """(len(ids) - 1,) bool: which tokens after the first are key tokens of a document."""
    stride = options["stride"]
    long = -token_losses(evaluator.model, ids, max(options["lengths"]), stride)
    short = -token_losses(evaluator.model, ids, options["truncated"] + stride, stride)
    return (long - short > GAIN) & (long > LIKELY)


def carry_over(is_key: torch.Tensor, ids: list[int], evaluator: Subject, other_ids: list[int],
               other: Subject) -> torch.Tensor:
    """The same key tokens in another model's ids: those that lie wholly within a run of them.

    Between two tokenizers, characters are what is common.
    """
    if other.tokenizer.digest == evaluator.tokenizer.digest:
        return is_key
    text = evaluator.tokenizer.decode(ids)
    if other.tokenizer.decode(other_ids) != text:
        raise BadInput(f"{other.folder}: its tokenizer does not keep the text as that of "
                       f"{evaluator.folder} does: the key tokens cannot be found in it")
    carried = torch.zeros(len(other_ids) - 1, dtype=torch.bool)
    for first, last in runs_of(is_key.tolist()):
        # Entry i is of token i + 1: there is no loss of the first.
        start = complete_characters(ids, first + 1, text, evaluator.tokenizer)
        end = complete_characters(ids, last + 1, text, evaluator.tokenizer)
        begin, stop = token_span(other_ids, start, end, other.tokenizer)
        # What also says a character outside of the run is no key token.
        if complete_characters(other_ids, begin, text, other.tokenizer) < start:
            begin += 1
        if complete_characters(other_ids, stop, text, other.tokenizer) > end:
            stop -= 1
        for token in range(max(1, begin), stop):
            carried[token - 1] = True
    return carried


def runs_of(flags: list[bool]) -> list[tuple[int, int]]:
    """(first, last + 1) of each unbroken run of True."""
    runs = []
    start = None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        if not flag and start is not None:
            runs.append((start, i))
            start = None
    return runs


# ------------------------------------------------------------------------------ measure, draw

def measure(subjects: list[Subject], options: dict) -> dict:
    """{"table": rows {"model", "length", "perplexity", "tokens", "long", "key_tokens"}, ...}.

    long: LongPPL; None where no token is a key token.
    """
    evaluator = evaluator_of(subjects, options)
    documents = cut_texts(evaluator, options)
    chosen = []
    with Progress("key tokens of texts", len(documents)) as progress:
        for _, ids in documents:
            chosen.append(key_tokens(evaluator, ids, options))
            progress.update()

    table = []
    for subject in subjects:
        encoded = []
        is_key = []
        for (text, ids), keys in zip(documents, chosen):
            own_ids = subject.tokenizer.encode(text)
            encoded.append(own_ids)
            is_key.append(carry_over(keys, ids, evaluator, own_ids, subject))
        is_key = torch.cat(is_key)
        for length in sorted(options["lengths"]):
            losses = []
            with Progress(f"texts, {subject.name}, {length}", len(encoded)) as progress:
                for ids in encoded:
                    losses.append(token_losses(subject.model, ids, length, options["stride"]))
                    progress.update()
            table.append(row_of(subject.name, length, torch.cat(losses), is_key))
    return {
        "table": table,
        "evaluator": evaluator.folder,
        "window": subjects[0].config.max_position_embeddings,
    }


def evaluator_of(subjects: list[Subject], options: dict) -> Subject:
    """The one model that chooses the key tokens."""
    folder = options["evaluator"]
    if not folder:
        return subjects[0]
    for subject in subjects:
        # Its weights need not be there twice.
        if os.path.realpath(subject.folder) == os.path.realpath(folder):
            return subject
    return Subject(folder, options)


def cut_texts(evaluator: Subject, options: dict) -> list[tuple[str, list[int]]]:
    """(text, the evaluator's token ids) of each document, cut to `tokens` of its tokens.

    The text is what is cut, so that models of other tokenizers read no more and no less of it.
    """
    longest = max(options["lengths"])
    documents = []
    for text in texts(options["text"]):
        ids = evaluator.tokenizer.encode(text)[:options["tokens"]]
        if len(ids) > longest:
            text = evaluator.tokenizer.decode(ids).rstrip("\ufffd")   # the last may be cut in half
            documents.append((text, evaluator.tokenizer.encode(text)))
        # Counted when they are long enough: a folder may begin with short ones.
        if len(documents) == options["documents"]:
            break
    if not documents:
        raise BadInput(f"{options['text']}: no text has more than {longest} tokens, the longest of "
                       "lengths")
    return documents


def row_of(name: str, length: int, losses: torch.Tensor, is_key: torch.Tensor) -> dict:
    """A row of the table, printed."""
    row = {
        "model": name,
        "length": length,
        "perplexity": losses.mean().exp().item(),
        "tokens": len(losses),
        "long": None,
        "key_tokens": int(is_key.sum()),
    }
    longppl = "no key tokens"
    if is_key.any():
        row["long"] = losses[is_key].mean().exp().item()
        longppl = f"LongPPL {row['long']:8.3f} of {row['key_tokens']}"
    print_row(
        name,
        f"{length:7d} tokens",
        f"perplexity {row['perplexity']:8.3f} of {row['tokens']}",
        longppl,
    )
    return row


def draw(result: dict, options: dict) -> None:
    """Perplexity by length, a line a model."""
    lengths = sorted(options["lengths"])
    lines = {}
    for row in result["table"]:
        lines.setdefault(row["model"], []).append(row["perplexity"])

    highest = max(max(values) for values in lines.values())
    lowest = min(min(values) for values in lines.values())

    def paint(axis, number):
        for name, values in lines.items():
            axis.plot(lengths, values, marker="o", label=name)
        axis.axvline(result["window"], color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        # Within a decade a logarithmic axis has no round number to show.
        if highest > 10 * lowest:
            axis.set_yscale("log")
        axis.set_xlabel("context, tokens (dashed: the first model's window)")
        axis.set_ylabel("perplexity")
        # The lengths are the ticks: powers of ten say nothing of 2,048.
        axis.set_xticks(lengths, lengths)
        axis.minorticks_off()
        axis.legend()

    save_panels("perplexity", options, [""], 5, paint)
