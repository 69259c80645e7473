"""Hostile input, by category: each is accepted with sane values, or is BadInput in one line that names its file.

    python -m tests.fuzz CATEGORY N [SEED]     N inputs of a category (all: N of each), in this process
    python -m tests.fuzz CATEGORY SEED:I       one input again, with its traceback

Anything else is a finding: another exception, a hang, a file half written, an accepted nonsense. Input I of a seed is a
function of (category, seed, I). tests/test_fuzz.py runs some thousands, and keeps what was found as rows of its own.
"""
import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch

import data
import guard
import report
from bench import plan
from bench.__main__ import split_words
from checkpoint import (
    ROPE_NUMBERS,
    YARN_NUMBERS,
    chats_of,
    config_json,
    load_pretrained,
    load_trained,
    merge,
    read_adapter,
    read_config,
    read_state,
    save_adapter,
    save_pretrained,
    sha256,
    sha256_of_json,
    shard_name,
    stored_tensors,
    write_config,
    write_tensors,
)
from configs import (
    BadInput,
    check_settings,
    check_training,
    default_groups,
    load_config,
    read_json,
    with_arguments,
    write_json,
)
from evals import curves, needle, perplexity, preferences, qa
from evals.__main__ import read_command
from evals.common import texts
from model import IGNORE, Llama, rope_frequencies
from pairs import convert, corpus
from pairs.build import draft, read_built
from pairs.show import show
from pairs.stats import stats
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "models" / "tiny")
SECONDS = 5          # of CPU time: an input that takes longer hangs
WAITING = 60         # seconds in all
LONGEST = 1500       # characters of a line that somebody is to read
MEMORY = 3 << 30     # bytes beyond what is mapped already: an input that asks for more asks for nonsense


class Hang(BaseException):
    """Raised by the alarm. No Exception, so that nothing takes it for a failure of its own."""


class Nonsense(AssertionError):
    """Something was accepted that should not have been."""


def sane(condition, *what):
    if not condition:
        raise Nonsense(" ".join(map(str, what))[:300])


# ---------------------------------------------------------------------------------------- mutations

DEEP = "@@deep@@"        # stands for brackets that json.dumps could not write
LONG_NUMBER = "@@long@@"
JUNK = [None, True, False, -1, 0, 1, 2, 7, 2**31, 2**32, 2**63, 2**64, -2**63, 10**12, 10**400, math.inf, -math.inf, math.nan, -0.0,
        0.5, -0.5, 1.5, 1e-320, 1e308, "", " ", "x", "0", "-1", "true", "null", "a\nb", "\x00", "\x1b[31m", "\ud800", "é" * 9, "漢字",
        "x" * 100_000, "../../etc/passwd", "/dev/null", "<|im_end|>", "{question}", "{", "%s", "(a+)+$", "(", "[]", [], [None], [[]], [0],
        [-1], [2**63], [True], [1.5], [""], ["x"], [[1]], [{}], {}, {"": None}, {"x": 5}, {"a": {"b": []}}, {"content": 0},
        {"role": {}, "content": 3}, [1] * 5000, DEEP, LONG_NUMBER, LONG_NUMBER[2:]]
BYTES = [b"", b"\xff", b"\x00", b'"', b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\r", b"-", b"9999999999", b"1e999", b"NaN", b"null",
         b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"[" * 50_000, b"-" * 5000, b"\xf0\x9f\x92\xa9", b"Infinity", b" "]


