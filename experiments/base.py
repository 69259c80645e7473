"""What all runs of experiments/ share; a run's line names its differences from these settings.

Apart from configs/tiny.py: lines that were measured keep their meaning when the default changes.
"""
config = dict(
    model="models/tiny",
    examples="models/tiny/world.py",
    context_size=512,
    n_examples=1200,
    prompt_tail="\nQuestion: {question}\nAnswer:",
    chunk_size=16, n_chunks=6,        # a prompt of about 110 tokens: inside the model's own window
    delta=1, candidates=4,
    max_new_tokens=16,
    build_batch=32,
    window=1024,                      # 8 times the model's window
    positions="continuous", draws=4,
    rope_theta=3e5,
    lora_r=16, lora_alpha=32, lora_targets="q_proj,k_proj",
    beta=1.0, gamma=1.0, sft_weight=1.0,
    steps=400, batch_size=16, micro_batch=16, lr=5e-3,
    checkpointing=False,
    threads=1,                        # the same sums where the vectors are as wide
    log_interval=100, save_interval=0, eval_interval=0,
    fresh_sizes=[104, 232, 488, 1000],  # 1, 2, 4, 8 windows, less room for question and answer
    fresh_questions=400,
)
