"""Speed and memory, as ratios of measurements made in one run, on whatever machine this is.

    python -m bench step     [key=value]     a training step, against three ways to compute the same loss
    python -m bench limit    [key=value]     the step's work against the least that it needs, its pace against the machine's
    python -m bench generate [key=value]     answers for pairs, against transformers' generate
    python -m bench plan CONFIG [key=value]  what a run will cost on GPUs that are not here: arithmetic; also config keys

Each prints a table and writes it, with versions and machine, to out/bench/COMMAND.json. Peers need requirements-dev.txt.
Inputs are random tokens of a seed, the same for all. A process measures one step and ends, so that no peer inherits
another's memory; repetitions are interleaved.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import load_pretrained, read_config, start_lora
from configs import BadInput, exit_on_bad_input, load_config, with_arguments, write_json
from loss import logo_loss
from bench.plan import DATASHEET, peak_memory
from generate import generate
from model import IGNORE, Llama, LlamaConfig, Segment, count_parameters, step_flops

SHAPE = dict(
    model="models/smollm2",  # Hugging Face folder of the model
    lora_r=0,                # rank of LoRA on q, k, v, o; 0: all weights train
    checkpointing=False,     # gradient checkpointing, for all ways
    dtype="float32",         # or bfloat16, on a GPU
    threads=0)               # CPU threads; 0: PyTorch's choice
OPTIONS = {
    "step": dict(
        **SHAPE,
        prompt=[2048],       # prompt lengths, in tokens
        answer=[64],         # answer lengths
        M=[2],               # numbers of rejected answers
        compile=False,       # torch.compile our blocks
        ways="ours,naive,transformers,trl",  # what to measure; trl takes M = 1 only
        repeats=3),          # processes for each way and shape
    "limit": dict(**SHAPE, prompt=2048, answer=64, M=2, compile=False, repeats=5),
    "generate": dict(
        model="models/smollm2", dtype="float32", threads=0,
        prompt=1024,         # longest prompt, in tokens; the shortest has half of it
        prompts=4,           # different prompts
        M=2,                 # answers to each
        answer=64,           # tokens of an answer
        repeats=3),
    "plan": dict(
        gpus=8,
        gpu="A800",          # part of a name in plan.DATASHEET
        shape="",            # one of SHAPES, where the config's model is not on this machine; empty: by the config's name
        prompt=0,            # tokens of a prompt; 0: n_chunks x chunk_size of the config
        answer=512,          # tokens of an answer
        samples=12000,       # the paper's (Sec. 4.1)
        memory=[24, 40, 80],  # GB of a GPU
        reserved=2.0,        # GB of it for the CUDA context, NCCL and the allocator's gaps
        utilisation=[0.3, 0.4, 0.5]),  # of the datasheet's FLOP/s, by the work that the layout needs (MFU)
}
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Freed memory stays with the process: without this, Linux hands out each large tensor's pages anew, which on a virtual
# machine took a third of a step, whoever computed it.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 29)}
# What plan needs of models that are not here: their published config.json.
SHAPES = {
    "llama3_8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192),
    "llama2_7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096),
    "mistral_7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768)}
STEP = dict(beta=2.5, gamma=0.25)  # of the loss; no cost depends on them


# ---------------------------------------------------------------------------------------- one step, in four ways

def draw(s, vocab):
    """Random tokens of one group: prompt (P,), answers (M + 1, L), the chosen first."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocab, (s["prompt"],), generator=generator)
    return prompt, torch.randint(3, vocab, (s["M"] + 1, s["answer"]), generator=generator)


def group(prompt, answers):
    """tokens, positions, targets, segments of the shared-prompt layout, as data.encode_group makes them."""
    P, (A, L) = len(prompt) - 1, answers.shape
    last = prompt[-1:].expand(A, 1)
    tokens = torch.cat([prompt[:-1], torch.cat([last, answers[:, :-1]], 1).flatten()])
    positions = torch.cat([torch.arange(P), (P + torch.arange(L)).repeat(A)])
    targets = torch.cat([torch.full((P,), IGNORE), answers.flatten()])
    return tokens, positions, targets, [Segment(0, P)] + [Segment(P + i * L, P + (i + 1) * L, 0, P) for i in range(A)]