def places(value, way=()):
    """The ways to all values within a JSON value."""
    found = [way]
    inner = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list) and len(value) <= 64:
        inner = list(enumerate(value))
    elif isinstance(value, list):  # of many alike some
        inner = [(i, value[i]) for i in (0, 1, len(value) // 2, len(value) - 1)]
    for key, member in inner:
        found += places(member, (*way, key))
    return found


def junk(rng, value=None):
    """Another value: anything at all, one of the same type, or a neighbour of this one."""
    chance = rng.random()
    if chance > 0.7:
        alike = [other for other in JUNK if type(other) is type(value)]
        if type(value) is int:
            alike += [3, 4, 8, 16, 100, 1024]
        if type(value) is float:
            alike += [0.0, 0.1, 1.0, 2.0, 100.0, 1e-6]
        return copy.deepcopy(rng.choice(alike or JUNK))
    if type(value) in (int, float) and chance < 0.3 and abs(value) < 1e300:
        near = [-value, value + 1, value - 1, value * 2, value + 0.5, value * 1000, str(value), [value], bool(value)]
        return rng.choice(near)
    if isinstance(value, str) and chance < 0.3:
        return rng.choice([value + value, value[:-1], value.upper(), value + "\n", [value], {"content": value}, value + "\ud800", " " + value])
    if isinstance(value, list) and value and chance < 0.3:
        return rng.choice([value[:-1], value + value[:1], value[::-1], [value], dict(enumerate(value[:9])), value[0]])
    return copy.deepcopy(rng.choice(JUNK))


def changed(rng, value, times=None):
    """A JSON value with some of its parts replaced, removed, added or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(times or rng.choice([1, 1, 1, 2, 3])):
        way = rng.choice(places(value))
        if not way:
            if rng.random() < 0.1:
                return junk(rng, value)
            continue
        holder = value
        for step in way[:-1]:
            holder = holder[step]
        last = way[-1]
        what = rng.random()
        if what < 0.15:
            del holder[last]
        elif what < 0.2 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "\ud800", "a\nb", "id", "x" * 5000])] = junk(rng, holder[last])
        elif what < 0.25:
            other = value
            for step in rng.choice(places(value)):
                other = other[step]
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = junk(rng, holder[last])
    return value


def text_of(rng, value):
    """A JSON value as text, now and then in a way that json.dumps has not."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    if DEEP in text:
        n = rng.choice([50, 900, 3000, 100_000])
        text = text.replace(json.dumps(DEEP), rng.choice(["[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n]))
    text = text.replace(json.dumps(LONG_NUMBER), "9" * 5000)
    if rng.random() < 0.05:  # a key twice
        text = text.replace('{"', '{"' + rng.choice(["id", "x", "model_type", "chunks", "question"]) + '": null, "', 1)
    return text


def bytes_of(rng, value):
    """A JSON value as bytes: as it is, with bytes changed, or nothing of it."""
    content = text_of(rng, value).encode("utf-8", "surrogatepass")
    return damaged(rng, content) if rng.random() < 0.25 else content


def damaged(rng, content):
    """Bytes cut short, turned, put in, taken out, doubled; now and then others altogether."""
    content = bytearray(content)
    if rng.random() < 0.05:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 300]))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del content[at:]
        elif kind == 1 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at:at] = rng.choice(BYTES)
        elif kind == 3:
            del content[at:at + rng.choice([1, 2, 8, 100])]
        else:
            content[at:at + rng.choice([0, 1, 3])] = rng.choice([rng.choice(BYTES), bytes(content[at:at + 40])])
    return bytes(content)


# ---------------------------------------------------------------------------------------- what is whole

class World:
    """A folder with a small model and all that belongs to it; one for a process."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.model = f"{folder}/model"
        self.adapter = f"{folder}/adapter"
        self.work = f"{folder}/work"
        torch.manual_seed(0)
        config = read_config(f"{TINY}/config.json")
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "head_dim": 8}
        for key, value in small.items():
            setattr(config, key, value)
        model = Llama(config).eval()
        save_pretrained(model, self.model, tokenizer=TINY)
        self.config = read_json(f"{self.model}/config.json")
        self.weights = Path(f"{self.model}/model.safetensors").read_bytes()
        self.tokenizer = load_tokenizer(TINY)
        self.lora = {"lora_r": 2, "lora_alpha": 4, "lora_targets": "q_proj,v_proj", "train_also": "norm"}
        model.train_only(**self.lora)
        save_adapter(model, self.adapter, self.model, self.lora)
        self.adapter_config = read_json(f"{self.adapter}/adapter_config.json")
        self.words = [f"model={self.model}", f"examples={TINY}/world.py", f"out={folder}/out"]
        self.cfg = load_config([str(ROOT / "configs" / "tiny.py"), *self.words, "lora_r=2", "lora_targets=q_proj,v_proj",
                                "train_also=norm", "window=256", "n_chunks=4", "held_out=0"])
        self.network = load_pretrained(self.model).eval()
        self.make_checkpoint(model)
        self.tokenizer_files = {name: read_json(f"{TINY}/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}
        self.world_rows = self.rows_of_pairs()

    def make_checkpoint(self, model):
        """A step_ folder as one process writes it."""
        self.step = f"{self.folder}/step_000002"
        os.makedirs(self.step)
        tensors = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                zeros, more = torch.zeros(p.shape), torch.zeros(p.shape)
                tensors.update(stored_tensors(name, p.detach(), {"exp_avg": zeros, "exp_avg_sq": more}))
        write_tensors(tensors, f"{self.step}/{shard_name(0, 1)}")
        self.state = {"step": 2, "config": {**self.cfg, "name": "tiny"}, "before": {}, "held_out": {"loss": 1.0}, "pairs": "x",
                      "skipped": [], "updates": 2, "processes": 1, "torch": "x",
                      "shards": {shard_name(0, 1): sha256(f"{self.step}/{shard_name(0, 1)}")}}

    def rows_of_pairs(self):
        """The header and two lines of a pairs' file."""
        tokenizer = self.tokenizer
        groups = default_groups()
        settings = {key: self.cfg[key] for key in groups["build"]}
        settings.update(model=self.model, adapter="", examples="x", dtype="float32", tokenizer=tokenizer.digest, corpus_size=0)
        chunks = [tokenizer.encode(text) for text in (" Rosa paints in Naples.", " Snow falls in Turin.")]
        audit = {"chosen_right": True, "chosen_saw_evidence": True, "rejected_right": [False, False],
                 "rejected_saw_evidence": [False, True], "evidence": ["irrelevant", "near misses"],
                 "error": ["hallucination", "unfollowing"], "length_ratio": 0.5, "overlap": [0.25, 0.0]}
        row = {"id": 0, "document": 0, "question": " Who is Rosa?", "answers": [" Naples"], "chunks": chunks, "scores": [1, 0],
               "chosen": " Rosa paints.", "rejected": [" Ida sings.", " Snow falls."], "audit": audit}
        ready = {"id": 2, "document": 1, "question": None, "answers": [], "system": "You paint.", "chunks": chunks, "scores": [0, 0],
                 "chosen": " yes.", "rejected": [" no.", " perhaps."]}
        return [{"settings": settings}, row, {"id": 1, "dropped": "chosen wrong"}, ready]

    def fresh(self):
        """An empty folder for one input."""
        shutil.rmtree(self.work, ignore_errors=True)
        os.makedirs(self.work)
        return self.work

    def model_folder(self, **files):
        """A copy of the model by links, some of its files as given (None: missing)."""
        folder = f"{self.fresh()}/model"
        os.makedirs(folder)
        for name in os.listdir(self.model):
            if name not in files:
                os.symlink(f"{self.model}/{name}", f"{folder}/{name}")
        for name, content in files.items():
            if content is not None:
                Path(folder, name).write_bytes(content)
        return folder


# ---------------------------------------------------------------------------------------- categories

def finite_everywhere(found, where):
    """Numbers of a result: none is NaN, infinite or below zero."""
    if isinstance(found, dict):
        for key, value in found.items():
            finite_everywhere(value, f"{where} {key}")
    elif isinstance(found, (list, tuple)):
        for value in found:
            finite_everywhere(value, where)
    elif isinstance(found, (int, float)):
        sane(math.isfinite(found) and found >= 0, where, found)


def settings_are_sane(cfg):
    """Of accepted settings: types as in default.py, no number that is none; then what a run does with them at its start."""
    check_settings(cfg)
    for group in default_groups().values():
        for key, default in group.items():
            sane(type(cfg[key]) is type(default), key, cfg[key])
            if type(default) in (int, float):
                sane(math.isfinite(cfg[key]) and (cfg[key] >= 0 or key == "delta"), key, cfg[key])


def use_settings(world, cfg):
    settings_are_sane(cfg)
    check_training(cfg, 1)
    guard.check_evals(cfg["evals"], read_command)
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    data.check_fit(cfg, tokenizer)
    with torch.device("meta"):
        model = Llama(read_config(os.path.join(cfg["model"], "config.json")))
        model.config.extend(cfg["window"], cfg["rope_theta"], cfg["yarn_factor"])
        model.train_only(cfg["lora_r"], cfg["lora_alpha"], cfg["lora_targets"], cfg["train_also"])
    frequencies, scale = rope_frequencies(model.config)
    sane(bool(torch.isfinite(frequencies).all()) and math.isfinite(scale), "frequencies", cfg["rope_theta"], cfg["yarn_factor"])
    sane(bool((frequencies > 0).all()), "frequencies", cfg["rope_theta"], cfg["yarn_factor"])
    if cfg["window"] > 2**17 or cfg["draws"] > 2**10:  # a permutation of these takes its time
        return
    pair = {"id": 3, "chunks": [[5, 6, 7]] * 2, "question": " Who?", "chosen": " yes.", "rejected": [" no."] * min(cfg["n_rejected"], 9)}
    batch = data.encode_group(pair, tokenizer, {**cfg, "n_rejected": len(pair["rejected"])}, draw=cfg["draws"] - 1)
    sane(0 <= batch.positions.min() and batch.positions.max() < cfg["window"], "positions")


def value_for(rng, default):
    """A value for a key, as Python would write it."""
    value = junk(rng, default)
    if value == DEEP:
        return rng.choice(["[" * 300 + "]" * 300, "(" * 5000, "-" * 5000 + "1", "[" * 100_000])
    if value == LONG_NUMBER:
        return "9" * 5000
    if isinstance(value, float) and not math.isfinite(value):
        return rng.choice(["1e400", "-1e400", "float('nan')", "nan"])
    text = repr(value)
    if rng.random() < 0.1:
        text = rng.choice(["{1: 2}", "{[]: 1}", "{[]:1}", "10**14", "1_000", "0x10", "1j", "b'x'", "...", "(1,)", "{1}", "'", "lambda: 0",
                           "__import__('os')", "f'{1}'", "1e5", "1e", "-", "~1", "True", "None", "''", '"a" "b"', "[1][0]"])
    return text


def words_for(rng, options, most=3):
    """key=value words for some of these options, or words that are none."""
    words = []
    for _ in range(rng.randint(1, most)):
        key = rng.choice(list(options))
        value = value_for(rng, options[key])
        if isinstance(options[key], str) and rng.random() < 0.7:
            value = str(junk(rng, options[key]))
        word = f"{key}={value}"
        if rng.random() < 0.05:
            word = rng.choice([key, f"{key}", f"={value}", f"{key}x=1", f"{key.upper()}=1", "", "=", "\ud800=1", f"{key}==1", f" {key}=1"])
        words.append(word)
    return words


def try_words(world, rng):
    every = {}
    for group in default_groups().values():
        every.update(group)
    words = words_for(rng, every)
    cfg = load_config([str(ROOT / "configs" / rng.choice(["tiny.py"] * 18 + ["default.py", "smollm2.py"])), *world.words, *words])
    use_settings(world, cfg)


def try_config(world, rng):
    every = {}
    for group in default_groups().values():
        every.update(group)
    items = [f"    {key!r}: {value!r},\n" for key, value in world.cfg.items() if key != "name"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice(list(every))
        items.append(f"    {rng.choice([repr(key)] * 9 + ['1', 'None', repr(key + 'x'), '()'])}: {value_for(rng, every[key])},\n")
    content = "config = {\n" + "".join(items) + "}\n"
    content = content.encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        content = damaged(rng, content)
    name = rng.choice(["c.py"] * 30 + ["c.json", "c", "c.PY"])
    path = Path(world.fresh(), name)
    path.write_bytes(content)
    use_settings(world, load_config([str(path)]))


def try_pairs(world, rng):
    rows = copy.deepcopy(world.world_rows)
    if rng.random() < 0.15:
        rows[0] = changed(rng, rows[0])
    else:
        at = rng.choice([1, 1, 3])
        rows[at] = changed(rng, rows[at])
    content = b"\n".join(text_of(rng, row).encode("utf-8", "surrogatepass") for row in rows) + b"\n"
    if rng.random() < 0.2:
        content = damaged(rng, content)
    path = f"{world.fresh()}/p.jsonl"
    Path(path).write_bytes(content)
    use_pairs(world, rng, path)


def use_pairs(world, rng, path):
    """Load to a forward pass, then stats, show and convert; each on its own, since each reads the file."""
    refused = []

    def part(work, *arguments):
        try:
            return work(*arguments)
        except BadInput as e:
            # Of an id that is none, and of a setting that may be of the file, the config or the command line.
            one_line(e, "" if str(e).startswith("expected: python -m pairs show") or work is preferences.settings_of else path)
            refused.append(e)

    pairs = part(data.load_pairs, path, world.cfg, world.tokenizer)
    if pairs:
        groups = [data.encode_group(pair, world.tokenizer, world.cfg, draw=1) for pair in pairs]
        batch = data.collate(groups)
        sane(0 <= batch.tokens.min() and batch.tokens.max() < world.tokenizer.vocab_size, "tokens")
        sane(0 <= batch.positions.min() and batch.positions.max() < world.cfg["window"], "positions")
        scored = batch.targets[batch.targets != IGNORE]
        sane(len(scored) and 0 <= scored.min() and scored.max() < world.tokenizer.vocab_size, "targets")
        data.split_pairs(pairs, 1)
        if rng.random() < 0.1:
            with torch.no_grad():
                sums, lengths = world.network(batch.tokens, batch.positions, batch.targets, batch.segments)
            sane(bool(torch.isfinite(sums).all()) and bool((lengths > 0).all()), "log-probs")
    part(stats, [path])
    part(show, [path, rng.choice(["0", "0", "2", "1", "-1", "x", "²", "9" * 5000])])
    part(preferences.settings_of, {**preferences.OPTIONS, "pairs": path, "config": str(ROOT / "configs" / "tiny.py")})
    if rng.random() < 0.3:
        out = f"{world.work}/trl.jsonl"
        part(convert.convert, [rng.choice(list(convert.TO_TRL)), path, out])
        whole_or_nothing(out)
    if rng.random() < 0.3:
        part(read_built, path)
    if refused:
        raise refused[0]


def whole_or_nothing(out):
    """A file of whole JSON lines, or none; nothing beside it."""
    sane(not os.path.exists(out + ".tmp"), "half a file is left:", out + ".tmp")
    if os.path.exists(out):
        for line in Path(out).read_text("utf-8").splitlines():
            sane(isinstance(json.loads(line), dict), "a line of the output:", line)


def try_model_config(world, rng):
    config = dict(world.config)
    if rng.random() < 0.3:
        config["rope_scaling"] = rng.choice([
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1, "truncate": True,
             "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": None},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
            {"type": "linear", "factor": 2.0}])
    if rng.random() < 0.1:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if rng.random() < 0.1:
        config["model_type"] = rng.choice(["mistral", "qwen2", "qwen3"])
    folder = world.model_folder(**{"config.json": bytes_of(rng, changed(rng, config))})
    use_model(world, rng, folder)


def use_model(world, rng, folder, finite=True):
    try:
        model = load_pretrained(folder).eval()
    except BadInput as e:
        raise one_line(e, folder) from e
    frequencies, scale = rope_frequencies(model.config)
    sane(bool(torch.isfinite(frequencies).all()) and math.isfinite(scale) and scale > 0, "frequencies", frequencies, scale)
    if finite:
        with torch.no_grad():
            logits = model.logits(torch.tensor([[3, 4, 5, 6]]))
        sane(bool(torch.isfinite(logits).all()), "logits")
    # What is written again is what was read.
    path = f"{world.work}/again.json"
    write_json(config_json(model.config), path)
    again = read_config(path)
    again.raw = model.config.raw
    known = {"rope_type", "rope_theta", "factor", *ROPE_NUMBERS["llama3"], *YARN_NUMBERS, "truncate"}
    for config in (again, model.config):  # what is no key of anything says nothing, and need not last
        config.rope = {key: value for key, value in config.rope.items() if key in known and value is not None}
    sane(again == model.config, "config.json does not come back:", model.config.rope, again.rope)
    model.config.extend(1024, 0.0, rng.choice([0.0, 8.0]))
    frequencies, scale = rope_frequencies(model.config)
    sane(bool(torch.isfinite(frequencies).all()) and math.isfinite(scale), "frequencies of a longer window")


def try_adapter(world, rng):
    folder = f"{world.fresh()}/adapter"
    shutil.copytree(world.adapter, folder)
    kind = rng.random()
    if kind < 0.7:
        Path(folder, "adapter_config.json").write_bytes(bytes_of(rng, changed(rng, world.adapter_config)))
    elif kind < 0.85:
        path = Path(folder, "adapter_model.safetensors")
        path.write_bytes(hostile_safetensors(rng, path.read_bytes()))
    else:
        Path(folder, "config.json").write_bytes(bytes_of(rng, changed(rng, read_json(f"{folder}/config.json"))))
    found = read_adapter(folder, read_config(f"{world.model}/config.json"))
    sane(found["lora_r"] > 0 and found["lora_alpha"] > 0 and math.isfinite(found["lora_alpha"]), found)
    load_pretrained(world.model, adapter=folder)
    if rng.random() < 0.1:
        merge(folder, f"{world.work}/merged")
        load_pretrained(f"{world.work}/merged")


def hostile_safetensors(rng, content):
    """A safetensors file of other tensors, with another header, or with bytes changed anywhere."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    kind = rng.random()
    if kind < 0.4:
        return safetensors.torch.save(other_tensors(rng, safetensors.torch.load(content)))
    if kind < 0.75:
        text = bytes_of(rng, changed(rng, header))
        length = len(text) if rng.random() < 0.8 else rng.choice([0, 1, size, 2**31, 2**63, 2**64 - 1, len(text) + 8])
        return struct.pack("<Q", length) + text + content[8 + size:]
    return damaged(rng, content)


def other_tensors(rng, tensors):
    """Tensors as a whole file may hold them: of other shapes, numbers and names, too many, too few."""
    name = rng.choice(list(tensors))
    tensor = tensors[name].clone()
    others = [tensor.to(torch.bfloat16), tensor.double(), tensor.half(), tensor.to(torch.int8), tensor > 0, tensor[:0], tensor[..., :0],
              tensor[1:], tensor[None], tensor.flatten(), torch.tensor(1.0), tensor.repeat(2, *[1] * (tensor.ndim - 1)),
              torch.full_like(tensor, math.nan), tensor.to(torch.float8_e4m3fn), tensor.to(torch.complex64)]
    tensors[rng.choice([name, name, name, name + ".x", "", "a\nb", "lm_head.weight", "\x1b[31m", "x" * 3000])] = rng.choice(others).contiguous()
    if rng.random() < 0.2:
        del tensors[rng.choice(list(tensors))]
    return tensors


def try_safetensors(world, rng):
    # Numbers within the body may be anything: there is no digest of what comes from elsewhere.
    use_model(world, rng, world.model_folder(**{"model.safetensors": hostile_safetensors(rng, world.weights)}), finite=False)


def try_index(world, rng):
    size = struct.unpack("<Q", world.weights[:8])[0]
    names = [name for name in json.loads(world.weights[8:8 + size]) if name != "__metadata__"]
    whole = {"metadata": {}, "weight_map": {name: "model-1.safetensors" for name in names}}
    if rng.random() < 0.3:
        whole["weight_map"][rng.choice(names)] = rng.choice(["model.safetensors", "a\nb.safetensors", "..safetensors", "/x.safetensors",
                                                              "\ud800.safetensors", "nothing.safetensors", "x" * 300 + ".safetensors"])
    index = bytes_of(rng, whole if rng.random() < 0.2 else changed(rng, whole))
    folder = world.model_folder(**{"model.safetensors": None, "model.safetensors.index.json": index})
    os.symlink(f"{world.model}/model.safetensors", f"{folder}/model-1.safetensors")
    use_model(world, rng, folder)


TEXTS = ["", " Rosa paints in Naples.", "<|im_end|> 123 \t\n\n é 漢字 \x00 " + "x" * 50, " " * 30 + "'s don't"]


def try_tokenizer(world, rng):
    files = {name: json.dumps(found).encode() for name, found in world.tokenizer_files.items()}
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": "x", "model_max_length": 128, "bos_token_id": 549,
              "eos_token_id": [550], "pad_token_id": 1, "added_tokens_decoder": {"549": {"content": "<|bos|>", "special": True}}}
    kind = rng.random()
    if kind < 0.55:
        spec = world.tokenizer_files["tokenizer.json"]
        if rng.random() < 0.4:  # what stands around the words, which would take nearly all changes else
            around = changed(rng, {**{key: value for key, value in spec.items() if key != "model"},
                                   "pre_tokenizer": rng.choice([spec["pre_tokenizer"], SPLITS]), "normalizer": rng.choice([None, {"type": "NFC"}])})
            spec = {**around, "model": spec["model"]} if isinstance(around, dict) else around
        else:
            spec = changed(rng, spec)
        files["tokenizer.json"] = bytes_of(rng, spec)
    elif kind < 0.8:
        files[rng.choice(["tokenizer_config.json", "generation_config.json"])] = bytes_of(rng, changed(rng, config))
    elif kind < 0.9:
        files["chat_template.jinja"] = rng.choice([damaged(rng, b"{{ messages }} <|im_start|>assistant <think> " * 3), rng.randbytes(40)])
    else:
        files["tokenizer.model"] = rng.choice([rng.randbytes(200), damaged(rng, b"IQ== 0\nIg== 1\n"), damaged(rng, sentencepiece_model())])
    folder = f"{world.fresh()}/t"
    os.makedirs(folder)
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    try:
        use_tokenizer(world, rng, folder)
    except BadInput as e:
        raise one_line(e, folder if "unknown template" not in str(e) else "") from e


SPLITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                {"type": "Split", "pattern": {"Regex": r"\p{L}+| ?[^\s]"}, "behavior": "Isolated", "invert": False},
                                                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def sentencepiece_model():
    path = ROOT / "tests" / ".cache" / "sp.model"
    return path.read_bytes() if path.exists() else b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


def use_tokenizer(world, rng, folder):
    tokenizer = load_tokenizer(folder, rng.choice(["auto", "auto", "plain", "chatml", "nothing"]))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        sane(all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids), "ids", ids[:9], tokenizer.vocab_size)
        sane(isinstance(tokenizer.decode(ids), str), "decoded")
    prefix, suffix, stops = tokenizer.chat("a ", " b", rng.choice([None, "", "be brief"]))
    sane(all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in prefix + suffix + stops), "chat", prefix, suffix, stops)
    chats = chats_of(folder, "auto")
    out = f"{world.work}/out"
    os.makedirs(out)
    write_config(world.network, out, torch.float32, chats)
    for name in os.listdir(out):
        if name in ("generation_config.json", "config.json"):
            read_json(f"{out}/{name}")
    load_tokenizer(out)


def try_state(world, rng):
    folder = f"{world.fresh()}/step_000002"
    os.makedirs(folder)
    shard = shard_name(0, 1)
    content = Path(world.step, shard).read_bytes()
    state = changed(rng, world.state)
    signed = rng.random() < 0.8
    if rng.random() < 0.2:
        content = hostile_safetensors(rng, content)
    Path(folder, shard).write_bytes(content)
    if isinstance(state, dict) and signed:
        # As if somebody had changed it and signed it anew.
        if isinstance(state.get("shards"), dict) and shard in state["shards"]:
            state["shards"][shard] = sha256(f"{folder}/{shard}")
        text = json.dumps(state)
        state = {**state, "sha256": sha256_of_json(json.loads(text))}
    Path(folder, "state.json").write_bytes(bytes_of(rng, state))
    try:
        found = read_state(folder)
    except BadInput as e:
        raise one_line(e, folder) from e
    guard.check_resumable(folder, found, world.cfg)
    try:
        model, _, _ = load_trained(folder, world.model if rng.random() < 0.5 else "")
    except BadInput as e:
        raise one_line(e) from e
    frequencies, scale = rope_frequencies(model.config)
    sane(bool(torch.isfinite(frequencies).all()) and math.isfinite(scale), "frequencies")


ROWS = [
    {"context": "Rosa paints in Naples. Snow falls in Turin. Ida sings in Rome all day.", "question": "Who is Rosa?", "answers": ["Naples"]},
    {"context": ["Rosa paints in Naples.", "Snow falls in Turin.", "Ida sings."], "question": "Who is Rosa?", "answer": "a painter"},
    {"question": "Who paints?", "answers": ["Rosa"], "title": "Naples", "text": "Rosa paints in Naples."},
    {"question": "Who sings?", "answers": ["Ida"], "title": "", "text": "Ida sings in Rome."},
    {"text": "Rosa paints in Naples. Snow falls in Turin. " * 6},
    {"prompt": "Who is Rosa?", "system": "You paint.", "chosen": "A painter.", "rejected": ["Nobody.", "A singer."]},
    {"prompt": "Who is Rosa?", "chosen": "A painter.", "rejected": "Nobody."},
]


def try_corpus(world, rng):
    rows = [copy.deepcopy(rng.choice(ROWS)) for _ in range(rng.randint(1, 4))]
    at = rng.randrange(len(rows))
    rows[at] = changed(rng, rows[at])
    lines = rng.random() < 0.7
    if lines:
        content = b"\n".join(text_of(rng, row).encode("utf-8", "surrogatepass") for row in rows) + b"\n"
    else:
        content = text_of(rng, rows).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        content = damaged(rng, content)
    name = rng.choice(["c.jsonl", "c.json", "c.txt"] if lines else ["c.json"])
    if rng.random() < 0.15:
        import gzip
        name, content = name + ".gz", gzip.compress(content, 1)
        if rng.random() < 0.6:
            content = damaged(rng, content)
    path = Path(world.fresh(), name)
    path.write_bytes(content)
    path = str(path) if rng.random() < 0.8 else world.work
    use_corpus(world, rng, path)


def use_corpus(world, rng, path):
    cfg = {**world.cfg, "examples": path, "n_examples": 0, "strict": rng.random() < 0.3, "fresh_questions": 1, "context_size": rng.choice([1, 2])}
    corpus.open_corpus.cache_clear()
    try:
        examples = corpus.read_examples(cfg, "train")
    except BadInput as e:
        raise one_line(e, path if "context of" not in str(e) else "") from e
    for i in range(len(examples)):
        new = draft(cfg, world.tokenizer, data.words_evaluator, i, examples[i])
        sane(type(new.row["document"]) is int, "document", new.row["document"])
        sane(all(isinstance(answer, str) for answer in new.row["answers"]), "answers", new.row["answers"])
    with contextlib.suppress(BadInput):
        corpus.read_examples(cfg, "fresh")
    with contextlib.suppress(BadInput):
        texts(path)


def try_generated(world, rng):
    """A corpus that a user's Python file makes."""
    rows = [changed(rng, rng.choice(ROWS[:2])) for _ in range(2)]
    found = rng.choice([f"return {rows!r}", f"yield from {rows!r}", "return 3", "yield", "return None", "raise OSError('x')", "return [0]"])
    if rng.random() < 0.7:
        found = f"return {rows!r}"
    head = rng.choice(["from math import nan, inf\ndef examples(count, size, seed):\n    "] * 9
                      + ["def examples():\n    ", "examples = 3\n    ", "def examples(count, size, seed):\n"])
    path = Path(world.fresh(), "made.py")
    path.write_bytes((head + found + "\n").encode("utf-8", "surrogatepass"))
    cfg = {**world.cfg, "examples": str(path), "n_examples": 2, "fresh_questions": 2}
    try:
        for split in ("train", "fresh"):
            for i, example in enumerate(corpus.read_examples(cfg, split)):
                draft(cfg, world.tokenizer, data.words_evaluator, i, example)
    except BadInput as e:
        raise one_line(e, str(path)) from e


CONVERTIBLE = {
    "trl": [{"prompt": "Who?", "chosen": "Rosa.", "rejected": "Ida."},
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Who?"}],
             "chosen": [{"role": "assistant", "content": "Rosa."}], "rejected": [{"role": "assistant", "content": "Ida."}]},
            {"chosen": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Rosa."}],
             "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ida."}]}],
    "longalpaca": [{"instruction": "Below is a paper.\nText of it.\n\nWho?", "input": "", "output": "Rosa."}],
    "long-llm-data": [{"conversations": [{"role": "user", "content": "Text.\n\nWho?"}, {"role": "assistant", "content": "Rosa."},
                                         {"from": "human", "value": "And?"}, {"from": "gpt", "value": "Ida."}]}],
}


