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
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt):] = torch.tensor(prompt)
        mask[i, longest - len(prompt):] = 1
    ids = ids.to(device)
    mask = mask.to(device)

    def answers():
        rows = model.generate(ids, attention_mask=mask, max_new_tokens=s["answer"],
                              do_sample=False, pad_token_id=0)
        return rows[:, longest:].tolist()

    return answers, len(prompts)


def measure(s: dict) -> dict:
    """The answers of one way, and the better of two times."""
    device = set_up(s)
    build = ours if s["way"] == "ours" else transformers
    write, n = build(s, device)
    answers = []
    took = [seconds(lambda: answers.append(write()), device) for _ in range(2)]
    return {"answers": answers[-1], "seconds": min(took), "tokens": n * s["answer"]}


def run(options: dict) -> list[dict]:
    runs = {way: [] for way in WAYS}
    for _ in range(options["repeats"]):
        for way in WAYS:
            found = in_new_process({**options, "way": way, "measure": "generate"})
            if "error" in found:
                raise BadInput(found["error"])
            runs[way].append(found)
    ratios = []
    for our, their in zip(runs["ours"], runs["transformers"], strict=True):
        ratios.append(their["seconds"] / our["seconds"])
    ratios.sort()
    same = 0
    our_answers = runs["ours"][0]["answers"]
    for our, their in zip(our_answers, runs["transformers"][0]["answers"], strict=True):
        same += our == their
    for way in WAYS:
        took = statistics.median(found["seconds"] for found in runs[way])
        print(f"{way:12} {took:8.2f} s   {runs[way][0]['tokens'] / took:8.1f} tokens/s")
    print(f"transformers takes {statistics.median(ratios):.2f} times as long "
          f"({ratios[0]:.2f}..{ratios[-1]:.2f}); {same} of {len(our_answers)} answers are the same")
    took = {way: [found["seconds"] for found in runs[way]] for way in WAYS}
    return [{"ratios": ratios, "same": same, "of": len(our_answers), "seconds": took}]
