"""README.md and RESULTS.md say what is: commands parse, quick ones run, tables and line numbers are compared.

    python -m tests.test_readme     sets the line numbers of the README's map from equations right
"""
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs import load_config, with_arguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
STAND_INS = {"FILE", "FOLDER", "BASE", "MERGED", "CONFIG", "HOST:29500"}  # what a reader puts something for


def code_lines(text):
    """Lines of the indented blocks, comments at their ends cut off."""
    lines = [line.strip() for line in text.split("\n") if line.startswith("    ")]
    return [line.split("   #")[0].strip() for line in lines]


def commands(text):
    """Shell commands as words: from indented blocks, and `...` in running text that starts with python."""
    found = [line for line in code_lines(text) if re.match(r"(python3?|torchrun|vllm|pip) ", line)]
    found += re.findall(r"`(python (?:-m )?[^`]+)`", text)
    words = []
    for line in found:
        for part in line.split(" && "):
            words.append(shlex.split(part.replace("$'", "'")))
    return words


COMMANDS = [words for text in (README, RESULTS) for words in commands(text)]


def check_settings_words(words):
    """A config file that exists, or the README's own, and keys that it has, with values of their types."""
    words = ["configs/tiny.py" if word in ("CONFIG", "configs/mine.py") else word for word in words]
    load_config([str(ROOT / word) if word.endswith(".py") and "=" not in word else word for word in words])


def check_train(words):
    check_settings_words(words)


def check_pairs(words):
    pairs = importlib.import_module("pairs.__main__")
    if words[0] in pairs.COMMANDS:
        command, *rest = words
        if command == "score":
            check_settings_words(rest)
        elif command == "convert":
            convert = importlib.import_module("pairs.convert")
            assert rest[0] in {**convert.FORMATS, **convert.TO_TRL} and len(rest) in (1, 3)
        else:
            assert not rest or rest[0].endswith("pairs.jsonl")
            assert command != "show" or len(rest) < 2 or rest[1].isdigit()
    else:
        check_settings_words(words)


def check_evals(words):
    command, model, *rest = words
    if command == "curves":
        assert model.startswith("out/") and not rest
    elif command == "questions":
        check_settings_words(rest)
    else:
        with_arguments(importlib.import_module(f"evals.{command}").OPTIONS, rest)
    assert model


def check_bench(words):
    bench = importlib.import_module("bench.__main__")
    command, *rest = words
    options, _ = bench.COMMANDS[command]
    if command == "plan":
        rest, config = bench.split_words(options, rest)
        check_settings_words(config)
    with_arguments(options, rest)


def check_sample(words):
    with_arguments(importlib.import_module("sample").OPTIONS, words[2:])


def check_merge(words):
    assert words[0] == "merge" and len(words) in (3, 4)


def check_pip(words):
    """pip install -r FILE: the file is there. A package that is named is in pyproject.toml, or said to be extra."""
    for flag, name in zip(words, words[1:]):
        assert flag != "-r" or (ROOT / name).is_file()


CHECKS = {"train_logo.py": check_train, "checkpoint.py": check_merge, "sample.py": check_sample,
          "pairs": check_pairs, "evals": check_evals, "bench": check_bench}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_parses(words):
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "torchrun":
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        program, rest = "python", rest[script:]
    if program in ("pip", "vllm"):
        return check_pip(rest)
    assert program in ("python", "python3"), words
    if rest[0] == "-m":
        _, module, *rest = rest
        if module in ("venv", "pytest"):
            return
        assert (ROOT / module.replace(".", "/")).is_dir() or (ROOT / f"{module.replace('.', '/')}.py").is_file()
    else:
        module, *rest = rest
        assert (ROOT / module).is_file()
    if rest and module in CHECKS:
        CHECKS[module](rest)


def test_both_files_have_commands():
    assert len(commands(README)) > 25 and len(commands(RESULTS)) > 10


def run(*words, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, **more)


def test_the_question_of_the_first_ten_minutes_is_answered(tmp_path):
    """On the base model, whose window it fits: the aligned one takes a run."""
    text, name = re.search(r'    echo "(.*)" > (\w+\.txt)', README).groups()
    (tmp_path / name).write_text(text + "\n")
    words = next(words for words in COMMANDS if "sample.py" in words and "Who is Rosa?" in words)
    words = [str(ROOT / words[1]), str(ROOT / "models" / "tiny"), *words[3:5], "tail=\nQuestion: {question}\nAnswer:"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0 and "Rosa paints in Naples." in done.stdout, done.stderr


def test_the_plans_table_is_what_the_command_prints(tmp_path):
    command = next(words for words in commands(RESULTS) if words[:4] == ["python", "-m", "bench", "plan"])
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command[1:]]
    assert run(*words, cwd=tmp_path).returncode == 0
    rows = []
    for row in json.loads((tmp_path / "out" / "bench" / "plan.json").read_text())["table"]:
        fits = [f"{found['M']}, {found['prompt']:,}" for found in row["fits"].values()]
        rows.append([f"{row['layout']}, {row['gpus']}", f"{row['tokens']:,}", f"{row['flops'] / 1e15:.3f}",
                     " / ".join(f"{hours:.1f}" for hours in row["hours"].values()),
                     f"{row['memory']['total'] / 1e9:.1f}", *fits])
    for row in rows:
        assert f"| {' | '.join(row)} |" in RESULTS
    # The README's sentence about it: hours at 30 % on 8, with the prompt once and with full rows.
    assert f"{rows[1][3].split()[0]} hours on 8 A800" in README and f"{rows[3][3].split()[0]} with M + 1" in README


