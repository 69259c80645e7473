"""A Llama in plain PyTorch that scores many answers to one prompt at the cost of one prompt.

Read top to bottom: segments, the config, rotary positions, attention over segments, the block,
LoRA, the model and its answers' log-probs; what a step costs comes last. Parameters carry Hugging
Face names and Hugging Face's half-split rotary layout, so weights move in and out untouched.
Mistral, Qwen2 and Qwen3 are Llamas too, but for the attention's biases and norms.

The model has no batch dimension. A batch is one stream of T tokens, cut into segments:

    stream     [ prompt - last token | answer 0 | answer 1 | ... ][ next group ... ]
    segment    its tokens see its prefix (the prompt, for an answer) and, causally, themselves.
               Never another answer, never another group.

The prompt stands in the stream once, since all answers see the same one: M times its work, its
activations and its keys are saved. Who sees whom is decided by *order* in the stream, how far apart
two tokens seem by their *positions*. These are two things: so positions may have gaps, and a
kernel's own causal flag is still right, without a T x T mask. (One mask remains: where there is no
varlen kernel, as on a CPU, the answers' rows of a group take one. See `answer_mask`.)

Shape letters: T tokens of the stream, P of a prompt, N rows or groups, A answers, H query heads,
K key/value heads, D head dim, C hidden size, V vocabulary. A suffix spells a shape: q_THD.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
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
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_THD, k_TKD, v_TKD -> out_THD


class Segment(NamedTuple):
    """Tokens start:end of the stream. They see prefix_start:prefix_end, and themselves causally."""
    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0  # 0: no prefix; the segment opens a group

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def prefix_length(self) -> int:
        return self.prefix_end - self.prefix_start

    def moved(self, offset: int) -> "Segment":
        """The same segment, `offset` tokens further down the stream."""
        start, end = self.start + offset, self.end + offset
        if not self.prefix_end:
            return Segment(start, end)
        return Segment(start, end, self.prefix_start + offset, self.prefix_end + offset)


def segments_by_group(segments: list[Segment]) -> list[list[Segment]]:
    """The segments of each group: one without a prefix, then the answers to it."""
    groups = []
    for segment in segments:
        if not segment.prefix_end:
            groups.append([])
        groups[-1].append(segment)
    return groups


# ------------------------------------------------------------------------------------------ config

@dataclass
class LlamaConfig:
    """What this model reads of config.json, under the Hugging Face names; `raw` keeps the file."""
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
    qkv_bias: bool = False  # Qwen2: biases on q, k, v whatever attention_bias says, none on o
    qk_norm: bool = False   # Qwen3: an RMSNorm on each head of q and of k
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    raw: dict = field(default_factory=dict)

    def extend(self, window: int, rope_theta: float = 0.0, yarn_factor: float = 0.0) -> None:
        """Announce a longer window in the export; change RoPE's base or scaling where one is given.

        yarn_factor: the longer window in windows of the pre-training (arXiv 2309.00071).
        """
        if rope_theta:
            self.rope["rope_theta"] = rope_theta
        if yarn_factor:
            # Other scalings (linear, llama3) are not YaRN's to build upon: their keys go.
            kept = ("rope_theta", "original_max_position_embeddings")
            self.rope = {key: self.rope[key] for key in kept if key in self.rope}
            self.rope.update(rope_type="yarn", factor=yarn_factor)
        if self.rope["rope_type"] == "yarn":
            # YaRN's ramp is drawn for the window of the pre-training, which is forgotten below.
            before = self.max_position_embeddings
            self.rope.setdefault("original_max_position_embeddings", before)
        if yarn_factor:
            # What YaRN reaches, not what another scaling had reached. transformers 4.51 takes the
            # factor from these two windows, whatever "factor" says.
            original = self.rope["original_max_position_embeddings"]
            self.max_position_embeddings = round(yarn_factor * original)
        self.max_position_embeddings = max(window, self.max_position_embeddings)


# ------------------------------------------------------------------------------------------ rotary

def rope_frequencies(config: LlamaConfig, device: torch.device | str = "cpu"
                     ) -> tuple[Tensor, float]:
    """Rotary frequencies (D/2,) in fp32, and the factor on cos and sin.

    linear: position interpolation (arXiv 2306.15595). yarn: arXiv 2309.00071. llama3: Llama 3.1's.
    """
    rope = config.rope
    kind = rope["rope_type"]
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    # Everything is divided in transformers' order. Another one rounds to a neighbour now and then,
    # and one unit in the last place is 0.004 radians at position 60,000.
    periods = rope["rope_theta"] ** (steps / config.head_dim)  # positions for a radian
    frequencies = 1.0 / periods
    if kind == "linear":
        return frequencies / rope["factor"], 1.0
    if kind == "llama3":
        return llama3_frequencies(rope, frequencies), 1.0
    if kind == "yarn":
        return yarn_frequencies(config, periods), yarn_temperature(rope)
    return frequencies, 1.0


def llama3_frequencies(rope: dict, frequencies: Tensor) -> Tensor:
    """Long wavelengths are interpolated, short ones kept, those between are blended."""
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    turns = rope["original_max_position_embeddings"] / wavelengths
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    interpolated = (1 - keep) * frequencies / rope["factor"]
    return interpolated + keep * frequencies


def yarn_frequencies(config: LlamaConfig, periods: Tensor) -> Tensor:
    """A ramp over the dimensions: fast pairs are kept, slow ones interpolated (Sec. 3.2)."""
    rope = config.rope
    dim = config.head_dim
    window = rope.get("original_max_position_embeddings") or config.max_position_embeddings

    def dim_of(turns):
        """The dimension that turns so many times inside the original window."""
        wavelength = window / (turns * 2 * math.pi)
        log_theta = math.log(rope["rope_theta"])
        return dim * math.log(wavelength) / (2 * log_theta)

    low = dim_of(rope.get("beta_fast") or 32)
    high = dim_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    # Dimensions below low turn fast enough to tell neighbours apart at any length; those above high
    # have not turned once within the window, so that a longer one would show angles never seen.
    low = max(low, 0)
    high = min(high, dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device=periods.device)
    width = max(high - low, 0.001)
    keep = 1 - ((steps - low) / width).clamp(0, 1)
    interpolated = 1.0 / (rope["factor"] * periods)
    return interpolated * (1 - keep) + 1.0 / periods * keep


def yarn_temperature(rope: dict) -> float:
    """The factor on cos and sin; its square divides the temperature of attention (Sec. 3.3)."""
    def temperature(scale):
        if rope["factor"] <= 1:
            return 1.0
        return 0.1 * scale * math.log(rope["factor"]) + 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


def rotary_tables(config: LlamaConfig, positions: Tensor, dtype: torch.dtype
                  ) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, D) of these positions. No table of all positions: they are arbitrary."""
    frequencies, scale = rope_frequencies(config, positions.device)
    # Angles in fp32, by an elementwise product. bf16 keeps 8 bits: at position 60,000 an angle
    # would be off by up to 128 radians. A matrix product would become just that under autocast,
    # which rounds its inputs but leaves elementwise products alone. Rounding cos, sin does no harm.
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # the two halves turn together
    cos = (angles.cos() * scale).to(dtype)
    sin = (angles.sin() * scale).to(dtype)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (T, heads, D) by its positions; Hugging Face pairs dimension i with i + D/2."""
    a, b = x.chunk(2, dim=-1)
    turned_by_90_degrees = torch.cat([-b, a], dim=-1)
    return x * cos + turned_by_90_degrees * sin


# --------------------------------------------------------------------------------------- attention

# A stream is sequences of many lengths, and the answers' keys lie in two pieces: their prompt's and
# their own. Flash kernels for sequences of varying lengths do all of it in one call; where there is
# none, PyTorch's scaled_dot_product_attention takes two calls a group.

def varlen_kernel(device: torch.device | str, dtype: torch.dtype) -> Callable | None:
    """The flash kernel for many sequences in one call, or None: flash-attn's, else PyTorch's own.

    Both align a causal mask at the bottom right: of 2 queries and 5 keys, the first query sees 4.
    So an answer's queries over its prompt's keys and its own need no mask. Flash kernels want
    16-bit floats, an Ampere GPU or newer, and a head dim that is a multiple of 8, at most 256.
    """
    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if flash_attn_varlen_func is not None:
        return partial(flash_attn_varlen_func, causal=True)
    return partial(varlen_attn, window_size=(-1, 0), enable_gqa=True)


class SegmentAttention:
    """Attention over the segments of a stream: q_THD, k_TKD, v_TKD -> out_THD.

    segments: they cover the stream in order; one without a prefix opens a group, the others of the
    group follow it. One object serves all layers: what the kernels want to know is laid out once.
    """

    def __init__(self, segments: list[Segment], device: torch.device | str):
        self.segments = segments
        self.device = device

    # Segments differ from batch to batch: traced by torch.compile, each would compile anew.
    @torch.compiler.disable
    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        kernel = varlen_kernel(q_THD.device, q_THD.dtype)
        if kernel is None:
            return self.group_by_group(q_THD, k_TKD, v_TKD)
        key_index, lengths = self.packed
        # The kernel wants the keys of each segment in a row: a prompt's once more for each answer.
        # Only keys and values are repeated, one layer at a time, not the prompt's computation.
        return kernel(q_THD, k_TKD[key_index], v_TKD[key_index], *lengths)

    @cached_property
    def packed(self) -> tuple[Tensor, tuple[Tensor, Tensor, int, int]]:
        """For the varlen kernel: where in the stream each segment's keys are, and the lengths."""
        key_index = []
        n_queries = []
        n_keys = []
        for segment in self.segments:
            key_index.append(torch.arange(segment.prefix_start, segment.prefix_end))
            key_index.append(torch.arange(segment.start, segment.end))
            n_queries.append(segment.length)
            n_keys.append(segment.prefix_length + segment.length)
        offsets = self.offsets(n_queries), self.offsets(n_keys)
        longest = max(n_queries), max(n_keys)
        return torch.cat(key_index).to(self.device), (*offsets, *longest)

    def offsets(self, lengths: list[int]) -> Tensor:
        """[0, a, a + b, ...] in int32, as the kernels want the borders between sequences."""
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return offsets.to(self.device)

    def group_by_group(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Without a varlen kernel: one call for a group's prompt, one for all its answers."""
        out = []
        start = 0
        for P, mask in self.groups:
            end = start + P + len(mask)
            q = as_heads(q_THD[start:end])
            k = as_heads(k_TKD[start:end])
            v = as_heads(v_TKD[start:end])
            q_prompt, q_answers = q[:, :, :P], q[:, :, P:]
            k_prompt, v_prompt = k[:, :, :P], v[:, :, :P]
            out.append(sdpa(q_prompt, k_prompt, v_prompt, is_causal=True))
            if len(mask):
                # All answers at once over the keys as they lie: no copy of the prompt's for each.
                mask = mask.to(q.dtype)
                out.append(sdpa(q_answers, k, v, attn_mask=mask))
            start = end
        return torch.cat(out)

    @cached_property
    def groups(self) -> list[tuple[int, Tensor]]:
        """For SDPA: (tokens of the prompt, mask of the answers' rows) of each group."""
        found = []
        for prompt, *answers in segments_by_group(self.segments):
            mask = answer_mask(prompt.length, [answer.length for answer in answers])
            found.append((prompt.length, mask.to(self.device)))
        return found


def answer_mask(P: int, lengths: list[int]) -> Tensor:
    """(answer tokens, P + answer tokens): 0 where a row's token sees a column's, else -inf.

    The only mask there is, and no T x T one: its rows are the answers' tokens. Answers are short
    beside a prompt, so the scores that it throws away are few: 1 % of the attention for three
    answers of 64 tokens to 2,048, 4 % for three of 512 to 8,192.
    """
    rows = sum(lengths)
    mask = torch.full((rows, P + rows), -math.inf)
    mask[:, :P] = 0
    start = 0
    for n in lengths:
        end = start + n
        itself = mask[start:end, P + start:P + end]
        itself.triu_(1)  # -inf stays above the diagonal, the rest becomes 0
        start = end
    return mask


def as_heads(x: Tensor) -> Tensor:
    """(T, heads, D) as SDPA wants it: (1, heads, T, D). A view."""
    return x.transpose(0, 1)[None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    """Attention of one sequence (1, heads, T, D), back as (T, H, D)."""
    if q.is_cuda:
        # GPUs come here in fp32, or if older than Ampere. Their one kernel for that which needs no
        # T x T scores knows no grouped heads; asked for them, the one that makes all scores runs.
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=not q.is_cuda, **mask)
    return out[0].transpose(0, 1)


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """(1, K, T, D) -> (1, H, T, D): a key head once for each of the query heads that read it."""
    return x.repeat_interleave(H // x.shape[1], dim=1)


# ------------------------------------------------------------------------------------------- block

def checkpointed(function: Callable, *inputs: Tensor) -> Tensor:
    """function(*inputs), of which only the inputs are kept: backward computes it once more.

    preserve_rng_state=False: nothing in here draws random numbers.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        qkv_bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(C, H * D, bias=qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        T = x.shape[0]
        q_THD = self.q_proj(x).view(T, -1, self.head_dim)
        k_TKD = self.k_proj(x).view(T, -1, self.head_dim)
        v_TKD = self.v_proj(x).view(T, -1, self.head_dim)
        if self.qk_norm:
            # Before the rotation, which changes no length: so scores stay bounded, however large
            # the projections grow. Not kept but repeated, like the norms of the block.
            q_THD = checkpointed(self.q_norm, q_THD)
            k_TKD = checkpointed(self.k_norm, k_TKD)
        q_THD = rotate(q_THD, cos, sin)
        k_TKD = rotate(k_TKD, cos, sin)
        out_THD = attend(q_THD, k_TKD, v_TKD)
        return self.o_proj(out_THD.reshape(T, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, C, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        # gate and up are a block's largest tensors. With them kept, SiLU's output and the product
        # need not be: elementwise work is dearer to keep than to repeat, at next to no FLOPs.
        product = checkpointed(swiglu, self.gate_proj(x), self.up_proj(x))
        return self.down_proj(product)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(C, eps=eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(C, eps=eps)
        self.mlp = MLP(config)
        self.checkpointing = False  # keep only the block's input, repeat the rest in backward
        self.offload = False        # and keep that input in host memory

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if not self.checkpointing or not torch.is_grad_enabled():
            return self.compute(x, cos, sin, attend)
        # Checkpointing keeps its arguments, and offloading moves what is kept. cos and sin are the
        # same for all blocks: bound to the function, they are kept once, and stay on the device.
        compute = partial(self.compute, cos=cos, sin=sin, attend=attend)
        if not self.offload:
            return checkpointed(compute, x)
        with save_on_cpu(pin_memory=x.is_cuda):
            return checkpointed(compute, x)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        # The norms are repeated even where the block is not: elementwise, see MLP. The two nest:
        # while backward repeats a checkpointed block, the norms' outputs are not kept either.
        normed = checkpointed(self.input_layernorm, x)
        x = x + self.self_attn(normed, cos, sin, attend)
        normed = checkpointed(self.post_attention_layernorm, x)
        return x + self.mlp(normed)


# -------------------------------------------------------------------------------------------- LoRA

class LoRALinear(nn.Linear):
    """y = W x + alpha / r * B A x (arXiv 2106.09685): W frozen, A (r, in), B (out, r).

    W keeps its name; lora_A.weight and lora_B.weight are the names of PEFT's files.
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float):
        bias = linear.bias is not None
        # On the meta device: the weight is taken over, so none is to be made and filled first.
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / r
        device = linear.weight.device
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        base = super().forward(x)
        # Never B A as one matrix: it would be as large as W, and so would its gradient.
        update = self.lora_B(self.lora_A(x))
        return base + self.scale * update


def words_of(text: str) -> list[str]:
    """The words of a text with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


# ------------------------------------------------------------------------------------------- Llama

class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        C, V = config.hidden_size, config.vocab_size
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(V, C),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(C, eps=config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def train_only(self, lora_r: int, lora_alpha: float, lora_targets: str, train_also: str
                   ) -> None:
        """LoRA on projections; all else is frozen but what train_also names. lora_r 0: all trains.

        lora_targets: projections, with commas between. train_also: parts of parameters' names.
        BadInput for a name that fits nothing, or that would train a weight which has LoRA.
        """
        targets = words_of(lora_targets)
        parts = words_of(train_also)
        if not lora_r:
            if parts:
                raise BadInput(f"train_also={train_also!r} needs lora_r: at lora_r=0 every "
                               "parameter trains, so set train_also= too")
            return
        if not targets or not set(targets) <= set(PROJECTIONS):
            expected = ",".join(PROJECTIONS)
            raise BadInput(f"lora_targets={lora_targets!r}: expected some of {expected}")
        for block in self.model.layers:
            for target in targets:
                parent = block.self_attn if hasattr(block.self_attn, target) else block.mlp
                setattr(parent, target, LoRALinear(getattr(parent, target), lora_r, lora_alpha))

        # After the loop above, since it makes parameters: whatever LoRA adds trains.
        for name, p in self.named_parameters():
            of_lora = "lora_" in name
            asked_for = any(part in name for part in parts)
            if asked_for and not of_lora and name.split(".")[-2] in targets:
                raise BadInput(f"train_also={train_also!r} names {name}, which has LoRA")
            p.requires_grad = of_lora or asked_for
        for part in parts:
            if not any(part in name for name, _ in self.named_parameters()):
                raise BadInput(f"train_also: {part!r} is in no parameter's name")

    def set_checkpointing(self, on: bool, offload: bool = False) -> None:
        """Repeat each block in backward from its input (T, C); offload keeps inputs on the host."""
        for block in self.model.layers:
            block.checkpointing = on
            block.offload = offload

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend | list[Attend]
                      ) -> Tensor:
        """Last hidden states (T, C), normed. attend: one for all layers, or a list, one a layer."""
        layers = self.model.layers
        # Training attends alike in all layers. Generation does not: each layer has its own cache.
        attends = attend
        if not isinstance(attend, list):
            attends = [attend] * len(layers)
        x = self.model.embed_tokens(tokens)
        cos, sin = rotary_tables(self.config, positions, x.dtype)
        for block, attend_here in zip(layers, attends):
            x = block(x, cos, sin, attend_here)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor, segments: list[Segment]
                ) -> tuple[Tensor, Tensor]:
        """Sum of the log-probs of each answer's tokens (A,) in fp32, and each answer's length (A,).

        tokens, positions, targets: (T,) int64; targets: the token to predict, or IGNORE. segments:
        see SegmentAttention. A segment with a prefix is one answer; answers keep their order. Sums
        and lengths, not means: whoever calls divides, so that it shows: each by its own length.
        """
        x = self.hidden_states(tokens, positions, SegmentAttention(segments, tokens.device))

        # Whose token is this? Lengths differ, so sums go by an index and not by a padded matrix.
        answers = [segment for segment in segments if segment.prefix_end]
        answer_of = torch.full_like(tokens, -1)
        for i, answer in enumerate(answers):
            answer_of[answer.start:answer.end] = i

        # Logits exist for scored rows only, and for a few of them at a time: 3 x 10,000 rows of
        # Llama-3-8B's 128,256 numbers would take 14 GiB in fp32. Checkpointing lets go of a chunk's
        # logits once its log-probs are there; without it backward would keep all chunks after all.
        scored = (targets != IGNORE).nonzero()[:, 0]
        logps = []
        for rows in scored.split(HEAD_CHUNK):
            of_rows = checkpointed(self.token_logps, x[rows], targets[rows])
            logps.append(of_rows)
        logps = torch.cat(logps)

        owner = answer_of[scored]
        A = len(answers)
        sums = torch.zeros(A, dtype=logps.dtype, device=logps.device).index_add(0, owner, logps)
        lengths = torch.bincount(owner, minlength=A)
        return sums, lengths

    def token_logps(self, x: Tensor, targets: Tensor) -> Tensor:
        """log pi(target) of rows: x (rows, C), targets (rows,) -> (rows,), fp32 or better."""
        logits = F.linear(x, self.lm_head.weight)
        # bf16 holds a log-prob of -6 to within 0.02, and what rewards are about are differences.
        at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
        return -F.cross_entropy(logits.to(at_least_fp32), targets, reduction="none")

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (N, T, V) of N full rows (N, T); positions (T,) or (N, T), 0..T-1 where None."""
        N, T = tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        # Each row is a group without answers: the same code as training, in the layout of everyone.
        rows = [Segment(start, start + T) for start in range(0, N * T, T)]
        attend = SegmentAttention(rows, tokens.device)
        tokens = tokens.reshape(-1)
        positions = positions.expand(N, T).reshape(-1)
        x = self.hidden_states(tokens, positions, attend)
        return self.lm_head(x).view(N, T, -1)


# -------------------------------------------------------------------------------- what a step costs

def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, frozen) numbers; a tied head counts once."""
    trained = 0
    frozen = 0
    for p in model.parameters():
        if p.requires_grad:
            trained += p.numel()
        else:
            frozen += p.numel()
    return trained, frozen


def step_flops(model: Llama, segments: list[Segment], scored: int) -> int:
    """FLOPs of forward and backward of one packed batch; scored: tokens whose logits are made."""
    config = model.config
    T = segments[-1].end

    # Norms, rotation and SiLU are left out, as is usual: their work does not grow with the width.
    work = 0
    for p in model.model.layers.parameters():
        if p.ndim > 1:
            work += matrix_flops(p) * T
    work += matrix_flops(model.lm_head.weight) * scored

    # (query, key) pairs below the causal edge. For each, and each dimension of each head: 2 for the
    # score and 2 for the value forward, twice that backward.
    pairs = 0
    for segment in segments:
        n = segment.length
        pairs += n * segment.prefix_length
        pairs += n * (n + 1) // 2
    width = config.num_attention_heads * config.head_dim
    return work + 12 * width * pairs * config.num_hidden_layers


def matrix_flops(p: Tensor) -> int:
    """FLOPs of a matrix for one token, forward and backward."""
    # A weight: 2 forward, 2 for the gradient of its input, and 2 for its own if it trains.
    return p.numel() * (6 if p.requires_grad else 4)
