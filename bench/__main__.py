"""Speed and memory, as ratios of measurements made in one run, on whatever machine this is.

    python -m bench step [key=value]         a step, against three ways to compute the same loss
    python -m bench limit [key=value]        a step's work against the least, its pace
    python -m bench generate [key=value]     answers for pairs, against transformers' generate
    python -m bench plan CONFIG [key=value]  what a run costs on GPUs that are not here: arithmetic

    python -m bench plan configs/llama3_8b_80k.py gpus=8 n_rejected=4
    python -m bench plan -h                  its keys

plan also takes keys of the config. Each prints a table and writes it, with versions and machine,
to out/bench/COMMAND.json. step and generate need the peers in requirements-dev.txt.
"""
import json
import os
import sys

from bench import common, generate, limit, plan, step
from configs import BadInput, exit_on_bad_input, nearest, saving, with_arguments, write_json
from console import asked_for_help, print_help

COMMANDS = {
    "step": (step.OPTIONS, step.run),
    "limit": (limit.OPTIONS, limit.run),
    "generate": (generate.OPTIONS, generate.run),
    "plan": (plan.OPTIONS, plan.run),
}


def split_words(options: dict, words: list[str]) -> tuple[list[str], list[str]]:
    """(key=value words of `options`, all other words): plan takes those of a config as well."""
    own = []
    others = []
    for word in words:
        if word.partition("=")[0] in options:
            own.append(word)
        else:
            others.append(word)
    return own, others


def show_help(argv: list[str]) -> None:
    """Of all commands; of one that is named, what it does and its keys."""
    command = argv[0] if argv else ""
    if command not in COMMANDS:
        print_help(__doc__, {})
        return
    options, run = COMMANDS[command]
    usage = [line for line in __doc__.splitlines() if f"-m bench {command} " in line]
    module = sys.modules[run.__module__]
    text = "\n".join([*usage, "", module.__doc__.strip()])
    print_help(text, {"keys:": options}, common.__file__, module.__file__)


def main(argv: list[str]) -> None:
    if asked_for_help(argv) or not argv:
        show_help(argv)
        sys.exit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        raise BadInput(f"python -m bench: expected {', '.join(COMMANDS)}, found {argv[0]}"
                       f"{nearest(argv[0], COMMANDS)}")
    name, *words = argv
    options, run = COMMANDS[name]
    if name == "plan":
        words, config = split_words(options, words)
        if not config or "=" in config[0]:
            raise BadInput("plan: expected a config file, as in: "
                           "python -m bench plan configs/llama3_8b_80k.py")
        options = with_arguments(options, words)
        table = run(options, config)
    else:
        options = with_arguments(options, words)
        if not os.path.isfile(os.path.join(options["model"], "config.json")):
            raise BadInput(f"model={options['model']!r}: no config.json there "
                           "(README, \"A real checkpoint\", makes models/smollm2)")
        table = run(options)
    found = {"command": ["bench", *argv], "options": options, **common.machine(), "table": table}
    path = f"out/bench/{name}.json"
    with saving(path):
        os.makedirs("out/bench", exist_ok=True)
        write_json(found, path)


def measure(task: dict) -> None:
    """The other end of common.in_new_process: one measurement, printed as JSON."""
    kinds = {"step": step.measure, "limit": limit.measure, "generate": generate.measure}
    print(json.dumps(kinds[task["measure"]](task)))


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    if sys.argv[1:2] == ["measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
