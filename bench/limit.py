"""python -m bench limit: what a step executes against the least that it needs, and its pace against
the machine's.

Two numbers say whether a step is good: work that nobody needs, and FLOP/s below what this machine
does in a plain matrix product. The second is then split by operator.
"""
import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.common import MODEL, in_new_process, seconds, set_up
from bench.step import ours, random_answers, shared_layout, take_step
from configs import BadInput
from model import step_flops

OPTIONS = dict(
    **MODEL,
    lora_r=0,                # rank of LoRA on q, k, v, o; 0: all weights train
    checkpointing=False,     # gradient checkpointing
    compile=False,           # torch.compile our blocks
    prompt=2048,             # tokens of the prompt
    answer=64,               # tokens of an answer
    M=2,                     # rejected answers
    repeats=5,               # steps that are timed
)


def attention_flops(q, k, v, dropout_p=0.0, is_causal=False, *args, out_shape=None,
                    **kwargs) -> int:
    """Forward of SDPA's CPU kernel, which PyTorch's counter does not know: scores and values. q, k,
    v: shapes.
    """
    _, H, L, D = q
    seen = L * (L + 1) // 2 if is_causal else L * k[2]
    return 4 * H * D * seen


def attention_backward_flops(grad, q, k, v, out, lse, dropout_p, is_causal, *args, out_shape=None,
                             **kwargs) -> int:
    """Its backward: five products, of which the scores are computed again."""
    return attention_flops(q, k, v, 0.0, is_causal) * 5 // 2


def count_flops(work) -> dict[str, int]:
    """FLOPs that work() executes, by operator."""
    ops = torch.ops.aten
    unknown_to_pytorch = {
        ops._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=unknown_to_pytorch) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return {str(op): flops for op, flops in counts.items()}


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Best FLOP/s of square matrix products."""
    best = 0.0
    for n in (1024, 2048):
        matrix = torch.randn(n, n, device=device).to(dtype)
        for _ in range(5):
            took = seconds(lambda x=matrix: x @ x, device)
            best = max(best, 2 * n ** 3 / took)
    return best


def measure(s: dict) -> dict:
    """FLOPs, seconds and costliest operators of our step, and this machine's best matrix
    product.
    """
    device = set_up(s)
    model, optimizer, loss = ours(s, device)

    def step():
        take_step(model, optimizer, loss)

    for _ in range(3):  # warms up
        step()
    peaks = []
    took = []
    for _ in range(s["repeats"]):
        peaks.append(matmul_peak(getattr(torch, s["dtype"]), device))
        took.append(seconds(step, device))
    counted = count_flops(step)
    costliest = costliest_operators(step)

    prompt, answers = random_answers(s, model.config.vocab_size)
    segments = shared_layout(prompt, answers).segments
    scored = (s["M"] + 1) * s["answer"]
    least = step_flops(model, segments, scored)
    # What backward computes again instead of keeping: logits, the scores inside the attention
    # kernel, and with checkpointing the blocks.
    logits = 2 * model.lm_head.weight.numel() * scored
    kernels = sum(flops for op, flops in counted.items() if op.endswith("for_cpu_backward"))
    executed = sum(counted.values())
    model.set_checkpointing(False)
    blocks = executed - sum(count_flops(step).values())
    again = {
        "logits": logits,
        "attention scores": kernels // 5,  # one of backward's five products
        "blocks (checkpointing)": blocks,
    }
    return {
        "least": least,
        "counted": executed,
        "again": again,
        "seconds": took,
        "peaks": peaks,
        "by_operator": counted,
        "costliest": costliest,
    }


def costliest_operators(work) -> list[list]:
    """[name, seconds, share of all, calls] of the ten operators that took most of work()."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    costs = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in costs)
    table = []
    for event in costs[:10]:
        took = event.self_cpu_time_total
        table.append([event.key, took / 1e6, took / total, event.count])
    return table


def run(options: dict) -> list[dict]:
    """Measure in a process of its own, print both numbers and the costliest operators."""
    found = in_new_process({**options, "measure": "limit"})
    if "error" in found:
        raise BadInput(found["error"])
    print_work(found)
    print_pace(found)
    return [found]


def print_work(found: dict) -> None:
    """FLOPs: the least, what was executed once, and what once more."""
    least = found["least"]
    once = found["counted"] - sum(found["again"].values())
    print(f"least that the step needs  {least / 1e12:8.3f} TFLOP")
    print(f"executed                   {once / 1e12:8.3f} TFLOP   {once / least:.3f} x the least, "
          "and again:")
    for name, flops in found["again"].items():
        print(f"    {name:22} {flops / 1e12:8.3f} TFLOP   {flops / least:.3f} x")


def print_pace(found: dict) -> None:
    """FLOP/s against those of a plain matrix product; then where the time goes."""
    peak = statistics.median(found["peaks"])
    low, high = min(found["peaks"]) / 1e9, max(found["peaks"]) / 1e9
    print(f"matrix products            {peak / 1e9:8.0f} GFLOP/s at best   ({low:.0f}..{high:.0f})")
    took = statistics.median(found["seconds"])
    low, high = min(found["seconds"]), max(found["seconds"])
    works = {
        "step, least work": found["least"],
        "step, executed work": found["counted"],
    }
    for name, flops in works.items():
        pace = flops / took
        print(f"{name:26} {pace / 1e9:8.0f} GFLOP/s   {pace / peak:.0%} of it   "
              f"{took:.2f} s ({low:.2f}..{high:.2f})")
    for name, cost, share, calls in found["costliest"]:
        print(f"    {name[:52]:52} {cost:8.3f} s  {share:6.1%}  {calls:6d} calls")
