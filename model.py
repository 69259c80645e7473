"""A Llama in plain PyTorch that scores many answers to one prompt at the cost of one prompt.

Read top to bottom: the config of a Hugging Face folder, rotary positions, attention over segments, the
block, LoRA, the model with its answer-only head, generation. Parameters carry Hugging Face names and Hugging
Face's half-split rotary layout, so weights move in and out untouched (checkpoint.py).

The model has no batch dimension. A batch is one stream of T tokens, cut into segments:

    stream     [ prompt - last token | branch 0 | branch 1 | ... ][ next group ... ]
    segment    (start, end, prefix_start, prefix_end): its tokens see stream[prefix_start:prefix_end]
               and, causally, themselves. Never another branch, never another group.

Causal by order in the stream, rotary by `positions`: two separate things, so no T x T mask exists anywhere and
positions are free to have gaps.

Shape letters: T tokens in the stream, N rows or groups, A answers, H query heads, K key/value heads,
D head dim, C hidden size, V vocabulary.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from configs import BadInput

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional: PyTorch carries a flash kernel too
    flash_attn_varlen_func = None

IGNORE = -100      # target of a token that nobody scores
HEAD_CHUNK = 256   # answer tokens whose logits exist at the same time



class Segment(NamedTuple):
    """Tokens start:end of the stream. They see prefix_start:prefix_end of it and, causally, themselves."""
    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0  # 0: no prefix; the segment opens a group

    def moved(self, offset: int) -> "Segment":
        if not self.prefix_end:
            return Segment(self.start + offset, self.end + offset)
        return Segment(*(bound + offset for bound in self))


# ------------------------------------------------------------------------------------------------ config.json

@dataclass
class LlamaConfig:
    """The fields of config.json that this model reads, under their Hugging Face names; `raw` keeps the file."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    raw: dict = field(default_factory=dict)

    def extend(self, window, rope_theta=0.0):
        """Announce a longer window to whoever opens the export, and change the RoPE base where one is given."""
        self.rope["rope_theta"] = rope_theta or self.rope["rope_theta"]
        if self.rope["rope_type"] == "yarn":
            self.rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        if self.rope["rope_type"] != "dynamic":  # dynamic NTK computes its frequencies from the original window
            self.max_position_embeddings = max(window, self.max_position_embeddings)


# ---------------------------------------------------------------------------------------------------- rotary

