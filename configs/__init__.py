"""Settings: configs/default.py < the named file < key=value on the command line. Nothing else.

Also what everything stands on: BadInput, the one line that a user sees, and reading files that a
user gave.
"""
import ast
import difflib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

HERE = os.path.dirname(os.path.abspath(__file__))
POSITIONS = ("continuous", "sparse", "pose", "randpos", "none", "mix")

CHOICES = {
    "positions": POSITIONS,
    "dtype": ("float32", "bfloat16"),
    "score_with": ("question", "question+answer"),
    "evaluator": ("words", "spacy"),
    "chosen_from": ("generated", "reference"),
    "endpoint_api": ("chat", "completions"),
    "log": ("", "tensorboard", "wandb", "trackio"),
}
AT_LEAST_ONE = ("n_chunks", "chunk_size", "context_size", "n_rejected", "draws", "batch_size",
                "micro_batch", "build_batch", "keep", "questions",
                "endpoint_requests", "max_new_tokens", "steps", "log_interval", "window")
AT_MOST = {
    "warmup": 1,
    "sparse_share": 1,
    "correct_share": 1,
    # Rotary angles are float32, which holds integers up to here.
    "window": 2 ** 24,
    # Streams are seeded with up to seed * 1,000,003 + id, and PyTorch takes 64 bits.
    "seed": 2 ** 32 - 1,
    # Beyond these it is a slip of the hand, which would end in a lack of memory hours later.
    "lora_r": 4096,
    "rope_theta": 1e15,
    "yarn_factor": 1e6,
    "n_rejected": 1024,
    "draws": 2 ** 16,
    "batch_size": 2 ** 20,
    "threads": 1024,
    "workers": 1024,
    "endpoint_requests": 1024,
}

LONGEST_LINE = 1000  # characters of a message
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class BadInput(ValueError):
    """Something the user gave is wrong. Its message is one line: where, what, what was expected."""

    def __init__(self, message: str):
        # What a message quotes is the user's, or of whoever made a file: a name may hold a line
        # break or a terminal's commands, a value may be a book.
        line = UNPRINTABLE.sub(lambda found: repr(found.group())[1:-1], message)
        if len(line) > LONGEST_LINE:
            half = LONGEST_LINE // 2
            line = f"{line[:half]} ... {line[-half:]}"
        super().__init__(line)


def nearest(word: object, known: Iterable[object]) -> str:
    """", did you mean 'gamma'?", to end a message about a wrong word; "" where none is near."""
    near = difflib.get_close_matches(str(word), [str(each) for each in known], 1)
    return f", did you mean {near[0]!r}?" if near else ""


