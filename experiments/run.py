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

import torch

from checkpoint import sha256
from configs import BadInput, default_groups, load_config, nearest, read_json, write_json
from experiments.measure import measure
from experiments.measure_smollm2 import check_smollm2, measure_smollm2
from experiments.remade import KEYS as REMADE_KEYS
from experiments.remade import count_own, remake
from guard import lock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = os.path.join(ROOT, "out", "experiments")  # pairs, models and logs: not in the repository
# What the runs of a world share, and how their models are measured.
BASES = {
    "tiny": os.path.join(ROOT, "experiments", "base.py"),
    "smollm2": os.path.join(ROOT, "experiments", "base_smollm2.py"),
}
MEASURES = {"tiny": measure, "smollm2": measure_smollm2}
# Of a difference, beside the keys of configs/default.py.
OWN_KEYS = ("world", "rope_scaling", "variant", "rounds", "policy", *REMADE_KEYS)
# What own wrong answers depend on, beside the pairs.
PLACED_BY = ("window", "positions", "sparse_share", "draws", "rope_theta", "yarn_factor",
             "held_out")


def run(difference: dict, seed: int) -> dict:
    """Train at a difference from a base and measure: {column: value}. RuntimeError if it failed.

    A difference has keys of configs/default.py, those of remade.py, and of the runner's own:

        world: NAME           whose base file it differs from: tiny, if it does not say, or smollm2
        steps: 0              measure without training
        rope_scaling: {...}   of the model's config.json
        variant: NAME         one of variants.py in the trainer's place
        rounds: 2             the same once more, from the aligned model and with its answers
        policy: {difference}  the answers are those of the model that this difference makes
    """
    cfg = settings(difference, seed)
    if world_of(difference) == "smollm2":
        check_smollm2()
    folder = os.path.join(WORK, digest({"difference": difference, "seed": seed}))
    # The same run may stand in two lists that are at work.
    with locked(folder):
        return trained_and_measured(difference, seed, cfg, folder)


def trained_and_measured(difference: dict, seed: int, cfg: dict, folder: str) -> dict:
    """What run() does, while no other process does the same."""
    # Before the hours: another commit may be checked out meanwhile.
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    line = {"seconds": {}, "commit": head.strip()}
    if cfg["steps"]:
        model_folder, found = train(difference, seed, folder, line["seconds"])
        line.update(found)
    else:
        theta = {}
        if cfg["rope_theta"]:
            theta["rope_theta"] = cfg["rope_theta"]
        if cfg["yarn_factor"]:
            # The trainer puts it into the export, and here is none.
            raise BadInput("yarn_factor with steps=0, expected rope_scaling")
        model_folder = with_rope(cfg["model"], theta)
    start = time.time()
    # Where all seeds have the pairs of one, its questions are those that no pair has seen.
    cfg.update(difference.get("built", {}))
    line.update(MEASURES[world_of(difference)](model_folder, cfg))
    line["seconds"]["measure"] = round(time.time() - start, 1)
    line["cpu_seconds"] = cpu_seconds()
    line["machine"] = {
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": cfg["threads"],
        "torch": torch.__version__,
    }
    # The exported weights are large and made again by the same run; its log and result.json stay.
    shutil.rmtree(os.path.join(folder, "hf"), ignore_errors=True)
    return line


def world_of(difference: dict) -> str:
    """Which of BASES a difference is from."""
    return difference.get("world", "tiny")


def settings(difference: dict, seed: int) -> dict:
    """The whole config of a run."""
    of_pairs = default_groups()["build"]
    for key in difference.get("built", {}):
        if key not in of_pairs:
            raise BadInput(f"built: {key!r} is no key of the pairs{nearest(key, of_pairs)}")
    words = [f"seed={seed}"]
    for key, value in difference.items():
        if key not in OWN_KEYS:
            words.append(f"{key}={value}")
    cfg = load_config([BASES[world_of(difference)], *words])
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
            half_made = made + ".new"
            # A killed run's may be there.
            shutil.rmtree(half_made, ignore_errors=True)
            shutil.copytree(folder, half_made)
            config = read_json(os.path.join(folder, "config.json"))
            write_json({**config, **changes}, os.path.join(half_made, "config.json"))
            os.replace(half_made, made)
    return made


def weights(folder: str) -> str:
    """What tells models apart: nothing that another model made is taken up."""
    return sha256(os.path.join(folder, "model.safetensors"))