def rope_frequencies(config, span):
    """Rotary frequencies (..., D/2) in fp32 and the factor on cos and sin, for each scaling that Llamas use.

    span: tensor (..., 1), the length that the model must cover (largest position + 1); only dynamic NTK
    depends on it. Formulas: NTK and dynamic NTK as in transformers, YaRN arXiv 2309.00071, llama3 as in Llama 3.1.
    """
    rope, dim = config.rope, config.head_dim
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor")
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=span.device) / dim
    if kind == "dynamic":  # stretch the base once the text outgrows the original window
        window = config.max_position_embeddings
        stretch = (factor * span.float() / window).clamp(min=factor) - (factor - 1)
        stretch = (stretch.double() ** (dim / (dim - 2))).float()  # vectorised fp32 pow rounds by its lane
        return 1.0 / (theta * stretch) ** exponent, 1.0
    frequencies = 1.0 / theta ** exponent
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":  # long wavelengths are interpolated, short ones kept, those between blended
        window, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((window * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequencies / factor + keep * frequencies, 1.0
    if kind == "yarn":
        return yarn_frequencies(config, frequencies)
    return frequencies, 1.0


def yarn_frequencies(config, frequencies):
    """YaRN: a ramp over the dimensions from kept to interpolated, and a temperature on the attention scores."""
    rope, dim = config.rope, config.head_dim
    window = rope.get("original_max_position_embeddings") or config.max_position_embeddings

    def dim_of(turns):  # the dimension that turns so many times inside the original window
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    interpolated = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = frequencies / rope["factor"] * interpolated + frequencies * (1 - interpolated)

    def temperature(scale):
        return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return frequencies, rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return frequencies, temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return frequencies, temperature(1.0)


def rotary_tables(config, positions, span, dtype):
    """cos and sin, (T, 1, D) each. No table of all positions: they are arbitrary integers up to the window.

    Angles are fp32, elementwise: a bf16 angle is off by several turns beyond a few thousand positions.
    """
    frequencies, scale = rope_frequencies(config, span)
    angles = positions[:, None].float() * frequencies           # (T, D/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]       # (T, 1, D): the two halves turn together
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x, cos, sin):
    """Turn x (T, heads, D) by its positions; Hugging Face pairs dimension i with i + D/2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


# ------------------------------------------------------------------------------------------------- attention

def varlen_kernel(device, dtype):
    """The flash kernel that attends over many sequences in one call, or None: flash-attn's, else PyTorch's own.

    Both align a causal mask at the bottom right: of 2 queries and 5 keys, the first query sees 4. Flash kernels
    want 16-bit floats, an Ampere GPU or newer, and a head dim that is a multiple of 8, at most 256.
    """
    if (torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16)
            or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    if flash_attn_varlen_func is not None:
        return partial(flash_attn_varlen_func, causal=True)
    return partial(varlen_attn, window_size=(-1, 0), enable_gqa=True)


class SegmentAttention:
    """Attention over a stream's segments: (T, H, D), (T, K, D), (T, K, D) -> (T, H, D). One layout, all layers.

    segments: list of (start, end, prefix_start, prefix_end), covering the stream in order. A segment without prefix
    opens a group; those with one follow it and are the answers to it.
    """

    def __init__(self, segments, device):
        self.segments, self.device = segments, device

    @cached_property
    def packed(self):
        """For the varlen kernel: where in the stream each segment's keys are, and the segments' lengths."""
        queries = [end - start for start, end, _, _ in self.segments]
        keys = [end - start + p_end - p_start for start, end, p_start, p_end in self.segments]
        key_index = torch.cat([torch.arange(a, b) for start, end, p_start, p_end in self.segments
                               for a, b in ((p_start, p_end), (start, end))]).to(self.device)
        offsets = [torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(self.device) for n in (queries, keys)]
        return key_index, (*offsets, max(queries), max(keys))

    @cached_property
    def groups(self):
        """For SDPA: (length of the prompt, mask of its answers' rows over the whole group) of each group."""
        opens = [i for i, segment in enumerate(self.segments) if not segment.prefix_end] + [len(self.segments)]
        return [(self.segments[i][1] - self.segments[i][0], answer_mask(self.segments[i:j], self.device))
                for i, j in zip(opens, opens[1:])]

    @torch.compiler.disable  # segments differ from batch to batch: traced, each would compile anew
    def __call__(self, q, k, v):
        if kernel := varlen_kernel(q.device, q.dtype):
            key_index, lengths = self.packed
            return kernel(q, k[key_index], v[key_index], *lengths)  # a prompt's keys once more for each answer to it
        out, of_groups = [], [P + len(mask) for P, mask in self.groups]
        for (P, mask), *qkv in zip(self.groups, *(x.split(of_groups) for x in (q, k, v))):
            q_, k_, v_ = (x.transpose(0, 1)[None] for x in qkv)  # (1, heads, T of the group, D)
            prompt, answers = q_.split([P, len(mask)], dim=2)
            out.append(sdpa(prompt, k_[:, :, :P], v_[:, :, :P], is_causal=True))
            if len(mask):  # all answers at once over the keys as they lie: no copy of the prompt's for each of them
                out.append(sdpa(answers, k_, v_, attn_mask=mask.to(q.dtype)))
        return torch.cat(out)


def sdpa(q, k, v, **mask):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)[0].transpose(0, 1)


def answer_mask(segments, device):
    """0 where an answer's token (a row) sees a token of its group (a column), else -inf.

    Answers next to each other are few beside a prompt, so the scores that it throws away are: 1 % of the attention
    for three answers of 64 tokens to 2,048, 4 % for three of 512 to 8,192.
    """
    (start, end, _, _), *answers = segments
    P = end - start
    own = torch.block_diag(*(torch.ones(end - start, end - start).tril() for start, end, _, _ in answers))
    seen = torch.cat([torch.ones(len(own), P), own], dim=1) if answers else torch.ones(0, P)
    return torch.zeros_like(seen).masked_fill(seen == 0, -math.inf).to(device)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)

    def forward(self, x, cos, sin, attend):
        T, D = x.shape[0], self.head_dim
        q, k, v = (proj(x).view(T, -1, D) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).reshape(T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.down_proj = nn.Linear(I, C, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(again(swiglu, self.gate_proj(x), self.up_proj(x)))


def swiglu(gate, up):
    return F.silu(gate) * up


def again(function, x, *more):
    """function(x, *more), computed once more in backward: what is elementwise is dearer to keep than to repeat."""
    return checkpoint(function, x, *more, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.checkpointing = False  # keep only the block's input, compute the rest again in backward
        self.offload = False        # and keep it in host memory

    def forward(self, x, cos, sin, attend):
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.compute(x, cos, sin, attend)
        compute = partial(self.compute, cos=cos, sin=sin, attend=attend)  # bound: what all blocks share stays put
        with save_on_cpu(pin_memory=x.is_cuda) if self.offload else nullcontext():  # takes what checkpoint keeps: x
            return again(compute, x)

    def compute(self, x, cos, sin, attend):
        x = x + self.self_attn(again(self.input_layernorm, x), cos, sin, attend)
        return x + self.mlp(again(self.post_attention_layernorm, x))


# ------------------------------------------------------------------------------------------------------ LoRA

class LoRALinear(nn.Linear):
    """y = W x + alpha / r * B A x (arXiv 2106.09685). W keeps its name and is frozen; A is (r, in), B (out, r).

    The names lora_A.weight and lora_B.weight are those of PEFT's files.
    """

    def __init__(self, linear, r, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / r
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=linear.weight.device)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=linear.weight.device)

    def forward(self, x):
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


# ----------------------------------------------------------------------------------------------------- Llama

class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def train_only(self, lora_r, lora_alpha, lora_targets, train_also):
        """Put LoRA on projections, and freeze all else but what train_also names. lora_r 0: everything trains.

        lora_targets: names of projections, train_also: parts of parameter names; both texts with commas.
        """
        targets, parts = ([word.strip() for word in text.split(",") if word.strip()]
                          for text in (lora_targets, train_also))
        if not lora_r:
            if parts:
                raise BadInput(f"train_also={train_also!r} needs lora_r: at lora_r=0 every parameter trains")
            return
        known = {name.split(".")[-1]: name for name, module in self.model.layers[0].named_modules()
                 if isinstance(module, nn.Linear)}
        if not targets or not known.keys() >= set(targets):
            raise BadInput(f"lora_targets={lora_targets!r}: expected some of {','.join(known)}")
        for block in self.model.layers:
            for target in targets:
                parent = block.get_submodule(known[target].rpartition(".")[0])
                setattr(parent, target, LoRALinear(getattr(parent, target), lora_r, lora_alpha))
        for name, p in self.named_parameters():
            p.requires_grad = "lora_" in name or any(part in name for part in parts)
            if p.requires_grad and "lora_" not in name and name.split(".")[-2] in targets:
                raise BadInput(f"train_also={train_also!r} names {name}, which has LoRA")
        for part in parts:
            if not any(part in name for name, _ in self.named_parameters()):
                raise BadInput(f"train_also: {part!r} is in no parameter's name")

    def set_checkpointing(self, on, offload=False):
        """Recompute each block in backward from its input (T, C); offload keeps those inputs in host memory."""
        for block in self.model.layers:
            block.checkpointing, block.offload = on, offload

    def trunk(self, tokens, positions, span, attend):
        """Last hidden state (T, C) of a stream. attend: one callable for all layers, or a list with one a layer."""
        x = self.model.embed_tokens(tokens)
        cos, sin = rotary_tables(self.config, positions, span, x.dtype)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, attend[i] if isinstance(attend, list) else attend)
        return self.model.norm(x)

    def forward(self, tokens, positions, targets, segments):
        """Sum of the log-probs, and length, of every answer of a packed batch: (A,) float32 and (A,) int64.

        tokens, positions, targets: (T,) int64; targets hold the token to predict, or IGNORE.
        segments: see SegmentAttention. A segment with a prefix is one answer; the answers keep their order.
        """
        answers = [segment for segment in segments if segment.prefix_end]
        x = self.trunk(tokens, positions, group_spans(positions, segments), SegmentAttention(segments, tokens.device))
        answer_of = torch.full_like(tokens, -1)
        for i, (start, end, _, _) in enumerate(answers):
            answer_of[start:end] = i
        rows = (targets != IGNORE).nonzero()[:, 0]  # logits exist for these rows only
        logps = torch.cat([again(self.token_logps, x[r], targets[r]) for r in rows.split(HEAD_CHUNK)])
        zeros = torch.zeros(len(answers), dtype=logps.dtype, device=logps.device)
        owner = answer_of[rows]
        return zeros.index_add(0, owner, logps), torch.bincount(owner, minlength=len(answers))

    def token_logps(self, x, targets):
        """log pi(target) of each row, in fp32 or better; checkpointed, so that backward does not keep the logits."""
        logits = F.linear(x, self.lm_head.weight)
        return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")

    def logits(self, tokens, positions=None):
        """Logits (N, T, V) of N full rows (N, T); positions (T,) or (N, T), 0..T-1 where None."""
        N, T = tokens.shape
        positions = torch.arange(T, device=tokens.device) if positions is None else positions
        positions = positions.expand(N, T).reshape(-1)
        segments = [Segment(i * T, i * T + T) for i in range(N)]
        x = self.trunk(tokens.reshape(-1), positions, group_spans(positions, segments),
                       SegmentAttention(segments, tokens.device))
        return self.lm_head(x).view(N, T, -1)


def group_spans(positions, segments):
    """(T, 1): largest position + 1 of each token's own group, so that groups do not see each other's lengths."""
    starts = [segment.start for segment in segments if not segment.prefix_end] + [len(positions)]
    return torch.cat([(positions[a:b].max() + 1).expand(b - a, 1) for a, b in zip(starts, starts[1:])])


# ----------------------------------------------------------------------------------------------- what a step costs

def count_parameters(model):
    """(trained, frozen) numbers; a tied head counts once."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def step_flops(model, segments, scored):
    """FLOPs of forward and backward of one packed batch; scored: tokens whose logits are made.

    A matrix costs 2 a weight and token forward, 2 for its input's gradient, and 2 for its own if it trains.
    """
    config, T = model.config, segments[-1][1]
    matrices = [p for p in model.model.layers.parameters() if p.ndim > 1]
    head = model.lm_head.weight
    work = sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices) * T
    work += head.numel() * (6 if head.requires_grad else 4) * scored
    seen = sum((end - start) * (p_end - p_start) + (end - start) * (end - start + 1) // 2
               for start, end, p_start, p_end in segments)  # (query, key) pairs below the causal edge
    width = config.num_attention_heads * config.head_dim
    return work + 12 * width * seen * config.num_hidden_layers  # scores and values: 4 forward, 8 backward
