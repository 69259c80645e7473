"""What goes to disk and comes back: model folders, PEFT adapters, checkpoints to resume from.

    model folder    config.json, model*.safetensors, tokenizer      load_pretrained, save_pretrained
    adapter         adapter_config.json, adapter_model.safetensors  load_adapter, save_adapter
    step_000100/    state.json, shard_I_of_N.safetensors            load_checkpoint, save_checkpoint

    python checkpoint.py merge FOLDER OUT [BASE]    an adapter or a step_ folder as a model folder

A parameter may be sharded (a DTensor of FSDP2): every process then reads and writes the rows that
it owns, straight from and to the files, so none ever holds the model. Folders are written under
another name, synced, then renamed: a kill leaves the old one or the new one, whole.

Why not torch.distributed.checkpoint for the training state? Its safetensors storage was tried
(PyTorch 2.13): it leaves no pickle behind and comes back equal to the bit in another number of
processes. But where a shard in the middle is lost, it leaves those rows as they were and says
nothing; a flipped bit passes as well; and each process copies its share once more in memory before
it writes. Digests, renaming and the agreement on errors would stay ours all the same.
"""
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os.path import exists, join
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs import BadInput, exit_on_bad_input, read_json, reading, write_json
from console import asked_for_help, print_help, say
from model import Llama, LlamaConfig, LoRALinear, rope_frequencies
from tokenizer import Tokenizer, load_tokenizer

Tensors = dict[str, Tensor]
Settings = dict[str, Any]  # what a JSON file holds

SHARD_BYTES = 4 << 30  # of one file of an exported model
MOST_LAYERS = 1024
DTYPES = ("auto", "float32", "bfloat16")  # of a command that reads a model
FLOATS = ("F64", "F32", "F16", "BF16")  # what safetensors calls the dtypes that a weight may have
PEFT = "base_model.model."  # what PEFT writes before each name
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, under torch's names
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                   "generation_config.json")


# ------------------------------------------------------------------------------- reading tensors

def open_safetensors(path: str) -> safe_open:
    """An open safetensors file, to be used in a with statement."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as e:  # ValueError: a name that is not UTF-8
        raise BadInput(f"{path}: not a readable safetensors file ({e})") from e


def tensor_names(path: str) -> set[str]:
    """The names of the tensors in a file."""
    with open_safetensors(path) as f:
        return set(f.keys())


def own_rows(p: Tensor) -> tuple[Tensor, int, int]:
    """(local tensor, its first row, one past its last): this process's part of a sharded parameter.

    Of a parameter that is not sharded, all of it.
    """
    if not isinstance(p, DTensor):
        return p.detach(), 0, len(p)
    local = p.detach().to_local()
    # FSDP2 cuts dimension 0 as torch.chunk does. Of a hybrid mesh, the last dimension shards.
    dim = p.device_mesh.ndim - 1
    each = math.ceil(len(p) / p.device_mesh.size(dim))
    first = min(p.device_mesh.get_local_rank(dim) * each, len(p))
    return local, first, first + len(local)


def read_rows(p: Tensor, key: str, paths: list[str]) -> None:
    """Fill this process's rows of a parameter.

    paths: files that hold consecutive rows of it, under one key.
    """
    local, first, last = own_rows(p)
    row = 0  # of the whole parameter, where the next file begins
    for path in paths:
        # Opened anew for each tensor: closing a file lets go of the pages that it had mapped.
        with open_safetensors(path) as f:
            rows = f.get_slice(key)
            count = rows.get_shape()[0]
            start = max(first, row)
            end = min(last, row + count)
            if start < end:
                local[start - first:end - first].copy_(rows[start - row:end - row])
            row += count


def check_parameters(wanted: Tensors, files: dict[str, str], where: str,
                     ignore: tuple[str, ...] = ()) -> None:
    """BadInput if {key: path} is not what {key: parameter} needs: names, shapes, kinds of number.

    ignore: parts of names that a file may have beyond what is wanted.
    """
    # A tensor too many is as bad as one too few: the norm or bias of another architecture, without
    # which this model would run and say something else.
    missing = sorted(wanted.keys() - files.keys())
    unexpected = []
    for name in sorted(files.keys() - wanted.keys()):
        if not any(part in name for part in ignore):
            unexpected.append(name)
    counts = f"({len(missing)} missing, {len(unexpected)} unexpected)"
    if missing:
        raise BadInput(f"{where}: {missing[0]} is missing {counts}")
    if unexpected:
        raise BadInput(f"{where}: {unexpected[0]} is not a tensor of this model {counts}")
    for path in sorted({files[key] for key in wanted}):
        with open_safetensors(path) as f:
            for key, p in wanted.items():
                if files[key] == path:
                    check_tensor(f.get_slice(key), key, list(p.shape), path)


def check_tensor(found, key: str, expected: list[int], path: str) -> None:
    """BadInput for another shape, or for whole numbers: quantised weights would pass as floats."""
    if found.get_shape() != expected:
        raise BadInput(f"{path}: {key} has shape {found.get_shape()}, "
                       f"expected {expected} (config.json)")
    if found.get_dtype() not in FLOATS:
        raise BadInput(f"{path}: {key} has dtype {found.get_dtype()}, "
                       f"expected one of {', '.join(FLOATS)}")


def read_parameters(wanted: Tensors, files: dict[str, str], where: str,
                    ignore: tuple[str, ...] = ()) -> None:
    """Fill {key: parameter} from {key: path}, all of it checked before anything is read."""
    check_parameters(wanted, files, where, ignore)
    for key, p in wanted.items():
        read_rows(p, key, [files[key]])


# ------------------------------------------------------------------------------- writing folders

def full_tensor(p: Tensor) -> Tensor:
    """The full tensor, on the CPU. Of a sharded one all processes have to ask."""
    p = p.detach()
    if isinstance(p, DTensor):
        # Offloaded parameters lie on the CPU, NCCL gathers on the GPU.
        p = p.to(p.device_mesh.device_type).full_tensor()
    return p.cpu()


def write_tensors(tensors: Tensors, path: str) -> None:
    """One safetensors file, on the disk when this returns."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    umask = os.umask(0)  # there is no way to ask for it without setting it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)  # safetensors makes it the owner's alone
    sync(path)


