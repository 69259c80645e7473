"""What a model folder can do, before and after: needles, questions, perplexity, preferences.

    python -m evals needle      MODEL [key=value]     facts hidden in long contexts
    python -m evals qa          MODEL [key=value]     questions over passages: right answers and F1
    python -m evals perplexity  MODEL [key=value]     of texts, by context length; and LongPPL
    python -m evals preferences MODEL [key=value]     margins and accuracy on pairs
    python -m evals questions   MODEL CONFIG [key=value]    a training config's fresh questions

Each of the first four prints a table, writes it to out/eval/COMMAND.json and, where matplotlib is
installed, draws out/eval/COMMAND.png. compare=FOLDER measures a second model beside the first. The
keys of a command stand in OPTIONS of evals/COMMAND.py. Generation is greedy, at ordinary positions.
"""
import importlib
import os
import sys
import time
from types import ModuleType

import torch

from configs import BadInput, exit_on_bad_input, with_arguments, write_json

COMMANDS = ("needle", "qa", "perplexity", "preferences")


def read_command(argv: list[str]) -> tuple[ModuleType, str, dict]:
    """(the command's module, model folder, options) of a command line. BadInput names a wrong key.

    The module is imported here and not at the top: who asks for perplexity need not have, or wait
    for, what the others import.
    """
    if len(argv) < 2 or argv[0] not in COMMANDS:
        commands = "|".join(COMMANDS)
        raise BadInput(f"expected: python -m evals {commands}|questions MODEL [key=value]")
    command, folder, *words = argv
    module = importlib.import_module(f"evals.{command}")
    options = with_arguments(module.OPTIONS, words)
    module.check(options)
    return module, folder, options


def main(argv: list[str]) -> None:
    if argv[:1] == ["questions"] and len(argv) > 1:
        from evals.questions import questions
        questions(argv[1], argv[2:])
        return
    module, folder, options = read_command(argv)
    from evals.common import subjects_of
    subjects = subjects_of(folder, options)
    if options["threads"]:
        torch.set_num_threads(options["threads"])

    start = time.time()
    result = module.measure(subjects, options)
    result["seconds"] = round(time.time() - start, 1)

    os.makedirs(options["out"], exist_ok=True)
    path = os.path.join(options["out"], f"{argv[0]}.json")
    write_json({"command": ["evals", *argv], "options": options, **result}, path)
    print(path)
    # Pictures come last, from the result alone: whatever fails there, the hours are on disk.
    if not hasattr(module, "draw"):
        return
    try:
        module.draw(result, options)
    except ImportError:
        print("no picture: pip install matplotlib")
    except (OSError, ValueError) as e:
        print(f"no picture: {e}")


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    # A folder's name need not be UTF-8. It is printed as it came.
    sys.stdout.reconfigure(errors="surrogateescape")
    main(sys.argv[1:])
