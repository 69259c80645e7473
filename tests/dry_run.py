"""A training step of a large model on many GPUs, walked where there is none: tensors have shapes and no numbers.

    python -m tests.dry_run CONFIG [gpus=8] [layers=0] [prompt=8192] [answer=512] [micro_batches=2] [key=value of the config]

The very functions of train_logo.py (sharding, optimizer, step) run on PyTorch's fake tensors in a fake process group, and
PyTorch's FSDP memory tracker counts bytes. Printed as JSON: its peak, item by item, beside the plan's; how often the varlen
kernel was called, and with which dtypes. layers=0: all of them.

A CPU build cannot run backward on fake CUDA tensors, so the device is called cpu, and what asks for its kind is told what a
GPU would hear: the choice of the kernel, of the fused optimizer, of host memory. A process of its own, since it patches torch.
"""
import ast
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

import model as model_py
from bench import plan
from bench.__main__ import split_words
from configs import load_config, with_arguments
from data import Batch

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = dict(gpus=8, layers=0, prompt=8192, answer=512, micro_batches=2)


class Tracker(FSDPMemTracker):
    """PyTorch's, less what it should not count: host memory, and shapes that DTensor asks for as tensors."""

    def __init__(self, model, optimizer, offload_params):
        super().__init__(model, optimizer)
        kinds = (_FSDPRefType.SHARDED_PARAM, _FSDPRefType.SHARDED_GRAD, _FSDPRefType.OPT)
        self.on_host = kinds if offload_params else ()
        self.peak = {}
        self.of_shapes = False
        ask = ShardingPropagator._propagate_tensor_meta_non_cached

        def ask_uncounted(*args):
            # DTensor learns an operator's output from fake tensors of the whole shape, which under fake tensors would be
            # taken for the process's own: clipping would seem to copy the model.
            self.of_shapes = True
            try:
                return ask(*args)
            finally:
                self.of_shapes = False

        ShardingPropagator._propagate_tensor_meta_non_cached = ask_uncounted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.of_shapes:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state):
        super()._update_peak_stats(peak_state)
        for memory in self._curr_mem_snap.values():
            now = {kind.value: size for kind, size in memory.items() if kind != "Total" and kind not in self.on_host}
            if sum(now.values()) > sum(self.peak.values()):
                self.peak = now


class ShapesOnHost(torch.autograd.graph.saved_tensors_hooks):
    """In the place of save_on_cpu, whose copies would be taken for the device's: it keeps shapes."""

    def __init__(self, pin_memory):
        super().__init__(lambda x: (x.shape, x.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1]))


def be_a_gpu(scored):
    """Patch what asks for the device, or for numbers that shapes have not. A list of q's, k's and v's dtypes, filled in later."""
    dtypes = []

    def kernel(q, k, v, *lengths):
        dtypes.append([str(x.dtype) for x in (q, k, v)])
        return model_py.varlen_attn(q, k, v, *lengths, window_size=(-1, 0), enable_gqa=True)

    model_py.varlen_kernel = lambda device, dtype: kernel
    model_py.save_on_cpu = ShapesOnHost
    torch.Tensor.nonzero = lambda x: x.new_zeros((scored, 1), dtype=torch.long)
    torch.bincount = lambda owner, minlength: owner.new_zeros(minlength)
    return dtypes


def trainers(cfg, gpus, *names):
    """Functions of train_logo.py, a script that nothing can import, with the names of the script that they need."""
    tree = ast.parse((ROOT / "train_logo.py").read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "name", "") in names]
    script = {}
    exec(compile(ast.Module(kept, []), "train_logo.py", "exec"), script)
    nothing = dict.fromkeys(("load_weights", "load_adapter", "start_lora"), lambda *_: None)
    numbers = {"float": lambda norm: 1.0, "mean_over_all": lambda parts: {"loss": 1.0}}
    script.update(cfg=cfg, device=torch.device("cpu"), dtype=getattr(torch, cfg["dtype"]), world=gpus,
                  shard_size=cfg["shard_size"] or gpus, **nothing, **numbers)
    return script


def micro_batch(shape, groups):
    """So many groups in one stream, and how many of its tokens are scored."""
    one = shape.segments()
    length = one[-1].end
    segments = [segment.moved(i * length) for i in range(groups) for segment in one]
    stream = torch.zeros(groups * length, dtype=torch.long)
    return Batch(stream, stream, stream, segments)


def walk(cfg, gpus, layers, prompt, answer, micro_batches):
    """A step after the first, so that AdamW has its moments."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    cfg["batch_size"] = gpus * cfg["micro_batch"] * micro_batches
    shape = plan.Shape(prompt, answer, cfg["n_rejected"], gpus)
    model = plan.planned_model(cfg, "")
    if layers:
        del model.model.layers[layers:]
    expected = plan.plan_of(model, cfg, shape)[2]
    plan.flash_backward = lambda config, load: 0
    visible = plan.plan_of(model, cfg, shape)[2]

    script = trainers(cfg, gpus, "shard_model", "make_optimizer", "batch_loss", "train_step", "is_finite")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    to_empty = model.to_empty

    def to_fake(device):
        with fake:
            to_empty(device=device)

    model.to_empty = to_fake
    script["shard_model"](model, cfg)
    dtypes = be_a_gpu(cfg["micro_batch"] * shape.scored())
    with fake:
        script["device"] = torch.device("cuda")  # there AdamW is fused
        optimizer = script["make_optimizer"](model, cfg)
        script["device"] = torch.device("cpu")
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        tracker = Tracker(model, optimizer, cfg["offload_params"])
        loss_of = script["batch_loss"]

        def batch_loss(*batch):
            tracker.reset_mod_stats()  # or the tracker refuses a second forward
            return loss_of(*batch)

        script["batch_loss"] = batch_loss
        batch = micro_batch(shape, cfg["micro_batch"])
        tracker.track_inputs((batch.tokens,))
        with tracker:
            script["train_step"](model, optimizer, [(batch, 1 / gpus)] * micro_batches, lr=1e-5)
    return {"tracker": tracker.peak, "peak": sum(tracker.peak.values()), "plan": expected, "visible": visible["total"],
            "calls": len(dtypes), "layers": len(model.model.layers), "dtypes": sorted(set(sum(dtypes, [])))}


def main(argv):
    words, config = split_words(OPTIONS, argv)
    print(json.dumps(walk(load_config(config), **with_arguments(OPTIONS, words)), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
