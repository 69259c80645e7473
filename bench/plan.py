"""What a step will cost, before it is taken: parameters, floating-point operations, bytes.
Arithmetic only.

    python -m bench plan CONFIG gpus=8 gpu=A800 [key=value]      hours and what fits

The work of a step is counted as model FLOPs utilisation wants it (PaLM, arXiv 2204.02311, App. B):
what forward and backward need, without what checkpointing computes again. Memory is that of one
process at the worst moment of a step:

    weights, moments    of its share; float32 what trains, the run's dtype what is frozen
    gathered            embeddings, head and two blocks, whole, in the run's dtype
    unreduced           whole gradients, on their way to the processes that keep a share of them
    gradients           of its share, float32; with LoRA, whole while micro-batches are summed up
    activations         with checkpointing a block's input (T, C), else all of autograd's
    working             what one block's backward, or one chunk of logits, needs at once
    flash backward      what flash attention's kernel allocates for itself

Left out: the allocator's gaps, NCCL's buffers, the CUDA context (about 1 GiB together), and, with
offload_params, a block's share on its way. All but flash's own has been held against PyTorch's FSDP
memory tracker (tests/dry_run.py): the plan is above it, by less than a fifth.
"""
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from checkpoint import read_config
from configs import BadInput, check_settings, load_config, refuse
from model import HEAD_CHUNK, Llama, LlamaConfig, Segment, count_parameters, step_flops

OPTIONS = dict(
    gpus=8,                  # GPUs that share the weights
    gpu="A800",              # part of a name in DATASHEET
    shape="",                # one of SHAPES, for a model that is not here; empty: by config name
    prompt=0,                # tokens of a prompt; 0: n_chunks x chunk_size of the config
    answer=512,              # tokens of an answer
    samples=12000,           # the paper's (Sec. 4.1)
    memory=[24, 40, 80],     # GB of a GPU
    reserved=2.0,            # GB of it for the CUDA context, NCCL and the allocator's gaps
    utilisation=[0.3, 0.4, 0.5],  # of the datasheet's FLOP/s (MFU)
)

# Dense bf16 FLOP/s on the makers' datasheets, by a part of the device's name; the first that fits.
DATASHEET = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}

# What the plan needs of models that are not here: their published config.json.
SHAPES = {
    "llama3_8b": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
    ),
    "llama2_7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "mistral_7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
    ),
}


def peak_flops(device: torch.device) -> float | None:
    """Datasheet FLOP/s of a CUDA device, or None where we know none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, flops in DATASHEET.items():
        if part in name:
            return flops
    return None


# ------------------------------------------------------------------------------------------- memory

class Load(NamedTuple):
    """What one micro-batch asks of a block."""
    tokens: int
    size: int           # bytes of a number
    keys: int = 0       # rows of keys that a varlen kernel is given; 0: no such kernel
    sequences: int = 0  # of that kernel


def load_of(cfg: dict, tokens: int, scored: int, naive: bool) -> Load:
    """The load of a packed batch. The kernel wants a prompt's keys once more for each answer."""
    size = getattr(torch, cfg["dtype"]).itemsize
    answers = cfg["n_rejected"] + 1
    if cfg["dtype"] == "float32":
        return Load(tokens, size)  # a CPU's
    if naive:
        return Load(tokens, size, tokens, cfg["micro_batch"] * answers)
    keys = tokens + answers * (tokens - scored)
    return Load(tokens, size, keys, cfg["micro_batch"] * (answers + 1))


def block_activations(model: Llama, load: Load) -> tuple[int, int]:
    """Bytes that autograd keeps of one block's forward, and how many of them are the MLP's.

    Kept of a token: the inputs of the norms and of the matrices that train, q, k, v, the
    attention's output (twice: as it was computed and in the stream's order), gate, up. A varlen
    kernel keeps the keys that it was given instead of k and v, and its output is in order.
    """
    config = model.config
    C, D = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    mlp_trains = any(p.requires_grad for p in model.model.layers[0].mlp.parameters())
    heads = (3 * H + 2 * K) * D * load.tokens
    if load.keys:
        heads = 2 * H * D * load.tokens + 2 * K * D * load.keys
    if config.qk_norm:
        heads += (H + K) * D * load.tokens  # q and k as they were before their norms
    # A frozen matrix keeps no input for a gradient: norm output and product of the MLP go then.
    of_mlp = mlp_trains * C + (2 + mlp_trains) * config.intermediate_size
    kept = 3 * C * load.tokens + heads + of_mlp * load.tokens
    return load.size * kept, load.size * of_mlp * load.tokens


