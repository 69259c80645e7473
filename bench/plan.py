"""What a step will cost, before it is taken: parameters, floating-point operations, bytes. Arithmetic only.

The work of a step is counted as model FLOPs utilisation wants it (PaLM, arXiv 2204.02311, App. B): what forward and
backward need, without what checkpointing computes again. Memory is the expected peak of one process:

    weights, gradients, moments    of its share; what trains is float32, what is frozen is in the run's dtype
    gathered                       embeddings, head and two blocks, whole, in the run's dtype
    activations                    with checkpointing one input (T, C) a block, else all that autograd keeps
    working                        one block's intermediates, or one chunk of logits, whichever is more
"""
import torch

from model import HEAD_CHUNK, count_parameters

# Dense bf16 FLOP/s on the makers' datasheets, by a part of the device's name; the first that fits.
DATASHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "B200": 2250e12,
             "A100": 312e12, "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(device):
    """Datasheet FLOP/s of a CUDA device, or None where we know none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in DATASHEET.items() if part in name), None)


def peak_memory(model, cfg, tokens, scored, shards, accumulating=False, naive=False):
    """{item: bytes} of one process at its worst moment, with their "total". tokens, scored: of the largest packed batch.

    shards: processes that share a copy of the weights. accumulating: gradients of earlier micro-batches are held.
    naive: tokens are M + 1 full rows, all of them scored at once.
    Activations go as gradients come, so there are three moments to compare: when backward starts, when it ends, and
    the update. Left out: the allocator's gaps, NCCL's buffers, the CUDA context (about 1 GiB together).
    """
    config, size = model.config, getattr(torch, cfg["dtype"]).itemsize
    trained, frozen = count_parameters(model)
    state = 0 if cfg["offload_params"] else 1 / shards
    blocks = list(model.model.layers)
    block = sum(p.numel() for p in blocks[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - len(blocks) * block
    root_trained = trained - len(blocks) * sum(p.numel() for p in blocks[0].parameters() if p.requires_grad)
    inside, backward = block_activations(model, tokens, size)
    on_gpu = cfg["dtype"] != "float32"
    if on_gpu and not naive:  # flash attention wants a prompt's keys and values once more for each answer to it
        keys = tokens + (cfg["n_rejected"] + 1) * (tokens - scored)
        keys *= 2 * config.num_key_value_heads * config.head_dim * size
        inside, backward = inside + keys, backward + keys
    inputs = 0 if cfg["offload_activations"] else tokens * config.hidden_size * size
    of_block, working = (inputs, inside + backward) if cfg["checkpointing"] else (inside, backward)
    logits = (scored if naive else min(scored, HEAD_CHUNK)) * config.vocab_size * (2 * size + 12)  # as they come, fp32, softmax, gradients
    gradients = state * 4 * trained
    moments = [
        {"gradients": gradients if accumulating else state * 4 * root_trained, "activations": len(blocks) * of_block,
         "working": max(working, logits)},
        {"gradients": gradients, "activations": of_block, "working": working},
        {"gradients": gradients, "activations": 0, "working": 0 if on_gpu else gradients}]  # AdamW without a fused kernel
    bytes_of = {
        "weights": state * (4 * trained + size * frozen),
        "moments": state * 8 * trained,
        "gathered": size * (root + 2 * block) + (size + 4) * root_trained,
        **max(moments, key=lambda moment: sum(moment.values()))}
    return {**bytes_of, "total": sum(bytes_of.values())}


def block_activations(model, tokens, size):
    """Bytes that autograd keeps of one block's forward, and that its backward holds beside them.

    Kept of a token: the inputs of the norms and of the matrices that train, q, k, v, the attention's output (twice: as
    it was computed and in the stream's order), gate, up.
    """
    config, block = model.config, model.model.layers[0]
    C, I, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    mlp = any(p.requires_grad for p in block.mlp.parameters())
    kept = (3 + mlp) * C + (3 * H + 2 * K) * D + (2 + mlp) * I
    return tokens * size * kept, tokens * size * (2 * C + 3 * I)


def describe(trained, frozen, tokens, memory):
    """The estimate as two lines."""
    items = " + ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items() if name != "total")
    return (f"trains {trained:,} of {trained + frozen:,} parameters; {tokens:,} tokens in the first step\n"
            f"expected peak memory of a process: {memory['total'] / 2**30:.2f} GiB = {items}")


def throughput(metrics, peak, processes, left):
    """The end of a step's line: tokens/s and TFLOP/s of all processes, share of the datasheet's, seconds left."""
    rate = metrics["tflop"] / metrics["seconds"]
    share = f"  MFU {1e12 * rate / (peak * processes):.1%}" if peak else ""
    minutes, seconds = divmod(round(left), 60)
    return (f"  {metrics['tokens'] / metrics['seconds']:,.0f} tokens/s  {rate:.3g} TFLOP/s{share}"
            f"  left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
