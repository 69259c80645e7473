"""LOGO training: one flat script, to be read from top to bottom.

    torchrun --standalone train_logo.py                         configs/tiny.py, on a laptop's CPU
    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_80k.py lr=2e-5 steps=50
    ... resume=auto                                             the same command, after a kill
    ... dry_run=True                                            all of it but the training
    ... -h                                                      every key with its value

    1  settings           configs/default.py < the named file < key=value of the command line
    2  before             what the model answers now; its own answers become the pairs
    3  model              masters -> checkpointing -> compile -> FSDP -> weights
    4  optimizer          AdamW; warm-up, then cosine
    5  loop               the training step stands between two double lines
    6  after              the export; what the model answers now

Reads a Hugging Face folder. Writes, under out/NAME: pairs.jsonl, metrics.jsonl and curves.png,
step_000100/ (to resume), hf/ (the aligned model), adapter/ (LoRA), result.json, config.json,
source/ (what made it). One process and many take one path: a step's groups are shared out, and
gradient and metrics are means over all of them. What watches over a run (lock, signals,
checkpoints, damage) stands in guard.py, what it says in report.py.
"""
import gc
import math
import os
import sys
import time
from functools import cache

from configs import (
    BadInput,
    check_settings,
    check_training,
    config_file,
    load_config,
    pairs_path,
    run_folder,
    saving,
    write_json,
)
from console import Progress, asked_for_help, leave, on_error, print_settings_help, say

# ------------------------------------------------------------------------------------- 1. settings

if __name__ == "__main__":
    # Before PyTorch is imported, which takes seconds: a wrong word is said at once.
    sys.excepthook = on_error
    if asked_for_help(sys.argv[1:]):
        print_settings_help(__doc__, sys.argv[1:])
        sys.exit()
    # All keys, with their meaning, are in configs/default.py. These make it LOGO, and by default
    # are what the paper has for Llama-3:
    #
    #     window=65536      K, the positions that a prompt's chunks are spread over (Eq. 4)
    #     n_rejected=2      M, rejected answers to a prompt
    #     beta=10.0         scale of the rewards (Eq. 2)
    #     gamma=3.0         margin between chosen and rejected, outside beta
    #     sft_weight=0.1    lambda, weight of the chosen answer's log-likelihood (Eq. 3)
    #     batch_size=64     groups (a prompt and its M + 1 answers) a step, over all processes
    cfg = load_config(sys.argv[1:])
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_settings(cfg)
    check_training(cfg, world)

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

import guard
import report
from checkpoint import (
    all_gather,
    config_path,
    find_checkpoint,
    load_adapter,
    load_checkpoint,
    load_pretrained,
    load_weights,
    read_config,
    save_adapter,
    save_pretrained,
    sha256,
    start_lora,
)
from data import (
    Batch,
    Sample,
    check_fit,
    collate,
    encode_group,
    load_pairs,
    split_pairs,
    step_samples,
)
from loss import logo_loss
from model import Llama, count_parameters
from tokenizer import load_tokenizer

# Whatever can be wrong with what the user gave is said in this stage, before hours are spent.
if cfg["evals"]:
    from evals.__main__ import read_command
    guard.check_evals(cfg["evals"], read_command)
device = guard.choose_device(cfg["threads"])
dtype = getattr(torch, cfg["dtype"])  # of the forward pass; what trains is stored in float32
shard_size = cfg["shard_size"] or world

tokenizer = load_tokenizer(cfg["model"], cfg["template"])
check_fit(cfg, tokenizer)
lora = {key: cfg[key] for key in ("lora_r", "lora_alpha", "lora_targets", "train_also")}
with torch.device("meta"):  # shapes only, so that what does not fit is said now; filled in stage 3
    model = Llama(read_config(config_path(cfg["model"], cfg["adapter"])))
    model.config.extend(cfg["window"], cfg["rope_theta"], cfg["yarn_factor"])
    model.train_only(**lora)
guard.check_lora(cfg, model)