def rows(prompt, answers):
    """input_ids and labels (M + 1, P + L) of the layout that repeats the prompt."""
    ids = torch.cat([prompt.expand(len(answers), -1), answers], 1)
    return ids, torch.cat([torch.full((len(answers), len(prompt)), IGNORE), answers], 1)


def mean_logps(logits, labels):
    """(N,) mean log-prob of each row's labels, from the logits of all its tokens."""
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    mask = labels[:, 1:] != IGNORE
    return (logps * mask).sum(1) / mask.sum(1)


def loss_of(logps):
    return logo_loss(logps[None, 0], logps[None, 1:], **STEP)[0]


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)  # the loss stays as it is


def our_model(s, device):
    model = load_pretrained(s["model"], getattr(torch, s["dtype"]), device)
    model.train_only(s["lora_r"], 16, "q_proj,k_proj,v_proj,o_proj", "")
    if s["lora_r"]:
        start_lora(model, 0)
    model.set_checkpointing(s["checkpointing"])
    for block in model.model.layers if s.get("compile") else ():
        block.compile(dynamic=True)
    return model, adamw(model)


def ours(s, device):
    """This repository's step."""
    model, optimizer = our_model(s, device)
    *batch, segments = group(*draw(s, model.config.vocab_size))

    def loss():
        sums, lengths = model(*(x.to(device) for x in batch), segments)
        return loss_of(sums / lengths)

    return model, optimizer, loss


def naive(s, device):
    """The same model on M + 1 full rows, with all logits."""
    model, optimizer = our_model(s, device)
    ids, labels = (x.to(device) for x in rows(*draw(s, model.config.vocab_size)))
    return model, optimizer, lambda: loss_of(mean_logps(model.logits(ids), labels))