def try_convert(world, rng):
    form = rng.choice(["trl", "trl", "longalpaca", "long-llm-data"])
    rows = [changed(rng, rng.choice(CONVERTIBLE[form])) if rng.random() < 0.7 else rng.choice(CONVERTIBLE[form]) for _ in range(3)]
    content = b"\n".join(text_of(rng, row).encode("utf-8", "surrogatepass") for row in rows) + b"\n"
    if rng.random() < 0.15:
        content = damaged(rng, content)
    path, out = f"{world.fresh()}/in.jsonl", f"{world.work}/out.jsonl"
    Path(path).write_bytes(content)
    try:
        convert.convert([form, path, out])
    finally:
        whole_or_nothing(out)
    for line in Path(out).read_text("utf-8").splitlines():
        corpus.example_of(json.loads(line))


class Silent:
    """A subject of an evaluation that says nothing, at once."""
    name = folder = "silent"
    batch_tokens = 0

    def __init__(self, world):
        self.tokenizer = world.tokenizer
        self.config = world.network.config
        self.model = world.network

    def prompt(self, context, head, tail):
        prefix, suffix, _ = self.tokenizer.chat(head, tail)
        ids = self.tokenizer.encode(context)
        return prefix + ids + suffix, range(len(prefix), len(prefix) + len(ids))

    def answers(self, prompts, shared, max_new_tokens, look=None):
        return ["" for _ in prompts]