def exit_on_bad_input(kind, error, trace) -> None:
    """sys.excepthook: bad input (exit code 1) and Ctrl-C are a line, all else has its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return
    if not issubclass(kind, BadInput):
        sys.__excepthook__(kind, error, trace)
        return
    if int(os.environ.get("RANK", 0)) > 0:
        # Mostly rank 0 has met the same: torchrun then ends this process before it repeats that.
        time.sleep(1)
    print(f"error: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- files

def read_json(path: str) -> dict:
    """The JSON object in a file."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: expected a JSON object, found {e}") from e
    if not isinstance(found, dict):
        raise BadInput(f"{path}: expected a JSON object, found {repr(found)[:40]}")
    return found


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn whatever goes wrong while a user's file is read and taken apart into one line.

    For shapes alone: a value that would be taken in silence (a size of True, a scale of NaN) needs
    a check by name.
    """
    try:
        yield
    except BadInput:
        raise
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror or e})") from e
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError,
            RecursionError) as e:
        found = " ".join(str(e).split())
        raise BadInput(f"{path}: not as expected ({type(e).__name__}: {found})") from e


@contextmanager
def saving(path: str) -> Iterator[None]:
    """Turn a disk that is full, or that refuses, into one line."""
    try:
        yield
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror or e})") from e


def write_json(value: Any, path: str) -> None:
    """Write, then rename: a kill leaves the old file or the new one, never half of one."""
    # A lone half of a character, which JSON can spell and UTF-8 has not, is written as it came.
    with open(path + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def run_file(path: str) -> ModuleType:
    """The module that a Python file makes."""
    if not path.endswith(".py"):
        raise BadInput(f"{path}: expected a Python file, as configs/tiny.py")
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location("file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BadInput:
        raise
    except Exception as e:  # the file is the user's: whatever it raises is said in one line
        raise BadInput(f"{path}: {type(e).__name__}: {e}") from e
    return module


# ---------------------------------------------------------------------------------------- settings

def default_groups() -> dict[str, dict]:
    """{"paths", "build", "train", "run"}: the keys of configs/default.py with their defaults."""
    module = run_file(os.path.join(HERE, "default.py"))
    return {name: getattr(module, name) for name in ("paths", "build", "train", "run")}


def config_file(argv: list[str]) -> str:
    """The file of a command line [FILE.py] key=value ...; of one that names none, tiny.py."""
    if argv and "=" not in argv[0]:
        return argv[0]
    return os.path.join(HERE, "tiny.py")


def load_config(argv: list[str]) -> dict:
    """The settings of a command line [FILE.py] key=value ...: every key, and "name", the file's."""
    path = config_file(argv)
    words = argv[1:] if argv[:1] == [path] else argv
    config = {}
    for group in default_groups().values():
        config.update(group)
    if not os.path.exists(path):
        known = [f"configs/{name}" for name in os.listdir(HERE) if name.endswith(".py")]
        raise BadInput(f"{path}: no such file{nearest(path, known)}")
    differences = getattr(run_file(path), "config", None)
    if not isinstance(differences, dict):
        raise BadInput(f"{path}: expected a dict named 'config'")
    for key, value in differences.items():
        config[key] = checked(config, key, value, path)
    beside_lora = config["train_also"] if config["lora_r"] else ""
    config = with_arguments(config, words)
    if not config["lora_r"]:
        # lora_r=0 on the command line is all that it takes to train everything: what a file trains
        # beside its LoRA is then just included. Without LoRA to be beside of, it is a mistake.
        if config["train_also"] not in ("", beside_lora):
            raise BadInput(f"train_also={config['train_also']!r} needs lora_r: at lora_r=0 every "
                           "parameter trains")
        config["train_also"] = ""
    config["name"] = os.path.splitext(os.path.basename(path))[0]
    return config


def with_arguments(config: dict, words: list[str]) -> dict:
    """A config with key=value words of the command line on top."""
    config = dict(config)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise BadInput(f"command line: expected key=value, found {word!r}")
        value = parse(text, config.get(key))
        config[key] = checked(config, key, value, "command line")
    return config


def parse(text: str, default: Any) -> Any:
    """A command-line word as a value. Where the default is text it stays text, as it looks."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


def checked(config: dict, key: str, value: Any, where: str) -> Any:
    """The value of a key, in its default's type. BadInput for an unknown key or another type."""
    if key not in config:
        raise BadInput(f"{where}: unknown key {key!r}{nearest(key, config)}")
    default = config[key]
    expected = type(default)
    if expected is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = float("inf")  # refused below
    if type(value) is not expected:
        raise BadInput(f"{where}: {key} is {value!r}, "
                       f"expected {expected.__name__} like {default!r}")
    if expected in (int, float) and not 0 <= value < float("inf") and key != "delta":
        raise BadInput(f"{where}: {key} is {value!r}, expected a number that is not negative")
    return value


def refuse(key: str, value: Any, expected: str) -> NoReturn:
    raise BadInput(f"{key} is {value!r}, expected {expected}")