def sync(path: str) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def put_in_place(tmp: str, folder: str) -> None:
    """Give a finished folder its name. What had it before goes only then."""
    # Without this a rename may reach the disk before what it names: after a power cut the folder
    # would look finished, with empty files in it.
    for path in glob.glob(join(glob.escape(tmp), "*")):
        sync(path)
    sync(tmp)
    shutil.rmtree(folder + ".old", ignore_errors=True)
    if exists(folder):
        os.rename(folder, folder + ".old")
    os.rename(tmp, folder)
    sync(os.path.dirname(os.path.abspath(folder)))
    shutil.rmtree(folder + ".old", ignore_errors=True)


@contextmanager
def writing(folder: str) -> Iterator[str]:
    """with writing(folder) as tmp: fill tmp, which becomes folder. A failure leaves nothing."""
    folder = os.path.normpath(folder)  # "OUT/" + ".tmp" would be a file inside of it
    tmp = folder + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        os.makedirs(tmp)
        yield tmp
        put_in_place(tmp, folder)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{folder}: cannot be written ({e})") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# ------------------------------------------------------------------------------- checked values

class Kind(NamedTuple):
    """What a value of a JSON file may be. Python alone would take many for another: True for 1."""
    fits: Callable[[Any], bool]
    words: str


SIZE = Kind(lambda value: type(value) is int and 0 < value < 1 << 31, "a whole number above 0")
# JSON as Python reads it knows NaN, Infinity, and whole numbers that no float holds.
NUMBER = Kind(lambda value: type(value) in (int, float) and 0 < value < 1 << 53,
              "a finite number above 0")
FLAG = Kind(lambda value: type(value) is bool, "true or false")
TEXT = Kind(lambda value: isinstance(value, str) and value != "", "a text")
OBJECT = Kind(lambda value: isinstance(value, dict) and value != {}, "an object with keys in it")
NAMES = Kind(lambda value: (isinstance(value, list) and value != []
                            and all(isinstance(name, str) and name for name in value)),
             "a list of names")


def refuse(path: str, key: str, value: Any, expected: str) -> NoReturn:
    raise BadInput(f"{path}: {key} is {value!r}, expected {expected}")


