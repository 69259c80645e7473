"""One run: pairs, training, and every measurement, as one JSON line."""
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from checkpoint import load_pretrained, sha256
from configs import default_groups, load_config, read_json, write_json
from data import chunk, prompt_around
from evals.common import texts
from evals.perplexity import token_losses
from generate import generate
from model import Llama
from pairs.answers import is_right
from pairs.corpus import read_examples
from tokenizer import Tokenizer, load_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = os.path.join(ROOT, "out", "experiments")  # pairs, models and logs: not in the repository
BASE = os.path.join(ROOT, "experiments", "base.py")
TIMES = {104: 1, 232: 2, 488: 4, 1000: 8}  # windows of a context, by its tokens
PERPLEXITY_LENGTHS = (64, 1024)
PERPLEXITY_TOKENS = 2049          # of each of the world's texts


def run(difference: dict, seed: int) -> dict:
    """Train at a difference from base.py and measure: {column: value}. RuntimeError if it failed.

    Two keys are the runner's own: steps=0 measures without training, and "rope_scaling" goes into
    the model's config.json.
    """
    cfg = settings(difference, seed)
    name = digest({"difference": difference, "seed": seed})
    folder = os.path.join(WORK, name)
    line = {"seconds": {}}
    if cfg["steps"]:
        # Built apart from the run, so that cells that differ in training alone share them.
        cfg["pairs"] = shared_pairs(cfg, line["seconds"])
        line.update(train(cfg, folder, line["seconds"]))
        model_folder = os.path.join(folder, "hf")
    else:
        theta = {"rope_theta": cfg["rope_theta"]} if cfg["rope_theta"] else {}
        model_folder = with_rope(cfg["model"], theta)
    start = time.time()
    line.update(measure(model_folder, cfg))
    line["seconds"]["measure"] = round(time.time() - start, 1)
    line["cpu_seconds"] = cpu_seconds()
    line["machine"] = {
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": cfg["threads"],
        "torch": torch.__version__,
    }
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    line["commit"] = head.strip()
    # The exported weights are large and made again by the same run; its log and result.json stay.
    shutil.rmtree(os.path.join(folder, "hf"), ignore_errors=True)
    return line


def settings(difference: dict, seed: int) -> dict:
    """The whole config of a run."""
    words = [f"seed={seed}"]
    for key, value in difference.items():
        if key != "rope_scaling":
            words.append(f"{key}={value}")
    cfg = load_config([BASE, *words])
    cfg["model"] = os.path.join(ROOT, cfg["model"])
    cfg["examples"] = os.path.join(ROOT, cfg["examples"])
    if "rope_scaling" in difference:
        cfg["model"] = with_rope(cfg["model"], {"rope_scaling": difference["rope_scaling"]})
    return cfg


def with_rope(folder: str, changes: dict) -> str:
    """A copy of a model folder with changes in its config.json."""
    if not changes:
        return folder
    made = os.path.join(WORK, "models", digest({"weights": weights(folder), **changes}))
    with locked(made):
        if not os.path.exists(made):
            shutil.copytree(folder, made + ".new")
            config = read_json(os.path.join(folder, "config.json"))
            write_json({**config, **changes}, os.path.join(made + ".new", "config.json"))
            os.replace(made + ".new", made)
    return made


def weights(folder: str) -> str:
    """What tells models apart: nothing that another model made is taken up."""
    return sha256(os.path.join(folder, "model.safetensors"))


