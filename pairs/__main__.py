"""From a corpus to a file of pairs, and looking at what was built.

    python -m pairs configs/NAME.py [key=value]    build the pairs, or go on building them
    python -m pairs score configs/NAME.py          what chunks and scores come to, before any answer is written
    python -m pairs stats PAIRS                    what is in them, and (with matplotlib) how positions cover the window
    python -m pairs show PAIRS 7                   pair 7, to read
"""
import sys
from functools import cache

import torch

from checkpoint import load_pretrained
from configs import exit_on_bad_input, load_config
from pairs import look
from pairs.build import build_pairs
from tokenizer import load_tokenizer


def main(argv: list[str]) -> int:
    if argv[:1] in (["score"], ["stats"], ["show"]):
        return getattr(look, argv[0])(argv[1:])
    cfg = load_config(argv)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    tokenizer = load_tokenizer(cfg["model"], cfg["template"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = cache(lambda: load_pretrained(cfg["model"], getattr(torch, cfg["dtype"]), device, cfg["adapter"]))
    return int(build_pairs(cfg, policy, tokenizer) > 0)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    sys.exit(main(sys.argv[1:]))
