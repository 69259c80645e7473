"""What watches over a run. Nothing in here is about training: a first reading can do without it.

    choose_device, init_processes       processes that may wait for hours, and end without a crash
    make_mesh
    lock                                one run at a time in a folder
    check_*, save_source                what must hold before work begins; what made the run
    full_rows, check_layouts            the layout against M + 1 full rows, before step 1
    StopSignals                         SIGTERM and Ctrl-C end a run after a step, with a checkpoint
    FaultWatch                          ends a run that is beyond help
    save, evaluate_checkpoint           a checkpoint, and a config's `evals` on it
    scored_tokens, work_of              what a step has done

A file of its own, since a script is read from the top, and none of this comes first to a reader.
"""
import fcntl
import glob
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from checkpoint import check_adapter, prune, read_adapter, save_checkpoint
from configs import BadInput, default_groups, load_config, saving, write_json
from console import Progress, on_error, say
from data import Batch
from model import Llama, Segment, step_flops

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = timedelta(hours=24)  # rank 0 evaluates a checkpoint for hours while the others wait
# By which share loss and gradient may differ between two ways of computing them, at beta=1. beta
# scales what log-probs are off by, and a loss near zero moves by the same share as the margin by
# nats. Measured: 3e-6 in float32; in bfloat16 4e-4 at beta=1, 1e-2 at beta=10.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
FAULTY_STEPS = 3  # in a row: then it is not a pair that is at fault


# --------------------------------------------------------------------------------------- processes

def choose_device(threads: int) -> torch.device:
    """This process's GPU, or the CPU with its share of the cores (or so many threads)."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # PyTorch would take all cores in each process, and threads that wait for a busy core crawl.
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, share))
    return device


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


# ------------------------------------------------------------------------------- before work begins

def lock(folder: str) -> IO:
    """The run's folder, made and locked while the file that this returns is open.

    A killed torchrun can leave its processes at work; two runs in a folder would ruin both.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        # A lock and not the file's presence: a killed process leaves the file, never the lock.
        held = open(os.path.join(folder, ".lock"), "w")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise BadInput(f"{folder}: another run is at work here") from e
    except OSError as e:
        raise BadInput(f"{folder}: cannot be written ({e.strerror})") from e
    return held


def check_resumable(resumed: str, state: dict, cfg: dict) -> None:
    """Keys of the groups paths and run may change when a run is resumed, no others."""
    for key in ("before", "held_out", "pairs", "skipped", "updates"):
        if key not in state:
            raise BadInput(f"{resumed}: {key!r} is not in its state.json, as another version of "
                           "this code has written it: training cannot go on from it, but "
                           "python checkpoint.py merge makes a model of it")
    groups = default_groups()
    for key, default in {**groups["build"], **groups["train"]}.items():
        # A key that it lacks is newer than the checkpoint, which was trained as its default says.
        found = state["config"].get(key, default)
        if found != cfg[key]:
            raise BadInput(f"{resumed}: was saved with {key}={found!r}, now it is {cfg[key]!r}: "
                           "resume with the old value, or name another out=")


def check_lora(cfg: dict, model: Llama) -> None:
    """An adapter to go on from has this run's LoRA, and what trains beside it."""
    if not cfg["adapter"]:
        return
    found = read_adapter(cfg["adapter"], model.config)
    for key in ("lora_r", "lora_alpha"):
        if found[key] != cfg[key]:
            raise BadInput(f"{cfg['adapter']}: was made with {key}={found[key]}, "
                           f"this run has {key}={cfg[key]}")
    check_adapter(model, cfg["adapter"])


def check_evals(commands: list[str], read_command: Callable[[list[str]], Any]) -> None:
    """Commands of python -m evals, said wrong, would fail hours later, at the first checkpoint.

    read_command: that of evals, which refuses a command line that it cannot run.
    """
    for text in commands:
        try:
            command, *words = shlex.split(text)
            if command == "questions":
                load_config(words)
            else:
                read_command([command, "MODEL", *words])
        except ValueError as e:  # BadInput is one; shlex's, of a quote without its partner, too
            raise BadInput(f"evals: {text!r}: {e}") from e


def save_source(folder: str, cfg: dict) -> None:
    """What made this run: config.json, and source/ with the code."""
    source = os.path.join(folder, "source")
    with saving(folder):
        os.makedirs(source, exist_ok=True)
        for path in glob.glob(os.path.join(glob.escape(HERE), "*.py")):
            shutil.copy(path, source)
        shutil.copy(os.path.join(HERE, "configs", "default.py"), source)
        write_json(cfg, os.path.join(folder, "config.json"))


# ------------------------------------------------------------------------------------ a first look

def full_rows(group: Batch) -> Batch:
    """One group as everyone else lays it out: M + 1 rows, each its prompt and one answer."""
    P = group.segments[0].end
    tokens = []
    positions = []
    targets = []
    segments = []
    start = 0
    for answer in group.segments[1:]:
        own = slice(answer.start, answer.end)
        tokens += [group.tokens[:P], group.tokens[own]]
        positions += [group.positions[:P], group.positions[own]]
        targets += [group.targets[:P], group.targets[own]]
        end = start + P + answer.length
        # A row sees itself causally, as if it were one segment. Its first token stands apart, since
        # a segment with a prefix is what the model takes for an answer: that prefix is all it is.
        segments += [Segment(start, start + 1), Segment(start + 1, end, start, start + 1)]
        start = end
    return Batch(torch.cat(tokens), torch.cat(positions), torch.cat(targets), segments)