guard.init_processes(device)
folder = run_folder(cfg)
writes = rank == 0 and not cfg["dry_run"]
lock = guard.lock(folder) if writes else None
resumed, state = find_checkpoint(folder, cfg["resume"])
if resumed:
    guard.check_resumable(resumed, state, cfg)
start_step = state["step"] if resumed else 0
tracker = report.Tracker()
if writes:
    guard.save_source(folder, cfg)
    tracker = report.open_tracker(cfg, folder, start_step)


# --------------------------------------------------------------- 2. before: questions, then pairs

# Who learns writes both sides: the chosen answer from the right evidence, the rejected ones from
# wrong or partial evidence. No judge and no other model; what it cannot say it cannot prefer.
@cache
def policy() -> Llama:
    """The model before training, which writes the answers. Opened only where one is missing."""
    with Progress(f"weights of {cfg['model']}"):
        return load_pretrained(cfg["model"], dtype, device, cfg["adapter"])


def right_answers(open_model, label: str) -> tuple[dict[str, tuple[int, int]], list[dict]]:
    """{context size: (right, asked)} on fresh questions, and the first ones of the last size.

    open_model: a function that gives the model.
    """
    found = {}
    said = []
    if not cfg["fresh_questions"]:
        return found, said
    from evals.questions import count_right

    for size in cfg["fresh_sizes"]:
        right, asked, said = count_right(open_model(), tokenizer, cfg, size, rank, world)
        found[str(size)] = (right, asked)  # as JSON has it, which a resumed run reads
        say(f"right answers {label:24s} context {size:6d}  {right:4d} of {asked:4d}  "
            f"{right / asked:.3f}")
    return found, said


def lap(name: str) -> None:
    """Note the seconds since the last lap, or the start, under a name."""
    seconds[name] = time.time() - started - sum(seconds.values())


def show_unwritten(model: Llama) -> None:
    """Of a dry run without pairs: what the first prompt will be, and what a step costs at most."""
    from pairs.build import first_prompt

    say(f"{pairs_path(cfg)}: no pairs yet, the run itself or python -m pairs builds them")
    policy()  # damaged weights are said now
    if rank == 0:
        group = encode_group(first_prompt(cfg, tokenizer), tokenizer, cfg)
        report.show_group(group, tokenizer)
        answers = (cfg["n_rejected"] + 1) * cfg["max_new_tokens"]
        tokens = group.segments[0].end + answers
        say_plan(model, cfg["micro_batch"] * tokens, cfg["micro_batch"] * answers,
                 cfg["batch_size"] * tokens)
    end_dry_run()


def end_dry_run() -> None:
    say("dry run: nothing was trained, nothing was written")
    dist.destroy_process_group()
    leave(0)


def say_plan(model: Llama, tokens: int, scored: int, tokens_of_step: int) -> None:
    """Work and peak of memory of a step. tokens, scored: of its largest micro-batch."""
    from bench.plan import describe, peak_memory

    accumulating = cfg["batch_size"] > cfg["micro_batch"] * world
    memory = peak_memory(model, cfg, tokens, scored, shard_size, accumulating)
    say(describe(trained, frozen, tokens_of_step, memory))


started = time.time()
seconds = {}
trained, frozen = count_parameters(model)
file = config_file(sys.argv[1:])
if file not in sys.argv:
    file = "configs/tiny.py (no file is named: that of the tiny example)"
say(f"settings: {file}, then the command line; examples: {cfg['examples']}")
say(f"{cfg['name']}: {cfg['model']}, {trained:,} trained + {frozen:,} frozen parameters, "
    f"{world} process(es) on {device.type}, window {cfg['window']}, M = {cfg['n_rejected']}")
reach = cfg["yarn_factor"] * model.config.rope.get("original_max_position_embeddings", 0)
if 0 < reach < cfg["window"]:
    # The window of the pre-training is not the one that a checkpoint with a scaling announces.
    say(f"warning: yarn_factor={cfg['yarn_factor']:g} reaches {reach:g} positions, "
        f"window is {cfg['window']}")
