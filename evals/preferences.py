"""Margins, accuracy and log-probs on a pairs file."""
import numpy as np
import torch

from configs import load_config
from data import collate, encode_group, load_pairs
from evals.common import pyplot, save_picture
from loss import logo_loss


@torch.no_grad()
def preferences(subjects, options):
    """Rows {"model", "margin", "accuracy", "chosen", "rejected"} of mean log-probs on pairs, at their first draw's positions."""
    cfg, table, shown = load_config([options["config"]] if options["config"] else []), [], {}
    for subject in subjects:
        pairs = load_pairs(options["pairs"], cfg, subject.tokenizer)[-options["last"] or None:]
        rows = []
        for pair in pairs:
            batch = collate([encode_group(pair, subject.tokenizer, cfg)])
            tensors = [x.to(subject.device) for x in (batch.tokens, batch.positions, batch.targets)]
            sums, lengths = subject.model(*tensors, batch.segments)
            rows.append((sums / lengths).cpu())
        logps = torch.stack(rows)
        shown[subject.name] = logps
        _, metrics = logo_loss(logps[:, 0], logps[:, 1:], cfg["beta"], cfg["gamma"], cfg["sft_weight"])
        row = {"model": subject.name, "n": len(pairs), **{key: float(value) for key, value in metrics.items()}}
        table.append(row)
        print(f"{subject.name:20} margin {row['rewards/margins']:+.3f}  accuracy {row['rewards/accuracies']:.3f}  chosen {row['logps/chosen']:.3f}  "
              f"rejected {row['logps/rejected']:.3f}  of {len(pairs)}", flush=True)
    if plt := pyplot():
        figure, axes = plt.subplots(1, len(shown), figsize=(1 + 4 * len(shown), 3.2), squeeze=False, sharex=True, constrained_layout=True)
        for axis, (name, logps) in zip(axes[0], shown.items()):
            edges = np.linspace(min(float(x.min()) for x in shown.values()), 0, 40)
            axis.hist(logps[:, 0], edges, alpha=0.6, label="chosen")
            axis.hist(logps[:, 1:].flatten(), edges, alpha=0.6, label="rejected")
            axis.set(title=name, xlabel="mean log-prob of an answer")
            axis.legend()
        save_picture(figure, plt, "preferences", options)
    return table, {}
