"""Right or wrong: how answers are compared, which make a pair, and what can be said of one without a judge."""
import re

from data import words_evaluator

LONG_ANSWER = 10  # uncommon words from which on a reference answer need not be repeated word by word


def normalize(text):
    """Lower case, no articles, no punctuation, single spaces: how answers are compared."""
    return " ".join(re.sub(r"\b(a|an|the)\b|[^\w\s]|_", " ", text.lower()).split())


def is_right(text, answers):
    """Whether a generated text contains one of the reference answers."""
    text = f" {normalize(text)} "
    return any(f" {normalize(answer)} " in text for answer in answers)


def gives(text, answers, share):
    """is_right, or for a long reference answer: whether the text has so large a share of its uncommon words."""
    long = [words for words in map(words_evaluator, answers) if len(words) >= LONG_ANSWER]
    return is_right(text, answers) or any(len(words & words_evaluator(text)) >= share * len(words) for words in long)


def overlap(a, b):
    """Words that two texts share, of all their words."""
    a, b = set(normalize(a).split()), set(normalize(b).split())
    return len(a & b) / max(1, len(a | b))


def fault_of_chosen(text, row, cfg):
    """Why a chosen answer makes no pair, or None."""
    if text is None:
        return "chosen unfinished"
    if not text.strip():
        return "chosen empty"
    if normalize(text) == normalize(row["question"]):
        return "chosen repeats the question"
    wrong = cfg["require_correct_chosen"] and row["answers"] and not gives(text, row["answers"], cfg["correct_share"])
    return "chosen wrong" if wrong else None


def keep_rejected(row, candidates, cfg):
    """(numbers of the first M usable candidates, None), or where fewer are usable the fault of the last that was not."""
    kept, seen, last = [], {normalize(row["chosen"])}, None
    for j, text in enumerate(candidates):
        fault = ("rejected unfinished" if text is None else "rejected empty" if not text.strip() else
                 "rejected equals another answer" if normalize(text) in seen else
                 "rejected right" if cfg["require_wrong_rejected"] and gives(text, row["answers"], cfg["correct_share"]) else
                 None)
        if fault is None:
            kept.append(j)
            seen.add(normalize(text))
        last = fault or last
    return kept[:cfg["n_rejected"]], last if len(kept) < cfg["n_rejected"] else None


def audit(cfg, evaluator, row, saw, evidence):
    """What can be said of a pair without a judge. None: there is nothing to tell it by.

    error, by entities (App. C): "unfollowing" shares none with the question, "hallucination" shares some and is wrong.
    The paper calls such rules too rough to select by; an answer of one word counts as unfollowing.
    """
    answers, asked = row["answers"], evaluator(row["question"])
    right = [gives(text, answers, cfg["correct_share"]) if answers else None for text in (row["chosen"], *row["rejected"])]
    words = [len(text.split()) for text in (row["chosen"], *row["rejected"])]
    error = ["right" if good else "hallucination" if asked & evaluator(text) else "unfollowing"
             for good, text in zip(right[1:], row["rejected"])]
    return {"chosen_right": right[0], "chosen_saw_evidence": saw[0],
            "rejected_right": right[1:], "rejected_saw_evidence": saw[1:],
            "evidence": evidence, "error": error,
            "length_ratio": round(words[0] * len(words[1:]) / max(1, sum(words[1:])), 3),
            "overlap": [round(overlap(row["chosen"], text), 3) for text in row["rejected"]]}