SMALL = {"needle": {"samples": 1, "lengths": [64], "depths": [50]}, "qa": {"questions": 2, "passages": [1]},
         "perplexity": {"lengths": [16, 32], "stride": 8, "tokens": 64, "truncated": 8}, "preferences": {}}


def try_options(world, rng):
    name = rng.choice(list(SMALL))
    module = {"needle": needle, "qa": qa, "perplexity": perplexity, "preferences": preferences}[name]
    folder = world.fresh()
    paths = {"examples": f"{folder}/c.jsonl", "text": f"{folder}/t.txt", "pairs": f"{folder}/p.jsonl", "config": str(ROOT / "configs" / "tiny.py")}
    Path(paths["examples"]).write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    Path(paths["text"]).write_text("Rosa paints in Naples. " * 40)
    Path(paths["pairs"]).write_text("".join(json.dumps(row) + "\n" for row in world.world_rows))
    words = [f"{key}={value}" for key, value in {**SMALL[name], **paths}.items() if key in module.OPTIONS]
    words += words_for(rng, module.OPTIONS, 2)
    _, _, options = read_command([name, world.model, *words])
    size = 1
    for key in ("samples", "lengths", "depths", "passages", "tokens", "max_new_tokens"):
        value = options.get(key, 1)
        size *= max(1, *value) * len(value) if isinstance(value, list) else min(value, 64)
    if size > 5_000_000 or options["compare"] or options.get("evaluator") or options.get("retrieval"):
        return
    result = module.measure([Silent(world)], options)
    if name == "preferences":
        sane(all(math.isfinite(value) for row in result["table"] for key, value in row.items() if key != "model"), "table")
    else:
        finite_everywhere(result["table"], name)


