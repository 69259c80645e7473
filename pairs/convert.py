"""Known forms of corpora, into rows of ours.

    python -m pairs convert longalpaca     IN OUT    {"instruction", "input", "output"}
    python -m pairs convert long-llm-data  IN OUT    {"conversations": [{"role", "content"}, ...]}
    python -m pairs convert trl            IN OUT    {"prompt", "chosen", "rejected"} of messages

IN is what `examples` may be (a file, a folder, -), OUT a new .jsonl. The first two have the
document in the first user turn with a question behind it; each question of a conversation becomes a
row.
"""
import json
import os
import re
import sys

from configs import BadInput
from pairs.corpus import files_of, parse, raw_rows, text_at

# LongAlpaca frames its documents. long-llm-data sets the question apart by a rule of hyphens, or by
# an empty line alone, which a document has as well: so the last of the surest kind counts.
FRAME = re.compile(r"\A(?:Below is|There are two) [^\n]*\n(?:\s*The (?:first )?paper begins\.\s*)?")
MARKED = re.compile(r"\n\s*Now the (?:second )?(?:paper|material|book) ends\.|\n-{8,}\n")
EMPTY_LINE = re.compile(r"\n\s*\n")
LONGEST_QUESTION = 4000  # characters; beyond it, it is the document's last paragraph


def longalpaca(row: dict) -> list[dict]:
    """{"instruction", "input", "output"}: a conversation of one turn."""
    text = text_at(row, "instruction")
    if row.get("input"):
        text += "\n\n" + text_at(row, "input")
    context, question = split_turn(text)
    answers = [text_at(row, "output")] if row.get("output") else []
    return [{"context": context, "question": question, "answers": answers}]


def long_llm_data(row: dict) -> list[dict]:
    """{"conversations"} or {"messages"}: a question in the first user turn, more of them after
    it."""
    turns = turns_of(row.get("conversations") or row.get("messages"))
    turns = [(role, text) for role, text in turns if role != "system"]
    roles = [role for role, _ in turns]
    if not turns or roles != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise BadInput(f"roles are {roles[:6]}, expected user and assistant in turn, user first")
    context, question = split_turn(turns[0][1])
    questions = [question] + [text for _, text in turns[2::2]]
    answers = [text for _, text in turns[1::2]] + [""]  # the last question may have none
    rows = []
    for question, answer in zip(questions, answers):
        if question.strip():
            right = [answer] if answer.strip() else []
            rows.append({"context": context, "question": question.strip(), "answers": right})
    return rows


def trl(row: dict) -> list[dict]:
    """TRL's preferences: messages, with the prompt by itself or at the head of both answers; or
    texts."""
    answers = []
    for key in ("chosen", "rejected"):
        value = row.get(key)
        if isinstance(value, str):
            answers.append([("assistant", value)])
        else:
            answers.append(turns_of(value))
    prompt = row.get("prompt")
    if prompt is None:
        prompt = answers[0][:-1]
    else:
        prompt = [("user", text_at(row, "prompt"))] if isinstance(prompt, str) else turns_of(prompt)
    for turns in answers:
        if not turns or turns[-1][0] != "assistant" or turns[:-1] not in ([], prompt):
            raise BadInput("expected chosen and rejected to be one assistant message after the "
                           "same prompt")
    roles = [role for role, _ in prompt]
    if roles not in (["user"], ["system", "user"]):
        raise BadInput(f"the prompt has the roles {roles[:6]}, expected one user turn (after a "
                       "system turn)")
    pair = {"prompt": prompt[-1][1], "chosen": answers[0][-1][1], "rejected": answers[1][-1][1]}
    if len(prompt) == 2:
        pair["system"] = prompt[0][1]
    return [pair]


def turns_of(messages: object) -> list[tuple[str, str]]:
    """[(role, text), ...] from {"role", "content"} or {"from", "value"}; roles: system, user,
    assistant."""
    names = {"human": "user", "gpt": "assistant"}
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        found = message if isinstance(message, dict) else {}
        role = found.get("role", found.get("from"))
        role = names.get(role, role)
        text = found.get("content", found.get("value"))
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise BadInput(f"a message is {repr(message)[:60]}, expected {{'role': user or "
                           "assistant, 'content': a text}")
        turns.append((role, text))
    return turns


def split_turn(text: str) -> tuple[str, str]:
    """(document, question) of a first user turn."""
    breaks = list(MARKED.finditer(text.rstrip())) or list(EMPTY_LINE.finditer(text.rstrip()))
    if breaks:
        context = FRAME.sub("", text[:breaks[-1].start()]).strip()
        question = text[breaks[-1].end():].strip()
        if context and question and len(question) <= LONGEST_QUESTION:
            return context, question
    raise BadInput("the first user turn ends with no question, expected document, empty line, "
                   "question")


FORMATS = {"longalpaca": longalpaca, "long-llm-data": long_llm_data, "trl": trl}


def convert(argv: list[str]) -> int:
    """python -m pairs convert FORMAT IN OUT: rows that cannot be converted are named and left
    out."""
    if len(argv) != 3 or argv[0] not in FORMATS:
        raise BadInput(f"expected: python -m pairs convert {'|'.join(FORMATS)} IN OUT")
    form, path, out = argv
    if os.path.exists(out):
        raise BadInput(f"{out}: is already there, expected a name for a new file")
    written = 0
    with open(out + ".tmp", "w", encoding="utf-8") as f:
        for name in files_of(path):
            for number, (raw, _) in enumerate(raw_rows(name), 1):
                if not raw.strip():
                    continue
                try:
                    row = parse(name, raw)
                    if not isinstance(row, dict):
                        raise BadInput(f"expected a JSON object, found {repr(row)[:40]}")
                    rows = FORMATS[form](row)
                except BadInput as e:
                    print(f"left out: {name}, line {number}: {e}", file=sys.stderr)
                    continue
                f.writelines(json.dumps(row) + "\n" for row in rows)
                written += len(rows)
    os.replace(out + ".tmp", out)
    print(f"{out}: {written} rows")
    return 0
