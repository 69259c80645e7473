"""Retrieval scores of attention heads (App. B, Eq. 5; Wu et al., arXiv 2404.15574).

    score(head) = needle's tokens that the head copied / needle's tokens

A head copied a token of the needle if, in the step that generated this very token, its arg-max over
all tokens so far lay on it. The mean over examples; heads above 0.1 are called retrieval heads.
"""
import os

import numpy as np
import torch

from evals.common import Look, Subject, print_row, token_span
from evals.pictures import heat_map, save_panels

RETRIEVAL_HEAD = 0.1
BEST = 10            # of whose scores the paper takes the mean


class RetrievalScores:
    """Counts, over many examples, what each head of a model copied from the needles."""

    def __init__(self, subject: Subject):
        config = subject.config
        self.name = subject.name
        self.tokenizer = subject.tokenizer
        self.shape = (config.num_hidden_layers, config.num_attention_heads)
        self.copied = []     # an example: bool (layers, heads, tokens of its needle)
        self.left_out = 0    # examples whose needle is not in the tokens' text

    def watch(self, prompts: list[list[int]], places: list[range], examples: list) -> Look:
        """A look(...) for generation that notes what is copied from each example's .needle.

        places: where the context's tokens lie in each prompt.
        """
        needles = []
        copied = []
        for ids, place, example in zip(prompts, places, examples):
            needle = self.find(ids, place, example.needle)
            hits = torch.zeros(*self.shape, len(needle), dtype=torch.bool)
            needles.append(needle)
            copied.append(hits)
            # A needle that cannot be found says nothing about a head. As a row of zeros it would
            # make every head look worse than it is.
            if needle:
                self.copied.append(hits)
            else:
                self.left_out += 1

        # tops: (layers, heads). A token that is generated twice is copied once.
        def look(i, token, tops):
            for number, place in enumerate(needles[i]):
                if prompts[i][place] == token:
                    copied[i][:, :, number] |= tops == place

        return look

    def find(self, ids: list[int], place: range, needle: str) -> range:
        """Where the needle's tokens lie in a prompt; an empty range where its text is not found."""
        context = ids[place.start:place.stop]
        start = self.tokenizer.decode(context).find(needle)
        if start < 0:
            return range(0)
        first, last = token_span(context, start, start + len(needle), self.tokenizer)
        return range(place.start + first, place.start + last)

    def mean(self) -> torch.Tensor:
        """(layers, heads): each head's mean score; empty where no needle was found."""
        if not self.copied:
            return torch.zeros(0)
        # The share of each needle's tokens first: a long needle counts no more than a short one.
        shares = [hits.float().mean(-1) for hits in self.copied]
        return torch.stack(shares).mean(0)

    def print(self) -> None:
        """The best heads, as layer.head, and how many examples they are judged by."""
        if self.left_out:
            asked = self.left_out + len(self.copied)
            print_row(
                self.name,
                f"{self.left_out} of {asked} needles not found in the tokens' text: "
                "left out of the retrieval scores",
            )
        if not self.copied:
            return
        scores = self.mean()
        n_heads = scores.numel()
        best = scores.flatten().topk(min(BEST, n_heads))
        names = []
        for value, i in zip(best.values.tolist(), best.indices.tolist()):
            layer, head = divmod(i, scores.shape[1])
            names.append(f"{layer}.{head} {value:.2f}")
        above = int((scores > RETRIEVAL_HEAD).sum())
        print_row(
            self.name,
            f"retrieval heads (score above {RETRIEVAL_HEAD}): {above} of {n_heads}",
            f"mean of the best {len(names)} {best.values.mean():.3f}: {', '.join(names)}",
        )


def draw_heads(heads: dict[str, list], options: dict) -> None:
    """Layer by head, a panel a model, on one scale."""
    titles = []
    grids = []
    for name, scores in heads.items():
        if scores:
            titles.append(f"{name}: retrieval score")
            grids.append(np.array(scores))
    if not grids:
        # Heads of another model, from an earlier command, beside this one's table.
        stale = os.path.join(options["out"], "retrieval.png")
        if os.path.exists(stale):
            os.remove(stale)
        return
    highest = max(RETRIEVAL_HEAD, np.max(grids))

    def paint(axis, number):
        heat_map(axis, grids[number], 0, highest)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)

    save_panels("retrieval", options, titles, 4.5, paint)
