r"""Make the embedded tiny model: its tokenizer, its training from scratch, its folder.

    python models/tiny/make.py      from the repository root; two to five minutes on one core

The model reads short biographies (world.py) and answers questions about them, inside a window of
128 tokens and not beyond: RoPE has never seen larger distances. A training sequence is a document,
then questions and answers until the window is full; each turn is exactly what the trainer's "plain"
template makes of one question:

    <|bos|> context\nQuestion: Who is Rosa?\nAnswer: Rosa paints in Naples.<|end|>\nQuestion: ...

**A head start, disclosed.**  From a random start a model this small answers with *some* job of the
document for a thousand steps or more, until an induction circuit forms. `head_start` builds the
outline of that circuit into the first weights (what follows what, and a lookup by name); training
has to make it work, and gets there in minutes.
"""

import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1])]  # the repository root, for model.py
from world import CITIES, JOBS, ask, examples, words, world  # noqa: E402

from checkpoint import save_pretrained  # noqa: E402
from configs import write_json  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

WINDOW = 128
STEPS = 1000
BATCH = 12        # sequences a step
RATE = 1e-3       # of AdamW

# Weights of the loss. To be found are a job and a city; the rest of an answer comes by itself.
VALUE = 1.0       # a job or a city in an answer
ANSWER = 0.3      # an answer's other tokens
CONTEXT = 0.03    # the document

BOS, END = "<|bos|>", "<|end|>"
# GPT-2's pattern: a word takes the space before it along
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# --------------------------------------------------------------------------------------- tokenizer

def byte_symbols():
    """The printable character that byte-level BPE writes for each of the 256 bytes (GPT-2's)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols = []
    shifted = 256
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(shifted))
            shifted += 1
    return symbols


def vocabulary():
    """{token: id}: the bytes, so that any text can be encoded, then words, then the specials."""
    tokens = byte_symbols() + ["Question", "Answer"]
    tokens += ["Ġ" + word for word in words()]
    tokens += [BOS, END]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder, vocab):
    """tokenizer.json without merges: a piece is looked up whole, and is bytes if it is no word."""
    special = []
    for token in (BOS, END):
        special.append({
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        })
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    plain = {token: i for token, i in vocab.items() if token not in (BOS, END)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "post_processor": None,
        "model": {"type": "BPE", "ignore_merges": True, "merges": [], "vocab": plain},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": WINDOW,
    }
    write_json(tokenizer, str(folder / "tokenizer.json"))
    write_json(config, str(folder / "tokenizer_config.json"))


class Words:
    """Encode the world's own texts without a tokenizer library: a token is a word or one mark."""

    def __init__(self, vocab):
        self.vocab = vocab
        self.bos = vocab[BOS]
        self.end = vocab[END]
        self.values = {vocab["Ġ" + word] for word in JOBS + CITIES}

    def encode(self, text):
        # A cut (\0) on both sides of each mark, and before each space: the word after it keeps it.
        for mark in ".?:\n":
            text = text.replace(mark, f"\0{mark}\0")
        ids = []
        for piece in text.replace(" ", "\0Ġ").split("\0"):
            if piece:
                ids.append(self.vocab[piece.replace("\n", "Ċ")])
        return ids

    def turn(self, question, answer):
        """One turn in the trainer's "plain" template: the tokens that ask, those that answer."""
        asks = self.encode(f"\nQuestion: {question}\nAnswer:")
        answers = self.encode(" " + answer) + [self.end]
        return asks, answers


# ---------------------------------------------------------------------------------------- training

def sequence(rng, coder, limit):
    """Tokens and loss weights (limit + 1) of one document and as many questions as fit."""
    text, facts = world(rng, rng.randint(30, limit - 22))
    tokens = [coder.bos] + coder.encode(text)
    weights = [CONTEXT] * len(tokens)
    while facts:
        people = min(len(facts), rng.choice([1, 1, 2]))
        question, answer = ask(rng, facts, people)
        asks, answers = coder.turn(question, answer)
        if len(tokens) + len(asks) + len(answers) > limit + 1:
            break
        tokens += asks + answers
        weights += [0.0] * len(asks)
        for token in answers:
            weights.append(VALUE if token in coder.values else ANSWER)
        # Nobody is asked about twice: the second answer could be copied from the first.
        facts = {name: fact for name, fact in facts.items() if fact not in answer}
    padding = limit + 1 - len(tokens)
    return tokens + [coder.end] * padding, weights + [0.0] * padding