def hf_model(s, device):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(s["model"], dtype=getattr(torch, s["dtype"])).to(device)
    model.config.use_cache = False
    if s["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def lora_config(s):
    from peft import LoraConfig
    return LoraConfig(r=s["lora_r"], lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM",
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) if s["lora_r"] else None


def transformers(s, device):
    """Full rows on transformers and PEFT, as the method's public scripts and most trainers do."""
    model = hf_model(s, device)
    if s["lora_r"]:
        from peft import get_peft_model
        model = get_peft_model(model, lora_config(s))
    ids, labels = (x.to(device) for x in rows(*draw(s, model.config.vocab_size)))
    return model, adamw(model), lambda: loss_of(mean_logps(model(ids).logits, labels))


def trl(s, device):
    """TRL's CPOTrainer with its SimPO loss, on the same tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    ids, labels = rows(*draw(s, json.load(open(os.path.join(s["model"], "config.json")))["vocab_size"]))
    batch = {f"{name}_{key}": value.to(device) for i, name in enumerate(("chosen", "rejected"))
             for key, value in (("input_ids", ids[i:i + 1]), ("labels", labels[i:i + 1]),
                                ("attention_mask", torch.ones_like(ids[i:i + 1])))}
    settings = CPOConfig(output_dir="out/bench/trl", loss_type="simpo", cpo_alpha=0.0, beta=STEP["beta"],
                         simpo_gamma=STEP["gamma"], gradient_checkpointing=s["checkpointing"], learning_rate=0.0,
                         bf16=s["dtype"] == "bfloat16", use_cpu=device == "cpu", max_length=None, report_to=[])
    trainer = CPOTrainer(hf_model(s, device), settings, processing_class=AutoTokenizer.from_pretrained(s["model"]),
                         train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
                         peft_config=lora_config(s))
    return trainer.model, trainer.create_optimizer(), lambda: trainer.compute_loss(trainer.model, batch)


WAYS = {"ours": ours, "naive": naive, "transformers": transformers, "trl": trl}


def take_step(model, optimizer, loss):
    value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


# ------------------------------------------------------------------------------------------------- measuring

def peak_bytes(step, device):
    """Most bytes that tensors hold at once during step(), beyond those from before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0  # every allocation and release, exact; resident memory would add what malloc keeps for itself
    for event in sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def seconds(step, device):
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def state_bytes(model, optimizer):
    """(weights and moments, gradients) in bytes."""
    moments = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    size = sum(x.nbytes for x in [*model.parameters(), *moments])
    return size, sum(p.nbytes for p in model.parameters() if p.requires_grad)


def measure_step(s):
    """One way's loss, peak memory and seconds, in this process."""
    device = set_up(s)
    model, optimizer, loss = WAYS[s["way"]](s, device)
    for p in model.parameters():  # the moments exist before anything is measured
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    losses = []
    step = lambda: losses.append(take_step(model, optimizer, loss))
    peak = peak_bytes(step, device)  # warms up as well
    took = min(seconds(step, device) for _ in range(2))
    state, gradients = state_bytes(model, optimizer)
    found = {"loss": losses[-1], "seconds": took, "peak": peak, "state": state, "gradients": gradients}
    if s["way"] == "ours":
        scored = (s["M"] + 1) * s["answer"]
        cfg = {**s, "offload_params": False, "offload_activations": False, "n_rejected": s["M"]}
        expected = peak_memory(model, cfg, s["prompt"] - 1 + scored, scored, 1)
        found["expected"] = expected["total"] - expected["gathered"]  # no FSDP here
    return found


def set_up(s):
    if s["threads"]:
        torch.set_num_threads(s["threads"])
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_new_process(s):
    """measure_...(s) in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "bench", "measure", json.dumps(s)], capture_output=True, text=True,
                          env={**os.environ, **MALLOC}, cwd=HERE)
    if done.returncode < 0:  # mostly Linux, out of memory
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def bench_step(options):
    ways = [w.strip() for w in options["ways"].split(",")]
    if unknown := set(ways) - set(WAYS):
        raise BadInput(f"ways={options['ways']!r}: expected some of {','.join(WAYS)}, found {', '.join(unknown)}")
    table = []
    print(f"{'prompt':>6} {'answer':>6} {'M':>2}  {'way':12} {'seconds':>8} {'x ours':>7} {'(low..high)':>13} "
          f"{'GiB':>7} {'x ours':>7} {'activations':>11} {'x ours':>7}  loss")
    for P, L, M in ((P, L, M) for P in options["prompt"] for L in options["answer"] for M in options["M"]):
        shape, found = {**options, "prompt": P, "answer": L, "M": M}, {way: [] for way in ways if way != "trl" or M == 1}
        for _ in range(options["repeats"]):
            for way in found:
                found[way].append(in_new_process({**shape, "way": way}))
        table += [summary(way, shape, runs, found.get("ours")) for way, runs in found.items()]
    return table


def summary(way, shape, runs, ours):
    """One printed line of a way's repeated measurements, and its dict for the JSON file."""
    row = {"way": way, **{key: shape[key] for key in ("prompt", "answer", "M")}, "runs": runs}
    head = f"{shape['prompt']:6d} {shape['answer']:6d} {shape['M']:2d}  {way:12}"
    if failed := [run["error"] for run in runs if "error" in run]:
        print(head, failed[0], flush=True)
        return {**row, "error": failed[0]}
    # gradients reach their full size while activations go: what is beyond state and gradients is the activations' share
    for run in runs:
        run["total"], run["activations"] = run["state"] + run["peak"], run["peak"] - run["gradients"]
    middle = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "total", "activations", "loss")}
    row.update(middle)
    if ours and not any("error" in run for run in ours):
        pairs = [run["seconds"] / our["seconds"] for run, our in zip(runs, ours)]
        row["seconds_ratio"] = [min(pairs), statistics.median(pairs), max(pairs)]
        for key in ("total", "activations"):
            row[f"{key}_ratio"] = middle[key] / statistics.median(our[key] for our in ours)
    low, mid, high = row.get("seconds_ratio", [float("nan")] * 3)
    print(f"{head} {middle['seconds']:8.2f} {mid:7.2f} {f'({low:.2f}..{high:.2f})':>13} {middle['total'] / 2**30:7.2f} "
          f"{row.get('total_ratio', float('nan')):7.2f} {middle['activations'] / 2**30:11.2f} "
          f"{row.get('activations_ratio', float('nan')):7.2f}  {middle['loss']:.5f}"
          + (f"  expected {runs[0]['expected'] / 2**30:.2f} GiB" if "expected" in runs[0] else ""), flush=True)
    return row


