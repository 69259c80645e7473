"""LOGO training, one flat script: set up, recall before, pairs, model, optimizer, loop, export, recall after.

    torchrun --standalone train_logo.py                                     configs/tiny.py: all of it on a laptop CPU
    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_80k.py lr=2e-5 steps=50

Reads a Hugging Face folder and writes, under out/NAME: pairs.jsonl, metrics.jsonl, result.json, hf/ (the aligned
model), config.json and source/ (what made it). One process and many take the same path.
"""
import glob
import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from configs import load_config
from data import (build_pairs, check_settings, collate, encode_group, exit_on_bad_input, load_pairs, pairs_path,
                  run_folder, step_samples)
from eval import recall
from loss import logo_loss
from model import BadInput, Llama, write_json
from tokenizer import load_tokenizer

# ------------------------------------------------------------------------------------------------------ set up

sys.excepthook = exit_on_bad_input
cfg = load_config(sys.argv[1:])
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
torch.set_num_threads(cfg["threads"] or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
tokenizer = load_tokenizer(cfg["model"], cfg["template"])
check_settings(cfg, tokenizer)
per_rank, uneven = divmod(cfg["batch_size"], world)
if uneven or per_rank % cfg["micro_batch"]:
    raise BadInput(f"batch_size={cfg['batch_size']} is no multiple of {world} processes x "
                   f"micro_batch={cfg['micro_batch']}")
if cfg["held_out"] % world:
    raise BadInput(f"held_out={cfg['held_out']} is no multiple of {world} processes")
dtype = getattr(torch, cfg["dtype"])
policy = Llama.from_pretrained(cfg["model"], dtype).to(device).eval()  # answers questions; trained from its file below

# Rank 0 may write pairs for hours while the others wait. A lone process needs no rendezvous.
alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24), **alone)
sys.excepthook = exit_on_bad_input  # init_process_group has put its own in front
folder, clock = run_folder(cfg), {"start": time.time()}
say = print if rank == 0 else lambda *args, **kwargs: None
if rank == 0:
    os.makedirs(os.path.join(folder, "source"), exist_ok=True)
    here = os.path.dirname(os.path.abspath(__file__))
    for path in glob.glob(os.path.join(here, "*.py")) + [os.path.join(here, "configs", "default.py")]:
        shutil.copy(path, os.path.join(folder, "source"))
    write_json(cfg, os.path.join(folder, "config.json"))


def recalls(model, label):
    """Right answers at each context size: {size: [right, asked]}."""
    found = {}
    for size in cfg["recall_sizes"] if cfg["recall_questions"] else []:
        found[size] = right, asked = recall(model, tokenizer, cfg, size, rank, world)
        say(f"recall {label:24s} context {size:6d}  {right:4d} of {asked:4d}  {right / asked:.3f}", flush=True)
    return found


def lap(name):
    """Seconds since the last lap, under a name."""
    clock[name] = time.time() - clock["start"] - sum(v for k, v in clock.items() if k != "start")


# ---------------------------------------------------------------------------------------- recall before, pairs

say(f"{cfg['name']}: {cfg['model']}, {sum(p.numel() for p in policy.parameters()):,} parameters, "
    f"{world} process(es) on {device.type}, window {cfg['window']}, M = {cfg['n_rejected']}")
before = {"recall": recalls(policy, "before")}
if cfg["rope_theta"]:  # what the longer base alone does: the control that training has to beat
    theta, policy.config.rope["rope_theta"] = policy.config.rope["rope_theta"], cfg["rope_theta"]
    before["recall_rope_theta"] = recalls(policy, "before, rope_theta only")
    policy.config.rope["rope_theta"] = theta
lap("recall_before")
if rank == 0:
    build_pairs(cfg, policy, tokenizer)
dist.barrier()
lap("pairs")
del policy
pairs = load_pairs(pairs_path(cfg), cfg["n_rejected"])
train, held_out = pairs[:len(pairs) - cfg["held_out"]], pairs[len(pairs) - cfg["held_out"]:]
if not train:
    raise BadInput(f"{pairs_path(cfg)}: {len(pairs)} pairs, expected more than held_out={cfg['held_out']}")

# --------------------------------------------------------------------------------------------- model, optimizer

model = Llama.from_pretrained(cfg["model"], torch.float32).to(device)  # float32 masters; the forward runs in dtype
model.set_checkpointing(cfg["checkpointing"])
if cfg["rope_theta"]:
    model.config.rope["rope_theta"] = cfg["rope_theta"]
mesh = dist.init_device_mesh(device.type, (world,))
mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
for block in model.model.layers:
    fully_shard(block, mesh=mesh, mp_policy=mixed)
fully_shard(model, mesh=mesh, mp_policy=mixed)  # the root keeps embeddings and head gathered until backward
decayed = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": cfg["weight_decay"]},
           {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(decayed, lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), foreach=True)