def train(model, coder):
    rng = random.Random(1)
    began = time.time()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in range(STEPS):
        # Short documents first: where the fact is near, the circuit forms sooner.
        limit = min(WINDOW, int(72 + (WINDOW - 72) * step / (0.4 * STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_curve(step)

        tokens, weights = batch(rng, coder, limit)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = model.logits(inputs).transpose(1, 2)
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 50 == 0 or step == STEPS - 1:
            value = losses[weights == VALUE].mean().item()
            seconds = time.time() - began
            print(f"step {step:5d}  window {limit:3d}  loss {loss.item():.3f}  "
                  f"jobs and cities {value:.3f}  {seconds:.0f}s", flush=True)


def batch(rng, coder, limit):
    """Tokens (N, limit + 1) and the weights of their targets (N, limit)."""
    tokens = []
    weights = []
    for _ in range(BATCH * WINDOW // limit):
        of_row, weights_of_row = sequence(rng, coder, limit)
        tokens.append(of_row)
        weights.append(weights_of_row)
    return torch.tensor(tokens), torch.tensor(weights)[:, 1:]


def learning_curve(step):
    """Warm up, stay, and fall as a cosine over the second half."""
    warm = min(1.0, (step + 1) / 40)
    late = max(0.0, 2 * step / STEPS - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * late))
    return warm * (0.03 + 0.97 * cosine)


# -------------------------------------------------------------------------------------- head start

@torch.no_grad()
def head_start(model):
    """The outline of an induction circuit: "what followed this name?", "what came three after it?"

    Four subspaces of the residual stream are set apart, and a direction u that all embeddings
    share. own holds a token's identity, before[i] that of the token i + 1 places earlier. Layer 0
    writes before: a key that is the same for every token, in the fastest rotary pairs, and a query
    a head that is this key turned back one, two or three places. Later layers look up. After a
    name, own asks before[0]: who follows it? The job. Two after a name, before[1] asks before[2]:
    who comes three after it? The city. What they find is written into own, as the next token.
    """
    config = model.config
    C, D, H = config.hidden_size, config.head_dim, config.num_attention_heads
    rank = (C - 1) // 4
    basis = torch.linalg.qr(torch.randn(C, 1 + 4 * rank))[0].T
    u = basis[0]
    subspaces = [slow_pairs(rows, D) for rows in basis[1:].split(rank)]
    own, *before = subspaces
    embeddings = 0.04 * torch.randn(config.vocab_size, C) + 0.3 * u
    model.model.embed_tokens.weight.copy_(embeddings)

    # Layer 0: the key says nothing but where a token is, the queries how many places back to look.
    theta = config.rope["rope_theta"]
    angles = theta ** (-torch.arange(0, D, 2) / D)[:4]  # of the four fastest pairs, a place
    nothing = torch.zeros(D, C)
    first, *later = (block.self_attn for block in model.model.layers)
    key = 0.8 * turned_back(0, angles, D)[:, None] * u
    queries = []
    for places in (1, 2, 3):
        queries.append(0.8 * turned_back(places, angles, D)[:, None] * u)
    writes = [0.15 * part for part in before]
    add(first.k_proj.weight, [key] * 2)
    add(first.q_proj.weight, queries + [nothing])
    add(first.v_proj.weight, [0.5 * own] * 2)
    add(first.o_proj.weight.T, writes + [nothing])

    # Later layers: two heads ask who follows a name, two who comes three places after it.
    for attention in later:
        add(attention.k_proj.weight, [1.6 * before[0], 1.6 * before[2]])
        add(attention.q_proj.weight, [1.6 * own] * 2 + [1.6 * before[1]] * 2)
        add(attention.v_proj.weight, [0.3 * own] * 2)
        add(attention.o_proj.weight.T, [0.15 * own] * H)


def slow_pairs(rows, D):
    """Rows (rank, C) laid out (D, C) in the slowest rotary pairs, which distance turns least."""
    out = torch.zeros(D, rows.shape[1])
    half = (len(rows) + 1) // 2
    out[D // 2 - half:D // 2] = rows[:half]
    out[D - len(rows) + half:] = rows[half:]
    return out


def turned_back(places, angles, D):
    """A constant vector (D,) in the fastest rotary pairs, turned back by so many places."""
    out = torch.zeros(D)
    n = len(angles)
    out[:n] = torch.cos(-places * angles)
    out[D // 2:D // 2 + n] = torch.sin(-places * angles)
    return out


def add(weight, heads):
    """Add one (D, C) map a head to a projection's weight, to an output projection's transpose."""
    weight += torch.cat(heads)


# -------------------------------------------------------------------------------------------- main

@torch.no_grad()
def count_right(model, coder, size, count):
    """Right answers among `count` questions: the arg-max is right at every token of the answer."""
    right = 0
    for example in examples(count, size, seed=2):
        asks, answer = coder.turn(example["question"], example["answer"])
        prompt = [coder.bos] + coder.encode(example["context"]) + asks
        row = torch.tensor([prompt + answer[:-1]])
        logits = model.logits(row)[0, len(prompt) - 1:]
        guesses = logits.argmax(-1)
        right += guesses.tolist() == answer
    return right


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the same sums in the same order everywhere
    vocab = vocabulary()
    write_tokenizer(HERE, vocab)
    model = Llama(LlamaConfig(
        vocab_size=math.ceil(len(vocab) / 8) * 8,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope={"rope_type": "default", "rope_theta": 10000.0},
        raw={"bos_token_id": vocab[BOS], "eos_token_id": vocab[END]},
    ))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    head_start(model)
    coder = Words(vocab)
    train(model, coder)

    # An export replaces a folder as a whole. This one holds more than the model, so the files move.
    save_pretrained(model, HERE / "new")
    for path in (HERE / "new").iterdir():
        path.rename(HERE / path.name)
    (HERE / "new").rmdir()

    asked = 200
    for times in (1, 2, 4, 8):
        size = times * WINDOW - 24  # question and answer take up to 24 tokens
        right = count_right(model, coder, size, asked)
        print(f"{times}x: {right / asked:.3f} of {asked} answers exactly right")


if __name__ == "__main__":
    main()
