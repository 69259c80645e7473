"""Perplexity of texts, by context length; and where a long context helps."""
import torch

from configs import BadInput
from evals.common import pyplot, save_picture, texts


@torch.no_grad()
def token_losses(model, ids, length, stride):
    """(len(ids) - 1,) nats of each token after the first, which sees between length - stride and length - 1 tokens before it.

    Windows of `length` tokens move on by `stride`, and each scores what the one before has not (Press et al., 2021).
    """
    ids = torch.tensor(ids, device=model.lm_head.weight.device)
    losses, done = [], 0
    for begin in range(0, len(ids) - 1, stride):
        window = ids[begin:begin + length]
        logits = model.logits(window[None])[0, :-1].float()
        each = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        losses.append(each[done - begin:].cpu())
        done = begin + len(window) - 1
        if done == len(ids) - 1:
            break
    return torch.cat(losses)


def perplexity(subjects, options):
    """Rows {"model", "length", "perplexity", "long", "key_tokens"}.

    long: LongPPL, over the tokens alone whose loss falls by more than `gain` nats from the shortest to this length.
    """
    if min(options["lengths"]) < 2 or options["stride"] < 1 or options["stride"] >= min(options["lengths"]):
        raise BadInput(f"stride={options['stride']}: expected at least 1 and less than the shortest of lengths={options['lengths']}")
    found, table = texts(options["text"])[:options["documents"]], []
    for subject in subjects:
        documents = [subject.tokenizer.encode(text)[:options["tokens"]] for text in found]
        documents = [ids for ids in documents if len(ids) > max(options["lengths"])]
        if not documents:
            raise BadInput(f"{options['text']}: no text has more than {max(options['lengths'])} tokens")
        shortest = None
        for length in sorted(options["lengths"]):
            losses = torch.cat([token_losses(subject.model, ids, length, options["stride"]) for ids in documents])
            shortest = losses if shortest is None else shortest
            key = shortest - losses > options["gain"]
            row = {"model": subject.name, "length": length, "perplexity": losses.mean().exp().item(), "tokens": len(losses),
                   "long": losses[key].mean().exp().item() if key.any() else None, "key_tokens": int(key.sum())}
            table.append(row)
            print(f"{subject.name:20} {length:7d} tokens   perplexity {row['perplexity']:8.3f} of {len(losses)}   "
                  + (f"LongPPL {row['long']:.3f} of {row['key_tokens']}" if row["long"] else "no tokens gain"), flush=True)
    if plt := pyplot():
        figure, axis = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
        for name in dict.fromkeys(r["model"] for r in table):
            mine = [r for r in table if r["model"] == name]
            axis.plot([r["length"] for r in mine], [r["perplexity"] for r in mine], marker="o", label=name)
        axis.axvline(subjects[0].model.config.max_position_embeddings, color="black", linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="context, tokens (dashed: the first model's window)", ylabel="perplexity")
        axis.legend()
        save_picture(figure, plt, "perplexity", options)
    return table, {}