def block_backward(model: Llama, load: Load) -> list[tuple[int, int]]:
    """Bytes beside what is kept, and flash attention's own, in both halves of a block's backward:
    the MLP's, then attention's.
    """
    config = model.config
    C, D = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    _, of_mlp = block_activations(model, load)
    mlp_trains = any(p.requires_grad for p in model.model.layers[0].mlp.parameters())
    # SiLU's output; the gradients of the product, of SiLU's output, of up. By then a product that
    # was kept has gone. And the gradients of the block's output and of the norm's.
    mlp = (2 * C + (4 - mlp_trains) * config.intermediate_size) * load.tokens
    # Gradients of the block's output, of the norm's, of attention's, of q, k, v, and of the keys
    # and values that the kernel was given. What was kept for the MLP has gone.
    attention = (2 * C + (2 * H + 2 * K) * D) * load.tokens + 2 * K * D * load.keys
    flash = flash_backward(config, load)
    return [(load.size * mlp, 0), (load.size * attention - of_mlp, flash)]


def flash_backward(config: LlamaConfig, load: Load) -> int:
    """Bytes that flash attention's backward allocates for itself, where Python sees nothing.

    After mha_varlen_bwd in flash-attention 2's csrc/flash_attn/flash_api.cpp. PyTorch has a copy.
    """
    if not load.keys:
        return 0
    H, D = config.num_attention_heads, config.head_dim
    # Kernels are made for head dims in steps of 32, above 128 in steps of 64.
    step = 32 if D <= 128 else 64
    rounded = math.ceil(D / step) * step
    # dq is summed up in float32, with 128 rows between sequences: a block may write beyond its
    # own. Of the same rows, one number a head: the sum of output times its gradient.
    rows = load.tokens + 128 * load.sequences
    own = 4 * rows * H * (rounded + 1)
    if config.num_key_value_heads < H:
        # Under GQA dk and dv are made for all query heads, and then summed over those that share a
        # key. Over keys that stand there once for each answer, this is what grows with M.
        own += load.size * 2 * load.keys * H * D
    return own


class Parameters(NamedTuple):
    """Numbers of parameters: of the root (embeddings, norm, head), of its head, of a block."""
    trained: int
    frozen: int
    root: int
    root_trained: int
    head_trained: int
    block: int
    block_trained: int


def parameters_of(model: Llama) -> Parameters:
    trained, frozen = count_parameters(model)
    blocks = len(model.model.layers)
    block_trained, block_frozen = count_parameters(model.model.layers[0])
    block = block_trained + block_frozen
    head_trained, _ = count_parameters(model.lm_head)
    return Parameters(trained, frozen, trained + frozen - blocks * block,
                      trained - blocks * block_trained, head_trained, block, block_trained)


class Moment(NamedTuple):
    """Bytes of one process that come and go within a step."""
    gathered: float = 0
    unreduced: float = 0
    gradients: float = 0
    activations: float = 0
    working: float = 0
    flash_backward: float = 0


def moments_of_a_step(model: Llama, cfg: dict, load: Load, rows: int, shards: int,
                      accumulating: bool) -> list[Moment]:
    """The moments of a step that can be its worst. rows: whose logits exist at the same time."""
    size = load.size
    n = parameters_of(model)
    blocks = len(model.model.layers)
    reduced = 0 if cfg["offload_params"] else 4 * n.trained / shards
    of_blocks = reduced * (n.trained - n.root_trained) / n.trained
    held = 0  # of earlier micro-batches
    if accumulating:
        # train_step reduces LoRA's gradients once a step: until then each process has them all.
        held = 4 * n.trained if cfg["lora_r"] else reduced
    stream = load.tokens * model.config.hidden_size * size

    kept, _ = block_activations(model, load)
    made_again = 0
    if cfg["checkpointing"]:
        # A block leaves its input, or nothing, and its forward is made again.
        made_again = kept
        kept = 0 if cfg["offload_activations"] else stream
    # Of a logit: as it comes, its gradient, and in float32 a copy, the softmax and the gradient.
    logits = rows * model.config.vocab_size * (2 * size + 12)

    # The head is first in backward: its gradient as it is summed up, and the next chunk's.
    found = [Moment(size * (n.root + n.block), 2 * size * n.head_trained, held,
                    blocks * kept, logits + 4 * stream)]
    # Then the blocks, and the next one's weights are on their way. Activations go as gradients
    # come, so the first to have its turn is compared, and the last. A block's gradient is reduced
    # in float32 while the next one's is made.
    weights = size * (n.root + 2 * n.block)
    unreduced = size * n.head_trained + (size + 4) * n.block_trained
    for working, flash in block_backward(model, load):
        working += made_again
        found.append(Moment(weights, unreduced, held, blocks * kept, working, flash))
        found.append(Moment(weights, unreduced, max(held, of_blocks), kept, working, flash))
    # Last the embeddings; then the root lets go of its weights, and its gradients are reduced.
    found.append(Moment(size * n.root, size * n.root_trained, max(held, of_blocks),
                        working=2 * stream))
    found.append(Moment(0, (size + 4 + 4 / shards) * n.root_trained, max(held, of_blocks)))
    # A CPU's AdamW, which is not fused, makes copies as large as the gradients.
    found.append(Moment(gradients=reduced, working=0 if load.keys else reduced))
    return found


