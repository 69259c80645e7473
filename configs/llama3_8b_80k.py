"""Long-context alignment of Llama-3-8B-Instruct-80K inside its own window (paper: LongBench 42.3 -> 47.0).

    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_80k.py examples=FILE

The paper: 8 x A800 80 GB, 16 hours, LoRA. Not run with this code yet.
"""
config = dict(
    model="models/Llama-3-8B-Instruct-80K",
    window=81920,
    beta=10.0,
    gamma=3.0,
    examples="data/examples.jsonl", n_examples=6000, draws=2, steps=188,  # 12,000 samples in steps of 64, as in the paper
    dtype="bfloat16",
    lora_r=32, lora_alpha=16, train_also="embed,norm",
    lr=2e-5,  # public scripts: 5e-7, a rate for training all weights; LoRA usually wants 1e-5 to 2e-4
)
