"""Right answers on a training config's fresh questions, as train_logo.py counts them."""
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from checkpoint import all_gather
from configs import BadInput, check_settings, load_config, run_folder, saving, write_json
from console import Progress
from data import chunk, prompt_around
from generate import generate
from model import Llama
from pairs.answers import is_right
from pairs.corpus import read_examples
from tokenizer import Tokenizer

SHOWN = 3  # questions whose answers are shown


class Count(NamedTuple):
    """What came of the fresh questions over contexts of one size."""
    right: int
    asked: int
    said: list[dict]  # of the first ones: {"context", "question", "answers", "said", "right"}


def count_right(model: Llama, tokenizer: Tokenizer, cfg: dict, size: int, rank: int = 0,
                world: int = 1) -> Count:
    """Ask fresh questions over a context of `size`. Right is an answer, generated greedily, that
    contains a reference answer.

    size: as context_size. With several processes each asks its share and all return the same.
    """
    fresh = read_examples(cfg, "fresh", size)
    examples = [fresh[i] for i in range(rank, len(fresh), world)]
    found = []
    for example, answer in answered(model, tokenizer, cfg, examples):
        found.append({
            "context": size,
            "question": example["question"],
            "answers": example["answers"],
            "said": answer,
            "right": is_right(answer, example["answers"]),
        })
    right = sum(each["right"] for each in found)
    if world == 1:
        return Count(right, len(found), found[:SHOWN])

    # A process may have no example at all. It takes part in the sum all the same.
    counts = torch.tensor([right, len(found)]).to(model.lm_head.weight.device)
    dist.all_reduce(counts)
    # Of process r the first is question r, its second r + world.
    shares = all_gather(found[:SHOWN])
    said = [shares[i % world][i // world] for i in range(min(SHOWN, int(counts[1])))]
    return Count(*counts.tolist(), said)


def answered(model: Llama, tokenizer: Tokenizer, cfg: dict, examples: list[dict],
             temperature: float = 0.0, generator: torch.Generator | None = None
             ) -> Iterator[tuple[dict, str]]:
    """(example, the model's answer) of each, at ordinary positions; temperature 0 is greedy."""
    prompts = []
    stops = []
    for example in examples:
        if not example.get("question") or not example.get("answers"):
            raise BadInput(f"{cfg['examples']}: some examples have no question or no answers, "
                           "fresh_questions needs them")
        prefix, suffix, stops = prompt_around(cfg, tokenizer, example["question"])
        # In chunks, as in training: a border between tokens may lie elsewhere in one long text.
        ids = []
        for piece in chunk(example["context"], tokenizer, cfg["chunk_size"]):
            ids += piece
        prompts.append(prefix + ids + suffix)

    with Progress("answers to fresh questions", len(prompts)) as progress:
        answers = generate(
            model,
            prompts,
            cfg["max_new_tokens"],
            temperature,
            stop_ids=stops,
            generator=generator,
            batch_tokens=cfg["batch_tokens"],
            progress=progress.update,
        )
    for example, ids in zip(examples, answers):
        yield example, tokenizer.decode(ids)


def questions(folder: str, argv: list[str]) -> None:
    """The command: argv is a training config and its key=value words."""
    # The trainer imports this file for count_right alone.
    from evals.common import Subject, area_by_length, print_row, share
    if not argv or "=" in argv[0]:
        # No config of our choice stands in: its questions would be asked about another world.
        raise BadInput("expected: python -m evals questions MODEL CONFIG [key=value]")
    cfg = load_config(argv)
    check_settings(cfg)
    if not cfg["fresh_sizes"] or not cfg["fresh_questions"]:
        raise BadInput("fresh_sizes and fresh_questions are empty: nothing to ask")
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    subject = Subject(folder, cfg)
    table = []
    for size in cfg["fresh_sizes"]:
        start = time.time()
        right, asked, _ = count_right(subject.model, subject.tokenizer, cfg, size)
        print_row(
            subject.name,
            f"context {size:6d}",
            f"right {share(right, asked)}",
            f"{time.time() - start:.1f}s",
        )
        row = {"model": subject.name, "size": size, "right": right / asked, "n": asked}
        table.append(row)
    area = area_by_length(cfg["fresh_sizes"], [row["right"] for row in table])
    if len(table) > 1:
        print_row(subject.name, f"area {area:.3f}")
    # Beside what a run's own evaluations wrote.
    out = os.path.join(run_folder(cfg), "eval")
    path = os.path.join(out, "questions.json")
    with saving(path):
        os.makedirs(out, exist_ok=True)
        write_json({"table": table, "area": area}, path)
    print(path)