def peak_memory(
    model: Llama,
    cfg: dict,
    tokens: int,
    scored: int,
    shards: int,
    accumulating: bool = False,
    naive: bool = False,
) -> dict[str, float]:
    """{item: bytes} of one process at its worst moment, with their "total".

    tokens, scored: of the largest packed batch. shards: processes that share a copy of the weights.
    accumulating: gradients of earlier micro-batches are held. naive: tokens are M + 1 full rows,
    all of them scored at once.
    """
    load = load_of(cfg, tokens, scored, naive)
    rows = scored if naive else min(scored, HEAD_CHUNK)
    found = moments_of_a_step(model, cfg, load, rows, shards, accumulating)
    worst = max(found, key=sum)
    trained, frozen = count_parameters(model)
    share = 0 if cfg["offload_params"] else 1 / shards
    memory = {
        "weights": share * (4 * trained + load.size * frozen),
        "moments": share * 8 * trained,
        **worst._asdict(),
    }
    return {**memory, "total": sum(memory.values())}


def spelled_out(memory: dict[str, float], unit: float) -> str:
    """The items of peak_memory as a sum."""
    items = []
    for name, value in memory.items():
        # What rounds to nothing is left out: most of a small model's.
        if name != "total" and value >= 0.005 * unit:
            items.append(f"{name.replace('_', ' ')} {value / unit:.2f}")
    return " + ".join(items)


def describe(trained: int, frozen: int, tokens: int, memory: dict[str, float]) -> str:
    """The estimate as two lines."""
    unit = 2**30
    name = "GiB"
    if memory["total"] < unit:
        # A small model's items would all be 0.00.
        unit = 2**20
        name = "MiB"
    return (f"trains {trained:,} of {trained + frozen:,} parameters; "
            f"{tokens:,} tokens in the first step\n"
            f"expected peak memory of a process: {memory['total'] / unit:.2f} {name} = "
            f"{spelled_out(memory, unit)}")


# -------------------------------------------------------------------------------- the plan of a run

class Shape(NamedTuple):
    """One group in one layout, on so many GPUs."""
    prompt: int
    answer: int
    M: int
    gpus: int
    naive: bool = False  # M + 1 full rows instead of the prompt once

    def segments(self) -> list[Segment]:
        """Who sees whom, as the model takes it."""
        P, L = self.prompt, self.answer
        found = [] if self.naive else [Segment(0, P)]
        for _ in range(self.M + 1):
            start = found[-1].end if found else 0
            if self.naive:
                found.append(Segment(start, start + P + L))
            else:
                found.append(Segment(start, start + L, 0, P))
        return found

    def scored(self) -> int:
        """Tokens whose logits are made: in full rows all of them, as most trainers do."""
        if self.naive:
            return (self.M + 1) * (self.prompt + self.answer)
        return (self.M + 1) * self.answer


def flops_by_name(part: str) -> float:
    """Datasheet FLOP/s of the GPU of this name, else of the first with this in its name."""
    if part in DATASHEET:
        return DATASHEET[part]
    for name, flops in DATASHEET.items():
        if part in name:
            return flops
    raise BadInput(f"gpu={part!r}: expected one of {', '.join(DATASHEET)}")


def planned_model(cfg: dict, shape: str) -> Llama:
    """The config's model on the meta device, from its folder or from SHAPES."""
    path = os.path.join(cfg["model"], "config.json")
    if os.path.isfile(path) and not shape:
        config = read_config(path)
    else:
        fitting = [name for name in SHAPES if cfg["name"].startswith(name)]
        name = shape or (fitting[0] if fitting else None)
        if name not in SHAPES:
            raise BadInput(f"{path}: no such file; shape= is one of {', '.join(SHAPES)}, "
                           f"found {name!r}")
        config = LlamaConfig(**SHAPES[name])
    with torch.device("meta"):
        model = Llama(config)
        model.train_only(cfg["lora_r"], cfg["lora_alpha"], cfg["lora_targets"], cfg["train_also"])
    return model


