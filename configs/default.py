"""Every key and its meaning. The other files hold differences only; key=value on the command line wins over both."""
config = dict(
    # the run
    model="",                # Hugging Face folder of the model to align: config.json, safetensors, tokenizer
    out="",                  # folder of the run; empty: out/<name of the config file>
    seed=0,                  # of every draw: data, sampling, positions, order
    dtype="float32",         # of the forward pass: float32, or bfloat16 (slow on CPUs); trained weights stay float32
    template="auto",         # chat template: auto, llama3, chatml, smollm2, llama2, mistral, plain
    threads=0,               # CPU threads of a process; 0: PyTorch's choice

    # examples
    examples="",             # a corpus: .jsonl, .json, .gz of these, .txt, a folder, - (corpus.py has the forms); or a .py
    context_size=8,          # passages around a question, where the corpus is passages; tokens, where it is a .py
    n_examples=0,            # examples to build pairs from; 0: all
    max_chars=20_000_000,    # a text with more characters is named and left out; 0: no limit
    strict=False,            # end at the first row that cannot be used, instead of leaving it out
    questions=1,             # questions to write about each document that has none
    question_prompt="Write one short question that this text answers, and nothing else.",  # comes after a chunk of it

    # chunks and their scores (METHOD: Sec. 3.2.2 of the paper)
    chunk_size=512,          # tokens of a chunk
    n_chunks=16,             # N, chunks of a prompt
    delta=6,                 # a chunk that shares more words than this with the question is critical
    max_critical=0,          # keep so many of the best critical chunks; 0: up to n_chunks
    evaluator="words",       # finds the words that are compared: words (built in), spacy (entities, nouns, verbs)
    spacy_model="en_core_web_sm",  # spaCy's package for evaluator=spacy
    score_with="question+answer",  # what a chunk's words are compared with: question, question+answer
    workers=0,               # processes that read, chunk and score; 0: one a core

    # pairs
    pairs="",                # the pairs' file; empty: pairs.jsonl in the run's folder
    prompt_head="",          # text before the chunks, inside the user's turn
    prompt_tail="\n\nQuestion: {question}",  # text after them
    n_rejected=2,            # M, dis-preferred answers of a pair
    candidates=0,            # dis-preferred answers to generate, from which the first M good ones are kept; 0: M
    chosen_from="generated", # the chosen answer: generated, or the reference answer of the corpus
    max_new_tokens=512,      # longest generated answer; a longer one is dropped, never cut
    temperature=0.7,         # of the answers' sampling; 0: greedy
    temperature_step=0.1,    # the third and fourth rejected answer are sampled so much hotter, the next two twice that
    top_p=0.95,              # nucleus of the sampling
    build_batch=8,           # examples whose answers are generated together

    # which pairs are kept
    require_correct_chosen=True,   # the chosen has the reference answer, where there is one
    require_wrong_rejected=True,   # a rejected answer has it not
    require_clean_rejected=False,  # the chunks that a rejected answer was written from have it not
    correct_share=0.5,       # share of the uncommon words of a long reference answer that counts as having it
    max_length_ratio=0.0,    # chosen : rejected words, either way; 0: any
    max_overlap=1.0,         # share of their words that a rejected answer and the chosen may have in common

    # answers from a server instead of the model here
    endpoint="",             # OpenAI-compatible, as http://127.0.0.1:8000/v1 (vLLM, SGLang, llama.cpp); empty: none
    endpoint_model="",       # name of the model there; empty: the first one it lists
    endpoint_api="chat",     # chat: the server's template; completions: our token ids (same tokenizer)
    endpoint_requests=16,    # requests at a time
    endpoint_retries=5,      # of a request that fails, each after a longer pause
    endpoint_timeout=300.0,  # seconds to wait for an answer

    # positions (Sec. 3.2.2, Eq. 4)
    window=65536,            # K, positions that a sample may use
    positions="mix",         # continuous, sparse, mix (sparse at sparse_share), none (0, 1, 2, ...); pose, randpos
    sparse_share=0.1,        # of the samples under mix
    draws=2,                 # position draws of a pair; together they cover each chunk's slot
    rope_theta=0.0,          # train and export with this RoPE base; 0: the checkpoint's own

    # objective (Eq. 2 and 3)
    beta=10.0,               # scale of the rewards
    gamma=3.0,               # margin between the rewards, outside beta
    sft_weight=0.1,          # lambda, weight of the chosen answer's mean negative log-likelihood

    # what is trained (the paper: LoRA on the attention projections, and the token embeddings)
    lora_r=0,                # rank of LoRA's matrices; 0: all weights train
    lora_alpha=16,           # LoRA's output is scaled by lora_alpha / lora_r
    lora_targets="q_proj,k_proj,v_proj,o_proj",  # projections with LoRA; also gate_proj, up_proj, down_proj
    train_also="",           # with LoRA: train parameters with one of these in their names in full, as embed,norm
    adapter="",              # a PEFT adapter's folder to go on from; the four keys above have to fit it

    # optimization
    steps=1200,              # optimizer steps
    batch_size=64,           # groups (a prompt with its M + 1 answers) a step, over all processes
    micro_batch=1,           # groups in one forward pass of one process
    lr=5e-7,                 # peak learning rate
    warmup=0.1,              # share of the steps with a rising rate; then cosine to zero
    weight_decay=0.05,       # of matrices; norms, biases, lookup tables (untied embeddings) and LoRA's B have none
    beta1=0.9,               # AdamW
    beta2=0.999,             # AdamW
    grad_clip=1.0,           # largest norm of the gradient
    checkpointing=True,      # keep only the blocks' inputs, recompute the rest in backward
    compile=False,           # torch.compile each block; its first step takes a minute

    # memory and machines
    offload_activations=False,  # with checkpointing: keep the blocks' inputs in host memory
    offload_params=False,    # keep weights, gradients and moments in host memory, and update them there
    shard_size=0,            # processes that share one copy of the weights (8: by node, hybrid sharding); 0: all

    # checkpoints, to resume a run
    save_interval=100,       # steps between checkpoints; 0: only when stopped by SIGTERM or SIGINT
    keep=2,                  # newest checkpoints to keep; the one with the lowest held-out loss stays as well
    resume="",               # auto: from the run's newest whole checkpoint, if any; or a step_ folder

    # evaluation
    log_interval=10,         # steps between printed lines; metrics.jsonl has every step
    held_out=64,             # pairs, the last of the file, that are not trained on
    eval_interval=100,       # steps between evaluations on them; 0: only before and after
    recall_sizes=[],         # context sizes (as context_size) at which answers are counted, before and after
    recall_questions=0,      # fresh examples at each of these sizes
    recall_batch=25,         # prompts generated together
    evals=[],                # eval.py's commands for each checkpoint, as ["needle lengths=[512,1024]"]; in RUN/eval
)
