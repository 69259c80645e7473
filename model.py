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
import json
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional: PyTorch carries a flash kernel too
    flash_attn_varlen_func = None

IGNORE = -100      # target of a token that nobody scores
HEAD_CHUNK = 256   # answer tokens whose logits exist at the same time


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line that says where, what, and what was expected."""


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

    @classmethod
    def from_json(cls, path):
        """Read config.json in either dialect. BadInput names what cannot be run."""
        raw = read_json(path)
        kind = raw.get("model_type")
        if kind not in ("llama", "mistral"):
            raise BadInput(f"{path}: model_type is {kind!r}, expected 'llama' or 'mistral'")
        for key, allowed in (("sliding_window", (None,)), ("quantization_config", (None,)),
                             ("hidden_act", (None, "silu")), ("partial_rotary_factor", (None, 1.0))):
            if raw.get(key) not in allowed:
                raise BadInput(f"{path}: {key} is {raw[key]!r}, which this model does not implement")
        missing = [key for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads") if not isinstance(raw.get(key), int)]
        if missing:
            raise BadInput(f"{path}: no whole number under {', '.join(missing)}")
        heads = raw["num_attention_heads"]
        known = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None and key != "raw"}
        return cls(**{"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads,
                      "max_position_embeddings": 2048, **known, "rope": read_rope(raw, path), "raw": raw})

    def extend(self, window, rope_theta=0.0):
        """Announce a longer window to whoever opens the export, and change the RoPE base where one is given."""
        self.rope["rope_theta"] = rope_theta or self.rope["rope_theta"]
        if self.rope["rope_type"] == "yarn":
            self.rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        if self.rope["rope_type"] != "dynamic":  # dynamic NTK computes its frequencies from the original window
            self.max_position_embeddings = max(window, self.max_position_embeddings)

    def to_json(self):
        """The dict to write as config.json: the file that was read, with what may have changed since."""
        names = [key for key in self.__dataclass_fields__ if key not in ("rope", "raw")]
        raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", **self.raw,
               **{key: getattr(self, key) for key in names}}
        raw.pop("torch_dtype", None)  # the older name of dtype: two that disagree would mislead a reader
        if "rope_parameters" in raw:  # the dialect of transformers 5
            return {**raw, "rope_parameters": self.rope}
        scaling = {key: value for key, value in self.rope.items() if key != "rope_theta"}
        return {**raw, "rope_theta": self.rope["rope_theta"],
                "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def read_rope(raw, path):
    """One dict {"rope_type", "rope_theta", ...} from `rope_parameters`, or from `rope_theta` + `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"  # "type" is the oldest spelling
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    needed = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needed:
        raise BadInput(f"{path}: rope_type is {rope['rope_type']!r}, expected one of {', '.join(needed)}")
    for key in needed[rope["rope_type"]]:
        if not isinstance(rope.get(key), (int, float)):
            raise BadInput(f"{path}: rope_type {rope['rope_type']!r} needs a number {key!r}, found {rope.get(key)!r}")
    return rope


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, TypeError) as e:  # no JSON, no UTF-8, or no object
        raise BadInput(f"{path}: expected a JSON object, found {e}") from e


def write_json(value, path):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


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
        opens = [i for i, (_, _, p_start, p_end) in enumerate(self.segments) if p_start == p_end] + [len(self.segments)]
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
        answers = [s for s in segments if s[3] > s[2]]
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
        segments = [(i * T, i * T + T, 0, 0) for i in range(N)]
        x = self.trunk(tokens.reshape(-1), positions, group_spans(positions, segments),
                       SegmentAttention(segments, tokens.device))
        return self.lm_head(x).view(N, T, -1)

    # ------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=(), generator=None, shared=None, look=None):
        """Continue each prompt; lists of ids in, lists of new ids out, with the stop token where one came.

        An answer without a stop token at its end was cut by max_new_tokens. temperature 0 is greedy;
        generator: a torch.Generator on the model's device, for sampling. shared: for each prompt, how many of its first
        tokens others may begin with as well: what is equal is computed once, as a training group's prompt is.
        look(row, token, tops): told of each new token with (layers, heads), where in its row each head's arg-max was.
        """
        if not all(len(p) for p in prompts):
            raise BadInput(f"prompt {[len(p) for p in prompts].index(0)} of {len(prompts)} is empty")
        device = self.lm_head.weight.device
        tokens, positions, segments, owners = self.lay_out(prompts, shared or [0] * len(prompts))
        cache = KVCache(self.config, segments, owners, max_new_tokens, watched=look is not None)
        tokens, positions = (torch.tensor(x, device=device) for x in (tokens, positions))
        x = self.trunk(tokens, positions, group_spans(positions, segments), cache.prefill(device))
        x = x[torch.tensor([segments[i][1] - 1 for i in owners], device=device)]  # the last token of each prompt
        out, alive = [[] for _ in prompts], list(range(len(prompts)))
        for step in range(max_new_tokens):
            tokens = sample(self.lm_head(x).float(), temperature, top_p, generator, alive, len(prompts))
            for row, (i, token) in enumerate(zip(alive, tokens.tolist())):
                out[i].append(token)
                if look:
                    look(i, token, torch.stack([tops[row] for tops in cache.tops]).cpu())
            going = [row for row, i in enumerate(alive) if out[i][-1] not in stop_ids]
            if not going or step == max_new_tokens - 1:
                break
            if len(going) < len(alive):  # what has ended leaves the batch
                alive, tokens = [alive[row] for row in going], tokens[going]
                cache.keep(going)
            positions = cache.lengths.to(device) + step
            x = self.trunk(tokens, positions, positions[:, None] + 1, cache.decode(device, step))
        return out

    @staticmethod
    def lay_out(prompts, shared):
        """(tokens, positions, segments, each prompt's segment): equal beginnings once, and what follows as answers to them."""
        tokens, positions, segments, place = [], [], [], {}
        cut = [min(n, len(p) - 1) for p, n in zip(prompts, shared)]
        ends = {}  # beginning -> the different ends that follow it
        for p, n in zip(prompts, cut):
            ends.setdefault(tuple(p[:n]), {}).setdefault(tuple(p[n:]))
        for start, those in ends.items():
            pieces = [start, *those] if len(those) > 1 and start else [start + end for end in those]
            opens, ahead = len(tokens), 0
            for piece, end in zip(pieces, [None, *those] if len(pieces) > len(those) else those):
                begin = len(tokens)
                segments.append((begin, begin + len(piece), *((opens, opens + ahead) if ahead else (begin, begin))))
                place[start, end] = len(segments) - 1
                positions += range(ahead, ahead + len(piece))
                tokens += piece
                ahead = len(start) if len(pieces) > len(those) else 0
        return tokens, positions, segments, [place[tuple(p[:n]), tuple(p[n:])] for p, n in zip(prompts, cut)]


def group_spans(positions, segments):
    """(T, 1): largest position + 1 of each token's own group, so that groups do not see each other's lengths."""
    starts = [start for start, _, p_start, p_end in segments if p_end == p_start] + [len(positions)]
    return torch.cat([(positions[a:b].max() + 1).expand(b - a, 1) for a, b in zip(starts, starts[1:])])


def sample(logits, temperature, top_p, generator, alive, N):
    """Next token of each row of logits (len(alive), V): the best at temperature 0, else from the nucleus of mass top_p.

    alive: which of the N rows that there once were these are. Noise is drawn for all N: what a row gets does not
    depend on which others have ended. The largest of probs / Exp(1) noise is a draw from probs.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # always keeps the first
    noise = probs.new_empty(N, probs.shape[1]).exponential_(generator=generator)[alive]
    return order.gather(1, (probs / noise).argmax(-1, keepdim=True))[:, 0]


class KVCache:
    """Keys and values of N rows, each an answer and the prompt that it continues.

    The prompts are prefilled as one unpadded stream of segments; row i's is owners[i]. watched: keep in tops, for each
    layer, (N, heads): the key that each head's newest query scores highest.
    """

    def __init__(self, config, segments, owners, max_new_tokens, watched=False):
        self.segments, self.owners, self.watched = segments, owners, watched
        lengths = [end - start + p_end - p_start for start, end, p_start, p_end in segments]
        self.lengths = torch.tensor([lengths[i] for i in owners])
        self.size = int(self.lengths.max()) + max_new_tokens
        self.layers, self.tops = [None] * config.num_hidden_layers, [None] * config.num_hidden_layers

    def keep(self, rows):
        """Drop all rows but these."""
        self.lengths = self.lengths[rows]
        for i, cached in enumerate(self.layers):
            self.layers[i] = cached[:, rows]

    def prefill(self, device):
        attention = SegmentAttention(self.segments, device)

        def attend(layer, q, k, v):
            self.layers[layer] = cached = k.new_zeros(2, len(self.owners), self.size, *k.shape[1:])  # (2, N, S, K, D)
            for row, owner in enumerate(self.owners):
                start, end, p_start, p_end = self.segments[owner]
                P, T = p_end - p_start, p_end - p_start + end - start
                cached[0, row, :P], cached[1, row, :P] = k[p_start:p_end], v[p_start:p_end]
                cached[0, row, P:T], cached[1, row, P:T] = k[start:end], v[start:end]
            if self.watched:
                last = torch.tensor([self.segments[i][1] - 1 for i in self.owners], device=device)
                seen = torch.arange(self.size, device=device) < self.lengths.to(device)[:, None]
                self.tops[layer] = top_keys(q[last], cached[0].transpose(1, 2), seen[:, None, None])
            return attention(q, k, v)

        return [partial(attend, i) for i in range(len(self.layers))]

    def decode(self, device, step):
        rows, slot = torch.arange(len(self.lengths), device=device), self.lengths.to(device) + step
        filled = int(self.lengths.max()) + step + 1
        seen = (torch.arange(filled, device=device) <= slot[:, None])[:, None, None]  # (N, 1, 1, S)

        def attend(layer, q, k, v):
            cached = self.layers[layer]
            cached[0, rows, slot], cached[1, rows, slot] = k, v
            keys, values = cached[:, :, :filled].transpose(2, 3)                      # (N, K, S, D)
            if self.watched:
                self.tops[layer] = top_keys(q, keys, seen)
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen, enable_gqa=True)[:, :, 0]

        return [partial(attend, i) for i in range(len(self.layers))]


def top_keys(q, keys, seen):
    """(N, H): which of the seen keys (N, K, S, D) each head's query (N, H, D) scores highest."""
    N, H, D = q.shape
    scores = q.view(N, keys.shape[1], -1, D) @ keys.transpose(2, 3)  # (N, K, H / K, S)
    return scores.masked_fill(~seen, -math.inf).argmax(-1).view(N, H)
