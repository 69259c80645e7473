"""What the measurements share: random tokens, a clock, a peak of memory, a process of one's own.

Inputs are random tokens of a seed, the same for all ways. A process measures one thing and ends, so
that no peer inherits another's memory; repetitions are interleaved, so that a slow minute of the
machine hits all alike.
"""
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODEL = dict(
    model="models/smollm2",  # Hugging Face folder of the model
    dtype="float32",         # or bfloat16, on a GPU
    threads=0,               # CPU threads; 0: PyTorch's choice
)
# Freed memory stays with the process: without this, Linux hands out each large tensor's pages anew,
# which on a virtual machine took a third of a step, whoever computed it.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 29),
}


def set_up(options: dict) -> str:
    """The device to measure on, after setting the number of threads."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(work: Callable, device: str) -> float:
    """How long work() takes, until the device has done it."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Callable, device: str) -> int:
    """Most bytes that tensors hold at once during work(), beyond those from before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # Every allocation and release, exact. Resident memory would add what malloc keeps for itself.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for change in changes:
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def in_new_process(task: dict) -> dict:
    """What `python -m bench measure` finds for a task, or {"error": why it found nothing}."""
    command = [sys.executable, "-m", "bench", "measure", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, **MALLOC})
    if done.returncode < 0:
        # Mostly Linux, out of memory: that is a result, and the other ways go on.
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """What the numbers were measured on and with."""
    versions = {}
    for package in ("torch", "transformers", "trl", "peft", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions,
    }
