"""python -m bench step: one training step in four ways that compute the same loss.

    ours           the prompt once, M + 1 answers as branches of it, logits of the answers
    naive          our model on M + 1 full rows, with all logits
    transformers   the same rows on transformers and PEFT, as most trainers do
    trl            TRL's CPOTrainer with its SimPO loss; M = 1 only
"""
import json
import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from bench.common import MODEL, in_new_process, peak_bytes, seconds, set_up
from bench.plan import peak_memory
from checkpoint import load_pretrained, start_lora
from configs import BadInput
from data import Batch
from loss import logo_loss
from model import IGNORE, Llama, Segment

OPTIONS = dict(
    **MODEL,
    lora_r=0,                # rank of LoRA on q, k, v, o; 0: all weights train
    checkpointing=False,     # gradient checkpointing, for all ways
    compile=False,           # torch.compile our blocks
    prompt=[2048],           # prompt lengths, in tokens
    answer=[64],             # answer lengths
    M=[2],                   # numbers of rejected answers
    ways="ours,naive,transformers,trl",  # what to measure
    repeats=3,               # processes for each way and shape
)
STEP = dict(beta=2.5, gamma=0.25)  # of the loss; no cost depends on them
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA_ALPHA = 16
NAN = float("nan")
GIB = 2 ** 30


# ------------------------------------------------------------------------------------------- inputs

def random_answers(s: dict, vocab: int) -> tuple[Tensor, Tensor]:
    """Random tokens of one group: prompt (P,), answers (M + 1, L), the chosen first."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocab, (s["prompt"],), generator=generator)
    answers = torch.randint(3, vocab, (s["M"] + 1, s["answer"]), generator=generator)
    return prompt, answers


def shared_layout(prompt: Tensor, answers: Tensor) -> Batch:
    """The prompt once, as data.encode_group lays a group out, at positions 0, 1, 2, ..."""
    P = len(prompt) - 1  # the last prompt token opens the branches instead
    A, L = answers.shape
    last = prompt[-1:].expand(A, 1)
    branches = torch.cat([last, answers[:, :-1]], dim=1)
    tokens = torch.cat([prompt[:-1], branches.flatten()])
    # All answers go on from the prompt, so they sit at the same positions.
    after = P + torch.arange(L)
    positions = torch.cat([torch.arange(P), after.repeat(A)])
    unscored = torch.full((P,), IGNORE)
    targets = torch.cat([unscored, answers.flatten()])
    segments = [Segment(0, P)]
    for start in range(P, P + A * L, L):
        segments.append(Segment(start, start + L, 0, P))
    return Batch(tokens, positions, targets, segments)


def full_rows(prompt: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """input_ids and labels (M + 1, P + L) of the layout that repeats the prompt."""
    prompts = prompt.expand(len(answers), -1)
    ids = torch.cat([prompts, answers], dim=1)
    labels = torch.cat([torch.full_like(prompts, IGNORE), answers], dim=1)
    return ids, labels


def mean_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) mean log-prob of each row's labels, from the logits of all its tokens."""
    targets = labels[:, 1:]
    scored = targets != IGNORE
    index = targets.clamp(min=0)[..., None]
    logps = logits[:, :-1].log_softmax(-1).gather(2, index)[..., 0]
    return (logps * scored).sum(1) / scored.sum(1)


def loss_of(logps: Tensor) -> Tensor:
    """The objective of one group from its M + 1 mean log-probs."""
    return logo_loss(logps[None, 0], logps[None, 1:], **STEP)[0]


# ------------------------------------------------------------------------------------ the four ways

Way = tuple[Module, Optimizer, Callable]


def adamw(model: Module) -> torch.optim.AdamW:
    """An optimizer that does all its work and moves nothing: the loss stays as it is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0)


def our_model(s: dict, device: str) -> Llama:
    """Our model with what s says of LoRA, checkpointing and compiling."""
    model = load_pretrained(s["model"], getattr(torch, s["dtype"]), device)
    model.train_only(s["lora_r"], LORA_ALPHA, ",".join(TARGETS), "")
    if s["lora_r"]:
        start_lora(model, 0)
    model.set_checkpointing(s["checkpointing"])
    if s["compile"]:
        for block in model.model.layers:
            block.compile(dynamic=True)
    return model


def ours(s: dict, device: str) -> Way:
    """This repository's step, as train_logo.py takes it but for FSDP."""
    model = our_model(s, device)
    prompt, answers = random_answers(s, model.config.vocab_size)
    batch = shared_layout(prompt, answers)
    tokens = batch.tokens.to(device)
    positions = batch.positions.to(device)
    targets = batch.targets.to(device)

    def loss():
        sums, lengths = model(tokens, positions, targets, batch.segments)
        return loss_of(sums / lengths)

    return model, adamw(model), loss