say(f"beta {cfg['beta']}, gamma {cfg['gamma']}, lambda {cfg['sft_weight']}; "
    f"{cfg['steps']} steps of {cfg['batch_size']} groups, lr {cfg['lr']}")
if rank == 0 and not resumed:
    from pairs.build import check_built
    check_built(cfg, tokenizer)  # before questions are asked, and in a dry run
if resumed:
    before = state["before"]
    say(f"resumed from {resumed}")
elif cfg["dry_run"]:
    before = {}
    if not os.path.exists(pairs_path(cfg)):
        show_unwritten(model)
else:
    from pairs.build import build_pairs

    counts, said = right_answers(policy, "before")
    before = {"right_answers": counts, "said": said}
    if (cfg["rope_theta"] or cfg["yarn_factor"]) and cfg["fresh_questions"]:
        # What the longer RoPE does without training: the control that training has to beat.
        own = policy().config
        policy().config = model.config
        counts, _ = right_answers(policy, "before, longer RoPE only")
        before["right_answers_rope"] = counts
        policy().config = own
    lap("questions_before")
    build_pairs(cfg, policy, tokenizer, rank, world)
    lap("pairs")
policy.cache_clear()  # the memory is wanted for training

# Checked whole, each pair's length too: one that fails at its turn would end the run hours later.
pairs = load_pairs(pairs_path(cfg), cfg, tokenizer)
pairs_digest = sha256(pairs_path(cfg))
if resumed and state["pairs"] != pairs_digest:
    raise BadInput(f"{pairs_path(cfg)}: not the pairs that {resumed} was trained on "
                   "(their sha256 differs)")
train, held_out = split_pairs(pairs, cfg["held_out"])
if not train:
    raise BadInput(f"{pairs_path(cfg)}: {len(pairs)} pairs, and none is of another document than "
                   f"the last {len(held_out)}: expected more, or a lower held_out="
                   f"{cfg['held_out']}")
largest_id = max(int(ids.max()) for pair in pairs for ids in pair["chunks"])
if largest_id >= model.config.vocab_size:  # a tokenizer may have words that the model does not
    raise BadInput(f"{pairs_path(cfg)}: has the token id {largest_id}, the model in {cfg['model']} "
                   f"has {model.config.vocab_size}")


# ---------------------------------------------------------------------------- 3. model and sharding

def shard_model(model: Llama, cfg: dict) -> None:
    """Make a model of shapes one that trains, each process with its share. The order matters."""
    # Masters first. An update of a bf16 weight is mostly smaller than its last bit, so what trains
    # is stored in float32, and FSDP casts a copy for the forward. What is frozen needs no master.
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)

    # Checkpointing lies inside of what is compiled, and of what FSDP gathers: a block's weights are
    # then gathered once for its recomputation and its backward.
    model.set_checkpointing(cfg["checkpointing"], cfg["offload_activations"])

    # Compile block by block, before FSDP, whose hooks stay outside of the graph.
    if cfg["compile"]:
        for block in model.model.layers:
            block.compile(dynamic=True)  # each batch has another length

    # FSDP, also for one process: there is no second path to keep right.
    host = CPUOffloadPolicy(device.type == "cuda") if cfg["offload_params"] else OffloadPolicy()
    how = {
        "mesh": guard.make_mesh(device.type, world, shard_size),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": host,
    }
    for block in model.model.layers:
        fully_shard(block, **how)
    # The root keeps embeddings and head gathered until backward: the head is needed at once.
    fully_shard(model, **how)

    # Only now is there memory, for this process's rows alone, which it reads from the files itself.
    model.to_empty(device="cpu" if cfg["offload_params"] else device)
    with torch.no_grad():
        load_weights(model, cfg["model"])
        if cfg["adapter"]:
            load_adapter(model, cfg["adapter"])
        else:
            start_lora(model, cfg["seed"])


with Progress("weights"):
    shard_model(model, cfg)