def learning_rate(step):
    """Linear to lr over the first share `warmup` of the steps, then a cosine to zero."""
    warm = math.ceil(cfg["warmup"] * cfg["steps"])
    if step < warm:
        return cfg["lr"] * (step + 1) / warm
    return cfg["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg["steps"] - warm)))


def groups_loss(samples, source):
    """Loss and metrics of (pair index, draw, epoch) triples: one packed batch, one forward."""
    batch = collate([encode_group(source[i], tokenizer, cfg, draw, epoch) for i, draw, epoch in samples])
    sums, lengths = model(*(x.to(device) for x in batch[:3]), batch.segments)
    logps = (sums / lengths).view(len(samples), -1)  # (N, M + 1) mean log-probs, the chosen first
    loss, metrics = logo_loss(logps[:, 0], logps[:, 1:], cfg["beta"], cfg["gamma"], cfg["sft_weight"])
    return loss, {"loss": loss.detach(), **metrics}


def mean_over_all(parts):
    """Mean of metric dicts of equally many groups, over micro-batches and processes, as floats."""
    mean = torch.stack([torch.stack(list(p.values())) for p in parts]).mean(0)
    dist.all_reduce(mean)
    return dict(zip(parts[0], (mean / world).tolist()))


@torch.no_grad()
def evaluate():
    """Metrics on the held-out pairs, at the positions of their first draw."""
    mine = [(i, 0, 0) for i in range(rank, len(held_out), world)]
    parts = [groups_loss([sample], held_out)[1] for sample in mine]
    model.reshard()  # without a backward nobody else gives the root's gathered parameters back
    return mean_over_all(parts) if parts else {}


def line(step, metrics, extra=""):
    return "step {:5d}  loss {loss:.4f}  accuracy {accuracy:.2f}  margin {margin:+.2f}  chosen {chosen:.3f}  " \
           "rejected {rejected:.3f}  sft {sft:.3f}".format(step, **metrics) + extra


# --------------------------------------------------------------------------------------------------------- loop

def train_step(step):
    """Forward and backward over this process's share of the step's groups, clip, update. Metrics of the whole step."""
    samples = step_samples(len(train), cfg, step)[rank * per_rank:(rank + 1) * per_rank]
    parts = []
    for i in range(0, per_rank, cfg["micro_batch"]):
        model.set_requires_gradient_sync(i + cfg["micro_batch"] >= per_rank)  # reduce once a step
        loss, metrics = groups_loss(samples[i:i + cfg["micro_batch"]], train)
        (loss * cfg["micro_batch"] / per_rank).backward()  # equal shares: exact for any split of the batch
        parts.append(metrics)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg["grad_clip"])
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        raise RuntimeError(f"step {step + 1}: the gradient is {norm}; ids of the pairs on this process: "
                           f"{[train[i]['id'] for i, _, _ in samples]}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    optimizer.step()
    optimizer.zero_grad()
    return {**mean_over_all(parts), "grad_norm": norm, "lr": learning_rate(step)}


before["held_out"] = first = now = evaluate()
if held_out:
    say(line(0, now, f"  held-out ({len(held_out)} pairs)"), flush=True)
log = open(os.path.join(folder, "metrics.jsonl"), "w") if rank == 0 else None
for step in range(cfg["steps"]):
    start = time.time()
    metrics = {"step": step + 1, **train_step(step)}
    metrics["seconds"] = time.time() - start
    last = step + 1 == cfg["steps"]
    if held_out and (last or cfg["eval_interval"] and (step + 1) % cfg["eval_interval"] == 0):
        now = evaluate()
        metrics["held_out"] = now
    if rank == 0:
        log.write(json.dumps(metrics) + "\n")
        log.flush()
    if (step + 1) % max(1, cfg["log_interval"]) == 0 or last or step == 0:
        say(line(step + 1, metrics, f"  |grad| {metrics['grad_norm']:.2f}  {metrics['seconds']:.2f}s"), flush=True)
    if "held_out" in metrics:
        say(line(step + 1, now, "  held-out"), flush=True)
        if now["chosen"] < first["chosen"] - 0.5:  # likelihood displacement: margins grow while the answer is lost
            say(f"warning: chosen log-prob fell from {first['chosen']:.3f} to {now['chosen']:.3f}: "
                "raise sft_weight or lower lr")
lap("train")

# --------------------------------------------------------------------------------------- export, recall after

state = {name: p.full_tensor().to(dtype).cpu() for name, p in model.named_parameters()}
model.config.extend(cfg["window"])
export = os.path.join(folder, "hf")
if rank == 0:
    model.save_pretrained(export, state)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                 "chat_template.jinja", "generation_config.json"):
        if os.path.exists(os.path.join(cfg["model"], name)):
            shutil.copy(os.path.join(cfg["model"], name), export)
dist.barrier()
del model, optimizer, state
after = {"recall": recalls(Llama.from_pretrained(export, dtype).to(device).eval(), "after"), "held_out": now}
lap("recall_after")
if rank == 0:
    seconds = {name: round(value, 1) for name, value in clock.items() if name != "start"}
    write_json({"config": cfg, "before": before, "after": after, "pairs": len(pairs), "processes": world,
                "seconds": seconds, "torch": torch.__version__}, os.path.join(folder, "result.json"))
    say(f"{export}: the aligned model; {folder}/result.json: before and after; seconds:", seconds)
dist.destroy_process_group()