def try_plan(world, rng):
    every = {**default_groups()["build"], **default_groups()["train"], **default_groups()["run"]}
    words = words_for(rng, plan.OPTIONS if rng.random() < 0.7 else every, 2)
    own, config = split_words(plan.OPTIONS, [str(ROOT / "configs" / rng.choice(["tiny.py"] * 19 + ["llama3_8b_80k.py"])), *world.words, *words])
    options = with_arguments(plan.OPTIONS, own)
    table = plan.run(options, config)
    finite_everywhere(table, "plan")


def try_metrics(world, rng):
    """metrics.jsonl where a run goes on."""
    rows = [{"step": i, "loss": 1.0, "seconds": 0.1} for i in range(1, 4)]
    at = rng.randrange(3)
    rows[at] = changed(rng, rows[at])
    content = b"\n".join(text_of(rng, row).encode("utf-8", "surrogatepass") for row in rows) + b"\n"
    if rng.random() < 0.3:
        content = damaged(rng, content)
    folder = world.fresh()
    Path(folder, "metrics.jsonl").write_bytes(content)
    try:
        report.keep_metrics(folder, 2)
    except BadInput as e:
        raise one_line(e, folder) from e
    finally:
        sane(not os.path.exists(f"{folder}/metrics.jsonl.tmp"), "half a file is left")
    if rng.random() < 0.005:
        curves.draw_curves(folder)