def check_settings(cfg: dict) -> None:
    """What can be said of settings alone, before any work. BadInput names the key."""
    for key, allowed in CHOICES.items():
        if cfg[key] not in allowed:
            refuse(key, cfg[key], f"one of {', '.join(allowed)}")
    for key in AT_LEAST_ONE:
        if cfg[key] < 1:
            refuse(key, cfg[key], "at least 1")
    for key, limit in AT_MOST.items():
        if cfg[key] > limit:
            refuse(key, cfg[key], f"at most {limit}")
    for key, value in cfg.items():
        if type(value) is int and abs(value) >= 2 ** 63:  # no array could count so far
            refuse(key, value, "less than 2 ** 63")
    for key in ("beta1", "beta2"):
        if cfg[key] >= 1:
            refuse(key, cfg[key], "less than 1")
    for key in ("grad_clip", "lora_alpha"):
        if not cfg[key]:  # no way to turn it off: every update, or LoRA's part of it, would be 0
            refuse(key, cfg[key], "more than 0")
    # Frequencies are powers of 1 / rope_theta: at 1 all dimensions turn alike.
    if 0 < cfg["rope_theta"] <= 1:
        refuse("rope_theta", cfg["rope_theta"], "0 or more than 1")
    if 0 < cfg["yarn_factor"] < 1:
        refuse("yarn_factor", cfg["yarn_factor"], "0 or at least 1")
    if not 0 < cfg["top_p"] <= 1:
        refuse("top_p", cfg["top_p"], "more than 0 and at most 1")
    if 0 < cfg["candidates"] < cfg["n_rejected"]:
        refuse("candidates", cfg["candidates"], f"0 or at least n_rejected={cfg['n_rejected']}")
    if "{question}" not in cfg["prompt_tail"]:
        refuse("prompt_tail", cfg["prompt_tail"], "a text with {question} in it")
    if not all(type(size) is int and size > 0 for size in cfg["fresh_sizes"]):
        refuse("fresh_sizes", cfg["fresh_sizes"], "a list of context sizes, as [104, 232]")
    if not all(isinstance(text, str) and text.strip() for text in cfg["evals"]):
        refuse("evals", cfg["evals"], 'a list of commands, as ["needle lengths=[512,1024]"]')


def check_training(cfg: dict, processes: int) -> None:
    """What a training run needs beside check_settings, still before any work. BadInput names it."""
    for key in ("model", "adapter"):
        if not os.path.isdir(cfg[key]) and (cfg[key] or key == "model"):
            refuse(key, cfg[key], "a folder")
    if not cfg["examples"]:
        refuse("examples", cfg["examples"], "a corpus: a file or a folder")
    # A run that goes on has its pairs, and may have lost what they were built from.
    if not cfg["resume"] and cfg["examples"] != "-" and not os.path.exists(cfg["examples"]):
        raise BadInput(f"{cfg['examples']}: no such file")
    if os.path.isdir(pairs_path(cfg)):
        refuse("pairs", cfg["pairs"], "a file")
    if 0 < cfg["n_examples"] <= cfg["held_out"]:
        refuse("held_out", cfg["held_out"], f"less than n_examples={cfg['n_examples']}")
    if cfg["held_out"] % processes:
        refuse("held_out", cfg["held_out"], f"a multiple of {processes} processes")
    if cfg["batch_size"] % (processes * cfg["micro_batch"]):
        refuse("batch_size", cfg["batch_size"],
               f"a multiple of {processes} processes x micro_batch={cfg['micro_batch']}")
    if processes % (cfg["shard_size"] or processes):
        refuse("shard_size", cfg["shard_size"], f"a divisor of {processes} processes, or 0")
    if cfg["offload_activations"] and not cfg["checkpointing"]:
        # Only the blocks' inputs, which checkpointing keeps, go to the host.
        refuse("offload_activations", True, "False where checkpointing=False")


def run_folder(cfg: dict) -> str:
    """Where a run writes."""
    return os.path.normpath(cfg["out"] or os.path.join("out", cfg["name"]))


def pairs_path(cfg: dict) -> str:
    """The pairs' file of a run."""
    return cfg["pairs"] or os.path.join(run_folder(cfg), "pairs.jsonl")
