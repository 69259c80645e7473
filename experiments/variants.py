"""Training with a piece of the core replaced: the method's neighbours, the public code's bugs.

    python -m experiments.variants NAME CONFIG.py key=value ...     train_logo.py, with a variant

VARIANTS says what each one replaces. Only training changes: without gradients, that is on held-out
pairs, every variant is the plain method, so that margins and log-probs can be compared.
"""
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import loss
from configs import BadInput, exit_on_bad_input
from data import Batch, Placing, random_stream
from model import Llama, LoRALinear, Segment, segments_by_group
from tokenizer import Tokenizer

# What is replaced, as it is: the variants are made of it.
ENCODE_GROUP = data.encode_group
TOKEN_IDS = data.token_ids
CONTINUOUS = data.continuous
LOGO_LOSS = loss.logo_loss
FORWARD = Llama.forward
HIDDEN_STATES = Llama.hidden_states

TAU = 0.05         # of DiscoPOP's Eq. 5
KL_WEIGHT = 1.0    # of base_kl, beside the LOGO loss


def measuring() -> bool:
    """Whether held-out pairs are looked at. Training alone has gradients."""
    return not torch.is_grad_enabled()


# ------------------------------------------------------------------------------------- objectives

def sft_all(pair: dict, tokenizer: Tokenizer, cfg: dict, draw: int = 0, epoch: int = 0) -> Batch:
    """SFT on everything, at beta=0: the mean over the tokens of prompt and chosen answer.

    The prompt becomes its first token alone, and the chosen answer all that follows. Each rejected
    answer is one token, so that there are M of them: at beta=0 nothing is trained by them.
    """
    group = ENCODE_GROUP(pair, tokenizer, cfg, draw, epoch)
    if measuring():
        return group
    if cfg["beta"]:
        raise BadInput(f"beta is {cfg['beta']}, expected 0: it trains on rejected answers as well")
    prompt, chosen, *rejected = group.segments
    # The chosen branch begins with the prompt's last token, right behind the others: one text.
    tokens = group.tokens[:chosen.end]
    targets = group.targets[:chosen.end].clone()
    targets[1:prompt.end] = tokens[2:prompt.end + 1]
    positions = group.positions[:chosen.end]
    segments = [Segment(0, 1), Segment(1, chosen.end, 0, 1)]
    for _ in rejected:
        start = segments[-1].end
        segments.append(Segment(start, start + 1, 0, 1))
        tokens = torch.cat([tokens, tokens[1:2]])
        positions = torch.cat([positions, positions[1:2]])
        targets = torch.cat([targets, targets[1:2]])
    return Batch(tokens, positions, targets, segments)


def discopop(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, sft_weight: float = 0.0
             ) -> tuple[Tensor, dict[str, Tensor]]:
    """DiscoPOP's log-ratio-modulated loss (arXiv 2406.08414, Eq. 5), without a reference model.

        f(x) = (1 - sigmoid(x / tau)) * -log sigmoid(x) + sigmoid(x / tau) * exp(-x)

    There x is beta times the log-ratio of chosen and rejected less that of the reference. Here it
    is Eq. 2's margin of mean log-probs, and gamma stands where the reference stood. As in logo_loss
    the chosen answer's likelihood is added.
    """
    plain, metrics = LOGO_LOSS(chosen, rejected, beta, gamma, sft_weight)
    if measuring():
        return plain, metrics
    x = beta * (chosen - rejected.mean(dim=1)) - gamma
    share = torch.sigmoid(x / TAU)
    preference = (1 - share) * -F.logsigmoid(x) + share * torch.exp(-x)
    return (preference - sft_weight * chosen).mean(), metrics


def longpo(model: Llama, tokens: Tensor, positions: Tensor, targets: Tensor,
           segments: list[Segment]) -> tuple[Tensor, Tensor]:
    """LongPO's short-to-long reward (arXiv 2502.13922): log-probs less the base's at ordinary
    positions.

    There the base reads the short chunk that the chosen answer was made from. Here it reads the
    training prompt, at 0, 1, 2, ...: inside its window, which is what short means. It is the same
    model with its LoRA off, at the RoPE that training begins with. gamma stays. What is subtracted
    is a constant to the likelihood term, so that this one is as it was.
    """
    sums, lengths = FORWARD(model, tokens, positions, targets, segments)
    if measuring():
        return sums, lengths
    with without_lora(model):
        base, _ = FORWARD(model, tokens, ordinary(segments), targets, segments)
    return sums - base, lengths