# ------------------------------------------------------------------------------------ 4. optimizer

def make_optimizer(model: Llama, cfg: dict) -> torch.optim.AdamW:
    """AdamW. Weight decay is for matrices that multiply.

    Not for norms and biases; not for lookup tables, whose rows would shrink where no token comes;
    not for LoRA's B, which starts at zero.
    """
    # Betas and decay are the public scripts'. The rate is not the paper's to copy: 5e-7 fits the
    # training of all weights, LoRA usually wants 1e-5 to 2e-4.
    decayed = []
    others = []
    for name, p in model.named_parameters():
        table = "embed_tokens" in name and not model.config.tie_word_embeddings
        if not p.requires_grad:
            continue
        if p.ndim > 1 and "lora_B" not in name and not table:
            decayed.append(p)
        else:
            others.append(p)
    groups = [{"params": decayed, "weight_decay": cfg["weight_decay"]},
              {"params": others, "weight_decay": 0.0}]
    fused = device.type == "cuda"  # on a CPU it saves nothing that shows
    return torch.optim.AdamW(groups, lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]),
                             fused=fused, foreach=not fused)


def learning_rate(step: int, cfg: dict) -> float:
    """Linear up to lr over the first share `warmup` of the steps, then a cosine to zero."""
    peak = cfg["lr"]
    warm = math.ceil(cfg["warmup"] * cfg["steps"])
    if step < warm:
        return peak * (step + 1) / warm
    # A run ends at zero: what the last samples taught is not left half undone by large steps.
    angle = math.pi * (step - warm) / max(1, cfg["steps"] - warm)
    return peak * 0.5 * (1 + math.cos(angle))


optimizer = make_optimizer(model, cfg)
skipped = set()  # ids of pairs whose loss or gradient was not finite
if resumed:
    load_checkpoint(resumed, state, model, optimizer)
    for moments in optimizer.state.values():
        moments["step"].fill_(state["updates"])  # fewer than steps, where one changed nothing
    skipped.update(state["skipped"])


# ----------------------------------------------------------------------------------------- 5. loop

def load_batch(samples: list[Sample], source: list[dict]) -> Batch:
    """Samples of pairs as one packed batch: groups one after another, without padding."""
    groups = []
    for pair, draw, epoch in samples:
        groups.append(encode_group(source[pair], tokenizer, cfg, draw, epoch))
    return collate(groups)


def share_of(samples: list[Sample], usable: list[Sample]) -> list[tuple[Batch, float]]:
    """This process's micro-batches of a step, each with its weight: its share of the usable groups.

    All processes make equally many, since each forward and backward is one for all: the weights
    are gathered from everywhere. Where no usable group is left, another one stands in and counts
    for nothing.
    """
    per_rank = len(samples) // world
    mine = samples[rank * per_rank:(rank + 1) * per_rank]
    micro = cfg["micro_batch"]
    share = []
    for i in range(0, per_rank, micro):
        kept = [sample for sample in mine[i:i + micro] if sample in usable]
        batch = load_batch(kept or usable[:1], train)
        share.append((batch, len(kept) / len(usable)))
    return share


def mean_over_all(parts: list[tuple[dict, float]]) -> dict[str, float]:
    """Weighted mean of metrics over micro-batches and processes; all weights add up to 1."""
    weighted = []
    for metrics, weight in parts:
        values = torch.stack(list(metrics.values()))
        weighted.append(weight * values)
    mean = torch.stack(weighted).sum(0)
    dist.all_reduce(mean)
    names = parts[0][0]
    return dict(zip(names, mean.tolist()))


