"""The README names files, functions, configs and keys that exist."""
import re
from pathlib import Path

from configs import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_named_file_exists():
    named = set(re.findall(r"(?:[\w-]+/)*[\w-]+\.(?:py|txt)\b", README))
    assert len(named) > 8
    for path in named:
        assert any((ROOT / folder / path).is_file() for folder in (".", "configs", "tests", "models/tiny")), path


def test_the_map_from_equations_names_functions_that_exist():
    rows = [line for line in README.splitlines() if line.startswith("|") and re.search(r"in `\w+\.py`", line)]
    assert len(rows) >= 6
    for row in rows:
        names, file = re.search(r"\| ((?:`[\w.]+`(?:, )?)+) in `(\w+\.py)`", row).groups()
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"^ *def {name}\(", (ROOT / file).read_text(), re.M), (name, file)


def test_every_command_names_a_config_and_keys_that_load():
    commands = re.findall(r"(?:train_logo|data|eval)\.py(?: score| questions \S+)?((?: configs/\w+\.py)?(?: \w+=[^\s`]+)*)", README)
    given = [command.split() for command in commands if command.strip()]
    assert len(given) >= 3
    for args in given:
        load_config([arg for arg in args])


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"[A-Z]+_(?:RESULTS|MINUTES)", README)
