"""Long-context alignment of Mistral-7B-Instruct-v0.2 inside its own window.

Paper: LongBench 31.1 -> 40.1.

    torchrun --standalone --nproc_per_node=8 train_logo.py configs/mistral_7b_32k.py examples=FILE

Needs sentencepiece. Not run with this code yet.
"""
config = dict(
    model="models/Mistral-7B-Instruct-v0.2",
    window=32768,
    beta=2.5,
    gamma=0.25,
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
