"""From a corpus to a file of pairs, and looking at what was built.

    python -m pairs CONFIG [key=value]           build the pairs, or go on building them
    torchrun --standalone --nproc_per_node=8 -m pairs CONFIG [key=value]    the same on 8 GPUs
    python -m pairs score CONFIG [key=value]     what chunks and scores come to, before any answer
    python -m pairs stats PAIRS [CONFIG]         what is in them; with a config, its positions too
    python -m pairs show PAIRS 7                 pair 7, to read
    python -m pairs convert FORMAT IN OUT        a known form of corpus into rows of ours

CONFIG is a file of configs/, as configs/tiny.py; PAIRS what a build wrote, as out/tiny/pairs.jsonl.
"""
import importlib
import os
import sys
from functools import cache

from configs import BadInput, check_settings, config_file, load_config, nearest, pairs_path
from console import asked_for_help, leave, on_error, print_help, print_settings_help

COMMANDS = {
    "score": "pairs.stats",
    "stats": "pairs.stats",
    "show": "pairs.show",
    "convert": "pairs.convert",
}


def build(argv: list[str]) -> int:
    """Build the pairs of a config. Exit code 1 where requests failed: a script can ask again."""
    cfg = load_config(argv)
    check_settings(cfg)
    if cfg["dry_run"]:
        raise BadInput("dry_run=True is train_logo.py's: it shows the pairs' first prompt as well")
    # PyTorch takes seconds: only now, when the words are known to be right.
    import torch

    import guard
    from checkpoint import load_pretrained
    from pairs.build import build_pairs
    from tokenizer import load_tokenizer

    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # As many threads as in a training run that builds its pairs itself: the same file to the byte.
    device = guard.choose_device(cfg["threads"])
    dtype = getattr(torch, cfg["dtype"])
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    if world > 1:
        guard.init_processes(device)

    @cache
    def policy():
        return load_pretrained(cfg["model"], dtype, device, cfg["adapter"])

    try:
        failed = build_pairs(cfg, policy, tokenizer, rank, world)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"interrupted: what is in {pairs_path(cfg)} stays, the same command goes on",
                  file=sys.stderr)
        # Not sys.exit: that would wait for the requests under way to a server.
        leave(130)
    if world > 1:
        leave(int(failed > 0))
    return int(failed > 0)


def main(argv: list[str]) -> int:
    # A name that is not UTF-8 is printed as it came in, and does not end a build at its last line.
    sys.stdout.reconfigure(errors="surrogateescape")
    sys.stderr.reconfigure(errors="surrogateescape")
    if asked_for_help(argv) or not argv:
        show_help(argv)
        return 0 if argv else 2
    command, *words = argv
    if command in COMMANDS:
        run = getattr(importlib.import_module(COMMANDS[command]), command)
        return run(words)
    if "=" not in command and not os.path.exists(config_file(argv)):
        hint = nearest(command, COMMANDS)
        if hint:
            raise BadInput(f"{command}: no command and no file{hint}")
    return build(argv)


def show_help(argv: list[str]) -> None:
    """Of all commands; of one that is named, what it does and its keys."""
    command = argv[0] if argv else ""
    if command not in COMMANDS:
        from pairs import convert, corpus
        print_settings_help("\n".join([__doc__, corpus.__doc__, convert.__doc__]), argv)
        return
    module = importlib.import_module(COMMANDS[command])
    usage = [line for line in __doc__.splitlines() if f"-m pairs {command} " in line]
    text = "\n".join([*usage, "", module.__doc__.strip()])
    if command == "score":
        print_settings_help(text, argv[1:])
    else:
        print_help(text, {})


if __name__ == "__main__":
    sys.excepthook = on_error
    sys.exit(main(sys.argv[1:]))
