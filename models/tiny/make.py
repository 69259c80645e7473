r"""Make the embedded tiny model: its tokenizer, its training from scratch, its folder.

    python models/tiny/make.py          from the repository root; two to five minutes on one core

The model reads short biographies (world.py) and answers questions about them, inside a window of 128 tokens and not
beyond: RoPE has never seen larger distances. A training sequence is one document, then questions and answers until the
window is full; each turn is exactly what the trainer's "plain" template makes of one question:

    <|bos|> context\nQuestion: Who is Rosa?\nAnswer: Rosa paints in Naples.<|end|>\nQuestion: ...

**A head start, disclosed.**  From a random start a model this small answers with *some* job of the document for a
thousand steps or more, until an induction circuit forms. `head_start` builds the outline of that circuit into the
first weights (what follows what, and a lookup by name); training has to make it work, and gets there in minutes.
"""

import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1])]                   # the repository root, for model.py
from checkpoint import save_pretrained                  # noqa: E402
from configs import write_json                          # noqa: E402
from model import Llama, LlamaConfig                    # noqa: E402
from tokenizer import byte_alphabet                     # noqa: E402
from world import CITIES, JOBS, ask, examples, words, world  # noqa: E402

WINDOW = 128
STEPS, BATCH, RATE = 1000, 12, 1e-3                     # sequences a step; AdamW
VALUE, ANSWER, CONTEXT = 1.0, 0.3, 0.03                 # weight of a job or city, of the answer's other tokens, of the rest
BOS, END = "<|bos|>", "<|end|>"
# GPT-2's pattern: a word takes the space before it along
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def vocabulary():
    """{token: id}: the bytes, so that any text can be encoded, then whole words, then the two special tokens."""
    tokens = list(byte_alphabet()) + ["Question", "Answer"] + ["Ġ" + word for word in words()] + [BOS, END]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder, vocab):
    """tokenizer.json without a single merge: ignore_merges looks a piece up whole, what is not a word is bytes."""
    special = [{"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for token in (BOS, END)]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "ignore_merges": True, "merges": [],
             "vocab": {token: i for token, i in vocab.items() if token not in (BOS, END)}}
    write_json({"version": "1.0", "added_tokens": special, "normalizer": None, "post_processor": None, "model": model,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "decoder": byte_level},
               str(folder / "tokenizer.json"))
    write_json({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END,
                "clean_up_tokenization_spaces": False, "model_max_length": WINDOW}, str(folder / "tokenizer_config.json"))


class Words:
    """Encode the world's own texts without a tokenizer library: every token is a word or one mark."""

    def __init__(self, vocab):
        self.vocab, self.bos, self.end = vocab, vocab[BOS], vocab[END]
        self.values = {vocab["Ġ" + word] for word in JOBS + CITIES}

    def encode(self, text):
        for mark in ".?:\n":
            text = text.replace(mark, f"\0{mark}\0")
        pieces = (piece for part in text.split("\0") for piece in part.replace(" ", "\0Ġ").split("\0"))
        return [self.vocab[piece.replace("\n", "Ċ")] for piece in pieces if piece]

    def turn(self, question, answer):
        """One turn in the trainer's "plain" template: the tokens that ask, and the tokens that answer."""
        return self.encode(f"\nQuestion: {question}\nAnswer:"), self.encode(" " + answer) + [self.end]


def sequence(rng, coder, limit):
    """Tokens and loss weights (limit + 1) of one document and as many questions as fit; nobody is asked about twice."""
    text, facts = world(rng, rng.randint(30, limit - 22))
    tokens = [coder.bos] + coder.encode(text)
    weights = [CONTEXT] * len(tokens)
    while facts:
        question, answer = ask(rng, facts, min(len(facts), rng.choice([1, 1, 2])))
        asks, answers = coder.turn(question, answer)
        if len(tokens) + len(asks) + len(answers) > limit + 1:
            break
        tokens += asks + answers
        weights += [0.0] * len(asks) + [VALUE if token in coder.values else ANSWER for token in answers]
        facts = {name: fact for name, fact in facts.items() if fact not in answer}
    padding = limit + 1 - len(tokens)
    return tokens + [coder.end] * padding, weights + [0.0] * padding


def train(model, coder):
    rng, began = random.Random(1), time.time()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}],
                                  betas=(0.9, 0.98))
    for step in range(STEPS):
        limit = min(WINDOW, int(72 + (WINDOW - 72) * step / (0.4 * STEPS)))  # short documents first
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_curve(step)
        rows = [sequence(rng, coder, limit) for _ in range(BATCH * WINDOW // limit)]
        tokens, weights = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])[:, 1:]
        losses = F.cross_entropy(model.logits(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            value = losses[weights == VALUE].mean().item()
            print(f"step {step:5d}  window {limit:3d}  loss {loss.item():.3f}  jobs and cities {value:.3f}  "
                  f"{time.time() - began:.0f}s", flush=True)


def learning_curve(step):
    """Warm up, stay, and fall as a cosine over the second half."""
    late = max(0.0, 2 * step / STEPS - 1)
    return min(1.0, (step + 1) / 40) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * late)))