# ------------------------------------------------------------------------------------------------------- limit

def attention_flops(q, k, v, dropout_p=0.0, is_causal=False, *args, out_shape=None, **kwargs):
    """Forward of SDPA's CPU kernel, which PyTorch's counter does not know: scores and values, half of it if causal."""
    (_, H, L, D), S = q, k[2]
    return 4 * H * D * (L * (L + 1) // 2 if is_causal else L * S)


def attention_backward_flops(grad, q, k, v, out, lse, dropout_p, is_causal, *args, out_shape=None, **kwargs):
    """Its backward: five products, of which the scores are computed again."""
    return attention_flops(q, k, v, 0.0, is_causal) * 5 // 2


def count_flops(work):
    """FLOPs that work() executes: {operator: FLOPs}."""
    ops = torch.ops.aten
    with FlopCounterMode(display=False, custom_mapping={
            ops._scaled_dot_product_flash_attention_for_cpu: attention_flops,
            ops._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops}) as counter:
        work()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def matmul_peak(dtype, device):
    """Best FLOP/s of square matrix products."""
    best = 0.0
    for n in (1024, 2048):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        best = max(best, 2 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(5)))
    return best


def measure_limit(s):
    """FLOPs, seconds and costliest operators of our step, and this machine's best matrix product."""
    device = set_up(s)
    model, optimizer, loss = ours(s, device)
    step = lambda: take_step(model, optimizer, loss)
    for _ in range(3):
        step()
    peaks, took = [], []
    for _ in range(s["repeats"]):
        peaks.append(matmul_peak(getattr(torch, s["dtype"]), device))
        took.append(seconds(step, device))
    counted = count_flops(step)
    *_, segments = group(*draw(s, model.config.vocab_size))
    scored = (s["M"] + 1) * s["answer"]
    least = step_flops(model, segments, scored)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    costs = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in costs)
    head = 2 * model.lm_head.weight.numel() * scored  # logits are made again in backward
    scores = sum(n for op, n in counted.items() if op.endswith("for_cpu_backward")) // 5
    model.set_checkpointing(False)
    blocks = sum(counted.values()) - sum(count_flops(step).values())
    return {"least": least, "counted": sum(counted.values()), "again": {"logits": head, "attention scores": scores,
            "blocks (checkpointing)": blocks}, "seconds": took, "peaks": peaks, "by_operator": counted,
            "costliest": [[e.key, e.self_cpu_time_total / 1e6, e.self_cpu_time_total / total, e.count] for e in costs[:10]]}


def bench_limit(options):
    found = in_new_process({**options, "measure": "limit"})
    if "error" in found:
        raise BadInput(found["error"])
    again, took, peak = sum(found["again"].values()), statistics.median(found["seconds"]), statistics.median(found["peaks"])
    excess = found["counted"] - again
    print(f"least that the step needs  {found['least'] / 1e12:8.3f} TFLOP")
    print(f"executed                   {excess / 1e12:8.3f} TFLOP   {excess / found['least']:.3f} x the least, and again:")
    for name, flops in found["again"].items():
        print(f"    {name:22} {flops / 1e12:8.3f} TFLOP   {flops / found['least']:.3f} x")
    print(f"matrix products            {peak / 1e9:8.0f} GFLOP/s at best   ({min(found['peaks']) / 1e9:.0f}.."
          f"{max(found['peaks']) / 1e9:.0f})")
    for name, flops in (("step, least work", found["least"]), ("step, executed work", found["counted"])):
        print(f"{name:26} {flops / took / 1e9:8.0f} GFLOP/s   {flops / took / peak:.0%} of it   "
              f"{took:.2f} s ({min(found['seconds']):.2f}..{max(found['seconds']):.2f})")
    for name, cost, share, calls in found["costliest"]:
        print(f"    {name[:52]:52} {cost:8.3f} s  {share:6.1%}  {calls:6d} calls")
    return [found]


# ---------------------------------------------------------------------------------------------------- generate

