"""From a corpus to a file of pairs, and looking at what was built.

    python -m pairs CONFIG [key=value]           build the pairs, or go on building them
    torchrun --standalone --nproc_per_node=8 -m pairs CONFIG [key=value]    the same on 8 GPUs
    python -m pairs score CONFIG [key=value]     what chunks and scores come to, before any answer
    python -m pairs stats PAIRS [CONFIG]         what is in them; with a config, its positions too
    python -m pairs show PAIRS 7                 pair 7, to read
    python -m pairs convert FORMAT IN OUT        a known form of corpus into rows of ours

CONFIG is a file of configs/; configs/default.py has every key.
"""
import os
import sys
from functools import cache

import torch

import guard
from checkpoint import load_pretrained
from configs import load_config, pairs_path
from pairs import convert, corpus
from pairs.build import build_pairs
from pairs.show import show
from pairs.stats import score, stats
from tokenizer import load_tokenizer

COMMANDS = {"score": score, "stats": stats, "show": show, "convert": convert.convert}


def build(argv: list[str]) -> int:
    """Build the pairs of a config. Exit code 1 where requests failed: a script can ask again."""
    cfg = load_config(argv)
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
        guard.leave(130)
    if world > 1:
        guard.leave(int(failed > 0))
    return int(failed > 0)


def main(argv: list[str]) -> int:
    # A name that is not UTF-8 is printed as it came in, and does not end a build at its last line.
    sys.stdout.reconfigure(errors="surrogateescape")
    sys.stderr.reconfigure(errors="surrogateescape")
    if "-h" in argv or "--help" in argv:
        print("\n".join([__doc__, corpus.__doc__, convert.__doc__]))
        return 0
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return build(argv)


if __name__ == "__main__":
    sys.excepthook = guard.on_error
    sys.exit(main(sys.argv[1:]))
