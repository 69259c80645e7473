"""LOGO training, one flat script: set up, recall before, pairs, model, optimizer, loop, export, recall after.

    torchrun --standalone train_logo.py                                     configs/tiny.py: all of it on a laptop CPU
    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_80k.py lr=2e-5 steps=50
    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_80k.py resume=auto     after a kill

Reads a Hugging Face folder and writes, under out/NAME: pairs.jsonl, metrics.jsonl, step_000100/ (to resume),
result.json, hf/ (the aligned model), adapter/ (LoRA), config.json and source/ (what made it). One process and many
take the same path.
"""
import fcntl
import glob
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bench.plan import describe, peak_flops, peak_memory, throughput
from checkpoint import (find_checkpoint, load_adapter, load_checkpoint, load_pretrained, load_weights, prune, read_adapter,
                        read_config, save_adapter, save_checkpoint, save_pretrained, sha256, start_lora, together)
from configs import BadInput, check_settings, default_groups, exit_on_bad_input, load_config, pairs_path, run_folder, write_json
from data import check_fit, collate, encode_group, load_pairs, split_pairs, step_samples
from evals.questions import count_right
from loss import logo_loss
from model import Llama, count_parameters, step_flops
from pairs.build import build_pairs
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
check_settings(cfg)
check_fit(cfg, tokenizer)
per_rank, uneven = divmod(cfg["batch_size"], world)
if uneven or per_rank % cfg["micro_batch"]:
    raise BadInput(f"batch_size={cfg['batch_size']} is no multiple of {world} processes x "
                   f"micro_batch={cfg['micro_batch']}")
if cfg["held_out"] % world:
    raise BadInput(f"held_out={cfg['held_out']} is no multiple of {world} processes")
if world % (shard_size := cfg["shard_size"] or world):
    raise BadInput(f"shard_size={shard_size} does not divide {world} processes")
if cfg["offload_activations"] and not cfg["checkpointing"]:
    raise BadInput("offload_activations=True needs checkpointing=True: only the blocks' inputs go to the host")
dtype = getattr(torch, cfg["dtype"])
lora = {"lora_r": cfg["lora_r"], "lora_alpha": cfg["lora_alpha"], "lora_targets": cfg["lora_targets"],
        "train_also": cfg["train_also"]}
with torch.device("meta"):  # shapes only; each process will read its own rows of the weights
    model = Llama(read_config(os.path.join(cfg["model"], "config.json")))
    model.config.extend(cfg["window"], cfg["rope_theta"])
    model.train_only(**lora)
if cfg["adapter"]:
    found = read_adapter(cfg["adapter"], model.config)
    for key in ("lora_r", "lora_alpha"):
        if found[key] != cfg[key]:
            raise BadInput(f"{cfg['adapter']}: was made with {key}={found[key]}, this run has {key}={cfg[key]}")

# Rank 0 may write pairs for hours while the others wait. A lone process needs no rendezvous.
alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24), **alone)