def check_layouts(shared: dict, rows: dict, cfg: dict) -> None:
    """Metrics of one group, its prompt shared, and of full rows: BadInput where they differ."""
    tolerance = TOLERANCE[cfg["dtype"]] * max(1.0, cfg["beta"])
    for key in ("loss", "grad_norm"):
        one = shared[key]
        other = rows[key]
        # A pair whose loss is not finite either way says nothing; the steps leave it out.
        void = not math.isfinite(one) and not math.isfinite(other)
        if not void and not math.isclose(one, other, rel_tol=tolerance):
            raise BadInput(f"verify: {key} of a group is {one:.6g} with its prompt shared by its "
                           f"answers, {other:.6g} in full rows, expected the same but for "
                           f"{100 * tolerance:g} % ({cfg['dtype']}): attention does not do "
                           "here what model.py wants of it; verify=False trains in spite of that")
    say(f"verify: a group is as in full rows: loss {shared['loss']:.6g} and {rows['loss']:.6g}, "
        f"|grad| {shared['grad_norm']:.6g} and {rows['grad_norm']:.6g}")


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
        # One process alone at the end of its run would leave the others in a collective for ever.
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


# ---------------------------------------------------------------------------- what a step has done

def scored_tokens(batch: Batch) -> int:
    """Tokens whose logits are made: the answers'."""
    scored = 0
    for segment in batch.segments:
        if segment.prefix_end:
            scored += segment.end - segment.start
    return scored


def work_of(model: Llama, share: list[tuple[Batch, float]], device: torch.device) -> dict:
    """Tokens and 1e12 floating-point operations of a step, over all processes."""
    tokens = 0
    flops = 0
    for batch, _ in share:
        tokens += len(batch.tokens)
        flops += step_flops(model, batch.segments, scored_tokens(batch))
    work = torch.tensor([tokens, flops / 1e12], device=device)
    dist.all_reduce(work)
    tokens, tflop = work.tolist()
    return {"tokens": tokens, "tflop": tflop}


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at its worst moment."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Of a CPU process all there is, with what malloc keeps for itself.
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            peak = re.search(r"VmHWM:\s+(\d+) kB", file.read())
        # Some sandboxes leave the line out.
        if peak:
            return 1024 * int(peak[1])
    # A process started by a large one has that one's peak here.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ------------------------------------------------------------------------------------- checkpoints

def save(folder: str, model: Llama, optimizer: torch.optim.AdamW, state: dict,
         stopped: bool) -> None:
    """A checkpoint, and its evaluations. A disk that is full costs the checkpoint, not the run.

    state: what the checkpoint says beside tensors; its "config" tells what is kept and evaluated.
    stopped: the run ends here, so a checkpoint that cannot be written is an error.
    """
    cfg = state["config"]
    step = state["step"]
    path = os.path.join(folder, f"step_{step:06d}")
    error = f"{path}: not written, since no step has changed a weight"
    if optimizer.state:
        # AdamW counts updates, for its bias correction. A step that was left out was none.
        updates = int(next(iter(optimizer.state.values()))["step"])
        state = {**state, "updates": updates, "processes": dist.get_world_size(),
                 "torch": torch.__version__}
        with Progress("checkpoint"):
            error = save_checkpoint(path, model, optimizer, state)
    if error and stopped:
        raise BadInput(error)
    if error:
        say(f"warning: {error}: the run goes on without this checkpoint")
        return
    if dist.get_rank() == 0:
        prune(folder, cfg["keep"])
    if cfg["evals"] and not stopped:
        if dist.get_rank() == 0:
            evaluate_checkpoint(folder, step, cfg["evals"])
        # The others wait in the default group, the one with the patience, and in no other.
        dist.barrier()


def evaluate_rest(resumed: str, folder: str, step: int, commands: list[str]) -> None:
    """The evaluations that a kill has cost the checkpoint that a run goes on from."""
    path = os.path.join(folder, f"step_{step:06d}")
    done = os.path.join(folder, "eval", f"step_{step:06d}", "done.json")
    # Not of a checkpoint of another run, which is not there to be evaluated.
    own = os.path.realpath(resumed) == os.path.realpath(path)
    if dist.get_rank() == 0 and commands and own and not os.path.exists(done):
        evaluate_checkpoint(folder, step, commands)
    dist.barrier()


def evaluate_checkpoint(folder: str, step: int, commands: list[str]) -> None:
    """A config's `evals` on a checkpoint's model, each in a process of its own."""
    name = f"step_{step:06d}"
    out = os.path.join(folder, "eval", name)
    merged = os.path.join(out, name)
    done = os.path.join(out, "done.json")
    # A killed run's, or one's that was begun anew: other weights, under the same name.
    shutil.rmtree(merged, ignore_errors=True)
    if os.path.exists(done):
        os.remove(done)
    checkpoint = os.path.join(folder, name)
    # Another process finds no room on this GPU where PyTorch keeps what training has freed.
    torch.cuda.empty_cache()
    if run_script(os.path.join(HERE, "checkpoint.py"), "merge", checkpoint, merged):
        for text in commands:
            command, *words = shlex.split(text)
            run_script("-m", "evals", command, merged, *words, f"out={out}")
    shutil.rmtree(merged, ignore_errors=True)
    try:
        os.makedirs(out, exist_ok=True)
        write_json({"evals": commands}, done)
    except OSError as e:
        say(f"warning: {done}: cannot be written ({e.strerror}): resumed here, the run would "
            "evaluate this checkpoint again")


def run_script(*words: str) -> bool:
    """Whether python WORDS has ended well; if not, there is a warning."""
    # It is no rank of ours: a script that found RANK would be silent, or wait for the others.
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment = {**alone, "PYTHONPATH": HERE}
    ended = subprocess.run([sys.executable, *words], env=environment)
    if ended.returncode:
        say(f"warning: {' '.join(words)} failed: the run goes on without it")
    return ended.returncode == 0
