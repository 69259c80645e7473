"""The embedded tiny Llama: the whole method on a laptop CPU, in minutes, with nothing to download.

    torchrun --standalone train_logo.py

Its window is 128 tokens; positions are spread over 1,024. It uses one CPU core. Outcome: see
README.
"""
config = dict(
    model="models/tiny",
    examples="models/tiny/world.py",
    context_size=512,
    n_examples=4800,
    prompt_tail="\nQuestion: {question}\nAnswer:",
    chunk_size=16, n_chunks=6,        # a prompt of about 110 tokens: inside the model's own window
    delta=1, candidates=4,
    max_new_tokens=16,
    build_batch=32,
    window=1024,                      # 8 times the model's window
    positions="continuous", draws=4,
    yarn_factor=8.0,                  # without it attention over 1,000 tokens is too flat
    # at beta=5 the margins of this world are saturated before the first step
    beta=1.0, gamma=1.0, sft_weight=1.0,
    # queries and keys are what has to learn distance; everything else the model can do already
    lora_r=16, lora_alpha=32, lora_targets="q_proj,k_proj",
    steps=400, batch_size=16, micro_batch=16, lr=1.5e-3,
    checkpointing=False,
    threads=1,                        # the same numbers on any machine
    log_interval=25, save_interval=0,
    fresh_sizes=[104, 232, 488, 1000],  # 1, 2, 4, 8 windows, less room for question and answer
    fresh_questions=200,
)