def leave(code):
    """End this process, without the interpreter's own end: gloo's threads outlive destroy_process_group, and one that
    lets go of a tensor while Python is being taken down aborts the process (PyTorch issue 190489)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_error(*error):
    exit_on_bad_input(*error)
    leave(1)


sys.excepthook = on_error  # also in front of what init_process_group has put there
folder, clock = run_folder(cfg), {"start": time.time()}
say = print if rank == 0 else lambda *args, **kwargs: None

if rank == 0:
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w")  # a killed torchrun can leave its processes at work
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise BadInput(f"{folder}: another run is at work here") from e
    except OSError as e:
        raise BadInput(f"{folder}: cannot be written ({e.strerror})") from e

# Keys of the groups paths and run may change when a run is resumed.
FIXED = [key for group in ("build", "train") for key in default_groups()[group]]
resumed, state = find_checkpoint(folder, cfg["resume"])
for key in cfg if resumed else ():
    if key in FIXED and state["config"].get(key) != cfg[key]:
        raise BadInput(f"{resumed}: was saved with {key}={state['config'].get(key)!r}, now it is {cfg[key]!r}: "
                       "resume with the old value, or name another out=")
if rank == 0:
    os.makedirs(os.path.join(folder, "source"), exist_ok=True)
    here = os.path.dirname(os.path.abspath(__file__))
    for path in glob.glob(os.path.join(here, "*.py")) + [os.path.join(here, "configs", "default.py")]:
        shutil.copy(path, os.path.join(folder, "source"))
    write_json(cfg, os.path.join(folder, "config.json"))


@cache
def policy():
    """The whole model that is trained, as it is before: to write answers. Opened only where answers are missing."""
    return load_pretrained(cfg["model"], dtype, device, cfg["adapter"])


def recalls(model, label):
    """Right answers at each context size: {size: [right, asked]}. model: a function that opens it."""
    found = {}
    for size in cfg["fresh_sizes"] if cfg["fresh_questions"] else []:
        found[size] = right, asked = count_right(model(), tokenizer, cfg, size, rank, world)
        say(f"right answers {label:24s} context {size:6d}  {right:4d} of {asked:4d}  {right / asked:.3f}", flush=True)
    return found


def lap(name):
    """Seconds since the last lap, under a name."""
    clock[name] = time.time() - clock["start"] - sum(v for k, v in clock.items() if k != "start")


# ---------------------------------------------------------------------------------------- recall before, pairs

trained, frozen = count_parameters(model)
say(f"{cfg['name']}: {cfg['model']}, {trained:,} trained + {frozen:,} frozen parameters, {world} process(es) on "
    f"{device.type}, window {cfg['window']}, M = {cfg['n_rejected']}", flush=True)
if resumed:
    before = state["before"]
    say(f"resumed from {resumed}")
else:
    before = {"right_answers": recalls(policy, "before")}
    if cfg["rope_theta"] and before["right_answers"]:  # what the longer base alone does: the control that training has to beat
        theta, policy().config.rope["rope_theta"] = policy().config.rope["rope_theta"], cfg["rope_theta"]
        before["right_answers_rope_theta"] = recalls(policy, "before, rope_theta only")
        policy().config.rope["rope_theta"] = theta
    lap("questions_before")
    if rank == 0:
        build_pairs(cfg, policy, tokenizer)
    dist.barrier()
    lap("pairs")
policy.cache_clear()
pairs = load_pairs(pairs_path(cfg), cfg, tokenizer)
pairs_digest = sha256(pairs_path(cfg))
if resumed and state["pairs"] != pairs_digest:
    raise BadInput(f"{pairs_path(cfg)}: not the pairs that {resumed} was trained on (their sha256 differs)")
train, held_out = split_pairs(pairs, cfg["held_out"])
if not train:
    raise BadInput(f"{pairs_path(cfg)}: {len(pairs)} pairs, expected more than held_out={cfg['held_out']}")

# --------------------------------------------------------------------------------------------- model, optimizer

for p in model.parameters():
    p.data = p.data.to(torch.float32 if p.requires_grad else dtype)  # masters of what trains; the forward runs in dtype
model.set_checkpointing(cfg["checkpointing"], cfg["offload_activations"])
mesh = dist.init_device_mesh(device.type, (world,))
if shard_size < world:  # shard inside a node, replicate across: gathering stays off the slow wires
    mesh = dist.init_device_mesh(device.type, (world // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))
how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
       "offload_policy": CPUOffloadPolicy(device.type == "cuda") if cfg["offload_params"] else OffloadPolicy()}
for block in model.model.layers:
    if cfg["compile"]:
        block.compile(dynamic=True)
    fully_shard(block, **how)
fully_shard(model, **how)  # the root keeps embeddings and head gathered until backward
model.to_empty(device="cpu" if cfg["offload_params"] else device)
with torch.no_grad():
    load_weights(model, cfg["model"])
    load_adapter(model, cfg["adapter"]) if cfg["adapter"] else start_lora(model, cfg["seed"])
trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}


def decays(name, p):
    """Matrices that multiply. Not norms and biases; not lookup tables; not LoRA's B, which starts at zero."""
    table = "embed_tokens" in name and not model.config.tie_word_embeddings
    return p.ndim > 1 and "lora_B" not in name and not table


decayed = [{"params": [p for name, p in trainable.items() if decays(name, p)], "weight_decay": cfg["weight_decay"]},
           {"params": [p for name, p in trainable.items() if not decays(name, p)], "weight_decay": 0.0}]
fused = device.type == "cuda"  # on a CPU it saves nothing that shows beside forward and backward
optimizer = torch.optim.AdamW(decayed, lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), fused=fused, foreach=not fused)
if resumed:
    load_checkpoint(resumed, state, model, optimizer)


