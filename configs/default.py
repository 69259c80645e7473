"""Every key, its default and its meaning. The other files of this folder hold differences only.

The four groups say what depends on a key: `paths` where things lie, `build` what the pairs are,
`train` what the weights become, `run` how it is done. A pairs file is refused where a key of build
differs from the one it was built with, a checkpoint where a key of build or train does. Keys of
paths and run may change at any time.
"""
paths = dict(
    model="",                # Hugging Face folder to align: config.json, safetensors, tokenizer
    examples="",             # corpus: .jsonl, .json, .gz of these, .txt, a folder; or a .py
    pairs="",                # the pairs' file; empty: pairs.jsonl in the run's folder
    adapter="",              # PEFT adapter to go on from; lora_ keys and train_also have to fit it
    out="",                  # folder of the run; empty: out/<name of the config file>
)
build = dict(
    seed=0,                  # of every draw: data, sampling, positions, order
    template="auto",         # chat template: auto, or a name of tokenizer.TEMPLATES
    n_examples=0,            # examples to build pairs from; 0: all
    context_size=8,          # passages around a question; tokens, where the corpus is a .py
    questions=1,             # that the policy writes about a document that comes without one
    question_prompt="Write one short question that this text answers, and nothing else.",  # so

    # chunks and their scores (Sec. 3.2.2)
    chunk_size=512,          # tokens of a chunk
    n_chunks=16,             # N, chunks of a prompt
    delta=6,                 # chunks that share more words than this with the question are critical
    max_critical=0,          # most critical chunks that count, the best ones; 0: n_chunks
    evaluator="words",       # finds what is compared: words (built in), spacy (entities and lemmas)
    spacy_model="en_core_web_sm",  # spaCy's package for evaluator=spacy
    score_with="question+answer",  # compared with a chunk's words: question, question+answer

    # the prompts and the answers to them
    prompt_head="",          # text before the chunks, inside the user's turn
    prompt_tail="\n\nQuestion: {question}",  # text after them
    n_rejected=2,            # M, rejected answers of a pair
    candidates=0,            # rejected answers to generate; the first M good ones are kept; 0: M
    chosen_from="generated",  # the chosen: generated, or the reference answer of the corpus
    max_new_tokens=512,      # longest generated answer; a longer one is dropped, never cut
    temperature=0.7,         # of the sampling; 0: greedy
    top_p=0.95,              # nucleus of the sampling
    build_batch=8,           # examples whose answers are generated together
    endpoint="",             # OpenAI-compatible server, as http://127.0.0.1:8000/v1; empty: model
    endpoint_model="",       # name of the model there; empty: the first one it lists
    endpoint_api="chat",     # chat: the server's template; completions: our token ids

    # which pairs are kept
    require_correct_chosen=True,   # the chosen has the reference answer, where there is one
    require_wrong_rejected=True,   # a rejected answer has it not
    correct_share=0.5,       # share of a long reference answer's words that counts as having it
)
train = dict(
    # positions (Sec. 3.2.2, Eq. 4)
    window=65536,            # K, positions that a sample may use
    positions="mix",         # continuous, sparse, mix; to compare: none (0, 1, ...), pose, randpos
    sparse_share=0.1,        # of the samples under mix; the others are continuous
    draws=2,                 # position draws of a pair; together they cover each chunk's slot
    rope_theta=0.0,          # train and export with this RoPE base; 0: the checkpoint's own
    yarn_factor=0.0,         # train and export with YaRN, its window so many times that of the
                             # pre-training (Llama 3.1: 8192), instead of the checkpoint's scaling;
                             # 0: the checkpoint's own

    # objective (Eq. 2 and 3)
    beta=10.0,               # scale of the rewards
    gamma=3.0,               # margin between the rewards, outside beta
    sft_weight=0.1,          # lambda, weight of the chosen answer's mean negative log-likelihood

    # what is trained. The paper's text: LoRA on the attention projections, and the token
    # embeddings; its public scripts: also the norms, as train_also="embed,norm"
    dtype="float32",         # of the forward: float32, or bfloat16; trained weights stay float32
    lora_r=0,                # rank of LoRA's matrices; 0: all weights train, train_also is not used
    lora_alpha=16,           # LoRA's output is scaled by lora_alpha / lora_r
    lora_targets="q_proj,k_proj,v_proj,o_proj",  # also gate_proj, up_proj, down_proj
    train_also="",           # with LoRA: parts of names of parameters that train in full

    # optimization
    steps=188,               # optimizer steps
    batch_size=64,           # groups (a prompt, its M + 1 answers) a step, over all processes
    lr=5e-7,                 # peak learning rate
    warmup=0.1,              # share of the steps with a rising rate; then cosine to zero
    weight_decay=0.05,       # of matrices; norms, biases, lookup tables and LoRA's B have none
    beta1=0.9,               # AdamW
    beta2=0.999,             # AdamW
    grad_clip=1.0,           # largest norm of the gradient
    held_out=64,             # last pairs of the file: not trained on, nor are their documents
)
run = dict(
    threads=0,               # CPU threads of a process; 0: its share of the cores
    workers=0,               # processes of a machine that read, chunk and score; 0: one a core
    endpoint_requests=16,    # requests to a server at a time
    strict=False,            # end at the first row that cannot be used, instead of leaving it out

    dry_run=False,           # check all, show the first prompt and what a step costs, train nothing
    verify=False,            # compare a group with M + 1 full rows first; where they differ, end

    # memory and machines
    micro_batch=1,           # groups in one forward pass of one process
    checkpointing=True,      # keep only the blocks' inputs, recompute the rest in backward
    compile=False,           # torch.compile each block; its first step takes a minute
    offload_activations=False,  # with checkpointing: keep the blocks' inputs in host memory
    offload_params=False,    # weights, gradients and moments live, and are updated, in host memory
    shard_size=0,            # processes that share a copy of the weights (8: by node); 0: all

    # answers are generated in batches of so many tokens, not rows: no answer depends on the batch
    batch_tokens=0,          # KV-cache slots of a batch; 0: half of a GPU's free memory

    # checkpoints, to resume a run
    save_interval=100,       # steps between checkpoints; 0: only when stopped by SIGTERM or SIGINT
    keep=2,                  # newest checkpoints to keep; the best by held-out loss stays as well
    resume="",               # auto: from the newest whole checkpoint, if any; or a step_ folder

    # evaluation
    log_interval=10,         # steps between printed lines, if they take less than ten seconds
    log="",                  # curves while it trains: tensorboard, wandb or trackio; empty: none
    eval_interval=100,       # steps between held-out evaluations; 0: only before and after
    fresh_sizes=[],          # context sizes at which fresh questions are asked, before and after
    fresh_questions=0,       # fresh questions at each of these sizes
    evals=[],                # evaluations of each checkpoint, as ["needle lengths=[512,1024]"]
)
