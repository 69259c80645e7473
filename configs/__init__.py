"""Config = configs/default.py < the named file < key=value on the command line. Later wins; nothing else configures."""
import ast
import difflib
import importlib.util
import os

from model import BadInput


def run_file(path):
    """The module that a Python file makes."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location("file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(path):
    """The dict `config` of a config file."""
    module = run_file(path)
    if not isinstance(getattr(module, "config", None), dict):
        raise BadInput(f"{path}: expected a dict named 'config'")
    return module.config


def load_config(argv, fallback="configs/tiny.py"):
    """argv: [FILE.py] key=value ...; the dict of every key, plus "name", the file's name without its ending."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = argv[0] if argv and "=" not in argv[0] else os.path.join(os.path.dirname(here), fallback)
    config = read_config(os.path.join(here, "default.py"))
    for key, value in read_config(path).items():
        config[key] = checked(config, key, value, path)
    config = with_arguments(config, argv[argv[:1] == [path]:])
    return {**config, "name": os.path.splitext(os.path.basename(path))[0]}


def with_arguments(config, args):
    """A config with key=value words of the command line on top."""
    config = dict(config)
    for arg in args:
        key, equals, text = arg.partition("=")
        if not equals:
            raise BadInput(f"command line: expected key=value, found {arg!r}")
        config[key] = checked(config, key, parse(text, config.get(key)), "command line")
    return config


def parse(text, default):
    """A command-line word as the type of the default value; text stays text where the default is text."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def checked(config, key, value, where):
    if key not in config:
        near = difflib.get_close_matches(key, config, 1)
        raise BadInput(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    want = type(config[key])
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want:
        raise BadInput(f"{where}: {key} is {value!r}, expected {want.__name__} like {config[key]!r}")
    if want in (int, float) and value < 0 and key != "delta":
        raise BadInput(f"{where}: {key} is {value!r}, expected a number that is not negative")
    return value
