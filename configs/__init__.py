"""Settings: configs/default.py < the named file < key=value on the command line. Nothing else configures.

Also what everything stands on: BadInput, the one line that a user sees, and reading files that a user gave.
"""
import ast
import difflib
import importlib.util
import json
import os
import sys
import time
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
}
AT_LEAST_ONE = ("n_chunks", "chunk_size", "n_rejected", "draws", "batch_size", "micro_batch", "build_batch",
                "fresh_batch", "keep", "questions", "endpoint_requests", "max_new_tokens", "steps")


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one line: where, what was found, what was expected."""


def exit_on_bad_input(kind, error, trace) -> None:
    """sys.excepthook: bad input ends with one line and exit code 1, anything else with its traceback."""
    if not issubclass(kind, BadInput):
        sys.__excepthook__(kind, error, trace)
        return
    if int(os.environ.get("RANK", 0)) > 0:
        # Mostly rank 0 has met the same. torchrun then ends this process before it repeats the line.
        time.sleep(1)
    print(f"error: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- files

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


def write_json(value: Any, path: str) -> None:
    """Write, then rename: a kill leaves the old file or the new one, never half of one."""
    with open(path + ".tmp", "w", encoding="utf-8", errors="surrogateescape") as f:
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
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------- settings

def default_groups() -> dict[str, dict]:
    """{"paths", "build", "train", "run"}: the keys of configs/default.py with their defaults, by group."""
    module = run_file(os.path.join(HERE, "default.py"))
    return {name: getattr(module, name) for name in ("paths", "build", "train", "run")}


def load_config(argv: list[str], fallback: str = "configs/tiny.py") -> dict:
    """The settings of a command line [FILE.py] key=value ...: every key, and "name", the file's without .py."""
    if argv and "=" not in argv[0]:
        path, words = argv[0], argv[1:]
    else:
        path, words = os.path.join(os.path.dirname(HERE), fallback), argv
    config = {}
    for group in default_groups().values():
        config.update(group)
    differences = getattr(run_file(path), "config", None)
    if not isinstance(differences, dict):
        raise BadInput(f"{path}: expected a dict named 'config'")
    for key, value in differences.items():
        config[key] = checked(config, key, value, path)
    config = with_arguments(config, words)
    return {**config, "name": os.path.splitext(os.path.basename(path))[0]}


def with_arguments(config: dict, words: list[str]) -> dict:
    """A config with key=value words of the command line on top."""
    config = dict(config)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise BadInput(f"command line: expected key=value, found {word!r}")
        config[key] = checked(config, key, parse(text, config.get(key)), "command line")
    return config


def parse(text: str, default: Any) -> Any:
    """A command-line word as a value. Where the default is text it stays text, whatever it looks like."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


def checked(config: dict, key: str, value: Any, where: str) -> Any:
    """The value of a key, in the type of its default. BadInput for an unknown key or another type."""
    if key not in config:
        near = difflib.get_close_matches(str(key), [str(known) for known in config], 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"{where}: unknown key {key!r}{hint}")
    expected = type(config[key])
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise BadInput(f"{where}: {key} is {value!r}, expected {expected.__name__} like {config[key]!r}")
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
    if not 0 < cfg["top_p"] <= 1:
        refuse("top_p", cfg["top_p"], "more than 0 and at most 1")
    if 0 < cfg["candidates"] < cfg["n_rejected"]:
        refuse("candidates", cfg["candidates"], f"0 or at least n_rejected={cfg['n_rejected']}")
    if "{question}" not in cfg["prompt_tail"]:
        refuse("prompt_tail", cfg["prompt_tail"], "a text with {question} in it")


def run_folder(cfg: dict) -> str:
    """Where a run writes."""
    return cfg["out"] or os.path.join("out", cfg["name"])


def pairs_path(cfg: dict) -> str:
    """The pairs' file of a run."""
    return cfg["pairs"] or os.path.join(run_folder(cfg), "pairs.jsonl")
