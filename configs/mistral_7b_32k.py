"""Long-context alignment of Mistral-7B-Instruct-v0.2 inside its own window (paper: LongBench 31.1 -> 40.1).

    torchrun --standalone --nproc_per_node=8 train_logo.py configs/mistral_7b_32k.py examples=FILE

Needs sentencepiece. Not run with this code yet.
"""
config = dict(
    model="models/Mistral-7B-Instruct-v0.2",
    template="mistral",
    window=32768,
    beta=2.5,
    gamma=0.25,
    examples="data/examples.jsonl", n_examples=6000, draws=2, steps=188,  # 12,000 samples in steps of 64, as in the paper
    dtype="bfloat16",
    lora_r=32, lora_alpha=16, train_also="embed,norm",
    lr=2e-5,  # public scripts: 5e-7, a rate for training all weights; LoRA usually wants 1e-5 to 2e-4
)