CATEGORIES = {
    "words": try_words,
    "config": try_config,
    "pairs": try_pairs,
    "model_config": try_model_config,
    "adapter": try_adapter,
    "safetensors": try_safetensors,
    "index": try_index,
    "tokenizer": try_tokenizer,
    "state": try_state,
    "corpus": try_corpus,
    "generated": try_generated,
    "convert": try_convert,
    "options": try_options,
    "plan": try_plan,
    "metrics": try_metrics,
}


# ---------------------------------------------------------------------------------------- the judge

def one_line(error, where=""):
    """The error itself, if it is one line of a readable length that names the file."""
    text = str(error)
    sane(text and text.isprintable() or all(c.isprintable() or "\udc80" <= c <= "\udcff" or "\ud800" <= c for c in text),
         "not one printable line:", repr(text[:200]))
    sane(len(text) <= LONGEST, "a line of", len(text), "characters:", text[:80])
    sane(where in text, "does not name", where, ":", text[:200])
    return error


def on_alarm(number, frame):
    raise Hang(f"longer than {SECONDS} s")


def alarms(busy, waiting):
    """After so many seconds of CPU time, and so many in all (0: never)."""
    # By CPU time, since a machine at work on other things makes anything slow.
    signal.setitimer(signal.ITIMER_PROF, busy)
    signal.setitimer(signal.ITIMER_REAL, waiting)