def digest(value: dict) -> str:
    """A name for a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    # A config file has to be named. It leaves nothing to say: all of its keys follow.
    line = [sys.executable, *words, BASES["tiny"]]
    for group in default_groups().values():
        for key in group:
            line.append(f"{key}={cfg[key]}")
    with open(log, "a") as f:
        done = subprocess.run(line, cwd=ROOT, stdout=f, stderr=f)
    if done.returncode:
        raise RuntimeError(f"{words[-1]} failed: see {log}")


def shared_pairs(cfg: dict, seconds: dict) -> str:
    """The pairs of these settings, built by the first run that needs them.

    Their name tells settings and weights, not code: where that builds others than before, the
    folder has to be emptied.
    """
    start = time.time()
    build = {"weights": weights(cfg["model"])}
    for key in default_groups()["build"]:
        build[key] = cfg[key]
    # The rotary scaling is in a copy's config.json; its folder's name tells it.
    build["folder"] = os.path.basename(cfg["model"])
    path = os.path.join(WORK, "pairs", digest(build) + ".jsonl")
    with locked(path):
        # A file without its mark was cut short: the build goes on where it ended.
        if not os.path.exists(path + ".done"):
            here = {**cfg, "pairs": path, "workers": 1}
            command(["-m", "pairs"], here, path + ".log")
            open(path + ".done", "w").close()
            seconds["pairs"] = round(time.time() - start, 1)
    return path


def pairs_of(cfg: dict, difference: dict, seed: int, seconds: dict) -> str:
    """The pairs' file of a run: a shared one, or one made of it."""
    built = {**cfg, **difference.get("built", {})}
    if "policy" in difference:
        built["model"] = aligned(difference["policy"], seed)
    shared = shared_pairs(built, seconds)
    if built["model"] == cfg["model"] and not set(difference) & set(REMADE_KEYS):
        return shared
    if difference.get("whole"):
        cfg["n_chunks"] = math.ceil(cfg["context_size"] / cfg["chunk_size"])
    changes = {}
    for key in REMADE_KEYS:
        if key in difference:
            changes[key] = difference[key]
    made_by = {**changes, "weights": weights(cfg["model"])}
    for key in [*default_groups()["build"], *PLACED_BY]:
        made_by[key] = cfg[key]
    path = shared.removesuffix(".jsonl") + f"-{digest(made_by)}.jsonl"
    with locked(path):
        if not os.path.exists(path):
            start = time.time()
            remake(shared, path + ".new", cfg, changes)
            os.replace(path + ".new", path)
            seconds["remake"] = round(time.time() - start, 1)
    return path


def aligned(difference: dict, seed: int) -> str:
    """The model folder that a run makes, which is kept."""
    made_by = {"difference": difference, "seed": seed}
    made_by["weights"] = weights(settings(difference, seed)["model"])
    kept = os.path.join(WORK, "models", digest(made_by))
    with locked(kept):
        if not os.path.exists(kept):
            export, _ = train(difference, seed, kept + ".run", {})
            os.replace(export, kept)
    return kept


def train(difference: dict, seed: int, folder: str, seconds: dict) -> tuple[str, dict]:
    """Run train_logo.py: (the export, what it says of held-out pairs and memory)."""
    cfg = settings(difference, seed)
    if difference.get("rounds", 1) > 1:
        first = {**difference, "rounds": difference["rounds"] - 1}
        # The export has the longer RoPE in its config.json.
        cfg["model"] = aligned(first, seed)
        cfg["rope_theta"] = 0.0
        cfg["yarn_factor"] = 0.0
    # Built apart from the run, so that cells that differ in training alone share them.
    cfg["pairs"] = pairs_of(cfg, difference, seed, seconds)
    # A run that was stopped has left a checkpoint. It is done anew, as its line names one commit;
    # but not under a trainer that a kill of this process's forerunner has left at work.
    if os.path.exists(folder):
        lock(folder).close()
        shutil.rmtree(folder)
    os.makedirs(folder)
    start = time.time()
    script = ["train_logo.py"]
    if "variant" in difference:
        script = ["-m", "experiments.variants", difference["variant"]]
    # Questions are asked of the export, below, by more than the trainer counts.
    cfg.update(out=folder, fresh_questions=0)
    command(script, cfg, os.path.join(folder, "log"))
    seconds["train"] = round(time.time() - start, 1)
    found = of_result(read_json(os.path.join(folder, "result.json")))
    if "negatives" in difference:
        found["own"] = count_own(cfg["pairs"])
    return os.path.join(folder, "hf"), found


def of_result(result: dict) -> dict:
    """The columns that a run's result.json gives."""
    before = result["before"]["held_out"]
    after = result["after"]["held_out"]
    return {
        "pairs": result["pairs"],
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
        total += used.ru_utime
        total += used.ru_stime
    return round(total, 1)


def processor() -> str:
    """The processor's name, where the system tells it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for row in f:
                if row.startswith("model name"):
                    _, _, name = row.partition(":")
                    return name.strip()
    return platform.processor() or platform.machine()
