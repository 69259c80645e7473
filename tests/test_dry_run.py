"""The path that only a GPU takes, walked with shapes alone, and the plan against PyTorch's own count of it (dry_run.py)."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 2
ALL_WEIGHTS = ("lora_r=0", "train_also=")


def dry_run(*words):
    """Llama-3-8B's shape, cut to two layers; by default LoRA, on 8 GPUs, two micro-batches."""
    command = [sys.executable, "-m", "tests.dry_run", "configs/llama3_8b_80k.py"]
    done = subprocess.run([*command, f"layers={LAYERS}", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", [
    ("n_rejected=1",),
    ("n_rejected=2", "micro_batches=1"),
    ("n_rejected=8",),
    ("train_also=", "micro_batch=2", "micro_batches=1"),
    (*ALL_WEIGHTS,),
    (*ALL_WEIGHTS, "micro_batches=1"),
    (*ALL_WEIGHTS, "prompt=256", "answer=32"),             # the root's gradients are the peak
    (*ALL_WEIGHTS, "gpus=1"),
    (*ALL_WEIGHTS, "offload_params=True", "offload_activations=True"),
    ("gpus=16", "shard_size=8"),                           # 2 replicas x 8 shards
    ("checkpointing=False",),
], ids=" ".join)
def test_the_plan_is_above_pytorchs_count_and_within_a_fifth(words):
    found = dry_run(*words)
    assert found["peak"] <= found["visible"] <= 1.2 * found["peak"], found
    # flash attention's own buffers, which no tracker sees, only add to it.
    assert found["visible"] <= found["plan"]["total"]
    # The kernel: once a layer in forward, and once more where backward makes the block again. Flash wants 16 bits.
    times = 1 if "checkpointing=False" in words else 2
    micro_batches = 1 if "micro_batches=1" in words else 2
    assert found["calls"] == times * LAYERS * micro_batches
    assert found["dtypes"] == ["torch.bfloat16"]