@torch.no_grad()
def head_start(model):
    """The outline of an induction circuit: "what followed this name?", "what came three after it?"

    Four subspaces of the residual stream are set apart, and a direction u that all embeddings share. own holds a token's
    identity, before[i] that of the token i + 1 places earlier. Layer 0 writes before: a key that is the same for every
    token, in the fastest rotary pairs, and a query a head that is this key turned back one, two or three places.
    Later layers look up. After a name, own asks before[0]: who follows it? The job. Two after a name, before[1] asks
    before[2]: who comes three after it? The city. What they find is written into own, as the next token.
    """
    config = model.config
    C, D, H = config.hidden_size, config.head_dim, config.num_attention_heads
    rank = (C - 1) // 4
    basis = torch.linalg.qr(torch.randn(C, 1 + 4 * rank))[0].T
    u = basis[0]
    own, *before = (slow_pairs(basis[1 + i * rank:1 + (i + 1) * rank], D) for i in range(4))
    model.model.embed_tokens.weight.copy_(0.04 * torch.randn(config.vocab_size, C) + 0.3 * u)

    angles = config.rope["rope_theta"] ** (-torch.arange(0, D, 2) / D)[:4]  # of the four fastest pairs, a place
    first, *later = (block.self_attn for block in model.model.layers)
    key = turned_back(0, angles, D)
    add(first.k_proj.weight, [0.8 * key[:, None] * u] * 2)
    add(first.q_proj.weight, [0.8 * turned_back(i, angles, D)[:, None] * u for i in (1, 2, 3)] + [torch.zeros(D, C)])
    add(first.v_proj.weight, [0.5 * own] * 2)
    add(first.o_proj.weight.T, [0.15 * before[i] for i in range(3)] + [torch.zeros(D, C)])
    for attention in later:
        add(attention.k_proj.weight, [1.6 * before[0], 1.6 * before[2]])
        add(attention.q_proj.weight, [1.6 * own] * 2 + [1.6 * before[1]] * 2)
        add(attention.v_proj.weight, [0.3 * own] * 2)
        add(attention.o_proj.weight.T, [0.15 * own] * H)


def slow_pairs(rows, D):
    """Rows (rank, C) laid out (D, C) in the slowest rotary pairs, which distance turns least."""
    out, half = torch.zeros(D, rows.shape[1]), (len(rows) + 1) // 2
    out[D // 2 - half:D // 2] = rows[:half]
    out[D - len(rows) + half:] = rows[half:]
    return out


def turned_back(places, angles, D):
    """A constant vector (D,) in the fastest rotary pairs, turned back by so many places."""
    out = torch.zeros(D)
    out[:len(angles)], out[D // 2:D // 2 + len(angles)] = torch.cos(-places * angles), torch.sin(-places * angles)
    return out


def add(weight, heads):
    """Add one (D, C) map a head to a projection's weight; an output projection gives its transpose."""
    weight += torch.cat(heads)


@torch.no_grad()
def count_right(model, coder, size, count):
    """Share of answers that greedy decoding gets exactly right: the arg-max is right at every answer token."""
    right = 0
    for example in examples(count, size, seed=2):
        asks, answer = coder.turn(example["question"], example["answer"])
        prompt = [coder.bos] + coder.encode(example["context"]) + asks
        guesses = model.logits(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1:].argmax(-1)
        right += guesses.tolist() == answer
    return right / count


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)                            # the same sums in the same order everywhere
    vocab = vocabulary()
    write_tokenizer(HERE, vocab)
    model = Llama(LlamaConfig(
        vocab_size=-(-len(vocab) // 8) * 8, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=WINDOW, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope={"rope_type": "default", "rope_theta": 10000.0},
        raw={"bos_token_id": vocab[BOS], "eos_token_id": vocab[END]}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    head_start(model)
    coder = Words(vocab)
    train(model, coder)
    save_pretrained(model, HERE / "new")                # replaces a folder as a whole, so not this one
    for path in (HERE / "new").iterdir():
        path.rename(HERE / path.name)
    (HERE / "new").rmdir()
    for times in (1, 2, 4, 8):
        share = count_right(model, coder, times * WINDOW - 24, 200)  # question and answer take up to 24 tokens
        print(f"{times}x: {share:.3f} of 200 answers exactly right")


if __name__ == "__main__":
    main()