def prompts_of(s, vocab):
    """s["prompts"] different prompts of uneven length, each M times in a row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(s["prompt"] // 2, s["prompt"], s["prompts"]).int().tolist()
    return [p for n in lengths for p in [torch.randint(3, vocab, (n,), generator=generator).tolist()] * s["M"]]


def measure_generate(s):
    """Greedy answers without a stop token, and seconds."""
    device = set_up(s)
    if s["way"] == "ours":
        model = load_pretrained(s["model"], getattr(torch, s["dtype"]), device)
        prompts = prompts_of(s, model.config.vocab_size)
        run = lambda: generate(model, prompts, s["answer"])
    else:
        model = hf_model({**s, "checkpointing": False}, device).eval()
        model.config.use_cache, model.generation_config.eos_token_id = True, None  # no answer ends early, as in ours
        prompts = prompts_of(s, model.config.vocab_size)
        longest = max(map(len, prompts))  # padded on the left, as decoders want it
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        run = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=s["answer"], do_sample=False,
                                     pad_token_id=0)[:, longest:].tolist()
    answers = []
    took = [seconds(lambda: answers.append(run()), device) for _ in range(2)]
    return {"answers": answers[-1], "seconds": min(took), "tokens": len(prompts) * s["answer"]}


def bench_generate(options):
    ways, runs = ("ours", "transformers"), {}
    for _ in range(options["repeats"]):
        for way in ways:
            runs.setdefault(way, []).append(in_new_process({**options, "way": way, "measure": "generate"}))
    for found in runs.values():
        if failed := [run["error"] for run in found if "error" in run]:
            raise BadInput(failed[0])
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(*runs.values()))
    same = [a == b for a, b in zip(*(found[0].pop("answers") for found in runs.values()))]
    for way in ways:
        took = statistics.median(run["seconds"] for run in runs[way])
        print(f"{way:12} {took:8.2f} s   {runs[way][0]['tokens'] / took:8.1f} tokens/s")
    print(f"transformers takes {statistics.median(ratios):.2f} times as long ({ratios[0]:.2f}..{ratios[-1]:.2f}); "
          f"{sum(same)} of {len(same)} answers are the same")
    return [{"ratios": ratios, "same": sum(same), "of": len(same),
             "seconds": {way: [run["seconds"] for run in found] for way, found in runs.items()}}]


# -------------------------------------------------------------------------------------------------------- plan

def planned_model(cfg, options):
    """The config's model on the meta device, from its folder or from SHAPES."""
    path = os.path.join(cfg["model"], "config.json")
    if os.path.isfile(path) and not options["shape"]:
        config = read_config(path)
    else:
        name = options["shape"] or next((name for name in SHAPES if cfg["name"].startswith(name)), None)
        if name not in SHAPES:
            raise BadInput(f"{path}: no such file; shape= is one of {', '.join(SHAPES)}, found {name!r}")
        config = LlamaConfig(**SHAPES[name])
    with torch.device("meta"):
        model = Llama(config)
        model.train_only(cfg["lora_r"], cfg["lora_alpha"], cfg["lora_targets"], cfg["train_also"])
    return model


def plan_of(model, cfg, P, L, M, shards, naive=False):
    """(tokens, FLOPs, {item: bytes}) of one group in one layout, on one process of so many."""
    segments = [Segment(0, P)] + [Segment(P + i * L, P + (i + 1) * L, 0, P) for i in range(M + 1)]
    scored = (M + 1) * L
    if naive:
        segments, scored = [Segment(i * (P + L), (i + 1) * (P + L)) for i in range(M + 1)], (M + 1) * (P + L)
    tokens = segments[-1][1]
    accumulating = cfg["batch_size"] > shards * cfg["micro_batch"]
    memory = peak_memory(model, {**cfg, "n_rejected": M}, tokens, scored, shards, accumulating, naive)
    return tokens, step_flops(model, segments, scored), memory


