"""Context scaling of Llama-3-8B-Instruct from 8K to 64K, 8 times its window.

Paper: LongBench 40.7 -> 43.9.

    torchrun --standalone --nproc_per_node=8 train_logo.py configs/llama3_8b_64k.py examples=FILE

14 chunks instead of 16, so that the policy, which writes the answers itself, is asked inside its
own 8,192 positions. The RoPE stays the checkpoint's; yarn_factor=8 is the first thing to try, then
rope_theta=4e6 (8 times). Not run with this code yet.
"""
config = dict(
    model="models/Meta-Llama-3-8B-Instruct",
    n_chunks=14,
    window=65536,
    beta=10.0,
    gamma=3.0,
    examples="data/examples.jsonl", n_examples=6000, draws=2,
    # 6,000 examples x 2 draws = 12,000 samples = 188 steps of 64, as the paper's text counts them
    # (0.3 B tokens). Its public scripts run 1,000 to 1,200 steps of 64, six times as many samples.
    steps=188, batch_size=64,
    dtype="bfloat16",
    # The paper's text trains the embeddings beside LoRA, the public scripts embeddings and norms.
    lora_r=32, lora_alpha=16, train_also="embed,norm",
    # Public scripts: 5e-7, a rate for training all weights; LoRA usually wants 1e-5 to 2e-4.
    lr=2e-5,
    verify=True,
)