# Terms of the loss that are made of hidden states, on their way to it: one, or none.
BESIDE = []


def base_kl(model: Llama, tokens: Tensor, positions: Tensor, attend) -> Tensor:
    """The hidden states; beside them KL(base at ordinary positions || policy at training positions)
    over the chosen answers' tokens, a mean over groups: LongPO's short-to-long constraint."""
    x = HIDDEN_STATES(model, tokens, positions, attend)
    if measuring():
        return x
    with without_lora(model):
        base = HIDDEN_STATES(model, tokens, ordinary(attend.segments), attend)
    found = []
    for _, chosen, *_ in segments_by_group(attend.segments):
        rows = slice(chosen.start, chosen.end)
        wanted = model.lm_head(base[rows]).log_softmax(-1)
        said = model.lm_head(x[rows]).log_softmax(-1)
        found.append(F.kl_div(said, wanted, log_target=True, reduction="batchmean"))
    BESIDE.append(torch.stack(found).mean())
    return x


def with_base_kl(chosen: Tensor, rejected: Tensor, beta: float, gamma: float,
                 sft_weight: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """logo_loss and what base_kl has found."""
    total, metrics = LOGO_LOSS(chosen, rejected, beta, gamma, sft_weight)
    if measuring():
        return total, metrics
    return total + KL_WEIGHT * BESIDE.pop(), metrics


@contextmanager
def without_lora(model: Llama) -> Iterator[None]:
    """The model that training began with, and no gradients. BadInput where all weights train."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not layers:
        raise BadInput("lora_r is 0, expected LoRA: without it the base is not there any more")
    scale = layers[0].scale  # one for all
    for layer in layers:
        layer.scale = 0.0
    with torch.no_grad():
        yield
    for layer in layers:
        layer.scale = scale


def ordinary(segments: list[Segment]) -> Tensor:
    """Positions (T,) without synthesis: a prompt from 0 on, each answer right behind it."""
    positions = []
    for segment in segments:
        start = segment.prefix_length
        positions.append(torch.arange(start, start + segment.length))
    return torch.cat(positions)


# ------------------------------------------------------------------------------ prompts, positions

def longrecipe_group(pair: dict, tokenizer: Tokenizer, cfg: dict, draw: int = 0,
                     epoch: int = 0) -> Batch:
    """LongRecipe (arXiv 2409.00509): what moves as a whole is a sentence, see longrecipe_places.

    Left out: its choice of impactful tokens, its replay of pre-training data and its merging of
    models. It trains on some 30 % of the window; how much is here, n_chunks says.
    """
    if measuring():
        return ENCODE_GROUP(pair, tokenizer, cfg, draw, epoch)
    full_stop = tokenizer.encode(".")[0]
    ids = np.concatenate(pair["chunks"])
    ends = np.flatnonzero(ids == full_stop) + 1
    pieces = np.split(ids, ends)
    pieces = [piece for piece in pieces if len(piece)]  # a text that ends in a full stop
    return ENCODE_GROUP({**pair, "chunks": pieces}, tokenizer, cfg, draw, epoch)


def longrecipe_places(p: Placing) -> np.ndarray:
    """LongRecipe's position index transformation, as its code has it: the first sentence at 0,
    the others in order, all of the slack in random gaps before them.

    `continuous` gives each chunk a slot of its own; here gaps of all sizes are as likely.
    """
    if measuring():
        return CONTINUOUS(p)
    n = len(p.lengths)
    # A sentence takes one of n + slack places, and then the room of its other tokens.
    places = np.sort(p.own.choice(n + p.slack, n, replace=False))
    places[0] = 0
    starts = places + np.cumsum([0, *p.lengths[:-1]]) - np.arange(n)
    placed = []
    for start, length in zip(starts, p.lengths):
        placed.append(start + np.arange(length))
    return np.concatenate(placed)


def untie_knots(pair: dict, tokenizer: Tokenizer, cfg: dict, draw: int = 0, epoch: int = 0
                ) -> Batch:
    """Untie the Knots (arXiv 2409.04774): the prompt's chunks in random order, another one a draw.

    Positions are the run's: the first chunk of the shuffled text has the first slot. Left out, as
    there is one short prompt: chunks of several documents among each other, the tokens that mark
    where a chunk was cut, the task of sorting them, and the loss on all tokens (sft_all has it).
    """
    if measuring():
        return ENCODE_GROUP(pair, tokenizer, cfg, draw, epoch)
    rng = random_stream("untie the knots", cfg["seed"], pair["id"], draw, epoch)
    chunks = [pair["chunks"][c] for c in rng.permutation(len(pair["chunks"]))]
    return ENCODE_GROUP({**pair, "chunks": chunks}, tokenizer, cfg, draw, epoch)


# ------------------------------------------------------------------------- the public code's bugs

def bug_slice(chosen: Tensor, rejected: Tensor, beta: float, gamma: float,
              sft_weight: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The second rejected log-prob is sliced as everything after the chosen one: a mean of all."""
    if measuring() or rejected.shape[1] < 2:
        return LOGO_LOSS(chosen, rejected, beta, gamma, sft_weight)
    everything = rejected.mean(dim=1, keepdim=True)
    sliced = torch.cat([rejected[:, :1], everything, rejected[:, 2:]], dim=1)
    return LOGO_LOSS(chosen, sliced, beta, gamma, sft_weight)


def unshifted_states(model: Llama, tokens: Tensor, positions: Tensor, attend) -> Tensor:
    """The hidden states; beside them how likely each chosen answer's tokens make themselves."""
    x = HIDDEN_STATES(model, tokens, positions, attend)
    if measuring():
        return x
    found = []
    for _, chosen, *_ in segments_by_group(attend.segments):
        # A branch opens with the prompt's last token, which is no label. The answer's own last
        # token, which is never read, is missing here.
        rows = slice(chosen.start + 1, chosen.end)
        found.append(-model.token_logps(x[rows], tokens[rows]).mean())
    BESIDE.append(torch.stack(found).mean())
    return x


def bug_unshifted(chosen: Tensor, rejected: Tensor, beta: float, gamma: float,
                  sft_weight: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The SFT term compares logits with labels that are not shifted: each token predicts itself."""
    total, metrics = LOGO_LOSS(chosen, rejected, beta, gamma, sft_weight)
    if measuring():
        return total, metrics
    preference, _ = LOGO_LOSS(chosen, rejected, beta, gamma)
    return preference + sft_weight * BESIDE.pop(), metrics


def bug_padding(pair: dict, tokenizer: Tokenizer, cfg: dict
                ) -> tuple[list[int], list[int], list[list[int]]]:
    """Answers are padded with token 0 to the longest of their group, and the padding is scored."""
    prefix, suffix, answers = TOKEN_IDS(pair, tokenizer, cfg)
    if measuring():
        return prefix, suffix, answers
    longest = max(len(answer) for answer in answers)
    padded = [answer + [0] * (longest - len(answer)) for answer in answers]
    return prefix, suffix, padded


# --------------------------------------------------------------------------------------- the script

# {name: [(where it is, its name there, what stands there instead), ...]}
VARIANTS = {
    "sft_all": [(data, "encode_group", sft_all)],
    "discopop": [(loss, "logo_loss", discopop)],
    "longpo": [(Llama, "forward", longpo)],
    "base_kl": [(Llama, "hidden_states", base_kl), (loss, "logo_loss", with_base_kl)],
    "longrecipe": [(data, "encode_group", longrecipe_group),
                   (data.STRATEGIES, "continuous", longrecipe_places)],
    "untie_knots": [(data, "encode_group", untie_knots)],
    "bug_slice": [(loss, "logo_loss", bug_slice)],
    "bug_unshifted": [(Llama, "hidden_states", unshifted_states),
                      (loss, "logo_loss", bug_unshifted)],
    "bug_padding": [(data, "token_ids", bug_padding)],
}


def put_in_place(name: str) -> None:
    """Replace what a variant replaces, in this process, before train_logo.py takes it up."""
    if name not in VARIANTS:
        raise BadInput(f"variant is {name!r}, expected one of {', '.join(VARIANTS)}")
    for where, old, new in VARIANTS[name]:
        if isinstance(where, dict):
            where[old] = new
        else:
            setattr(where, old, new)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    name, *words = sys.argv[1:] or [""]
    put_in_place(name)
    sys.argv = ["train_logo.py", *words]
    runpy.run_path("train_logo.py", run_name="__main__")
