"""What keeps a run from harm. Nothing in here is about training: a first reading can do without it.

    init_processes, make_mesh, leave    processes that may wait for hours, and end without a crash
    on_error                            one line says what was wrong, where it is seen
    lock                                one run at a time in a folder
    check_*, save_source                what must hold before work begins; what made the run
    StopSignals                         SIGTERM and Ctrl-C end a run after a step, with a checkpoint
    FaultWatch                          ends a run that is beyond help
    append_metrics, keep_metrics        metrics.jsonl holds every step once, whatever happened
    evaluate_checkpoint                 a config's `evals` on a checkpoint

A file of its own, since a script is read from the top, and none of this comes first to a reader.
"""
import fcntl
import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from typing import IO

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from checkpoint import read_adapter
from configs import (
    BadInput,
    default_groups,
    exit_on_bad_input,
    with_arguments,
    write_json,
)
from model import LlamaConfig

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = timedelta(hours=24)  # rank 0 builds pairs, or evaluates, for hours while others wait
FAULTY_STEPS = 3  # in a row: then it is not a pair that is at fault


# --------------------------------------------------------------------------------------- processes

def init_processes(device: torch.device) -> None:
    """The default process group. A lone process, without torchrun, needs no rendezvous."""
    alone = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, **alone)
    sys.excepthook = on_error  # in front of what init_process_group has put there


def make_mesh(device_type: str, world: int, shard_size: int) -> DeviceMesh:
    """All processes as one dimension, or ("replicate", "shard") where fewer share the weights.

    Weights are sharded inside a node and replicated across, so gathering stays off the slow wires.
    The two groups are made by hand: those that init_device_mesh makes would time out after half an
    hour, whatever the default group was given.
    """
    if shard_size == world:
        return dist.init_device_mesh(device_type, (world,))
    ranks = torch.arange(world).view(world // shard_size, shard_size)
    shard, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=PATIENCE)
    replicate, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=PATIENCE)
    return DeviceMesh.from_group([replicate, shard], device_type, mesh=ranks,
                                 mesh_dim_names=("replicate", "shard"))


def leave(code: int) -> None:
    """End this process, without the interpreter's own end.

    gloo's threads outlive destroy_process_group, and one that lets go of a tensor while Python is
    being taken down aborts the process (PyTorch issue 190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_error(kind, error, trace) -> None:
    """sys.excepthook of a run: bad input and Ctrl-C are one line each; every error ends it."""
    if issubclass(kind, KeyboardInterrupt):
        if int(os.environ.get("RANK", "0")) == 0:
            print("interrupted: the same command goes on from what is written "
                  "(with resume=auto, where there is a step_ folder)", file=sys.stderr)
        leave(130)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        error = tell_torchrun(kind, error)
    exit_on_bad_input(kind, error, trace)
    leave(1)


def tell_torchrun(kind, error) -> Exception:
    """The error, with a word on what follows it: torchrun adds some 25 lines of its own.

    torchrun ends its report with what it finds in a file that it has named, so that the cause
    stands in the last lines as well, not only far above them.
    """
    message = "".join(traceback.format_exception_only(kind, error)).strip()
    if issubclass(kind, BadInput):
        message = (f"{error} (this is the cause; torchrun's own lines only say that a process has "
                   "ended. One process does without them: python train_logo.py)")
        error = BadInput(message)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as f:
            json.dump({"message": f"error: {message}", "timestamp": int(time.time())}, f)
    return error


# ------------------------------------------------------------------------------- before work begins

def lock(folder: str) -> IO:
    """The run's folder, made and locked while the file that this returns is open.

    A killed torchrun can leave its processes at work; two runs in a folder would ruin both.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        held = open(os.path.join(folder, ".lock"), "w")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise BadInput(f"{folder}: another run is at work here") from e
    except OSError as e:
        raise BadInput(f"{folder}: cannot be written ({e.strerror})") from e
    return held


def check_resumable(resumed: str, state: dict, cfg: dict) -> None:
    """Keys of the groups paths and run may change when a run is resumed, no others."""
    groups = default_groups()
    for key in [*groups["build"], *groups["train"]]:
        found = state["config"].get(key)
        if found != cfg[key]:
            raise BadInput(f"{resumed}: was saved with {key}={found!r}, now it is {cfg[key]!r}: "
                           "resume with the old value, or name another out=")