def naive(s: dict, device: str) -> Way:
    """The same model and loss, without the layout: what the layout is worth by itself."""
    model = our_model(s, device)
    ids, labels = full_rows(*random_answers(s, model.config.vocab_size))
    ids = ids.to(device)
    labels = labels.to(device)

    def loss():
        return loss_of(mean_logps(model.logits(ids), labels))

    return model, adamw(model), loss


def hf_model(s: dict, device: str):
    """transformers' model, in training mode."""
    from transformers import AutoModelForCausalLM
    dtype = getattr(torch, s["dtype"])
    model = AutoModelForCausalLM.from_pretrained(s["model"], dtype=dtype).to(device)
    model.config.use_cache = False
    if s["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def lora_config(s: dict):
    """PEFT's LoRA with our settings, or None where all weights train."""
    if not s["lora_r"]:
        return None
    from peft import LoraConfig
    return LoraConfig(
        r=s["lora_r"],
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=TARGETS,
    )


def transformers(s: dict, device: str) -> Way:
    """Full rows on another implementation: the loss has to be the same."""
    model = hf_model(s, device)
    if s["lora_r"]:
        from peft import get_peft_model
        model = get_peft_model(model, lora_config(s))
    ids, labels = full_rows(*random_answers(s, model.config.vocab_size))
    ids = ids.to(device)
    labels = labels.to(device)

    def loss():
        return loss_of(mean_logps(model(ids).logits, labels))

    return model, adamw(model), loss


def trl(s: dict, device: str) -> Way:
    """TRL's own loss on the same tokens; cpo_alpha 0 leaves SimPO of it."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    with open(os.path.join(s["model"], "config.json")) as f:
        vocab = json.load(f)["vocab_size"]
    ids, labels = full_rows(*random_answers(s, vocab))
    batch = {}
    for row, name in enumerate(("chosen", "rejected")):
        row_ids = ids[row:row + 1].to(device)
        batch[f"{name}_input_ids"] = row_ids
        batch[f"{name}_labels"] = labels[row:row + 1].to(device)
        batch[f"{name}_attention_mask"] = torch.ones_like(row_ids)
    settings = CPOConfig(
        output_dir="out/bench/trl",
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=STEP["beta"],
        simpo_gamma=STEP["gamma"],
        gradient_checkpointing=s["checkpointing"],
        learning_rate=0.0,
        bf16=s["dtype"] == "bfloat16",
        use_cpu=device == "cpu",
        max_length=None,
        report_to=[],
    )
    # The trainer wants a data set to be built; the batch above is what it is measured on.
    unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = CPOTrainer(
        hf_model(s, device),
        settings,
        train_dataset=unused,
        processing_class=AutoTokenizer.from_pretrained(s["model"]),
        peft_config=lora_config(s),
    )

    def loss():
        return trainer.compute_loss(trainer.model, batch)

    return trainer.model, trainer.create_optimizer(), loss


WAYS = {"ours": ours, "naive": naive, "transformers": transformers, "trl": trl}


# ---------------------------------------------------------------------------------------- measuring

def take_step(model: Module, optimizer: Optimizer, loss: Callable) -> float:
    """Forward, backward, update; the loss."""
    value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def state_bytes(model: Module, optimizer: Optimizer) -> tuple[int, int]:
    """(weights and moments, gradients) in bytes."""
    size = sum(p.nbytes for p in model.parameters())
    for state in optimizer.state.values():
        size += sum(x.nbytes for x in state.values() if torch.is_tensor(x))
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return size, gradients


def measure(s: dict) -> dict:
    """One way's loss, peak memory and seconds, in this process."""
    device = set_up(s)
    model, optimizer, loss = WAYS[s["way"]](s, device)
    # An empty update first: the moments exist before anything is measured.
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()

    losses = []

    def step():
        losses.append(take_step(model, optimizer, loss))

    peak = peak_bytes(step, device)  # warms up as well
    took = min(seconds(step, device) for _ in range(2))
    state, gradients = state_bytes(model, optimizer)
    found = {
        "loss": losses[-1],
        "seconds": took,
        "peak": peak,
        "state": state,
        "gradients": gradients,
        "total": state + peak,
        # Gradients reach their full size while activations go: what is beyond state and gradients
        # is the activations' share.
        "activations": peak - gradients,
    }
    if s["way"] == "ours":
        found["expected"] = expected_peak(model, s)
    return found


def expected_peak(model: Llama, s: dict) -> int:
    """Bytes that bench.plan foretells for our step. Nothing is gathered here, where there is no
    FSDP.
    """
    scored = (s["M"] + 1) * s["answer"]
    tokens = s["prompt"] - 1 + scored
    cfg = {
        **s,
        "offload_params": False,
        "offload_activations": False,
        "n_rejected": s["M"],
        "micro_batch": 1,
    }
    memory = peak_memory(model, cfg, tokens, scored, shards=1)
    return memory["total"] - memory["gathered"]


def run(options: dict) -> list[dict]:
    """Every shape in every way, a printed line each. Rows for the JSON file."""
    ways = [word.strip() for word in options["ways"].split(",")]
    unknown = sorted(set(ways) - set(WAYS))
    if unknown:
        raise BadInput(f"ways={options['ways']!r}: expected some of {','.join(WAYS)}, "
                       f"found {', '.join(unknown)}")
    print(f"{'prompt':>6} {'answer':>6} {'M':>2}  {'way':12} {'seconds':>8} {'x ours':>7} "
          f"{'(low..high)':>13} {'GiB':>7} {'x ours':>7} {'activations':>11} {'x ours':>7}  loss")
    table = []
    for prompt in options["prompt"]:
        for length in options["answer"]:
            for M in options["M"]:
                shape = {**options, "prompt": prompt, "answer": length, "M": M}
                table += compare(shape, ways)
    return table


def compare(shape: dict, ways: list[str]) -> list[dict]:
    """Rows of one shape, a way each. Repetitions are interleaved."""
    runs = {}
    for way in ways:
        if way == "trl" and shape["M"] > 1:
            continue  # it takes one rejected answer
        runs[way] = []
    for _ in range(shape["repeats"]):
        for way in runs:
            task = {**shape, "way": way, "measure": "step"}
            runs[way].append(in_new_process(task))
    rows = []
    for way in runs:
        row = summary(way, shape, runs[way], runs.get("ours"))
        print_row(row)
        rows.append(row)
    return rows


def summary(way: str, shape: dict, runs: list[dict], ours: list[dict] | None) -> dict:
    """A way's repeated measurements as one row: medians, and ratios to ours where it was
    measured.
    """
    row = {"way": way, "runs": runs}
    for key in ("prompt", "answer", "M"):
        row[key] = shape[key]
    for run in runs:
        if "error" in run:
            return {**row, "error": run["error"]}
    for key in ("seconds", "total", "activations", "loss"):
        row[key] = statistics.median(run[key] for run in runs)
    if not ours or any("error" in run for run in ours):
        return row
    # The two of a pair were measured one after the other: their ratio is better than the medians'.
    ratios = []
    for run, our in zip(runs, ours, strict=True):
        ratios.append(run["seconds"] / our["seconds"])
    row["seconds_ratio"] = [min(ratios), statistics.median(ratios), max(ratios)]
    for key in ("total", "activations"):
        row[f"{key}_ratio"] = row[key] / statistics.median(our[key] for our in ours)
    return row


def print_row(row: dict) -> None:
    """One line of the table; nan where there is nothing to compare with."""
    head = f"{row['prompt']:6d} {row['answer']:6d} {row['M']:2d}  {row['way']:12}"
    if "error" in row:
        print(head, row["error"], flush=True)
        return
    low, middle, high = row.get("seconds_ratio", [NAN, NAN, NAN])
    columns = [
        head,
        f"{row['seconds']:8.2f}",
        f"{middle:7.2f}",
        f"{f'({low:.2f}..{high:.2f})':>13}",
        f"{row['total'] / GIB:7.2f}",
        f"{row.get('total_ratio', NAN):7.2f}",
        f"{row['activations'] / GIB:11.2f}",
        f"{row.get('activations_ratio', NAN):7.2f} ",
        f"{row['loss']:.5f}",
    ]
    expected = row["runs"][0].get("expected")
    if expected:
        columns.append(f" expected {expected / GIB:.2f} GiB")
    print(*columns, flush=True)
