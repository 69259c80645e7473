"""From a corpus to a file of pairs, and looking at what was built.

    python -m pairs CONFIG [key=value]           build the pairs, or go on building them
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

from checkpoint import load_pretrained
from configs import exit_on_bad_input, load_config, pairs_path
from pairs import convert, corpus
from pairs.build import build_pairs
from pairs.show import show
from pairs.stats import score, stats
from tokenizer import load_tokenizer

COMMANDS = {"score": score, "stats": stats, "show": show, "convert": convert.convert}


def build(argv: list[str]) -> int:
    """Build the pairs of a config. Exit code 1 where requests failed: a script can ask again."""
    cfg = load_config(argv)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, cfg["dtype"])

    @cache
    def policy():
        return load_pretrained(cfg["model"], dtype, device, cfg["adapter"])

    try:
        return int(build_pairs(cfg, policy, tokenizer) > 0)
    except KeyboardInterrupt:
        print(f"interrupted: what is in {pairs_path(cfg)} stays, the same command goes on",
              file=sys.stderr, flush=True)
        # Not sys.exit: that would wait for the requests under way to a server.
        os._exit(130)


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
    sys.excepthook = exit_on_bad_input
    sys.exit(main(sys.argv[1:]))