def checked(raw: Settings, key: str, kind: Kind, path: str, default: Any = None) -> Any:
    """The value of a key, or the default for null and nothing. BadInput for another kind."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not kind.fits(value):
        refuse(path, key, value, kind.words)
    return value


# ------------------------------------------------------------------------------- config.json

# model_type: (its class in transformers, what it always has, whatever the file says).
FAMILY = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),  # Qwen2.5 and Qwen1.5 as well
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
# What each kind of scaling needs, and what YaRN may say besides.
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                "original_max_position_embeddings")


def read_config(path: str) -> LlamaConfig:
    """config.json, in the dialect of transformers 4 or 5, as a LlamaConfig.

    BadInput names the key of what is not implemented, or what is no size, number or flag.
    """
    raw = read_json(path)
    with reading(path):
        check_architecture(raw, path)
        flags = {key: checked(raw, key, FLAG, path, default=False) for key in FLAGS}
        _, always = FAMILY[raw["model_type"]]
        config = LlamaConfig(
            **read_sizes(raw, path),
            **flags,
            **always,
            rope=read_rope(raw, path),
            rms_norm_eps=checked(raw, "rms_norm_eps", NUMBER, path, default=1e-6),
            raw=raw,
        )
        # What the numbers come to, each of which may be in order.
        frequencies, scale = rope_frequencies(config)
        if not math.isfinite(scale) or not (frequencies.isfinite() & (frequencies > 0)).all():
            refuse(path, "rope", config.rope, "what makes finite frequencies above 0")
        return config


def check_architecture(raw: Settings, path: str) -> None:
    """BadInput for what would run here and mean something else."""
    kind = raw.get("model_type")
    if kind not in list(FAMILY):  # a list, since a file may say what cannot be hashed
        refuse(path, "model_type", kind, f"one of {', '.join(FAMILY)}")
    only = {"sliding_window": [None], "quantization_config": [None], "hidden_act": [None, "silu"],
            "partial_rotary_factor": [None, 1.0], "use_sliding_window": [None, False]}
    if kind.startswith("qwen"):
        # Their files name a window and say beside it that it is not used. Nor have they these
        # biases in transformers, which would go past a file that asks for them.
        del only["sliding_window"]
        only["mlp_bias"] = [None, False]
    if kind == "qwen2":
        only["attention_bias"] = [None, False]
    for key, allowed in only.items():
        if raw.get(key) not in allowed:
            raise BadInput(f"{path}: {key} is {raw[key]!r}, which this model does not implement")
    for layer in raw.get("layer_types") or []:
        if layer != "full_attention":
            refuse(path, "layer_types", raw["layer_types"], "'full_attention' alone")
    if kind == "qwen3" and raw.get("head_dim") is None:
        # Not hidden_size / num_attention_heads as everywhere else.
        raise BadInput(f"{path}: no head_dim, which means 128 for a qwen3: expected a number")
    if kind == "mistral" and "sliding_window" not in raw:
        # transformers then takes 4096.
        raise BadInput(f"{path}: no sliding_window, which means 4096 for a mistral: expected null")


def read_sizes(raw: Settings, path: str) -> dict[str, int]:
    """The whole numbers of a LlamaConfig, fitting each other. Defaults are transformers' own."""
    sizes = {}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads"):
        sizes[key] = checked(raw, key, SIZE, path)

    if sizes["num_hidden_layers"] > MOST_LAYERS:  # a slip of the hand that takes hours to build
        refuse(path, "num_hidden_layers", sizes["num_hidden_layers"], f"at most {MOST_LAYERS}")
    width = sizes["hidden_size"]
    heads = sizes["num_attention_heads"]
    if raw.get("head_dim") is None and width % heads:
        refuse(path, "num_attention_heads", heads, f"a divisor of hidden_size={width}")
    head_dim = checked(raw, "head_dim", SIZE, path, default=width // heads)
    if head_dim % 2:
        refuse(path, "head_dim", head_dim, "an even number: rotary positions turn pairs")
    # With fewer heads for keys, each of them serves the same number of queries' heads.
    kv_heads = checked(raw, "num_key_value_heads", SIZE, path, default=heads)
    if heads % kv_heads:
        refuse(path, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    window = checked(raw, "max_position_embeddings", SIZE, path, default=2048)
    return {**sizes, "head_dim": head_dim, "num_key_value_heads": kv_heads,
            "max_position_embeddings": window}


def read_rope(raw: Settings, path: str) -> Settings:
    """One dict {"rope_type", "rope_theta", ...} out of both dialects.

    transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling. Where a file has
    all of them, rope_scaling counts, as in transformers.
    """
    rope = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = raw.get(key)
        if found is not None and not isinstance(found, dict):
            refuse(path, key, found, "an object or null")
        rope = dict(found or rope)
    if rope.get("original_max_position_embeddings") is None:
        # null means the window of config.json, which is about to change.
        rope.pop("original_max_position_embeddings", None)
    kind = rope.get("rope_type")
    oldest = rope.pop("type", None)  # the spelling before rope_type
    if oldest is not None:
        kind = oldest
    rope["rope_type"] = "default" if kind is None else kind
    theta = checked(raw, "rope_theta", NUMBER, path, default=10000.0)
    rope["rope_theta"] = checked(rope, "rope_theta", NUMBER, path, default=theta)
    check_rope(rope, path)
    return rope


def check_rope(rope: Settings, path: str) -> None:
    """BadInput for a scaling that is not implemented, or whose numbers would turn nothing right."""
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        refuse(path, "rope_type", kind, f"one of {', '.join(ROPE_NUMBERS)}")
    for key, value in rope.items():
        # A dict: the frequencies of one kind of layer, in models that have several kinds.
        if isinstance(value, dict) or key == "partial_rotary_factor" and value not in (None, 1.0):
            raise BadInput(f"{path}: {key} is {value!r}, which this model does not implement")
    # A factor says that there is a scaling: which one, some file's older dialect may say elsewhere.
    if kind == "default" and rope.get("factor") not in (None, 1.0):
        refuse(path, "factor", rope["factor"], "a rope_type beside it that is not 'default'")
    # Frequencies are powers of 1 / theta: at 1 all dimensions turn alike, below it they speed up.
    if rope["rope_theta"] <= 1:
        refuse(path, "rope_theta", rope["rope_theta"], "a number above 1")
    for key in ROPE_NUMBERS[kind]:
        checked(rope, key, NUMBER, path)
    if kind == "yarn":
        for key in YARN_NUMBERS:
            checked(rope, key, NUMBER, path, default=1.0)
        checked(rope, "truncate", FLAG, path, default=True)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        refuse(path, "low_freq_factor", rope["low_freq_factor"],
               f"less than high_freq_factor={rope['high_freq_factor']}")


def model_type(config: LlamaConfig) -> str:
    """The first of FAMILY with the same biases and norms, for a model that came from no folder."""
    for kind, (_, always) in FAMILY.items():
        if all(getattr(config, key) == (key in always) for key in ("qkv_bias", "qk_norm")):
            return kind
    raise BadInput("no model_type has both qkv_bias and qk_norm")


def config_json(config: LlamaConfig) -> Settings:
    """The dict to write as config.json: the file that was read, with what has changed since."""
    kind = config.raw.get("model_type") or model_type(config)
    raw = {"model_type": kind, "architectures": [FAMILY[kind][0]], "hidden_act": "silu"}
    raw.update(config.raw)
    for key in config.__dataclass_fields__:
        # qkv_bias and qk_norm are said by model_type: nobody else has a key for them.
        if key not in ("rope", "raw", "qkv_bias", "qk_norm"):
            raw[key] = getattr(config, key)
    # The older name of dtype: two that disagree would mislead a reader.
    raw.pop("torch_dtype", None)
    five = raw.get("rope_parameters") is not None
    if five:
        raw["rope_parameters"] = dict(config.rope)
    # A reader takes the dialect that it knows. So whatever stands in the file says the same.
    if not five or raw.get("rope_scaling") is not None or "rope_theta" in raw:
        scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
        raw["rope_theta"] = config.rope["rope_theta"]
        raw["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return raw


# ------------------------------------------------------------------------------- model folders

def load_pretrained(folder: str, dtype: torch.dtype = torch.float32,
                    device: str | torch.device = "cpu", adapter: str = "") -> Llama:
    """A whole Llama from a Hugging Face folder, with a PEFT adapter on it where one is named."""
    config = read_config(config_path(folder, adapter))
    with torch.device("meta"):
        model = Llama(config)
        if adapter:
            model.train_only(**read_adapter(adapter, config))
    # Before memory is taken: a wrong size in config.json may ask for more than there is.
    check_parameters(base_parameters(model), weight_files(folder), folder, ignored_names(config))

    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty has parted them
    load_weights(model, folder)
    if adapter:
        load_adapter(model, adapter)
    return model


def config_path(folder: str, adapter: str = "") -> str:
    """The config.json of a model folder, with an adapter on it or without.

    save_adapter's has the window and the RoPE base that the adapter was trained with. PEFT writes
    none: then it is the base model's.
    """
    if adapter and not os.path.isdir(adapter):
        raise BadInput(f"{adapter}: no such folder")
    path = join(adapter, "config.json")
    return path if adapter and exists(path) else join(folder, "config.json")


def load_weights(model: Llama, folder: str) -> None:
    """Fill a model, sharded or not, but for LoRA's matrices. BadInput names a wrong tensor."""
    files = weight_files(folder)
    read_parameters(base_parameters(model), files, folder, ignored_names(model.config))


def base_parameters(model: Llama) -> Tensors:
    """{name: parameter} without LoRA's matrices; a tied head is not among them."""
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


def ignored_names(config: LlamaConfig) -> tuple[str, ...]:
    """What a file may hold beyond: frequencies of old exports, the copy of a tied head."""
    if config.tie_word_embeddings:
        return ("rotary_emb", "lm_head.weight")
    return ("rotary_emb",)


def weight_files(folder: str) -> dict[str, str]:
    """{tensor name: path} of a folder with one file of weights, or with an index of several."""
    index = join(folder, "model.safetensors.index.json")
    single = join(folder, "model.safetensors")
    if exists(index):
        return indexed_files(index)
    if exists(single):
        return {name: single for name in tensor_names(single)}
    raise BadInput(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")


def indexed_files(index: str) -> dict[str, str]:
    """{tensor name: path} as an index file says, each checked to be there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadInput(f"{index}: no 'weight_map' from tensor names to files")
    for name, file in weight_map.items():
        # A downloaded folder must not reach into the rest of the disk.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            refuse(index, name, file, "the name of a .safetensors file beside it, without a folder")

    folder = os.path.dirname(index)
    files = {name: join(folder, file) for name, file in weight_map.items()}
    held = {path: tensor_names(path) for path in sorted(set(files.values()))}
    for name, path in sorted(files.items()):
        if name not in held[path]:
            raise BadInput(f"{path}: {name} is not in this shard, though the index says so")
    return files


def dtype_of(folder: str) -> torch.dtype:
    """The dtype in which a model folder stores its weights."""
    name = "model.norm.weight"
    files = weight_files(folder)
    if name not in files:
        raise BadInput(f"{folder}: {name} is missing")
    with open_safetensors(files[name]) as f:
        return f.get_tensor(name).dtype


def dtype_named(name: str, folder: str, device: str) -> torch.dtype:
    """What a command's dtype= means for a model folder; name: of DTYPES."""
    if name != "auto":
        return getattr(torch, name)
    # A GPU has flash kernels for 16 bits only, and float32 would be twice the memory, for digits
    # that the folder never had. A CPU is as fast in float32, and exact.
    if device == "cpu":
        return torch.float32
    return dtype_of(folder)


def start_lora(model: Llama, seed: int) -> None:
    """A uniform as nn.Linear starts, B zero: the model begins as its base.

    Each process draws every whole A and keeps its rows: the same for any number of processes.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU, whatever the device
    for name, p in model.named_parameters():
        local, first, last = own_rows(p)
        if "lora_A" in name:
            full = torch.empty(p.shape).uniform_(-1, 1, generator=generator) / p.shape[1] ** 0.5
            local.copy_(full[first:last])
        elif "lora_B" in name:
            local.zero_()


def merged_weights(model: Llama, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """The full tensor of each of base_parameters, with LoRA's product on it.

    The product is added in float32 and the sum rounded once, to `dtype` or else to the weight's
    own. All processes have to iterate.
    """
    for name, p in base_parameters(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        tensor = full_tensor(p)
        target = dtype or tensor.dtype
        if isinstance(module, LoRALinear) and name.endswith(".weight"):
            # In bfloat16 the product would be rounded once more, and most of a small one be lost.
            A = full_tensor(module.lora_A.weight).float()
            B = full_tensor(module.lora_B.weight).float()
            tensor = tensor.float() + module.scale * (B @ A)
        yield tensor.to(target)


class Chats(NamedTuple):
    """How a model is talked to."""
    folder: str                  # with the files of its tokenizer
    tokenizer: Tokenizer | None  # None where the folder has none: then there is nothing to say


def chats_of(folder: str | None, template: str) -> Chats | None:
    """Read before anything is written. BadInput for a tokenizer or template that is none."""
    if not folder:
        return None
    tokenizer = None
    if exists(join(folder, "tokenizer.json")) or exists(join(folder, "tokenizer.model")):
        tokenizer = load_tokenizer(folder, template)
    return Chats(folder, tokenizer)


def save_pretrained(model: Llama, folder: str, dtype: torch.dtype | None = None,
                    tokenizer: str | None = None, template: str = "auto", write: bool = True
                    ) -> None:
    """Write a folder that transformers opens: config.json, weights, the tokenizer's files.

    What is at `folder` is replaced as a whole. dtype: of the weights; None: as they are. tokenizer:
    the folder to copy its files from. template: of the chats that were trained on. Sharded: all
    processes call it, one with write=True; that one's memory holds one file of 4 GiB at a time.
    """
    tensors = merged_weights(model, dtype)
    try:
        if write:
            write_model(model, tensors, folder, dtype, chats_of(tokenizer, template))
    finally:
        # A process that writes nothing, or could not, still takes part in gathering the rest.
        for _ in tensors:
            pass


def write_model(model: Llama, tensors: Iterator[Tensor], folder: str, dtype: torch.dtype | None,
                chats: Chats | None) -> None:
    files = files_of_names(model, dtype)
    with writing(folder) as tmp:
        for file, names in files.items():
            write_tensors({name: next(tensors) for name in names}, join(tmp, file))
        if len(files) > 1:
            weight_map = {}
            for file, names in files.items():
                weight_map.update(dict.fromkeys(names, file))
            index = join(tmp, "model.safetensors.index.json")
            write_json({"metadata": {}, "weight_map": weight_map}, index)
        write_config(model, tmp, dtype or model.model.norm.weight.dtype, chats)


def files_of_names(model: Llama, dtype: torch.dtype | None) -> dict[str, list[str]]:
    """{file: names of its tensors} in the model's order: SHARD_BYTES at most, or one tensor."""
    groups = [[]]
    size = 0
    for name, p in base_parameters(model).items():
        nbytes = p.numel() * (dtype or p.dtype).itemsize
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    files = {}
    for number, names in enumerate(groups, 1):
        files[f"model-{number:05d}-of-{len(groups):05d}.safetensors"] = names
    return files


def write_config(model: Llama, folder: str, dtype: torch.dtype, chats: Chats | None) -> None:
    """config.json, and the tokenizer's files."""
    config = config_json(model.config)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(config, join(folder, "config.json"))
    if not chats:
        return
    for name in TOKENIZER_FILES:
        if exists(join(chats.folder, name)):
            shutil.copy(join(chats.folder, name), folder)
    # transformers cuts text at the tokenizer's own limit, whatever window config.json announces.
    path = join(folder, "tokenizer_config.json")
    settings = read_json(path) if exists(path) else {}
    limit = settings.get("model_max_length")
    if type(limit) in (int, float) and limit < model.config.max_position_embeddings:
        settings["model_max_length"] = model.config.max_position_embeddings
        write_json(settings, path)
    if chats.tokenizer:
        write_chats(chats.tokenizer, settings, folder)


def write_chats(tokenizer: Tokenizer, settings: Settings, folder: str) -> None:
    """What a chat looks like and where an answer ends, for transformers and what stands on it.

    The base's own word counts: its sampling and its chat template stay, what is missing is added.
    """
    if "chat_template" not in settings and not exists(join(folder, "chat_template.jinja")):
        with open(join(folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
            f.write(tokenizer.jinja())

    path = join(folder, "generation_config.json")
    generation = read_json(path) if exists(path) else {}
    ends = generation.get("eos_token_id") or []
    if isinstance(ends, int):
        ends = [ends]
    # A base model may name the end of a text alone, after which one that learned turns never stops.
    for stop in tokenizer.chat("", "")[2]:
        if stop not in ends:
            ends.append(stop)
    generation["eos_token_id"] = ends
    if tokenizer.bos_id is not None:
        generation.setdefault("bos_token_id", tokenizer.bos_id)
    # Without one transformers takes the same, and says so at each call.
    generation.setdefault("pad_token_id", ends[0])
    write_json(generation, path)


# ------------------------------------------------------------------------------- adapters

def adapter_tensors(model: Llama) -> tuple[Tensors, list[str]]:
    """({PEFT's key: parameter}, the modules that PEFT saves in full) of what is trained."""
    tensors = {}
    modules = []
    for name, p in model.named_parameters():
        module = name.rpartition(".")[0]
        if p.requires_grad and "lora_" in name:
            tensors[PEFT + name] = p
        elif p.requires_grad and module not in modules:
            modules.append(module)
    modules.sort()
    for module in modules:
        for name, p in model.get_submodule(module).named_parameters():
            tensors[f"{PEFT}{module}.{name}"] = p
    if model.config.tie_word_embeddings and "model.embed_tokens" in modules:
        # PEFT copies a module that it saves, which unties the head from it: both are written.
        modules.append("lm_head")
        tensors[PEFT + "lm_head.weight"] = model.lm_head.weight
    return tensors, modules


def save_adapter(model: Llama, folder: str, base: str, lora: Settings,
                 tokenizer: str | None = None, template: str = "auto", write: bool = True
                 ) -> None:
    """Write what was trained for PEFT: LoRA's matrices, and in full what modules_to_save names.

    base: the folder of the frozen model. lora: lora_r, lora_alpha, lora_targets. config.json holds
    a changed RoPE base or window, which the base model's does not: open the base with it. All
    processes call it, one with write=True.
    """
    # Clones: a tied head shares its memory with the embeddings, which safetensors refuses to write.
    parameters, modules = adapter_tensors(model)
    tensors = {key: full_tensor(p).clone() for key, p in parameters.items()}
    if not write:
        return
    chats = chats_of(tokenizer, template)
    targets = [target.strip() for target in lora["lora_targets"].split(",")]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
                "r": lora["lora_r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": 0.0,
                "bias": "none", "inference_mode": True, "target_modules": targets,
                "modules_to_save": modules or None}
    if model.config.tie_word_embeddings and "model.embed_tokens" in modules:
        # They stay one tensor in PEFT as well, else it warns of two that part when it goes on.
        settings["ensure_weight_tying"] = True
    with writing(folder) as tmp:
        write_tensors(tensors, join(tmp, "adapter_model.safetensors"))
        write_json(settings, join(tmp, "adapter_config.json"))
        write_config(model, tmp, next(iter(parameters.values())).dtype, chats)


# What PEFT can do beyond plain LoRA, and the values that mean that it does not.
PLAIN_LORA = {
    "peft_type": ["LORA"],
    "bias": [None, "none"],
    "use_dora": [None, False],
    "use_rslora": [None, False],
    "rank_pattern": [None, {}],
    "alpha_pattern": [None, {}],
    "layers_to_transform": [None],
    "layer_replication": [None],
    "alora_invocation_tokens": [None],
    "fan_in_fan_out": [None, False],
    # Others (pissa, olora, ...) take the first A and B out of the base, whose file still has them.
    "init_lora_weights": [None, False, "gaussian", "eva", "orthogonal", True],
}


def read_adapter(folder: str, config: LlamaConfig) -> Settings:
    """adapter_config.json as the keys of Llama.train_only. BadInput for anything but plain LoRA."""
    path = join(folder, "adapter_config.json")
    raw = read_json(path)
    for key, allowed in PLAIN_LORA.items():
        if raw.get(key) not in allowed:
            refuse(path, key, raw.get(key), repr(allowed[-1]))
    rank = checked(raw, "r", SIZE, path)
    alpha = checked({"lora_alpha": 8, **raw}, "lora_alpha", NUMBER, path)  # PEFT's own default
    targets = checked(raw, "target_modules", NAMES, path)
    modules = raw.get("modules_to_save") or []
    if modules:
        checked(raw, "modules_to_save", NAMES, path)
    if config.tie_word_embeddings:
        # PEFT's copy of the embeddings, see adapter_tensors: here they are one tensor all the time.
        modules = [name for name in modules if name != "lm_head"]
    # PEFT may list "model.layers.0.self_attn.q_proj" for each layer. A layer that it leaves out is
    # found by its missing tensors.
    targets = sorted({target.split(".")[-1] for target in targets})
    return {"lora_r": rank, "lora_alpha": alpha, "train_also": ",".join(modules),
            "lora_targets": ",".join(targets)}


def load_adapter(model: Llama, folder: str) -> None:
    """Fill what is trained from an adapter's folder. BadInput for other names or shapes."""
    read_parameters(*adapter_files(model, folder), folder)


def check_adapter(model: Llama, folder: str) -> None:
    """BadInput where load_adapter would refuse the folder. The model may have shapes alone."""
    check_parameters(*adapter_files(model, folder), folder)


def adapter_files(model: Llama, folder: str) -> tuple[Tensors, dict[str, str]]:
    """({PEFT's key: parameter} of what is trained, {key: path} of what an adapter's file holds)."""
    path = join(folder, "adapter_model.safetensors")
    tensors, _ = adapter_tensors(model)
    return tensors, {key: path for key in tensor_names(path)}


# ------------------------------------------------------------------------- checkpoints: writing

def all_gather(value: Any) -> list[Any]:
    """The JSON-like values of all processes, in order of rank."""
    # The values are pickled on their way between our own processes; no file ever is.
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sha256(path: str) -> str:
    """The digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_checkpoint(folder: str, model: Llama, optimizer: torch.optim.Optimizer,
                    state: Settings) -> str | None:
    """Write what is trained and AdamW's moments, each process its own rows, and `state`.

    state: JSON, with "step" and "config". All processes call it. Returns None, or on every process
    the line that says what could not be written; then nothing of it is left.
    """
    tmp = folder + ".tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    dist.barrier()  # or a fast process's shard would be removed as a leftover

    # What fails on one process must not raise there: the others would wait for it for ever.
    digests, error = attempt(write_shard, tmp, model, optimizer)
    everyone = all_gather((digests, error))
    errors = [error for _, error in everyone if error]
    if not errors:
        # `errors` is the same everywhere, so all processes come by here and none waits for another.
        error = None
        if dist.get_rank() == 0:
            shards = [digests for digests, _ in everyone]
            _, error = attempt(finish_checkpoint, tmp, folder, shards, state)
        errors = [error for error in all_gather(error) if error]
    if not errors:
        return None
    if dist.get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    return f"{folder}: cannot be written ({errors[0]})"


def attempt(function: Callable, *arguments) -> tuple[Any, str | None]:
    """(what the function returns, None), or (None, why the disk refused)."""
    try:
        return function(*arguments), None
    except (OSError, SafetensorError) as e:
        return None, str(e)


def write_shard(tmp: str, model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Write this process's rows of what is trained, and of its moments. {file: digest}."""
    mesh = next(model.parameters()).device_mesh
    part = mesh.get_local_rank(mesh.ndim - 1)
    parts = mesh.size(mesh.ndim - 1)
    if dist.get_rank() != part:
        return {}  # of the replicas of hybrid sharding the first one writes

    tensors = {}
    for name, p in trained_parameters(model).items():
        for key, tensor in stored_tensors(name, p, optimizer.state[p]).items():
            local, _, _ = own_rows(tensor)
            tensors[key] = local.cpu()
    os.makedirs(tmp, exist_ok=True)
    file = shard_name(part, parts)
    path = join(tmp, file)
    write_tensors(tensors, path)
    return {file: sha256(path)}


def trained_parameters(model: Llama) -> Tensors:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stored_tensors(name: str, p: Tensor, moments: Tensors) -> Tensors:
    """{key in a shard: tensor} of one parameter and its two moments."""
    tensors = {name: p}
    for key in MOMENTS:
        tensors[f"{name}.{key}"] = moments[key]
    return tensors


def shard_name(part: int, parts: int) -> str:
    # The count is in the name: shards of two numbers of processes never mix.
    return f"shard_{part}_of_{parts}.safetensors"


def finish_checkpoint(tmp: str, folder: str, shards: list[dict[str, str]],
                      state: Settings) -> None:
    """Write state.json with every shard's digest and its own, and give the folder its name."""
    digests = {}
    for found in shards:
        digests.update(found)
    for file in digests:
        if not exists(join(tmp, file)):
            raise OSError(f"{file} is not visible here: put out= on a disk that all nodes share")
    # One digest over all digests: a shard of another step, though whole, is noticed too.
    content = {**state, "shards": digests}
    write_json({**content, "sha256": sha256_of_json(content)}, join(tmp, "state.json"))
    put_in_place(tmp, folder)


# ------------------------------------------------------------------------- checkpoints: reading

def read_state(folder: str, part: int = 0, parts: int = 1) -> Settings:
    """state.json of a checkpoint whose files are what was written, else BadInput.

    Of the shards it reads every parts-th, beginning with number `part`.
    """
    path = join(folder, "state.json")
    state = read_json(path)
    digest = state.pop("sha256", None)
    if digest != sha256_of_json(state):
        raise BadInput(f"{path}: not as it was written (its sha256 differs)")
    check_state(state, path)
    for name in sorted(state["shards"])[part::parts]:
        file = join(folder, name)
        if not exists(file):
            raise BadInput(f"{file}: no such file")
        if sha256(file) != state["shards"][name]:
            raise BadInput(f"{file}: not as it was written (its sha256 differs from state.json)")
    return state


def check_state(state: Settings, path: str) -> None:
    """BadInput for a state that this file did not write, though its digest fits."""
    checked(state, "step", SIZE, path)
    checked(state, "config", OBJECT, path)
    shards = checked(state, "shards", OBJECT, path)
    if shards.keys() != {shard_name(part, len(shards)) for part in range(len(shards))}:
        refuse(path, "shards", sorted(shards), f"shard_I_of_{len(shards)}.safetensors for each I")


def step_of(path: str, ending: str = "") -> int | None:
    """The step of a checkpoint's folder, by its name; None for anything else, which is the user's.

    ending: a regular expression for what may follow the digits.
    """
    match = re.fullmatch(rf"step_([0-9]{{6,}}){ending}", os.path.basename(path))
    if match is None or os.path.islink(path) or not os.path.isdir(path):
        return None
    return int(match[1])


def checkpoints(run: str) -> list[str]:
    """The step_ folders of a run, the newest first."""
    found = []
    for path in glob.glob(join(glob.escape(str(run)), "step_*")):
        if step_of(path) is not None:
            found.append(path)
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(run: str, resume: str) -> tuple[str | None, Settings | None]:
    """(folder, state) to go on from, or (None, None). The same on all processes.

    resume "": none, and BadInput where there is one that would be overwritten. "auto": the newest
    whole one; each damaged one is named. Otherwise a folder.
    """
    folders = checkpoints(run) if resume in ("", "auto") else [resume]
    # As the first process sees it: a shared disk may show a new folder to one node before another.
    folders = all_gather(folders)[0]
    if folders and not resume:
        raise BadInput(f"{folders[0]} is there: resume=auto goes on from it; to start anew, remove "
                       f"the step_ folders of {run} or name another out=")
    for folder in folders:
        state, error = read_state_together(folder)
        if not error:
            return folder, state
        if folder != folders[-1]:
            if dist.get_rank() == 0:
                print(f"warning: {error}: taking the one before", flush=True)
        elif len(folders) > 1:
            raise BadInput(f"{error}: no whole checkpoint is left")
        else:
            raise BadInput(error)
    return None, None


def read_state_together(folder: str) -> tuple[Settings | None, str | None]:
    """(state, None), or (None, what is wrong with it). Each process checks some of the files."""
    state = None
    error = None
    try:
        state = read_state(folder, dist.get_rank(), dist.get_world_size())
    except BadInput as e:
        error = str(e)
    for found in all_gather(error):
        if found:
            return None, found
    return state, None


@torch.no_grad()
def load_checkpoint(folder: str, state: Settings, model: Llama,
                    optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill what is trained, and AdamW's moments, from a checkpoint of any number of processes."""
    parts = len(state["shards"])
    paths = [join(folder, shard_name(part, parts)) for part in range(parts)]
    trained = trained_parameters(model)
    check_shards(trained, paths, folder)

    for name, p in trained.items():
        if optimizer is None:
            read_rows(p, name, paths)
            continue
        moments = {key: torch.zeros_like(p, requires_grad=False) for key in MOMENTS}
        for key, tensor in stored_tensors(name, p, moments).items():
            read_rows(tensor, key, paths)
        # AdamW counts steps in a tensor, which the fused kernel wants beside the moments.
        device = p.device if optimizer.defaults["fused"] else "cpu"
        step = torch.tensor(float(state["step"]), device=device)
        optimizer.state[p] = {"step": step, **moments}


def check_shards(trained: Tensors, paths: list[str], folder: str) -> None:
    """BadInput unless the shards hold all rows of what is trained, and of its moments."""
    wanted = {}
    for name, p in trained.items():
        wanted |= stored_tensors(name, p, dict.fromkeys(MOMENTS, p))
    found = {key: [] for key in wanted}
    for path in paths:
        with open_safetensors(path) as f:
            differ = sorted(wanted.keys() ^ set(f.keys()))
            if differ:
                raise BadInput(f"{path}: {differ[0]} is trained in one of checkpoint and model")
            for key in wanted:
                found[key].append(f.get_slice(key).get_shape())

    for key, p in wanted.items():
        # Rows that are missing would stay what they were, so they are counted.
        rows = sum(math.prod(shape[:1]) for shape in found[key])
        shapes = [[rows, *shape[1:]] for shape in found[key]]
        if any(shape != list(p.shape) for shape in shapes):
            raise BadInput(f"{folder}: {key} has shapes {found[key]}, "
                           f"expected the rows of {list(p.shape)}")


# ------------------------------------------------------------------------- checkpoints: removing

def prune(run: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the one with the lowest held-out loss.

    Also what a kill left half written or half removed. Nothing else in the folder is touched. What
    cannot be removed is a warning: the run is worth more than the disk.
    """
    # The newest are for going on, the best is for use: training may be past it when it ends.
    folders = checkpoints(run)
    best = best_checkpoint(folders)
    for folder in folders[keep:]:
        if folder != best:
            # Renamed first: a kill while it is being removed leaves no half checkpoint.
            warn_on_failure(os.rename, folder, folder + ".tmp")
    for path in glob.glob(join(glob.escape(str(run)), "step_*")):
        if step_of(path, r"\.(tmp|old)") is not None:
            warn_on_failure(shutil.rmtree, path)


def warn_on_failure(function: Callable, path: str, *more) -> None:
    try:
        function(path, *more)
    except OSError as e:
        say(f"warning: {path}: cannot be removed ({e.strerror or e})")


def best_checkpoint(folders: list[str]) -> str | None:
    """The folder with the lowest held-out loss; None where no state.json has one."""
    losses = {}
    for folder in folders:
        try:
            loss = read_json(join(folder, "state.json"))["held_out"]["loss"]
        except (BadInput, KeyError, TypeError):
            continue  # damaged, or not evaluated: no candidate
        if type(loss) is float and math.isfinite(loss):
            losses[folder] = loss
    return min(losses, key=lambda folder: (losses[folder], folder), default=None)


# ------------------------------------------------------------------------------- merge

USAGE = "python checkpoint.py merge ADAPTER_OR_STEP_FOLDER OUT [BASE_MODEL_FOLDER]"
EXAMPLE = "python checkpoint.py merge out/mine/adapter MERGED"


def merge(source: str, out: str, base: str = "") -> None:
    """Write an adapter, or what a checkpoint has trained, with its base model as a model folder."""
    out = os.path.normpath(out)
    if exists(out):
        raise BadInput(f"{out}: is already there")
    if exists(join(source, "adapter_config.json")):
        model, base, template = load_adapted(source, base)
    else:
        model, base, template = load_trained(source, base)
    save_pretrained(model, out, dtype_of(base), base, template)
    print(f"{out}: {source} on {base}")


def load_adapted(folder: str, base: str) -> tuple[Llama, str, str]:
    """The model that an adapter makes of its base; the base: that given, else that it names; the
    chat template: that of the adapter's own tokenizer."""
    path = join(folder, "adapter_config.json")
    base = base or checked(read_json(path), "base_model_name_or_path", TEXT, path)
    template = "auto"
    chats = chats_of(folder, template)
    if chats.tokenizer:
        template = chats.tokenizer.template
    return load_pretrained(base, dtype_of(base), adapter=folder), base, template


def load_trained(folder: str, base: str) -> tuple[Llama, str, str]:
    """The model that a checkpoint was taken of; its base: that given, else that of the run; the
    run's chat template."""
    state = read_state(folder)
    path = join(folder, "state.json")
    with reading(path):
        cfg = state["config"]
        base = base or checked(cfg, "model", TEXT, path)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg["dtype"]]
        model = load_pretrained(base, dtype)
        model.config = read_config(config_path(base, cfg["adapter"]))
        # As the run did. One of before YaRN was a key had none.
        model.config.extend(cfg["window"], cfg["rope_theta"], cfg.get("yarn_factor", 0.0))
        model.train_only(cfg["lora_r"], cfg["lora_alpha"], cfg["lora_targets"], cfg["train_also"])
        template = checked({"template": "auto", **cfg}, "template", TEXT, path)
    load_checkpoint(folder, state, model)
    return model, base, template


def main(argv: list[str]) -> None:
    if asked_for_help(argv) or not argv:
        print_help(f"{USAGE}\n\n{merge.__doc__}\n\n    {EXAMPLE}", {})
        sys.exit(0 if argv else 2)
    if len(argv) not in (3, 4) or argv[0] != "merge":
        raise BadInput(f"expected: {USAGE}")
    merge(*argv[1:])


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    main(sys.argv[1:])
