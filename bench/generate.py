"""python -m bench generate: answers for pairs, greedy and without a stop token, against
transformers' generate.
"""
import statistics
from collections.abc import Callable

import torch

from bench.common import MODEL, in_new_process, seconds, set_up
from bench.step import hf_model
from checkpoint import load_pretrained
from configs import BadInput
from generate import generate

OPTIONS = dict(
    **MODEL,
    prompt=1024,             # longest prompt, in tokens; the shortest has half of it
    prompts=4,               # different prompts
    M=2,                     # answers to each
    answer=64,               # tokens of an answer
    repeats=3,               # processes for each way
)
WAYS = ("ours", "transformers")


def random_prompts(s: dict, vocab: int) -> list[list[int]]:
    """s["prompts"] different prompts of uneven length, each M times in a row, as pairs are
    built.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(s["prompt"] // 2, s["prompt"], s["prompts"]).int().tolist()
    prompts = []
    for length in lengths:
        prompt = torch.randint(3, vocab, (length,), generator=generator).tolist()
        prompts += [prompt] * s["M"]
    return prompts


def ours(s: dict, device: str) -> tuple[Callable, int]:
    """(a function that returns the answers, how many there are)."""
    model = load_pretrained(s["model"], getattr(torch, s["dtype"]), device)
    prompts = random_prompts(s, model.config.vocab_size)

    def answers():
        return generate(model, prompts, s["answer"])

    return answers, len(prompts)


def transformers(s: dict, device: str) -> tuple[Callable, int]:
    """The same with transformers: rows padded on the left, as decoders want it."""
    model = hf_model({**s, "checkpointing": False}, device).eval()
    model.config.use_cache = True
    model.generation_config.eos_token_id = None  # no answer ends early, as in ours
    prompts = random_prompts(s, model.config.vocab_size)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt):] = torch.tensor(prompt)
        mask[row, -len(prompt):] = 1
    ids = ids.to(device)
    mask = mask.to(device)

    def answers():
        rows = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=s["answer"],
            do_sample=False,
            pad_token_id=0,
        )
        return rows[:, longest:].tolist()

    return answers, len(prompts)


def measure(s: dict) -> dict:
    """The answers of one way, and the better of two times."""
    device = set_up(s)
    build = ours if s["way"] == "ours" else transformers
    write, n = build(s, device)
    answers = []

    def work():
        answers.append(write())

    # The first time warms up; on a quiet machine it may be the better one all the same.
    took = min(seconds(work, device), seconds(work, device))
    return {"answers": answers[-1], "seconds": took, "tokens": n * s["answer"]}


def run(options: dict) -> list[dict]:
    """Both ways in turn; printed, and a row for the JSON file."""
    runs = {"ours": [], "transformers": []}
    for _ in range(options["repeats"]):
        for way in WAYS:
            found = in_new_process({**options, "way": way, "measure": "generate"})
            if "error" in found:
                raise BadInput(found["error"])
            runs[way].append(found)
    row = compare(runs["ours"], runs["transformers"])
    for way in WAYS:
        took = statistics.median(row["seconds"][way])
        pace = runs[way][0]["tokens"] / took
        print(f"{way:12} {took:8.2f} s   {pace:8.1f} tokens/s")
    low, high = row["ratios"][0], row["ratios"][-1]
    middle = statistics.median(row["ratios"])
    print(f"transformers takes {middle:.2f} times as long ({low:.2f}..{high:.2f}); "
          f"{row['same']} of {row['of']} answers are the same")
    return [row]


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """Ratios of seconds, sorted, and how many answers of the first runs are the same."""
    ratios = []
    for our, their in zip(ours, theirs, strict=True):
        ratios.append(their["seconds"] / our["seconds"])
    same = 0
    for our, their in zip(ours[0]["answers"], theirs[0]["answers"], strict=True):
        same += our == their
    return {
        "ratios": sorted(ratios),
        "same": same,
        "of": len(ours[0]["answers"]),
        "seconds": {
            "ours": [found["seconds"] for found in ours],
            "transformers": [found["seconds"] for found in theirs],
        },
    }
