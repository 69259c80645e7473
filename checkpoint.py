"""What goes to disk and comes back: Hugging Face folders, PEFT adapters, and checkpoints to resume from.

    model folder    config.json, model*.safetensors, tokenizer      load_pretrained, load_weights, save_pretrained
    adapter         adapter_config.json, adapter_model.safetensors  load_adapter, save_adapter
    step_000100/    state.json, shard_I_of_N.safetensors            load_checkpoint, save_checkpoint

    python checkpoint.py merge FOLDER OUT [BASE]    FOLDER, an adapter or a step_ folder, as a model folder

A parameter may be sharded (a DTensor of FSDP2): every process then reads and writes the rows that it owns, straight
from and to the files, so none ever holds the model. Folders are written under another name, synced, then renamed.
Nothing here is pickled.
"""
import glob
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from configs import BadInput, exit_on_bad_input, read_json, write_json
from model import Llama, LlamaConfig, LoRALinear

SHARD_BYTES = 4 << 30  # of one file of an exported model
PEFT = "base_model.model."  # what PEFT writes before each name
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "generation_config.json")


# ------------------------------------------------------------------------------------------------ rows in files

def own_rows(p):
    """(local tensor, its first row, one past its last) of a parameter; all of it, where it is not sharded."""
    if not isinstance(p, DTensor):
        return p.detach(), 0, len(p)
    local, dim = p.detach().to_local(), p.device_mesh.ndim - 1      # hybrid: the last mesh dimension shards
    each = -(-len(p) // p.device_mesh.size(dim))
    first = min(p.device_mesh.get_local_rank(dim) * each, len(p))
    return local, first, first + len(local)


def read_rows(p, key, paths):
    """Fill this process's rows of a parameter from files that hold consecutive rows of it under one key."""
    local, first, last = own_rows(p)
    row = 0
    for path in paths:
        with open_safetensors(path) as f:  # opened anew for each tensor: lets go of the last one's mapped pages
            rows = f.get_slice(key)
            count = rows.get_shape()[0]
            a, b = max(first, row), min(last, row + count)
            if a < b:
                local[a - first:b - first].copy_(rows[a - row:b - row])
            row += count


def read_parameters(wanted, files, where, ignore=()):
    """Fill {key: parameter} from {key: path}. BadInput, before anything is read, for names or shapes that differ."""
    missing = sorted(wanted.keys() - files.keys())
    extra = sorted(name for name in files.keys() - wanted.keys() if not any(part in name for part in ignore))
    if missing or extra:
        name, what = (missing[0], "missing") if missing else (extra[0], "not a tensor of this model")
        raise BadInput(f"{where}: {name} is {what} ({len(missing)} missing, {len(extra)} unexpected)")
    for path in sorted({files[key] for key in wanted}):
        with open_safetensors(path) as f:
            for key in (key for key in wanted if files[key] == path):
                shape, expected = f.get_slice(key).get_shape(), list(wanted[key].shape)
                if shape != expected:
                    raise BadInput(f"{path}: {key} has shape {shape}, expected {expected} (config.json)")
    for key, p in wanted.items():
        read_rows(p, key, [files[key]])


def full_tensor(p):
    """The full tensor, on the CPU. Of a sharded one all processes have to ask."""
    p = p.detach()
    return (p.to(p.device_mesh.device_type).full_tensor() if isinstance(p, DTensor) else p).cpu()


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: not a readable safetensors file ({e})") from e


def write_tensors(tensors, path):
    """One safetensors file, on the disk when this returns."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)  # safetensors makes it the owner's alone
    sync(path)


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def put_in_place(tmp, folder):
    """Give a finished folder its name. What had it before goes only then."""
    for path in [*glob.glob(os.path.join(tmp, "*")), tmp]:
        sync(path)
    shutil.rmtree(folder + ".old", ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, folder + ".old")
    os.rename(tmp, folder)
    sync(os.path.dirname(os.path.abspath(folder)))
    shutil.rmtree(folder + ".old", ignore_errors=True)


@contextmanager
def writing(folder):
    """with writing(folder) as tmp: fill tmp, which becomes folder at the end; a failed write leaves nothing behind."""
    tmp = f"{folder}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        os.makedirs(tmp)
        yield tmp
        put_in_place(tmp, str(folder))
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{folder}: cannot be written ({e})") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ config.json

def read_config(path):
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
    known = {key: raw[key] for key in LlamaConfig.__dataclass_fields__ if raw.get(key) is not None and key != "raw"}
    return LlamaConfig(**{"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads,
                  "max_position_embeddings": 2048, **known, "rope": read_rope(raw, path), "raw": raw})


def config_json(config):
    """The dict to write as config.json: the file that was read, with what may have changed since."""
    names = [key for key in config.__dataclass_fields__ if key not in ("rope", "raw")]
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", **config.raw,
           **{key: getattr(config, key) for key in names}}
    raw.pop("torch_dtype", None)  # the older name of dtype: two that disagree would mislead a reader
    if "rope_parameters" in raw:  # the dialect of transformers 5
        return {**raw, "rope_parameters": config.rope}
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
    return {**raw, "rope_theta": config.rope["rope_theta"],
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def read_rope(raw, path):
    """One dict {"rope_type", "rope_theta", ...} from `rope_parameters`, or from `rope_theta` + `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"  # "type" is the oldest spelling
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    needed = {"default": (), "linear": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needed:
        raise BadInput(f"{path}: rope_type is {rope['rope_type']!r}, expected one of {', '.join(needed)}")
    for key in needed[rope["rope_type"]]:
        if not isinstance(rope.get(key), (int, float)):
            raise BadInput(f"{path}: rope_type {rope['rope_type']!r} needs a number {key!r}, found {rope.get(key)!r}")
    return rope


# ------------------------------------------------------------------------------------------------ model folders

def load_pretrained(folder, dtype=torch.float32, device="cpu", adapter=""):
    """A whole Llama from a Hugging Face folder, with a PEFT adapter on it where one is named."""
    config = read_config(os.path.join(folder, "config.json"))
    with torch.device("meta"):
        model = Llama(config)
        if adapter:
            model.train_only(**read_adapter(adapter, config))
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty has parted them
    load_weights(model, folder)
    if adapter:
        load_adapter(model, adapter)
    return model


def load_weights(model, folder):
    """Fill a model, sharded or not, from a folder; LoRA's matrices are not in it. BadInput names a wrong tensor."""
    wanted = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    ignore = ("rotary_emb", "lm_head.weight") if model.config.tie_word_embeddings else ("rotary_emb",)
    read_parameters(wanted, weight_files(folder), folder, ignore)


def start_lora(model, seed):
    """A uniform as nn.Linear starts, B zero: the model begins as its base. The same for any number of processes."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        local, first, last = own_rows(p)
        if "lora_A" in name:
            full = torch.empty(p.shape).uniform_(-1, 1, generator=generator) / p.shape[1] ** 0.5
            local.copy_(full[first:last])
        elif "lora_B" in name:
            local.zero_()


def merged(model, dtype=None):
    """(name, full tensor) of each weight, LoRA added in float32 and rounded once. All processes have to iterate."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            continue
        module, tensor = model.get_submodule(name.rpartition(".")[0]), full_tensor(p)
        if isinstance(module, LoRALinear) and name.endswith(".weight"):
            A, B = (full_tensor(part.weight).float() for part in (module.lora_A, module.lora_B))
            tensor = (tensor.float() + module.scale * (B @ A)).to(tensor.dtype if dtype is None else dtype)
        yield name, tensor if dtype is None else tensor.to(dtype)


def save_pretrained(model, folder, dtype=None, tokenizer=None, write=True):
    """Write a folder that transformers and vLLM open: config.json, weights in files of 4 GiB, tokenizer's files.
    What is at `folder` is replaced as a whole.

    dtype: of the weights; None: as they are. tokenizer: the folder to copy its files from. Sharded: all processes
    call it, one with write=True; that one's memory holds one file at a time.
    """
    tensors = merged(model, dtype)
    try:
        if write:
            write_model(model, tensors, folder, tokenizer)
    finally:  # a process that writes nothing, or could not, still takes part in gathering the rest
        for _ in tensors:
            pass


def write_model(model, tensors, folder, tokenizer):
    with writing(folder) as tmp:
        shard, names, paths = {}, [], []
        for name, tensor in tensors:
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
                names, paths, shard = [*names, list(shard)], [*paths, write_part(shard, tmp, len(paths))], {}
            shard[name] = tensor
        names, paths = [*names, list(shard)], [*paths, write_part(shard, tmp, len(paths))]
        final = ["model.safetensors"] if len(paths) == 1 else [
            f"model-{i + 1:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))]
        for path, name in zip(paths, final):
            os.rename(path, os.path.join(tmp, name))
        if len(paths) > 1:
            weight_map = {name: file for file, held in zip(final, names) for name in held}
            write_json({"metadata": {}, "weight_map": weight_map}, os.path.join(tmp, "model.safetensors.index.json"))
        write_config(model, tmp, tensor.dtype, tokenizer)


def write_part(tensors, folder, i):
    path = os.path.join(folder, f"part_{i}.safetensors")
    write_tensors(tensors, path)
    return path


def write_config(model, folder, dtype, tokenizer):
    config = {**config_json(model.config), "dtype": str(dtype).removeprefix("torch.")}
    write_json(config, os.path.join(folder, "config.json"))
    for name in TOKENIZER_FILES if tokenizer else ():
        if os.path.exists(os.path.join(tokenizer, name)):
            shutil.copy(os.path.join(tokenizer, name), folder)


def weight_files(folder):
    """{tensor name: path} from model.safetensors, or from the shards that model.safetensors.index.json names."""
    index = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    if os.path.exists(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BadInput(f"{index}: no 'weight_map' from tensor names to files")
        files = {name: os.path.join(folder, shard) for name, shard in weight_map.items()}
    elif os.path.exists(single):
        with open_safetensors(single) as f:
            return {name: single for name in f.keys()}
    else:
        raise BadInput(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    for path in sorted(set(files.values())):
        with open_safetensors(path) as f:
            held = set(f.keys())
        lost = sorted(name for name, where in files.items() if where == path and name not in held)
        if lost:
            raise BadInput(f"{path}: {lost[0]} is not in this shard, though {os.path.basename(index)} says so")
    return files


# ----------------------------------------------------------------------------------------------------- adapters

def adapter_tensors(model):
    """({PEFT's key: parameter}, names of the modules that PEFT saves whole) of what is trained beside LoRA's base."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {PEFT + name: p for name, p in trained.items() if "lora_" in name}
    modules = sorted({name.rpartition(".")[0] for name in trained if "lora_" not in name})
    for module in modules:
        for name, p in model.get_submodule(module).named_parameters():
            tensors[f"{PEFT}{module}.{name}"] = p
    if model.config.tie_word_embeddings and "model.embed_tokens" in modules:  # PEFT copies a module, and so unties it
        modules.append("lm_head")
        tensors[PEFT + "lm_head.weight"] = model.lm_head.weight
    return tensors, modules


def save_adapter(model, folder, base, lora, tokenizer=None, write=True):
    """Write what was trained for PEFT: LoRA's matrices, and as modules_to_save what was trained whole. float32.

    base: the folder of the frozen model. lora: lora_r, lora_alpha, lora_targets. config.json holds a changed RoPE
    base or window, which the base model's does not: open the base with it.
    """
    parameters, modules = adapter_tensors(model)
    tensors = {key: full_tensor(p).clone() for key, p in parameters.items()}
    if not write:
        return
    with writing(folder) as tmp:
        write_tensors(tensors, os.path.join(tmp, "adapter_model.safetensors"))
        write_json({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora["lora_r"],
                    "lora_alpha": lora["lora_alpha"], "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
                    "target_modules": [target.strip() for target in lora["lora_targets"].split(",")],
                    "modules_to_save": modules or None}, os.path.join(tmp, "adapter_config.json"))
        write_config(model, tmp, next(iter(parameters.values())).dtype, tokenizer)


def read_adapter(folder, config):
    """adapter_config.json as the keys of Llama.train_only. BadInput for anything but plain LoRA."""
    path = os.path.join(folder, "adapter_config.json")
    raw = read_json(path)
    for key, allowed in (("peft_type", ("LORA",)), ("bias", (None, "none")), ("use_dora", (None, False)),
                         ("use_rslora", (None, False)), ("rank_pattern", (None, {})), ("alpha_pattern", (None, {})),
                         ("layers_to_transform", (None,)), ("fan_in_fan_out", (None, False))):
        if raw.get(key) not in allowed:
            raise BadInput(f"{path}: {key} is {raw[key]!r}, expected {allowed[-1]!r}")
    if not isinstance(raw.get("r"), int) or raw["r"] < 1 or not isinstance(raw.get("target_modules"), list):
        raise BadInput(f"{path}: expected a whole number under 'r' and a list under 'target_modules'")
    modules = [m for m in raw.get("modules_to_save") or [] if not (m == "lm_head" and config.tie_word_embeddings)]
    return {"lora_r": raw["r"], "lora_alpha": raw.get("lora_alpha", 8), "train_also": ",".join(modules),
            "lora_targets": ",".join(sorted({target.split(".")[-1] for target in raw["target_modules"]}))}


def load_adapter(model, folder):
    """Fill what is trained from an adapter's folder. BadInput for other names or shapes than the model's."""
    path = os.path.join(folder, "adapter_model.safetensors")
    with open_safetensors(path) as f:
        files = {key: path for key in f.keys()}
    read_parameters(adapter_tensors(model)[0], files, folder)


# -------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(folder, model, optimizer, state):
    """Write what is trained and AdamW's moments, each process its own rows, and `state` (JSON; has "step").

    All processes call it. Returns None, or on every process the line that says what could not be written; then
    nothing of it is left.
    """
    rank, shard = dist.get_rank(), next(model.parameters()).device_mesh
    part, parts = shard.get_local_rank(shard.ndim - 1), shard.size(shard.ndim - 1)
    name, tmp, error = f"shard_{part}_of_{parts}.safetensors", folder + ".tmp", None
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    dist.barrier()
    tensors = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            moments = optimizer.state[p]
            tensors.update({key: p, key + ".exp_avg": moments["exp_avg"], key + ".exp_avg_sq": moments["exp_avg_sq"]})
    try:
        if rank == part:  # with hybrid sharding the first replica writes
            os.makedirs(tmp, exist_ok=True)
            write_tensors({key: own_rows(t)[0].cpu() for key, t in tensors.items()}, os.path.join(tmp, name))
            digest = {name: sha256(os.path.join(tmp, name))}
    except (OSError, SafetensorError) as e:
        error = f"{folder}: cannot be written ({e})"
    found = all_gather({"digests": digest if rank == part and not error else {}, "error": error})
    error = next((one["error"] for one in found if one["error"]), None)
    if rank == 0 and not error:
        try:
            digests = {file: value for one in found for file, value in one["digests"].items()}
            lost = [file for file in digests if not os.path.exists(os.path.join(tmp, file))]
            if lost:
                raise OSError(f"{lost[0]} is not visible here: put out= on a disk that all nodes share")
            content = {**state, "shards": digests}
            write_json({**content, "sha256": of_json(content)}, os.path.join(tmp, "state.json"))
            put_in_place(tmp, folder)
        except OSError as e:
            error = f"{folder}: cannot be written ({e})"
    error = all_gather(error)[0] if not error else error
    if error and rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    return error


def all_gather(value):
    """The JSON-like values of all processes, in order of rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


together = all_gather


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def of_json(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_state(folder, part=0, parts=1):
    """state.json of a checkpoint whose files are what was written, else BadInput. Checks every parts-th file."""
    path = os.path.join(folder, "state.json")
    state = read_json(path)
    digest = state.pop("sha256", None)
    if digest != of_json(state):
        raise BadInput(f"{path}: not as it was written (its sha256 differs)")
    for name in sorted(state["shards"])[part::parts]:
        file = os.path.join(folder, name)
        if not os.path.exists(file):
            raise BadInput(f"{file}: no such file")
        if sha256(file) != state["shards"][name]:
            raise BadInput(f"{file}: not as it was written (its sha256 differs from state.json)")
    return state


def checkpoints(run):
    """The step_ folders of a run, the newest first."""
    found = {path: path.rsplit("step_")[-1] for path in glob.glob(os.path.join(glob.escape(str(run)), "step_*"))}
    return sorted((path for path in found if found[path].isdigit()), key=lambda path: int(found[path]), reverse=True)


def find_checkpoint(run, resume):
    """(folder, state) to go on from, or (None, None). The same on all processes.

    resume "": none, and BadInput where there is one that would be overwritten. "auto": the newest whole one; each
    damaged one is named. Otherwise a folder.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    folders = all_gather(checkpoints(run) if resume in ("", "auto") else [resume])[0]  # as the first process sees it
    if folders and not resume:
        raise BadInput(f"{folders[0]} is there: resume=auto goes on from it; to start anew, remove the step_ folders "
                       f"of {run} or name another out=")
    for folder in folders:
        try:
            state, error = read_state(folder, rank, world), None
        except BadInput as e:
            state, error = None, str(e)
        error = next((e for e in all_gather(error) if e), None)
        if not error:
            return folder, state
        if folder == folders[-1]:
            raise BadInput(error + ("" if len(folders) == 1 else ": no whole checkpoint is left"))
        if rank == 0:
            print(f"warning: {error}: taking the one before", flush=True)
    return None, None


@torch.no_grad()
def load_checkpoint(folder, state, model, optimizer=None):
    """Fill what is trained, and AdamW's moments, from a checkpoint written by any number of processes."""
    paths = [os.path.join(folder, name) for name in sorted(state["shards"], key=lambda name: int(name.split("_")[1]))]
    with open_safetensors(paths[0]) as f:
        held = set(f.keys())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differ = sorted(trained.keys() ^ {name for name in held if not name.endswith((".exp_avg", ".exp_avg_sq"))})
    if differ:
        raise BadInput(f"{folder}: {differ[0]} is trained in one of checkpoint and model only")
    for name, p in trained.items():
        read_rows(p, name, paths)
        if optimizer is None:
            continue
        device = p.device if optimizer.defaults["fused"] else "cpu"
        moments = {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(state["step"]), device=device), **moments}
        for key, moment in moments.items():
            read_rows(moment, f"{name}.{key}", paths)


def prune(run, keep):
    """Remove all but the newest `keep` checkpoints and the one with the lowest held-out loss."""
    folders, losses = checkpoints(run), {}
    for folder in folders:
        try:
            losses[folder] = read_json(os.path.join(folder, "state.json"))["held_out"]["loss"]
        except (BadInput, KeyError, TypeError):  # damaged, or not evaluated: no candidate for the best
            continue
    best = min(losses, key=lambda folder: (losses[folder], folder), default=None)
    for folder in folders[keep:]:
        if folder != best:
            os.rename(folder, folder + ".tmp")  # a kill while it is being removed leaves no half checkpoint
    for leftover in glob.glob(os.path.join(glob.escape(str(run)), "step_*.*")):
        shutil.rmtree(leftover)


# -------------------------------------------------------------------------------------------------------- merge

def merge(source, out, base=""):
    """Write an adapter, or what a checkpoint has trained, together with its base model as a model folder."""
    if os.path.exists(out):
        raise BadInput(f"{out}: is already there")
    if os.path.exists(os.path.join(source, "adapter_config.json")):
        base = base or read_json(os.path.join(source, "adapter_config.json")).get("base_model_name_or_path")
        model = load_pretrained(base, dtype_of(base), adapter=source)
        if os.path.exists(os.path.join(source, "config.json")):
            model.config = read_config(os.path.join(source, "config.json"))
    else:
        state = read_state(source)
        cfg = state["config"]
        base = base or cfg["model"]
        model = load_pretrained(base, getattr(torch, cfg["dtype"]))
        model.config.extend(cfg["window"], cfg["rope_theta"])
        model.train_only(*(cfg[key] for key in ("lora_r", "lora_alpha", "lora_targets", "train_also")))
        load_checkpoint(source, state, model)
    save_pretrained(model, out, dtype_of(base), tokenizer=base)
    print(f"{out}: {source} on {base}")


def dtype_of(folder):
    """The dtype in which a model folder stores its weights."""
    files = weight_files(folder)
    with open_safetensors(files["model.norm.weight"]) as f:
        return f.get_tensor("model.norm.weight").dtype


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    if len(sys.argv) not in (4, 5) or sys.argv[1] != "merge":
        sys.exit("usage: python checkpoint.py merge ADAPTER_OR_STEP_FOLDER OUT [BASE_MODEL_FOLDER]")
    merge(*sys.argv[2:])