def check_adapter(cfg: dict, config: LlamaConfig) -> None:
    """An adapter to go on from has this run's LoRA."""
    if not cfg["adapter"]:
        return
    found = read_adapter(cfg["adapter"], config)
    for key in ("lora_r", "lora_alpha"):
        if found[key] != cfg[key]:
            raise BadInput(f"{cfg['adapter']}: was made with {key}={found[key]}, "
                           f"this run has {key}={cfg[key]}")


def check_evals(commands: list[str], known: dict[str, dict]) -> None:
    """Commands of python -m evals, said wrong, would fail hours later, one at each checkpoint.

    known: {command: its options with their defaults}.
    """
    for text in commands:
        try:
            command, *words = shlex.split(text)
            if command not in known:
                raise BadInput(f"unknown command, expected one of {', '.join(known)}")
            with_arguments(known[command], words)
        except ValueError as e:  # BadInput is one; shlex's, of a quote without its partner, too
            raise BadInput(f"evals: {text!r}: {e}") from e


def save_source(folder: str, cfg: dict) -> None:
    """What made this run: config.json, and source/ with the code."""
    source = os.path.join(folder, "source")
    os.makedirs(source, exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(HERE), "*.py")):
        shutil.copy(path, source)
    shutil.copy(os.path.join(HERE, "configs", "default.py"), source)
    write_json(cfg, os.path.join(folder, "config.json"))


# ----------------------------------------------------------------------------------------- signals

class StopSignals:
    """SIGTERM and SIGINT (Ctrl-C), noted from here on instead of ending the process."""

    def __init__(self):
        self.received = []
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        self.received.append(number)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process has had one: all of them stop after the same step."""
        count = torch.tensor(len(self.received), device=device)
        dist.all_reduce(count)
        return bool(count)

    def release(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class FaultWatch:
    """A pair that is not finite is left out. Several steps in a row that had one are another thing:
    weights that have run away, which no checkpoint should hold."""

    def __init__(self):
        self.in_a_row = 0

    def watch(self, metrics: dict) -> None:
        self.in_a_row = self.in_a_row + 1 if "skipped" in metrics else 0
        if self.in_a_row == FAULTY_STEPS:
            raise BadInput(f"step {metrics['step']}: in {FAULTY_STEPS} steps in a row a loss or a "
                           f"gradient was not finite, now of the pairs {metrics['skipped']}: lower "
                           "lr, or look at these pairs")


# ----------------------------------------------------------------------------------- metrics.jsonl

def append_metrics(folder: str, metrics: dict) -> None:
    """Append a step's line; one that cannot be written whole is taken back, with a warning."""
    path = os.path.join(folder, "metrics.jsonl")
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(metrics) + "\n")
    except OSError as e:
        os.truncate(path, size)
        print(f"warning: {path}: step {metrics['step']} is not in it ({e.strerror})", flush=True)


def keep_metrics(folder: str, steps: int) -> None:
    """Leave the first steps' lines: what was done after the checkpoint is done again."""
    path = os.path.join(folder, "metrics.jsonl")
    kept = []
    if steps and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for line in f:
                whole = line.endswith("\n")  # a kill may have cut the last one short
                if whole and json.loads(line)["step"] <= steps:
                    kept.append(line)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------- evaluating a checkpoint

def evaluate_checkpoint(folder: str, step: int, commands: list[str]) -> None:
    """A config's `evals` on a checkpoint's model, each in a process of its own.

    One process calls this, and may be at it for hours. The others wait in a barrier of the default
    group, the one that waits longest, with nothing under way in another.
    """
    name = f"step_{step:06d}"
    out = os.path.join(folder, "eval", name)
    merged = os.path.join(out, name)
    shutil.rmtree(merged, ignore_errors=True)  # a killed run's: other weights, under the same name
    checkpoint = os.path.join(folder, name)
    if run_script(os.path.join(HERE, "checkpoint.py"), "merge", checkpoint, merged):
        for text in commands:
            command, *words = shlex.split(text)
            run_script("-m", "evals", command, merged, *words, f"out={out}")
    shutil.rmtree(merged, ignore_errors=True)


def run_script(*words: str) -> bool:
    """Whether python WORDS has ended well; if not, there is a warning."""
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment = {**alone, "PYTHONPATH": HERE}
    ended = subprocess.run([sys.executable, *words], env=environment)
    if ended.returncode:
        print(f"warning: {' '.join(words)} failed: the run goes on without it", flush=True)
    return ended.returncode == 0
