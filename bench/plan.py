"""What a step will cost, before it is taken: parameters, floating-point operations, bytes.
Arithmetic only.

    python -m bench plan CONFIG gpus=8 gpu=A800 [key=value]      hours and what fits

The work of a step is counted as model FLOPs utilisation wants it (PaLM, arXiv 2204.02311, App. B):
what forward and backward need, without what checkpointing computes again. Memory is the expected
peak of one process:

    weights, gradients, moments    of its share; float32 what trains, the run's dtype what is frozen
    gathered                       embeddings, head and two blocks, whole, in the run's dtype
    activations                    with checkpointing a block's input (T, C), else all of autograd's
    working                        the more of one block's intermediates and one chunk of logits

Left out: the allocator's gaps, NCCL's buffers, the CUDA context (about 1 GiB together).
"""
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from checkpoint import read_config
from configs import BadInput, load_config
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

def block_activations(model: Llama, tokens: int, size: int) -> tuple[int, int]:
    """Bytes that autograd keeps of one block's forward, and that its backward holds beside them.

    Kept of a token: the inputs of the norms and of the matrices that train, q, k, v, the
    attention's output (twice: as it was computed and in the stream's order), gate, up. size: bytes
    of a number.
    """
    config = model.config
    C, D = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    wide = config.intermediate_size
    mlp_trains = any(p.requires_grad for p in model.model.layers[0].mlp.parameters())
    # A frozen matrix keeps no input for a gradient: norm output and product of the MLP go then.
    kept_of_norms = (3 + mlp_trains) * C
    kept_of_heads = (3 * H + 2 * K) * D
    if config.qk_norm:
        kept_of_heads += (H + K) * D  # q and k as they were before their norms
    kept_of_mlp = (2 + mlp_trains) * wide
    kept = kept_of_norms + kept_of_heads + kept_of_mlp
    beside = 2 * C + 3 * wide
    return tokens * size * kept, tokens * size * beside


def block_memory(model: Llama, cfg: dict, tokens: int, scored: int, naive: bool
                 ) -> tuple[int, int]:
    """Bytes of each block that wait for its backward, and bytes that one block's backward needs."""
    size = getattr(torch, cfg["dtype"]).itemsize
    on_gpu = cfg["dtype"] != "float32"
    kept, beside = block_activations(model, tokens, size)
    if on_gpu and not naive:
        # Flash attention wants a prompt's keys and values once more for each answer to it: this is
        # what grows with M.
        rows = tokens + (cfg["n_rejected"] + 1) * (tokens - scored)
        keys = rows * 2 * model.config.num_key_value_heads * model.config.head_dim * size
        kept += keys
        beside += keys
    if not cfg["checkpointing"]:
        return kept, beside
    # With checkpointing a block leaves its input, or nothing, and its forward is made again.
    of_block = 0 if cfg["offload_activations"] else tokens * model.config.hidden_size * size
    return of_block, kept + beside


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
    size = getattr(torch, cfg["dtype"]).itemsize
    on_gpu = cfg["dtype"] != "float32"
    trained, frozen = count_parameters(model)
    share = 0 if cfg["offload_params"] else 1 / shards
    blocks = len(model.model.layers)
    block = list(model.model.layers[0].parameters())
    block_size = sum(p.numel() for p in block)
    root_size = trained + frozen - blocks * block_size
    root_trained = trained - blocks * sum(p.numel() for p in block if p.requires_grad)

    of_block, working = block_memory(model, cfg, tokens, scored, naive)
    # Of a logit: as it comes, its gradient, and in float32 a copy, the softmax and the gradient.
    rows = scored if naive else min(scored, HEAD_CHUNK)
    logits = rows * model.config.vocab_size * (2 * size + 12)

    # Activations go as gradients come, so there are three moments to compare.
    gradients = share * 4 * trained
    backward_starts = {
        "gradients": gradients if accumulating else share * 4 * root_trained,
        "activations": blocks * of_block,
        "working": max(working, logits),
    }
    backward_ends = {"gradients": gradients, "activations": of_block, "working": working}
    # A CPU's AdamW, which is not fused, makes copies as large as the gradients.
    update = {"gradients": gradients, "activations": 0, "working": 0 if on_gpu else gradients}
    worst = max(backward_starts, backward_ends, update, key=lambda moment: sum(moment.values()))
    memory = {
        "weights": share * (4 * trained + size * frozen),
        "moments": share * 8 * trained,
        "gathered": size * (root_size + 2 * block_size) + (size + 4) * root_trained,
        **worst,
    }
    return {**memory, "total": sum(memory.values())}


def describe(trained: int, frozen: int, tokens: int, memory: dict[str, float]) -> str:
    """The estimate as two lines."""
    items = []
    for name, value in memory.items():
        if name != "total":
            items.append(f"{name} {value / 2**30:.2f}")
    return (f"trains {trained:,} of {trained + frozen:,} parameters; "
            f"{tokens:,} tokens in the first step\n"
            f"expected peak memory of a process: {memory['total'] / 2**30:.2f} GiB = "
            f"{' + '.join(items)}")


# -------------------------------------------------------------------------------- the plan of a run

class Shape(NamedTuple):
    """One group in one layout, and how many processes share the weights."""
    prompt: int
    answer: int
    M: int
    shards: int
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
    """(tokens, FLOPs, {item: bytes}) of one group."""
    segments = shape.segments()
    tokens = segments[-1].end
    accumulating = cfg["batch_size"] > shape.shards * cfg["micro_batch"]
    memory = peak_memory(model, {**cfg, "n_rejected": shape.M}, tokens, shape.scored(),
                         shape.shards, accumulating, shape.naive)
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


def run(options: dict, config: list[str]) -> list[dict]:
    """Both layouts, on one GPU and on all: printed lines, and rows for the JSON file."""
    cfg = load_config(config)
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
        for shards in sorted({1, options["gpus"]}):
            shape = Shape(prompt, options["answer"], M, shards, naive)
            table.append(plan_row(model, cfg, shape, options))
    return table


def plan_row(model: Llama, cfg: dict, shape: Shape, options: dict) -> dict:
    """One layout on so many GPUs, printed."""
    tokens, flops, memory = plan_of(model, cfg, shape)
    layout = "M + 1 rows" if shape.naive else "shared prompt"
    peak = shape.shards * flops_by_name(options["gpu"])
    work = options["samples"] * flops
    hours = {}
    spelled = []
    for utilisation in options["utilisation"]:
        took = work / (peak * utilisation) / 3600
        hours[str(utilisation)] = took
        spelled.append(f"{took:.1f} h at {utilisation:.0%}")
    print(f"\n{layout}, {shape.shards} x {options['gpu']}: "
          f"{tokens:,} tokens and {flops / 1e15:.3f} PFLOP a sample; "
          f"{options['samples']:,} samples: {', '.join(spelled)}")
    items = [f"{name} {value / 1e9:.1f}" for name, value in memory.items() if name != "total"]
    print(f"  GB a GPU: {' + '.join(items)} = {memory['total'] / 1e9:.1f}")
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
        "gpus": shape.shards,
        "tokens": tokens,
        "flops": flops,
        "memory": memory,
        "hours": hours,
        "fits": fitting,
    }