def digest(value: dict) -> str:
    """A name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class locked:
    """Only one process at a time makes what lies at a path."""

    def __init__(self, path: str):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path = path + ".lock"

    def __enter__(self):
        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error):
        self.file.close()


def command(words: list[str], cfg: dict, log: str) -> None:
    """A command of the repository with every setting spelled out, its output in a log."""
    line = [sys.executable, *words, BASE]
    for group in default_groups().values():
        line += [f"{key}={cfg[key]}" for key in group]
    with open(log, "a") as f:
        done = subprocess.run(line, cwd=ROOT, stdout=f, stderr=f)
    if done.returncode:
        raise RuntimeError(f"{words[-1]} failed: see {log}")


def shared_pairs(cfg: dict, seconds: dict) -> str:
    """The pairs of these settings, built by the first run that needs them."""
    start = time.time()
    build = {key: cfg[key] for key in default_groups()["build"]}
    build["weights"] = weights(cfg["model"])
    # The rotary scaling is in a copy's config.json; its folder's name tells it.
    build["folder"] = os.path.basename(cfg["model"])
    path = os.path.join(WORK, "pairs", digest(build) + ".jsonl")
    with locked(path):
        # A file without its mark was cut short: the build goes on where it ended.
        if not os.path.exists(path + ".done"):
            command(["-m", "pairs"], {**cfg, "pairs": path, "workers": 1}, path + ".log")
            open(path + ".done", "w").close()
            seconds["pairs"] = round(time.time() - start, 1)
    return path


def train(cfg: dict, folder: str, seconds: dict) -> dict:
    """Run train_logo.py, and read what it says of held-out pairs, time and memory."""
    os.makedirs(folder, exist_ok=True)
    start = time.time()
    log = os.path.join(folder, "log")
    command(["train_logo.py"], {**cfg, "out": folder, "fresh_questions": 0}, log)
    seconds["train"] = round(time.time() - start, 1)
    result = read_json(os.path.join(folder, "result.json"))
    before = result["before"]["held_out"]
    after = result["after"]["held_out"]
    return {
        "margin": round(after["rewards/margins"], 4),
        "accuracy": round(after["rewards/accuracies"], 4),
        "chosen_before": round(before["logps/chosen"], 4),
        "chosen_after": round(after["logps/chosen"], 4),
        "peak_memory": result["peak_memory"],
    }


def cpu_seconds() -> float:
    """What this process and its children used. Wall clocks of runs that share cores say little."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return round(total, 1)


def processor() -> str:
    """The processor's name, where the system tells it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for row in f:
                if row.startswith("model name"):
                    return row.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------- what is measured

def measure(folder: str, cfg: dict) -> dict:
    """Columns right_1x .. and invented_1x .. (shares), ppl_64 and ppl_1024, of a model folder."""
    torch.set_num_threads(cfg["threads"])
    model = load_pretrained(folder, torch.float32, "cpu")
    tokenizer = load_tokenizer(folder, cfg["template"])
    found = {}
    for size in cfg["fresh_sizes"]:
        times = TIMES[size]
        right = 0
        invented = 0
        for example, answer in answered(model, tokenizer, cfg, size):
            right += is_right(answer, example["answers"])
            invented += invents(answer, example["context"])
        found[f"right_{times}x"] = right / cfg["fresh_questions"]
        found[f"invented_{times}x"] = invented / cfg["fresh_questions"]
    for length in PERPLEXITY_LENGTHS:
        losses = []
        # A mean over all tokens, as token_losses gives them, then exp: not a mean of perplexities.
        for text in texts(cfg["examples"]):
            ids = tokenizer.encode(text)[:PERPLEXITY_TOKENS]
            losses.append(token_losses(model, ids, length, length // 2))
        found[f"ppl_{length}"] = round(math.exp(torch.cat(losses).mean()), 4)
    return found


def answered(model: Llama, tokenizer: Tokenizer, cfg: dict,
             size: int) -> Iterator[tuple[dict, str]]:
    """(example, greedy answer) of fresh questions over `size` tokens, at ordinary positions."""
    examples = read_examples(cfg, "fresh", size)
    prompts = []
    for example in examples:
        prefix, suffix, stops = prompt_around(cfg, tokenizer, example["question"])
        chunks = chunk(example["context"], tokenizer, cfg["chunk_size"])
        prompts.append(sum(chunks, prefix) + suffix)
    answers = generate(
        model,
        prompts,
        cfg["max_new_tokens"],
        stop_ids=stops,
        batch_tokens=cfg["batch_tokens"],
    )
    for example, ids in zip(examples, answers):
        # An answer that never stopped keeps its last token.
        said = ids[:-1] if ids[-1] in stops else ids
        yield example, tokenizer.decode(said)


def invents(answer: str, context: str) -> bool:
    """Whether an answer says something of somebody that its document does not say.

    The world tells a fact in one sentence, and answers repeat such sentences: one that is not in
    the document gives a person a job or a city that the document does not give.
    """
    # Whole sentences, not words: "Rosa sings" is invented where it is Ida who sings.
    told = set(sentences(context))
    return any(sentence not in told for sentence in sentences(answer))


def sentences(text: str) -> list[str]:
    """The sentences of a text, without full stops."""
    return [part.strip() for part in text.split(".") if part.strip()]
