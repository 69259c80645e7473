"""Questions over passages: right answers and F1, by number of passages and by the gold passage's place."""
import re
import string
from collections import Counter

import numpy as np

from data import random_stream
from evals.common import interval
from pairs.answers import is_right
from pairs.corpus import Corpus, Examples


def f1(found, wanted):
    """Harmonic mean of precision and recall of two lists of tokens, as multisets."""
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def words(text):
    """Lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def qa_f1(prediction, answer):
    return f1(words(prediction), words(answer))


def qa(subjects, options):
    """Rows {"model", "passages", "right", "f1", "n", "by_place"}: answer contained, token F1, by place of the gold passage."""
    corpus = Corpus(options["examples"], {"strict": True, "questions": 1})
    order = random_stream("order of questions", options["seed"]).permutation(len(corpus))[-options["questions"]:]
    table = []
    for subject in subjects:
        for passages in options["passages"]:
            # the other questions' passages are the distractors
            examples, asked, places = Examples(corpus, order, min(passages, len(order)), options["seed"]), [], []
            for i in range(len(examples)):
                example, gold = examples[i], corpus[order[i]]["passage"]
                places.append(example["context"].index(gold))
                context = "".join(passage + "\n\n" for passage in example["context"])
                asked.append((subject.prompt(context, "", options["prompt_tail"].replace("{question}", example["question"])), example))
            said = subject.answers([prompt for prompt, _ in asked], options["max_new_tokens"])
            right = [is_right(said[i], example["answers"]) for i, (_, example) in enumerate(asked)]
            f1 = [max(qa_f1(said[i], answer) for answer in example["answers"]) for i, (_, example) in enumerate(asked)]
            low, high = interval(sum(right), len(right))
            thirds = [[r for r, p in zip(right, places) if 3 * p // passages == third] for third in range(3)]
            table.append({"model": subject.name, "passages": passages, "right": float(np.mean(right)), "f1": float(np.mean(f1)),
                          "n": len(right), "by_place": [[sum(t), len(t)] for t in thirds]})
            print(f"{subject.name:20} {passages:3d} passages   right {np.mean(right):.3f} ({low:.3f}..{high:.3f})   F1 {np.mean(f1):.3f}   "
                  f"of {len(right)}   gold passage first / middle / last third: "
                  + " / ".join(f"{sum(t)}:{len(t)}" for t in thirds), flush=True)
    return table, {}
