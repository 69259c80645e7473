"""Margins, accuracy and log-probs on pairs, as a training run counts them on held-out ones."""
import os

import numpy as np
import torch

from configs import BadInput, check_settings, checked, default_groups, load_config
from console import Progress
from data import encode_group, load_pairs, read_header
from evals.common import COMMON, Subject, check_options, print_row
from evals.pictures import save_panels
from loss import logo_loss
from tokenizer import load_tokenizer

OPTIONS = dict(
    **COMMON,
    pairs="",                # the pairs' file; its first line says how prompts are made
    config="",               # training config, for what the first line does not say: the next six
    window=-1,               # as in training; -1: the config's
    positions="",            # as in training; empty: the config's
    sparse_share=-1.0,       # as in training; -1: the config's
    draws=-1,                # as in training; -1: the config's
    beta=-1.0,               # as in training; -1: the config's
    gamma=-1.0,              # as in training; -1: the config's
    last=64,                 # so many pairs of the file, the last ones; 0: all
)
TRAIN_KEYS = ("window", "positions", "sparse_share", "draws", "beta", "gamma")


def check(options: dict) -> None:
    check_options(options, (), ())
    if not options["pairs"]:
        raise BadInput("pairs is empty, expected a pairs' file")
    # A training run checks its evals before it has built its pairs. Whoever names a file that is
    # not there is told so by measure, before any weights are read.
    if os.path.exists(options["pairs"]):
        settings_of(options)


def settings_of(options: dict) -> dict:
    """The settings for these pairs: the file's own, then the command line's, then the config's.

    BadInput where one is in none of them. A default would do too, and give numbers that mean
    nothing: an accuracy at another window, or after another prompt, looks like any other.
    """
    path = options["pairs"]
    header = read_header(path)
    if not header and not options["config"]:
        raise BadInput(f"{path}: its first line has no settings: name the config that it is for, "
                       "as config=configs/tiny.py")
    # Keys of the groups paths and run say nothing of the numbers: their defaults do.
    cfg = {}
    if options["config"]:
        cfg = load_config([options["config"]])
    else:
        for group in default_groups().values():
            cfg.update(group)
    for key in default_groups()["build"]:
        if key in header:
            cfg[key] = checked(cfg, key, header[key], f"{path}, line 1")
        elif not options["config"]:
            raise BadInput(f"{path}, line 1: the settings have no {key}: name a config")

    missing = []
    for key in TRAIN_KEYS:
        if options[key] != OPTIONS[key]:
            cfg[key] = options[key]
        elif not options["config"]:
            missing.append(key)
    if missing:
        raise BadInput(f"{path} does not say {', '.join(missing)}: name the training config, as "
                       "config=configs/tiny.py, or give each as key=value")
    check_settings(cfg)
    return cfg


@torch.no_grad()
def measure(subjects: list[Subject], options: dict) -> dict:
    """{"table": rows {"model", "n", and logo_loss's metrics}, "logps": mean log-probs by model}.

    logps: for each pair, its chosen and rejected answers, at the positions of its first draw.
    """
    cfg = settings_of(options)
    table = []
    logps = {}
    for subject in subjects:
        tokenizer = load_tokenizer(subject.folder, cfg["template"])
        try:
            # Token ids of another tokenizer name other words: refused here, before the weights.
            pairs = load_pairs(options["pairs"], cfg, tokenizer)
        except BadInput as e:
            raise BadInput(f"{subject.folder}: {e}") from e
        if options["last"]:
            # Training holds out the end of the file.
            pairs = pairs[-options["last"]:]
        found = []
        with Progress(f"pairs, {subject.name}", len(pairs)) as progress:
            for pair in pairs:
                found.append(pair_logps(subject, pair, tokenizer, cfg))
                progress.update()
        found = torch.stack(found)
        logps[subject.name] = found.tolist()
        _, metrics = logo_loss(found[:, 0], found[:, 1:], cfg["beta"], cfg["gamma"])
        row = {"model": subject.name, "n": len(pairs)}
        for key, value in metrics.items():
            row[key] = value.item()
        table.append(row)
        print_row(
            subject.name,
            f"margin {row['rewards/margins']:+.3f}",
            f"accuracy {row['rewards/accuracies']:.3f}",
            f"chosen {row['logps/chosen']:.3f}",
            f"rejected {row['logps/rejected']:.3f}",
            f"of {len(pairs)}",
        )
    return {"table": table, "logps": logps}


def pair_logps(subject: Subject, pair: dict, tokenizer, cfg: dict) -> torch.Tensor:
    """(1 + M,) mean log-prob of each answer, each over its own length."""
    batch = encode_group(pair, tokenizer, cfg)
    tokens = batch.tokens.to(subject.device)
    positions = batch.positions.to(subject.device)
    targets = batch.targets.to(subject.device)
    sums, lengths = subject.model(tokens, positions, targets, batch.segments)
    return (sums / lengths).cpu()


def draw(result: dict, options: dict) -> None:
    """Histograms of the answers' mean log-probs, a panel a model, on one scale."""
    names = list(result["logps"])
    logps = [np.array(result["logps"][name]) for name in names]
    # The same bins in all panels, so that their heights can be compared.
    edges = np.linspace(min(each.min() for each in logps), 0, 40)

    def paint(axis, number):
        axis.hist(logps[number][:, 0], edges, alpha=0.6, label="chosen")
        axis.hist(logps[number][:, 1:].flatten(), edges, alpha=0.6, label="rejected")
        axis.set_xlabel("mean log-prob of an answer")
        axis.legend()

    save_panels("preferences", options, names, 4.5, paint)
