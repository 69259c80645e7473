"""Known forms of corpora, into rows of ours; pairs of ours into TRL's form.

    python -m pairs convert longalpaca     IN OUT     {"instruction", "input", "output"}
    python -m pairs convert long-llm-data  IN OUT     {"conversations": [{"role", "content"}, ...]}
    python -m pairs convert trl            IN OUT     {"prompt", "chosen", "rejected"}
    python -m pairs convert to-trl         PAIRS OUT  of pairs.jsonl: a row for each rejected answer
    python -m pairs convert to-trl-first   PAIRS OUT  a row a pair, its first rejected answer

IN is what `examples` may be (a file, a folder, -), OUT a new .jsonl. The first two have the
document in the first user turn with a question behind it; each question of a conversation becomes a
row. TRL's rows are texts or messages. Those that follow each other with the same prompt and chosen
answer become one pair with all their rejected ones, so that what to-trl wrote comes back as it was.
"""
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from configs import BadInput
from data import load_pairs, text_around
from pairs.corpus import example_of, files_of, parse, raw_rows, text_at
from pairs.stats import settings_of, tokenizer_of
from tokenizer import Tokenizer

# LongAlpaca frames its documents. long-llm-data sets the question apart by a rule of hyphens, or by
# an empty line alone, which a document has as well: so the last of the surest kind counts.
FRAME = re.compile(r"\A(?:Below is|There are two) [^\n]*\n(?:\s*The (?:first )?paper begins\.\s*)?")
MARKED = re.compile(r"\n\s*Now the (?:second )?(?:paper|material|book) ends\.|\n-{8,}\n")
EMPTY_LINE = re.compile(r"\n\s*\n")
LONGEST_QUESTION = 4000  # characters; beyond it, it is the document's last paragraph


def longalpaca(row: dict) -> list[dict]:
    """{"instruction", "input", "output"}: a conversation of one turn."""
    # Document and question are in one text. "input" is empty in the rows that are long.
    text = text_at(row, "instruction")
    if row.get("input"):
        text += "\n\n" + text_at(row, "input")
    context, question = split_turn(text)
    answers = [text_at(row, "output")] if row.get("output") else []
    return [{"context": context, "question": question, "answers": answers}]


def long_llm_data(row: dict) -> list[dict]:
    """{"conversations"} or {"messages"}: a question in the first user turn, others after it."""
    turns = turns_of(row.get("conversations") or row.get("messages"))
    turns = [turn for turn in turns if turn.role != "system"]
    roles = [turn.role for turn in turns]
    # Two questions in a row, or two answers: which answers which could only be guessed.
    in_turn = ["user", "assistant"] * len(turns)
    if not turns or roles != in_turn[:len(turns)]:
        raise BadInput(f"roles are {roles[:6]}, expected user and assistant in turn, user first")
    context, first_question = split_turn(turns[0].text)
    rows = []
    for i in range(0, len(turns), 2):
        question = turns[i].text.strip() if i else first_question
        # The last question may have no answer, and others an empty one.
        answers = [turn.text for turn in turns[i + 1:i + 2] if turn.text.strip()]
        if question:
            rows.append({"context": context, "question": question, "answers": answers})
    return rows


def trl(row: dict) -> list[dict]:
    """TRL's preferences: texts, or messages with the prompt by itself or before both answers."""
    answers = []
    for key in ("chosen", "rejected"):
        value = row.get(key)
        # TRL's "standard" form has texts, its "conversational" form lists of messages.
        if isinstance(value, str):
            value = {"role": "assistant", "content": value}
        answers.append(turns_of(value))
    prompt = row.get("prompt")
    if prompt is None:
        # An "implicit" prompt: the turns that both answers begin with.
        prompt = answers[0][:-1]
    elif isinstance(prompt, str):
        prompt = [Turn("user", prompt)]
    else:
        prompt = turns_of(prompt)
    for turns in answers:
        alone = turns[:-1] in ([], prompt)
        if not turns or turns[-1].role != "assistant" or not alone:
            raise BadInput("expected chosen and rejected to be one assistant message after the "
                           "same prompt")
    roles = [turn.role for turn in prompt]
    # A pair's prompt is one user's turn: that is what the template puts around it in training.
    if roles not in (["user"], ["system", "user"]):
        raise BadInput(f"the prompt has the roles {roles[:6]}, expected one user turn (after a "
                       "system turn)")
    chosen, rejected = answers
    pair = {
        "prompt": prompt[-1].text,
        "chosen": chosen[-1].text,
        "rejected": [rejected[-1].text],
    }
    if len(prompt) == 2:
        pair["system"] = prompt[0].text
    return [pair]


class Turn(NamedTuple):
    """A message: its role (system, user, assistant) and text."""
    role: str
    text: str


def turns_of(messages: object) -> list[Turn]:
    """The turns of {"role", "content"} or {"from", "value"} messages."""
    names = {"human": "user", "gpt": "assistant"}
    if not isinstance(messages, list):
        messages = [messages]
    turns = []
    for message in messages:
        # ShareGPT's names beside OpenAI's: both are about.
        found = message if isinstance(message, dict) else {}
        role = found.get("role", found.get("from"))
        if isinstance(role, str):  # a file may say what cannot be hashed
            role = names.get(role, role)
        text = found.get("content", found.get("value"))
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise BadInput(f"a message is {repr(message)[:60]}, expected {{'role': user or "
                           "assistant, 'content': a text}")
        turns.append(Turn(role, text))
    return turns