def largest(fits, high):
    """The largest n in 0..high for which fits(n), where what fits is everything up to some n."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def bench_plan(options, *config):
    cfg = load_config(list(config))
    model, per_gpu = planned_model(cfg, options), [f for name, f in DATASHEET.items() if name in options["gpu"]]
    if not per_gpu:
        raise BadInput(f"gpu={options['gpu']!r}: expected one of {', '.join(DATASHEET)}")
    P, L, M, gpus = options["prompt"] or cfg["n_chunks"] * cfg["chunk_size"], options["answer"], cfg["n_rejected"], options["gpus"]
    trained, frozen = count_parameters(model)
    print(f"{cfg['name']}: {trained:,} trained + {frozen:,} frozen parameters; prompt {P}, M + 1 = {M + 1} answers of {L}; "
          f"{cfg['dtype']}, checkpointing {cfg['checkpointing']}")
    table = []
    for naive in (False, True):
        for shards in sorted({1, gpus}):
            tokens, flops, memory = plan_of(model, cfg, P, L, M, shards, naive)
            hours = [options["samples"] * flops / (shards * per_gpu[0] * u) / 3600 for u in options["utilisation"]]
            row = {"layout": "M + 1 rows" if naive else "shared prompt", "gpus": shards, "tokens": tokens, "flops": flops,
                   "memory": memory, "hours": dict(zip(map(str, options["utilisation"]), hours)), "fits": {}}
            print(f"\n{row['layout']}, {shards} x {options['gpu']}: {tokens:,} tokens and {flops / 1e15:.3f} PFLOP a sample; "
                  f"{options['samples']:,} samples: " + ", ".join(
                      f"{h:.1f} h at {u:.0%}" for h, u in zip(hours, options["utilisation"])))
            print("  GB a GPU: " + " + ".join(f"{name} {value / 1e9:.1f}" for name, value in memory.items() if name != "total")
                  + f" = {memory['total'] / 1e9:.1f}")
            for size in options["memory"]:
                room = (size - options["reserved"]) * 1e9
                most = largest(lambda m: m == 0 or plan_of(model, cfg, P, L, m, shards, naive)[2]["total"] <= room, 1024)
                longest = largest(lambda p: p == 0 or plan_of(model, cfg, p, L, M, shards, naive)[2]["total"] <= room, 1 << 20)
                row["fits"][size] = {"M": most, "prompt": longest}
                print(f"  {size} GB: " + (f"M up to {most} at this prompt" if most else "no M at this prompt") + "; "
                      + (f"prompts up to {longest:,} at M = {M}" if longest else f"no prompt at M = {M}"))
            table.append(row)
    return table


# -------------------------------------------------------------------------------------------------------- main

def machine():
    """What the numbers were measured on and with."""
    versions = {}
    for package in ("torch", "transformers", "trl", "peft", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": time.strftime("%Y-%m-%d"), "gpu": gpu, "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(), "system": platform.platform(), "versions": versions}


def main(argv):
    commands = {"step": bench_step, "limit": bench_limit, "generate": bench_generate, "plan": bench_plan}
    if not argv or argv[0] not in commands:
        raise BadInput(f"expected {', '.join(commands)}, found {' '.join(argv[:1]) or 'nothing'}")
    name, options, config = argv[0], dict(OPTIONS[argv[0]]), []
    for arg in argv[1:]:
        if name == "plan" and arg.partition("=")[0] not in options:
            config.append(arg)  # the config file, or one of its keys
        else:
            options = with_arguments(options, [arg])
    if name == "plan" and (not config or "=" in config[0]):
        raise BadInput("plan: expected a config file, as in: python -m bench plan configs/llama3_8b_80k.py")
    if "model" in options and not os.path.isfile(os.path.join(options["model"], "config.json")):
        raise BadInput(f"model={options['model']!r}: no config.json there (README, \"A real checkpoint\", makes models/smollm2)")
    table = commands[name](options, *config)
    os.makedirs("out/bench", exist_ok=True)
    write_json({"command": ["bench", *argv], "options": options, **machine(), "table": table}, f"out/bench/{name}.json")


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    if sys.argv[1:2] == ["measure"]:
        task = json.loads(sys.argv[2])
        kinds = {"step": measure_step, "limit": measure_limit, "generate": measure_generate}
        print(json.dumps(kinds[task.get("measure", "step")](task)))
    else:
        main(sys.argv[1:])
