"""What a model folder can do, before and after: needles, questions, perplexity, preferences.

    python -m evals needle      MODEL [key=value]     facts hidden in long contexts
    python -m evals qa          MODEL [key=value]     questions over passages: right answers and F1
    python -m evals perplexity  MODEL [key=value]     of texts, by context length; and LongPPL
    python -m evals preferences MODEL [key=value]     margins and accuracy on pairs
    python -m evals questions   MODEL CONFIG [key=value]    a training config's fresh questions
    python -m evals curves      RUN                   the picture of a run, as out/tiny

    python -m evals needle models/tiny lengths=[104,232] haystack=models/tiny/world.py
    python -m evals needle -h                         its keys

Each of the first four prints a table, writes it to out/eval/COMMAND.json and, where matplotlib is
installed, draws out/eval/COMMAND.png. compare=FOLDER measures a second model beside the first.
Generation is greedy, at ordinary positions.
"""
import importlib
import os
import sys
import time
from types import ModuleType

from configs import BadInput, exit_on_bad_input, nearest, saving, with_arguments, write_json
from console import asked_for_help, print_help, print_settings_help

COMMANDS = ("needle", "qa", "perplexity", "preferences")
OTHERS = ("questions", "curves")  # that are no table of a model folder
HERE = os.path.dirname(os.path.abspath(__file__))


def read_command(argv: list[str]) -> tuple[ModuleType, str, dict]:
    """(the command's module, model folder, options) of a command line. BadInput names a wrong key.

    The module is imported here and not at the top: who asks for perplexity need not have, or wait
    for, what the others import.
    """
    if len(argv) < 2 or argv[0] not in COMMANDS:
        commands = "|".join((*COMMANDS, *OTHERS))
        hint = nearest(argv[0], (*COMMANDS, *OTHERS)) if argv else ""
        raise BadInput(f"expected: python -m evals {commands} MODEL [key=value]{hint}")
    command, folder, *words = argv
    module = importlib.import_module(f"evals.{command}")
    options = with_arguments(module.OPTIONS, words)
    module.check(options)
    return module, folder, options


def show_help(argv: list[str]) -> None:
    """Of all commands; of one that is named, what it does and its keys."""
    command = argv[0] if argv else ""
    if command not in (*COMMANDS, *OTHERS):
        print_help(__doc__, {})
        return
    module = importlib.import_module(f"evals.{command}")
    usage = [line for line in __doc__.splitlines() if f"-m evals {command} " in line]
    text = "\n".join([*usage, "", module.__doc__.strip()])
    if command == "questions":
        print_settings_help(text, argv[2:])
    elif command == "curves":
        print_help(text, {})
    else:
        sources = (os.path.join(HERE, "common.py"), module.__file__)
        print_help(text, {"keys:": module.OPTIONS}, *sources)


def main(argv: list[str]) -> None:
    if asked_for_help(argv) or not argv:
        show_help(argv)
        sys.exit(0 if argv else 2)
    if argv[0] == "curves":
        from evals.curves import curves
        curves(argv[1:])
        return
    if argv[0] == "questions" and len(argv) > 1:
        from evals.questions import questions
        questions(argv[1], argv[2:])
        return
    module, folder, options = read_command(argv)
    import torch

    from evals.common import subjects_of
    subjects = subjects_of(folder, options)
    if options["threads"]:
        torch.set_num_threads(options["threads"])

    start = time.time()
    result = module.measure(subjects, options)
    result["seconds"] = round(time.time() - start, 1)

    path = os.path.join(options["out"], f"{argv[0]}.json")
    with saving(path):
        os.makedirs(options["out"], exist_ok=True)
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