def learning_rate(step):
    """Linear to lr over the first share `warmup` of the steps, then a cosine to zero."""
    warm = math.ceil(cfg["warmup"] * cfg["steps"])
    if step < warm:
        return cfg["lr"] * (step + 1) / warm
    return cfg["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg["steps"] - warm)))


def pack(samples, source):
    """(pair index, draw, epoch) triples as one packed batch."""
    return collate([encode_group(source[i], tokenizer, cfg, draw, epoch) for i, draw, epoch in samples])


def groups_loss(samples, source):
    """Loss and metrics of (pair index, draw, epoch) triples: one packed batch, one forward."""
    batch = pack(samples, source)
    sums, lengths = model(batch.tokens.to(device), batch.positions.to(device), batch.targets.to(device), batch.segments)
    logps = (sums / lengths).view(len(samples), -1)  # (N, M + 1) mean log-probs, the chosen first
    loss, metrics = logo_loss(logps[:, 0], logps[:, 1:], cfg["beta"], cfg["gamma"], cfg["sft_weight"])
    scored = sum(s.end - s.start for s in batch.segments if s.prefix_end)
    work = torch.tensor([len(batch.tokens), step_flops(model, batch.segments, scored) / 1e12], device=device)
    return loss, {"loss": loss.detach(), **metrics, "tokens": work[0], "tflop": work[1]}


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
    mean = mean_over_all(parts) if parts else {}
    return {key: value for key, value in mean.items() if key not in ("tokens", "tflop")}


def line(step, metrics, extra=""):
    return (f"step {step:5d}  loss {metrics['loss']:.4f}  accuracy {metrics['rewards/accuracies']:.2f}  "
            f"margin {metrics['rewards/margins']:+.2f}  chosen {metrics['logps/chosen']:.3f}  "
            f"rejected {metrics['logps/rejected']:.3f}  nll {metrics['nll']:.3f}{extra}")


def estimate():
    """What rank 0 prints before the first step, from the groups of that step: work, and the peak of memory."""
    samples, micro = step_samples(len(train), cfg, 0), cfg["micro_batch"]
    batches = [pack(samples[i:i + micro], train) for i in range(0, len(samples), micro)]
    largest = max(batches, key=lambda batch: len(batch.tokens))
    scored = sum(s.end - s.start for s in largest.segments if s.prefix_end)
    memory = peak_memory(model, cfg, len(largest.tokens), scored, shard_size, accumulating=per_rank > micro)
    say(describe(trained, frozen, sum(len(batch.tokens) for batch in batches), memory), flush=True)


# --------------------------------------------------------------------------------------------------------- loop

def train_step(step):
    """Forward and backward over this process's share of the step's groups, clip, update. Metrics of the whole step."""
    everyone = step_samples(len(train), cfg, step)
    samples = everyone[rank * per_rank:(rank + 1) * per_rank]
    parts = []
    for i in range(0, per_rank, cfg["micro_batch"]):
        # LoRA's gradients are reduced once a step; unsharded till then, all weights' would be a whole model in float32
        model.set_requires_gradient_sync(not cfg["lora_r"] or i + cfg["micro_batch"] >= per_rank)
        loss, metrics = groups_loss(samples[i:i + cfg["micro_batch"]], train)
        (loss * cfg["micro_batch"] / per_rank).backward()  # equal shares: exact for any split of the batch
        parts.append(metrics)
    norm, metrics = clip(), mean_over_all(parts)
    if not math.isfinite(norm + metrics["loss"]):
        raise BadInput(f"step {step + 1}: the loss is {metrics['loss']}, the gradient {norm}; the weights are as "
                       f"before. Not finite by themselves: ids {offenders(everyone)} of {pairs_path(cfg)}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    optimizer.step()
    optimizer.zero_grad()
    for key in ("tokens", "tflop"):
        metrics[key] *= cfg["batch_size"] / cfg["micro_batch"]  # of the step
    return {**metrics, "grad_norm": norm, "lr": learning_rate(step)}


def clip():
    """Clip the gradient, sharded as it is; its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(list(trainable.values()), cfg["grad_clip"])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def offenders(samples):
    """Ids of the pairs whose loss or gradient alone is not finite. All processes take the same one at a time."""
    found = []
    model.set_requires_gradient_sync(True)
    for sample in samples:
        optimizer.zero_grad()
        loss, _ = groups_loss([sample], train)
        loss.backward()
        if not math.isfinite(clip() + loss.item()):
            found.append(train[sample[0]]["id"])
    return found


def agreed(signals):
    """Whether any process has had a signal: all of them stop after the same step."""
    flag = torch.tensor(len(signals), device=device)
    dist.all_reduce(flag)
    return bool(flag)


def save(step):
    """A checkpoint after so many steps. A disk that is full costs the checkpoint, not the run."""
    state = {"step": step, "config": cfg, "pairs": pairs_digest, "before": before, "processes": world,
             "held_out": now if judged == step else None, "torch": torch.__version__}
    error = save_checkpoint(os.path.join(folder, f"step_{step:06d}"), model, optimizer, state)
    if not error and rank == 0:
        prune(folder, cfg["keep"])
    return error


def evaluate_checkpoint(step):
    """The config's commands of eval.py on a checkpoint's model, each in a process of its own. Rank 0; the others wait."""
    here, name = os.path.dirname(os.path.abspath(__file__)), f"step_{step:06d}"
    merged = os.path.join(folder, "eval", name, name)
    work = [[os.path.join(here, "checkpoint.py"), "merge", os.path.join(folder, name), merged]]
    for command in map(shlex.split, cfg["evals"]):
        work.append(["-m", "evals", command[0], merged, *command[1:], f"out={os.path.dirname(merged)}"])
    for script, *args in work:
        if subprocess.run([sys.executable, script, *args], env={**os.environ, "PYTHONPATH": here}).returncode:
            say(f"warning: {script} {' '.join(args)} failed: the run goes on", flush=True)
    shutil.rmtree(merged, ignore_errors=True)


def log(metrics):
    """Append a line to metrics.jsonl; a line that cannot be written whole is taken back."""
    path = os.path.join(folder, "metrics.jsonl")
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(metrics) + "\n")
    except OSError as e:
        os.truncate(path, size)
        say(f"warning: {path}: step {metrics['step']} is not in it ({e.strerror})", flush=True)


def keep_metrics(steps):
    """Leave the first steps' lines in metrics.jsonl: what an interrupted run did after its checkpoint is done again."""
    path, kept = os.path.join(folder, "metrics.jsonl"), []
    if steps and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            kept = [text for text in f if text.endswith("\n") and json.loads(text)["step"] <= steps]
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


start_step = state["step"] if resumed else 0
if rank == 0:
    keep_metrics(start_step)
    estimate()
if resumed:
    first, now, judged = before["held_out"], state["held_out"], start_step
else:
    before["held_out"] = first = now = evaluate()
    judged = 0
    if held_out:
        say(line(0, now, f"  held-out ({len(held_out)} pairs)"), flush=True)
signals = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
peak, pace = peak_flops(device), []
for step in range(start_step, cfg["steps"]):
    start = time.time()
    metrics = {"step": step + 1, **train_step(step)}
    metrics["seconds"] = time.time() - start
    pace.append(metrics["seconds"])
    last = step + 1 == cfg["steps"]
    if held_out and (last or cfg["eval_interval"] and (step + 1) % cfg["eval_interval"] == 0):
        now, judged = evaluate(), step + 1
        metrics["held_out"] = now
    if rank == 0:
        log(metrics)
    if (step + 1) % max(1, cfg["log_interval"]) == 0 or last or step == start_step:
        left = sum(pace[-20:]) / len(pace[-20:]) * (cfg["steps"] - step - 1)
        speed = "" if step == start_step else throughput(metrics, peak, world, left)
        extra = f"  |grad| {metrics['grad_norm']:.2f}  {metrics['seconds']:.2f}s{speed}"
        say(line(step + 1, metrics, extra), flush=True)
    if "held_out" in metrics:
        say(line(step + 1, now, "  held-out"), flush=True)
        if now["logps/chosen"] < first["logps/chosen"] - 0.5:  # likelihood displacement: margins grow while the answer is lost
            say(f"warning: chosen log-prob fell from {first['logps/chosen']:.3f} to {now['logps/chosen']:.3f}: "
                "raise sft_weight or lower lr")
    stopped = agreed(signals)
    if stopped or cfg["save_interval"] and (last or (step + 1) % cfg["save_interval"] == 0):
        error = save(step + 1)
        if error and stopped:
            raise BadInput(error)
        if error:
            say(f"warning: {error}: the run goes on without this checkpoint", flush=True)
        if not error and not stopped and rank == 0 and cfg["evals"]:
            evaluate_checkpoint(step + 1)
    if stopped and not last:
        say(f"stopped after step {step + 1}: resume=auto goes on from {folder}/step_{step + 1:06d}", flush=True)
        dist.destroy_process_group()
        leave(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
lap("train")
used = torch.cuda.max_memory_allocated() if device.type == "cuda" else (
    1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # on a CPU with what malloc keeps for itself
say(f"peak memory of this process so far: {used / 2**30:.2f} GiB", flush=True)

# --------------------------------------------------------------------------------------- export, recall after

export = os.path.join(folder, "hf")
error = None
try:
    if cfg["lora_r"]:
        save_adapter(model, os.path.join(folder, "adapter"), cfg["model"], lora, cfg["model"], write=rank == 0)
    save_pretrained(model, export, dtype, cfg["model"], write=rank == 0)
except BadInput as e:  # all processes have to know, or the others end with a traceback about this one
    error = str(e)
if error := together(error)[0]:
    raise BadInput(error)
del model, optimizer, trainable, decayed
after = {"right_answers": recalls(cache(lambda: load_pretrained(export, dtype, device)), "after"), "held_out": now}
lap("questions_after")
if rank == 0:
    seconds = {name: round(value, 1) for name, value in clock.items() if name != "start"}
    write_json({"config": cfg, "before": before, "after": after, "pairs": len(pairs), "processes": world,
                "resumed": resumed, "peak_memory": used, "seconds": seconds, "torch": torch.__version__},
               os.path.join(folder, "result.json"))
    say(f"{export}: the aligned model; {folder}/result.json: before and after; seconds:", seconds)
dist.destroy_process_group()
leave(0)