@pytest.mark.parametrize("column, shape", [
    (1, ({"window": 1024, "sparse_share": 0.1, "draws": 4}, [16] * 6, 8)),          # a pair of configs/tiny.py
    (4, ({"window": 65536, "sparse_share": 0.1, "draws": 2}, [512] * 16, 512)),     # a prompt of the paper, 64K
])
def test_the_positions_table_is_what_the_code_gives(column, shape):
    cover = importlib.import_module("pairs.coverage")
    for kind, counts in cover.coverage(*shape).items():
        row = next(line for line in RESULTS.split("\n") if line.startswith(f"| {kind} |")).split(" | ")
        now = [f"{(counts.held > 0).mean():.1%}".replace("%", " %"),
               *[f"{cover.to_uniform(n):.3f}".removeprefix("0") for n in (counts.every, counts.answer)]]
        assert [cell.strip(" |") for cell in row[column:column + 3]] == now, (kind, now)


def test_the_configs_count_of_samples_is_the_papers():
    for path in sorted((ROOT / "configs").glob("*_*.py")):
        if path.name not in ("__init__.py",):
            cfg = load_config([str(path)])
            assert cfg["n_examples"] * cfg["draws"] == 12000 <= cfg["steps"] * cfg["batch_size"] < 12000 + 64
    assert "| 188 steps of 64 |" in README


MAP_ROW = re.compile(r"\[([\w/]+\.py):(\d+)\]\(([\w/]+\.py)#L(\d+)\) \| `([^`]+)` \|")


def test_the_map_from_equations_points_at_what_it_names():
    rows = MAP_ROW.findall(README)
    assert len(rows) >= 16
    for file, number, link, anchor, text in rows:
        assert file == link and number == anchor
        lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
        now = [i for i, line in enumerate(lines, 1) if text in line]
        assert text in lines[int(number) - 1], f"{file}:{number} is not {text!r}: lines {now} (python -m tests.test_readme)"


def test_every_named_file_and_test_exists():
    text = README + RESULTS
    for path in set(re.findall(r"(?<![\w/])(?:[\w-]+/)*[\w-]+\.(?:py|txt|png|md|toml)\b", text)):
        known = path in ("configs/mine.py", "rosa.txt", "curves.png") or any((ROOT / folder / path).exists() for folder in (".", "configs", "tests"))
        assert known, path
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, name


def test_every_named_setting_exists():
    """`key=value` and `key` in the two tables that readers turn knobs by."""
    cfg = load_config([])
    for key, _ in re.findall(r"`(\w+)=([^`\s]*)", README):
        assert key in cfg or key in ("loss_type", "key"), key


def test_links_lead_somewhere():
    for text in (README, RESULTS):
        for target in re.findall(r"\]\(([^)#]+)?(?:#([^)]*))?\)", text):
            path, anchor = target
            if path.startswith("http") or not path:
                continue
            assert (ROOT / path).exists(), path
            if path == "RESULTS.md" and anchor:
                titles = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")
                          for title in re.findall(r"^#+ (.*)$", RESULTS, re.M)]
                assert anchor in titles, anchor


def test_the_readmes_config_is_a_config(tmp_path):
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    path = tmp_path / "mine.py"
    path.write_text(block)
    cfg = load_config([str(path)])
    assert cfg["name"] == "mine" and len(block.strip().split("\n")) <= 12


def test_all_weights_train_by_the_words_of_the_readme():
    """On a paper's config, whose train_also goes with LoRA alone."""
    plan = importlib.import_module("bench.plan")
    words = re.search(r"All weights train at `([^`]+)`", README).group(1).split()
    for path in sorted((ROOT / "configs").glob("*_*k.py")):
        model = plan.planned_model(load_config([str(path), *words]), "")
        assert all(p.requires_grad for p in model.parameters())


def test_a_drop_reason_that_is_named_is_one_that_code_gives():
    """In the table of symptoms, and in what 'dropped' columns count."""
    code = "\n".join(path.read_text(encoding="utf-8")
                     for path in [ROOT / "data.py", *(ROOT / "pairs").glob("*.py")])
    symptoms = README.split("## Symptom")[1].split("\n## ")[0]
    named = set(re.findall(r'"([a-z]+ [a-z ]+)"', symptoms))
    assert len(named) >= 4
    for reason in named:
        assert f'"{reason}"' in code, reason


def test_requirements_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def lines(name):
        text = (ROOT / name).read_text()
        return [line for line in text.split("\n") if line and not line.startswith("#")]

    assert lines("requirements.txt") == project["dependencies"]
    assert lines("requirements-dev.txt") == ["-r requirements.txt", *project["optional-dependencies"]["dev"]]
    extras = [*project["optional-dependencies"]["pairs"], *project["optional-dependencies"]["eval"]]
    assert set(extras) <= set(project["optional-dependencies"]["dev"])
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert re.fullmatch(r"[\w-]+==[\w.]+", requirement), "an exact version"


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"[A-Z]+_(?:RESULTS|MINUTES|TABLE|MAP)\b|TODO", README + RESULTS)


def main():
    """Set the line numbers of the map right."""
    def renumber(match):
        file, *_, text = match.groups()
        lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
        now = [i for i, line in enumerate(lines, 1) if text in line]
        if len(now) != 1:
            print(f"{file}: {text!r} stands in lines {now}")
            return match.group()
        return f"[{file}:{now[0]}]({file}#L{now[0]}) | `{text}` |"

    (ROOT / "README.md").write_text(MAP_ROW.sub(renumber, README), encoding="utf-8")


if __name__ == "__main__":
    main()
