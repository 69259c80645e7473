"""Context scaling of Llama-3-8B-Instruct from 8K to 64K, 8 times its window (paper: LongBench 40.7 -> 43.9).

    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_64k.py examples=FILE

14 chunks instead of 16, so that the policy, which writes the answers itself, is asked inside its own 8,192 positions.
The RoPE base stays the checkpoint's; rope_theta=4e6 (8 times) is the first thing to try. Not run with this code yet.
"""
config = dict(
    model="models/Meta-Llama-3-8B-Instruct",
    n_chunks=14,
    window=65536,
    beta=10.0,
    gamma=3.0,
    examples="data/examples.jsonl", n_examples=6000, draws=2, steps=188,  # 12,000 samples in steps of 64, as in the paper
    dtype="bfloat16",
    lora_r=32, lora_alpha=16, train_also="embed,norm",
    lr=2e-5,  # public scripts: 5e-7, a rate for training all weights; LoRA usually wants 1e-5 to 2e-4
)