def batch_loss(model: Llama, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The LOGO loss of a packed batch, a mean over its groups, and metrics."""
    tokens = batch.tokens.to(device)
    positions = batch.positions.to(device)
    targets = batch.targets.to(device)
    sums, lengths = model(tokens, positions, targets, batch.segments)
    # Each answer is divided by its own length: sums would let the longest answer decide.
    logps = (sums / lengths).view(-1, cfg["n_rejected"] + 1)  # (N, M + 1)
    chosen = logps[:, 0]
    rejected = logps[:, 1:]
    loss, metrics = logo_loss(chosen, rejected, cfg["beta"], cfg["gamma"], cfg["sft_weight"])
    return loss, {"loss": loss.detach(), **metrics}


# =================================================================================================

def train_step(model, optimizer, share: list[tuple[Batch, float]], lr: float | None) -> dict:
    """One step over a share of its groups: metrics of the whole. lr None: the gradient alone."""
    optimizer.zero_grad()  # to None: between steps gradients take no memory
    parts = []
    for i, (batch, weight) in enumerate(share):
        last = i + 1 == len(share)
        # With LoRA, gradients are few: reduced once a step. Those of all weights, kept unsharded
        # until the last micro-batch, would be a whole model in float32 on every GPU.
        model.set_requires_gradient_sync(last or not cfg["lora_r"])
        loss, metrics = batch_loss(model, batch)
        # FSDP divides by the number of processes, weight by that of groups in the whole step: the
        # gradient is the mean over groups, exactly, however they are cut into micro-batches.
        (loss * (weight * world)).backward()
        parts.append((metrics, weight))
    # The norm over all shards, of the whole step's gradient: the same for any number of processes.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg["grad_clip"])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    metrics = {**mean_over_all(parts), "grad_norm": float(norm), "lr": lr}
    if lr is not None and is_finite(metrics):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return metrics

# =================================================================================================


def is_finite(metrics: dict) -> bool:
    # Both are sums over everything, and a sum keeps a NaN or an infinity. All processes have the
    # same two numbers, so they all go the same way.
    return math.isfinite(metrics["loss"] + metrics["grad_norm"])


def step_without_faults(model, optimizer, step: int) -> dict:
    """train_step; pairs whose loss or gradient is not finite are left out, from then on.

    Without them the step is done anew, so that it does not matter when their fault was found. Where
    no other pair is left, or none is at fault alone, the weights stay as they are.
    """
    samples = step_samples(len(train), cfg, step)
    usable = usable_of(samples) or samples
    share = share_of(samples, usable)
    metrics = train_step(model, optimizer, share, learning_rate(step, cfg))
    if is_finite(metrics):
        return {**metrics, **guard.work_of(model, share, device)}
    found = set()
    for sample in usable:
        # All processes take the same pair, one after another, so all find the same.
        alone = [(load_batch([sample], train), 1 / world)]
        if not is_finite(train_step(model, optimizer, alone, lr=None)):
            found.add(train[sample.pair]["id"])
    skipped.update(found)
    if found and usable_of(samples):
        metrics = step_without_faults(model, optimizer, step)
    found.update(metrics.get("skipped", []))
    return {**guard.work_of(model, share, device), **metrics, "skipped": sorted(found)}


def usable_of(samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if train[sample.pair]["id"] not in skipped]


@torch.no_grad()
def evaluate(model: Llama) -> dict[str, float]:
    """Metrics on the held-out pairs but `skipped` ones, at the positions of their first draw."""
    every = range(len(held_out))
    usable = [i for i in every if held_out[i]["id"] not in skipped] or every
    parts = []
    with Progress("held-out pairs", len(every[rank::world])) as progress:
        for i in every[rank::world]:
            # One at a time, always at the same positions, so that two evaluations can be compared.
            # As in share_of, another pair stands in for one left out, and counts for nothing.
            counts = i in usable
            batch = load_batch([Sample(i if counts else usable[0], draw=0, epoch=0)], held_out)
            _, metrics = batch_loss(model, batch)
            parts.append((metrics, counts / len(usable)))
            progress.update()
    model.reshard()  # without a backward nobody else gives the root's gathered parameters back
    return mean_over_all(parts) if parts else {}


@torch.no_grad()
def faulty_held_out(model: Llama) -> list[int]:
    """Ids of the held-out pairs whose loss is not finite: no mean with one of them is a number."""
    found = []
    for i in range(rank, len(held_out), world):
        loss, _ = batch_loss(model, load_batch([Sample(i, draw=0, epoch=0)], held_out))
        if not math.isfinite(loss):
            found.append(held_out[i]["id"])
    model.reshard()
    return sorted(sum(all_gather(found), []))


def say_estimate(model: Llama) -> None:
    """What the first step will cost, from the groups that it has."""
    samples = step_samples(len(train), cfg, 0)
    micro = cfg["micro_batch"]
    tokens = 0
    largest = None
    for i in range(0, len(samples), micro):
        batch = load_batch(samples[i:i + micro], train)
        tokens += len(batch.tokens)
        if largest is None or len(batch.tokens) > len(largest.tokens):
            largest = batch
    say_plan(model, len(largest.tokens), guard.scored_tokens(largest), tokens)


def tokens_of(sample: Sample) -> int:
    return train[sample.pair]["tokens"]


def compare_layouts(model: Llama, optimizer) -> None:
    """Loss and gradient of a real group against M + 1 full rows of it. BadInput: they differ."""
    # The shortest of the first step: its rows take M + 1 times the memory of the shared prompt.
    samples = step_samples(len(train), cfg, start_step)
    group = load_batch([min(samples, key=tokens_of)], train)
    found = []
    for layout in (group, guard.full_rows(group)):
        found.append(train_step(model, optimizer, [(layout, 1 / world)], lr=None))
    guard.check_layouts(*found, cfg)


def try_longest(model: Llama, optimizer) -> None:
    """The run's longest groups, forward and backward: memory ends now, or not at their turn."""
    samples = set()
    for step in range(start_step, cfg["steps"]):
        samples.update(step_samples(len(train), cfg, step))
    longest = sorted(samples, key=lambda sample: (-tokens_of(sample), sample))[:cfg["micro_batch"]]
    batch = load_batch(longest, train)
    # AdamW's two moments, which the first update makes, take their room from the second step on.
    moments = []
    for p in model.parameters():
        if p.requires_grad and not optimizer.state:
            moments += [torch.empty_like(p), torch.empty_like(p)]
    # The second micro-batch of a step meets the gradient of the first.
    micro_batches = min(2, cfg["batch_size"] // (world * cfg["micro_batch"]))
    train_step(model, optimizer, [(batch, 1 / world)] * micro_batches, lr=None)
    optimizer.zero_grad()


def first_look(model: Llama, optimizer) -> None:
    """What would spoil the run in silence, or end it after hours. It changes no number."""
    try:
        with Progress("a first look at the longest groups"):  # and compiling, which takes minutes
            if cfg["verify"]:
                compare_layouts(model, optimizer)
            try_longest(model, optimizer)
    except torch.OutOfMemoryError as e:
        longest = max(pair["tokens"] for pair in train)
        raise BadInput(f"out of memory at the longest of the run's groups, up to {longest} tokens, "
                       f"at micro_batch={cfg['micro_batch']}: in this order checkpointing=True, "
                       "micro_batch=1, offload_activations=True, offload_params=True; ahead: "
                       "python -m bench plan CONFIG") from e


peak = None  # FLOP/s of the device on its datasheet, where we know it
if rank == 0:
    from bench.plan import peak_flops
    peak = peak_flops(device)
    say_estimate(model)
if writes:
    report.keep_metrics(folder, start_step)
if start_step < cfg["steps"]:
    first_look(model, optimizer)
if cfg["dry_run"]:
    report.show_group(load_batch(step_samples(len(train), cfg, start_step)[:1], train), tokenizer)
    end_dry_run()
if resumed:
    now = state["held_out"] or {}  # none where nothing is held out, or none was due
    if cfg["save_interval"] and report.is_due(start_step, cfg["save_interval"], cfg["steps"]):
        guard.evaluate_rest(resumed, folder, start_step, cfg["evals"])
else:
    now = evaluate(model)
    if held_out and not math.isfinite(now["loss"]):
        # Left out for the whole run, so that its evaluations can be compared. A pair that is not
        # finite later on shows: then it is the weights that are at fault.
        found = faulty_held_out(model)
        skipped.update(found)
        say(f"not finite, left out from here on: held-out pairs {found}")
        now = evaluate(model)
    before["held_out"] = now
    if held_out:
        say(report.sentence(0, now) + f"  held-out ({len(held_out) - len(skipped)} pairs)")
origin = {"config": cfg, "pairs": pairs_digest, "before": before}
printed = report.Report(folder, cfg, world, peak, tracker)

# From here on SIGTERM and Ctrl-C wait for the end of a step, which then leaves a checkpoint.
stop = guard.StopSignals()
faults = guard.FaultWatch()
for step in range(start_step, cfg["steps"]):
    begun = time.time()
    metrics = step_without_faults(model, optimizer, step)
    metrics["step"] = done = step + 1
    metrics["seconds"] = time.time() - begun
    if held_out and report.is_due(done, cfg["eval_interval"], cfg["steps"]):
        metrics["held_out"] = now = evaluate(model)
    printed.step(metrics, before["held_out"])
    faults.watch(metrics)
    stopped = stop.agreed(device)
    due = cfg["save_interval"] and report.is_due(done, cfg["save_interval"], cfg["steps"])
    if stopped or due:
        state = {**origin, "step": done, "held_out": metrics.get("held_out"),
                 "skipped": sorted(skipped)}
        guard.save(folder, model, optimizer, state, stopped)
    if stopped and done < cfg["steps"]:
        say(f"stopped after step {done}: resume=auto goes on from {folder}/step_{done:06d}")
        printed.close()
        dist.destroy_process_group()
        leave(0)
stop.release()
printed.close()
lap("train")
used = guard.peak_memory(device)
say(f"peak memory of this process so far: {used / 2**30:.2f} GiB")


# ------------------------------------------------------------------ 6. after: export, questions

def export_model(model: Llama) -> str:
    """hf/ and, with LoRA, adapter/."""
    # The masters are float32. The export is rounded to the run's dtype, once, after LoRA is added.
    export = os.path.join(folder, "hf")
    if cfg["lora_r"]:
        adapter = os.path.join(folder, "adapter")
        write_together(save_adapter, model, adapter, cfg["model"], lora, cfg["model"],
                       cfg["template"])
    write_together(save_pretrained, model, export, dtype, cfg["model"], cfg["template"])
    return export


def write_together(save, *arguments) -> None:
    """All processes gather, one writes. BadInput on all of them if it could not."""
    error = None
    try:
        with Progress("export"):
            save(*arguments, write=rank == 0)
    except BadInput as e:
        error = str(e)
    # Known to all before any of them gathers what comes next: one alone would wait for ever.
    error = all_gather(error)[0]
    if error:
        raise BadInput(error)


export = export_model(model)
del model, optimizer
gc.collect()  # FSDP's hooks and their modules hold each other: without it both models would be here
# The export is asked and not the model that was trained: what is measured is what a user gets.
aligned = cache(lambda: load_pretrained(export, dtype, device))
counts, said = right_answers(aligned, "after")
after = {"right_answers": counts, "said": said, "held_out": now}
lap("questions_after")

if rank == 0:
    from evals.curves import draw_curves

    result = {"config": cfg, "before": before, "after": after, "pairs": len(pairs),
              "processes": world, "resumed": resumed, "skipped": sorted(skipped),
              "peak_memory": used, "seconds": seconds, "torch": torch.__version__,
              "next": report.next_commands(cfg, export, pairs_path(cfg), said)}
    with saving(folder):
        write_json(result, os.path.join(folder, "result.json"))
    try:
        draw_curves(folder)
    except BadInput as e:  # resumed at its last step in another folder, it has no metrics
        say(f"no picture of the run: {e}")
    report.say_end(result, folder, pairs_path(cfg))
dist.destroy_process_group()
leave(0)
