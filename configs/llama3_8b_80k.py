"""Long-context alignment of Llama-3-8B-Instruct-80K inside its own window (paper: LongBench 42.3 -> 47.0).

    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_80k.py examples=FILE

The paper: 8 x A800 80 GB, 16 hours, LoRA. Not run with this code yet: here all weights are trained, for which
lr=5e-7, the rate of the public scripts, is made.
"""
config = dict(
    model="models/Llama-3-8B-Instruct-80K",
    window=81920,
    beta=10.0,
    gamma=3.0,
    examples="data/examples.jsonl", n_examples=6000, draws=2,  # 12,000 samples, as in the paper
    dtype="bfloat16",
)