def plan_of(model: Llama, cfg: dict, shape: Shape) -> tuple[int, int, dict[str, float]]:
    """(tokens, FLOPs) of one group, and {item: bytes} of a micro-batch of such groups."""
    segments = shape.segments()
    tokens = segments[-1].end
    shards = min(cfg["shard_size"] or shape.gpus, shape.gpus)
    accumulating = cfg["batch_size"] > shape.gpus * cfg["micro_batch"]
    groups = cfg["micro_batch"]
    memory = peak_memory(model, {**cfg, "n_rejected": shape.M}, groups * tokens,
                         groups * shape.scored(), shards, accumulating, shape.naive)
    return tokens, step_flops(model, segments, shape.scored()), memory


def largest(fits: Callable[[int], bool], high: int) -> int:
    """The largest n in 1..high for which fits(n), where what fits is everything up to some n; 0
    where none does.
    """
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def what_fits(model: Llama, cfg: dict, shape: Shape, room: float) -> dict[str, int]:
    """The largest M at this prompt, and the longest prompt at this M, in so many bytes; 0: none."""

    def fits(other: Shape) -> bool:
        return plan_of(model, cfg, other)[2]["total"] <= room

    most = largest(lambda M: fits(shape._replace(M=M)), 1024)
    longest = largest(lambda P: fits(shape._replace(prompt=P)), 1 << 20)
    return {"M": most, "prompt": longest}


def check(options: dict) -> None:
    """BadInput names the option that nothing can be planned with."""
    for key in ("gpus", "answer"):
        if options[key] < 1:
            refuse(key, options[key], "at least 1")
    for key in ("gpus", "answer", "prompt", "samples"):
        # Beyond it sizes are no longer exact as floats, and no machine is as large.
        if options[key] > 1 << 40:
            refuse(key, options[key], "at most 2**40")
    for key in ("memory", "utilisation"):
        for value in options[key]:
            if type(value) not in (int, float) or not 0 < value < 1 << 40:
                refuse(key, options[key], "a list of numbers above 0")
        if len(set(options[key])) < len(options[key]):
            refuse(key, options[key], "a list of different numbers")


def run(options: dict, config: list[str]) -> list[dict]:
    """Both layouts, on one GPU and on all: printed lines, and rows for the JSON file."""
    check(options)
    cfg = load_config(config)
    check_settings(cfg)
    model = planned_model(cfg, options["shape"])
    flops_by_name(options["gpu"])  # refuses an unknown one before a line is printed
    prompt = options["prompt"] or cfg["n_chunks"] * cfg["chunk_size"]
    M = cfg["n_rejected"]
    trained, frozen = count_parameters(model)
    print(f"{cfg['name']}: {trained:,} trained + {frozen:,} frozen parameters; prompt {prompt}, "
          f"M + 1 = {M + 1} answers of {options['answer']}; {cfg['dtype']}, "
          f"checkpointing {cfg['checkpointing']}")
    table = []
    for naive in (False, True):
        for gpus in sorted({1, options["gpus"]}):
            shape = Shape(prompt, options["answer"], M, gpus, naive)
            table.append(plan_row(model, cfg, shape, options))
    return table


def plan_row(model: Llama, cfg: dict, shape: Shape, options: dict) -> dict:
    """One layout on so many GPUs, printed."""
    tokens, flops, memory = plan_of(model, cfg, shape)
    layout = "M + 1 rows" if shape.naive else "shared prompt"
    peak = shape.gpus * flops_by_name(options["gpu"])
    work = options["samples"] * flops
    hours = {}
    spelled = []
    for utilisation in options["utilisation"]:
        took = work / (peak * utilisation) / 3600
        hours[str(utilisation)] = took
        spelled.append(f"{took:.1f} h at {utilisation:.0%}")
    print(f"\n{layout}, {shape.gpus} x {options['gpu']}: "
          f"{tokens:,} tokens and {flops / 1e15:.3f} PFLOP a sample; "
          f"{options['samples']:,} samples: {', '.join(spelled)}")
    print(f"  GB a GPU: {spelled_out(memory, 1e9)} = {memory['total'] / 1e9:.1f}")
    fitting = {}
    for size in options["memory"]:
        room = (size - options["reserved"]) * 1e9
        found = what_fits(model, cfg, shape, room)
        most = f"M up to {found['M']}" if found["M"] else "no M"
        longest = f"prompts up to {found['prompt']:,}" if found["prompt"] else "no prompt"
        print(f"  {size} GB: {most} at this prompt; {longest} at M = {shape.M}")
        fitting[size] = found
    return {
        "layout": layout,
        "gpus": shape.gpus,
        "tokens": tokens,
        "flops": flops,
        "memory": memory,
        "hours": hours,
        "fits": fitting,
    }