@contextlib.contextmanager
def limits():
    """An alarm for hangs; no more memory than an input may ask for."""
    before = {number: signal.signal(number, on_alarm) for number in (signal.SIGALRM, signal.SIGPROF)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(world, category, seed, i):
    """"accepted" or "refused" of an input; the finding as an exception."""
    rng = random.Random(f"{category} {seed} {i}")
    alarms(SECONDS, WAITING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # numpy's, of a mean of nothing: a NaN is on its way
            CATEGORIES[category](world, rng)
        return "accepted"
    except BadInput as error:
        one_line(error)
        return "refused"
    finally:
        alarms(0, 0)


def place_of(error):
    """Where a finding comes from: its kind, and the last line of ours that it went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT)) and "/tests/" not in frame.filename]
    frames = frames or traceback.extract_tb(error.__traceback__)[-1:]
    last = frames[-1]
    said = " ".join(str(error).split())[:90] if isinstance(error, Nonsense) else ""
    return f"{type(error).__name__} at {os.path.relpath(last.filename, ROOT)}:{last.lineno} {said}".strip()


def fuzz(world, category, n, seed=0, until=math.inf):
    """({outcome: how many}, {place: (how many, first i, message)}) of n inputs."""
    counts, found = Counter(), {}
    with limits():
        for i in range(n):
            if time.monotonic() > until:
                break
            if i % 500 == 0:  # for what no alarm can end: a library's own loop
                faulthandler.dump_traceback_later(900, exit=True)
            try:
                counts[outcome(world, category, seed, i)] += 1
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a Rust panic is none of Exception
                counts["found"] += 1
                where = place_of(error)
                many, first, said = found.get(where, (0, i, f"{type(error).__name__}: {str(error)[:200]}"))
                found[where] = (many + 1, first, said)
        faulthandler.cancel_dump_traceback_later()
    return counts, found


def main(argv):
    category, n, seed = argv[0], argv[1], int(argv[2]) if len(argv) > 2 else 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        world = World(folder)
        if ":" in n:
            with limits():
                print(outcome(world, category, *map(int, n.split(":"))))
            return 0
        worst = 0
        for name in CATEGORIES if category == "all" else category.split(","):
            start = time.monotonic()
            counts, found = fuzz(world, name, int(n), seed)
            took = time.monotonic() - start
            print(f"{name:14} {counts.total():7d} inputs in {took:6.1f} s ({1000 * took / max(1, counts.total()):.1f} ms): "
                  f"{counts['accepted']} accepted, {counts['refused']} refused, {counts['found']} found", flush=True)
            for where, (many, first, said) in sorted(found.items(), key=lambda item: -item[1][0]):
                print(f"    {many:6d}  {where}  as {seed}:{first}  {said!r}", flush=True)
            worst |= bool(found)
        return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