def split_turn(text: str) -> tuple[str, str]:
    """(document, question) of a first user turn."""
    text = text.rstrip()
    breaks = [*EMPTY_LINE.finditer(text)]
    breaks = [*MARKED.finditer(text)] or breaks
    if breaks:
        last = breaks[-1]
        context = FRAME.sub("", text[:last.start()]).strip()
        question = text[last.end():].strip()
        if context and question and len(question) <= LONGEST_QUESTION:
            return context, question
    raise BadInput("the first user turn ends with no question, expected document, empty line, "
                   "question")


# ------------------------------------------------------------------------------ pairs -> TRL's rows

def trl_rows(path: str, most: int | None) -> Iterator[dict]:
    """TRL's rows of a pairs' file, one for each rejected answer, or for the first `most` alone.

    BadInput where the file's first line does not say what its token ids and questions stand in.
    """
    settings = settings_of(path, ("prompt_head", "prompt_tail", "n_chunks", "n_rejected"))
    # Another window than the run's matters to nobody here: TRL has one of its own.
    settings["window"] = sys.maxsize
    tokenizer = tokenizer_of(path, settings)
    for pair in load_pairs(path, settings, tokenizer):
        turns = prompt_turns(pair, settings, tokenizer)
        for text in pair["rejected"][:most]:
            yield trl_row(turns, pair["chosen"], text, tokenizer.template)


def prompt_turns(pair: dict, settings: dict, tokenizer: Tokenizer) -> list[Turn]:
    """A pair's prompt as messages: its system turn if it has one, and the user's turn."""
    head, tail = text_around(settings, pair["question"])
    ids = np.concatenate(pair["chunks"]).tolist()
    # All at once: the end of a chunk may be half a character.
    turns = [Turn("user", head + tokenizer.decode(ids) + tail)]
    if pair["system"]:
        turns.insert(0, Turn("system", pair["system"]))
    return turns


def trl_row(turns: list[Turn], chosen: str, rejected: str, template: str) -> dict:
    """A row in TRL's "conversational" form; in its "standard" form where no template is around."""
    if template == "plain":
        # Then there are no turns to speak of, and TRL would look for a chat template in vain.
        prompt = "\n\n".join(turn.text for turn in turns)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    prompt = [{"role": turn.role, "content": turn.text} for turn in turns]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def grouped(rows: Iterable[dict]) -> Iterator[dict]:
    """Pairs that follow each other with the same prompt and chosen answer, as one."""
    last = None
    for row in rows:
        same = last is not None and all(row.get(key) == last.get(key) for key in SHARED)
        # A row that is there twice stays two: one pair has no answer twice.
        if same and row["rejected"][0] not in last["rejected"]:
            last["rejected"] += row["rejected"]
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


# ----------------------------------------------------------------------------------------- command

FORMATS = {"longalpaca": longalpaca, "long-llm-data": long_llm_data, "trl": trl}
TO_TRL = {"to-trl": None, "to-trl-first": 1}  # how many of a pair's rejected answers; None: all
SHARED = ("prompt", "system", "chosen")       # what rows of one pair have in common


def convert(argv: list[str]) -> int:
    """python -m pairs convert FORMAT IN OUT: bad rows are named and left out."""
    if len(argv) != 3 or argv[0] not in [*FORMATS, *TO_TRL]:
        raise BadInput(f"expected: python -m pairs convert {'|'.join([*FORMATS, *TO_TRL])} IN OUT")
    form, path, out = argv
    if os.path.exists(out):
        raise BadInput(f"{out}: is already there, expected a name for a new file")
    if form in TO_TRL:
        rows = trl_rows(path, TO_TRL[form])
    else:
        rows = converted_rows(form, path)
    if form == "trl":
        rows = grouped(rows)
    try:
        write_rows(rows, out)
    except BadInput:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: cannot be converted into {out} ({e})") from e
    return 0


def write_rows(rows: Iterable[dict], out: str) -> None:
    """Write rows as a file, which appears whole or not at all; print how many."""
    written = 0
    answers = Counter()
    try:
        with open(out + ".tmp", "w", encoding="utf-8") as f:
            for row in rows:
                f.write(json.dumps(row) + "\n")
                written += 1
                # Of a ready pair in our form: the config has to ask for as many.
                if isinstance(row.get("rejected"), list) and isinstance(row["prompt"], str):
                    answers[len(row["rejected"])] += 1
        os.replace(out + ".tmp", out)
    finally:
        # Whatever ended it: half of a file is of no use to anybody.
        if os.path.exists(out + ".tmp"):
            os.remove(out + ".tmp")
    print(f"{out}: {written} rows")
    for n, rows in sorted(answers.items()):
        print(f"  {rows} of them have {n} rejected: n_rejected={n}")


def converted_rows(form: str, path: str) -> Iterator[dict]:
    """Rows of ours for what `path` names; what makes none is named and left out."""
    for name in files_of(path):
        for number, (raw, _) in enumerate(raw_rows(name), 1):
            if not raw.strip():
                continue
            try:
                rows = converted(form, name, raw)
            except BadInput as e:
                print(f"left out: {name}, line {number}: {e}", file=sys.stderr)
                continue
            yield from rows


def converted(form: str, name: str, raw: bytes) -> list[dict]:
    """Rows of ours for a row of a file. BadInput, without file and line, says why not."""
    row = parse(name, raw)
    if not isinstance(row, dict):
        raise BadInput(f"expected a JSON object, found {repr(row)[:40]}")
    rows = FORMATS[form](row)
    for row in rows:
        # What is wrong with it is said now, and not when the pairs are built.
        example_of(row)
    return rows
