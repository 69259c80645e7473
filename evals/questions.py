"""Right answers on a training config's fresh questions, as train_logo.py counts them before and after."""
import time

import torch
import torch.distributed as dist

from configs import BadInput, load_config
from data import chunk, prompt_around
from evals.common import Subject
from generate import generate
from pairs.answers import is_right
from pairs.corpus import read_examples


def count_right(model, tokenizer, cfg, size, rank=0, world=1):
    """(right, asked): fresh questions over a context of `size` whose generated answer contains a reference answer.

    With several processes each asks its share and all return the sum.
    """
    examples = read_examples(cfg, "fresh", size)
    examples = [examples[i] for i in range(rank, len(examples), world)]
    if not all(example.get("question") and example.get("answers") for example in examples):
        raise BadInput(f"{cfg['examples']}: some examples have no question or no answers, fresh_questions needs them")
    prompts, stops = [], ()
    for example in examples:
        prefix, suffix, stops = prompt_around(cfg, tokenizer, example["question"])
        chunks = chunk(example["context"], tokenizer, cfg["chunk_size"])
        prompts.append(prefix + [t for c in chunks for t in c] + suffix)
    right = 0
    for i in range(0, len(prompts), cfg["fresh_batch"]):
        answers = generate(model, prompts[i:i + cfg["fresh_batch"]], cfg["max_new_tokens"], stop_ids=stops)
        right += sum(is_right(tokenizer.decode(ids), example["answers"]) for ids, example in zip(answers, examples[i:]))
    counts = torch.tensor([right, len(examples)])
    if world > 1:
        counts = counts.to(model.lm_head.weight.device)
        dist.all_reduce(counts)
    return tuple(counts.tolist())


def questions(folder, argv):
    cfg = load_config(argv)
    if not cfg["fresh_sizes"] or not cfg["fresh_questions"]:
        raise BadInput("fresh_sizes and fresh_questions are empty: nothing to ask")
    torch.set_num_threads(cfg["threads"] or torch.get_num_threads())
    subject = Subject(folder, cfg)
    for size in cfg["fresh_sizes"]:
        start = time.time()
        right, asked = count_right(subject.model, subject.tokenizer, cfg, size)
        print(f"context {size:6d}  right {right:4d} of {asked:4d}  {right / asked:.3f}  {time.time() - start:.1f}s")
