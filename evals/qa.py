"""Questions over passages: right answers and F1, by number of passages and the gold one's place."""
import re
import string
from collections import Counter

from configs import BadInput
from evals.common import (
    ASKING,
    COMMON,
    Subject,
    check_options,
    check_path,
    print_row,
    share,
)
from pairs.answers import CJK, is_right
from pairs.corpus import Corpus, Examples, by_document

OPTIONS = dict(
    **COMMON,
    **ASKING,
    examples="",             # a corpus with questions and answers, see pairs/corpus.py
    passages=[1, 4, 8, 16],  # around a question, where the corpus is passages
    questions=100,           # the last, documents shuffled by seed as for pairs, from its head
    prompt_tail="Answer this question in a few words: {question}?",  # around the question
    max_new_tokens=64,       # of an answer
)


def check(options: dict) -> None:
    check_options(options, ("questions", "max_new_tokens"), ("passages",))
    check_path(options, "examples")
    if "{question}" not in options["prompt_tail"]:
        raise BadInput("prompt_tail: expected a text with {question} in it")


def squad_words(text: str) -> list[str]:
    """The words by SQuAD's script: lower case, no ASCII punctuation ("U.S." is us), no articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    # Its one addition here: without spaces between them, a whole sentence would be one word.
    return CJK.sub(r" \1 ", text).split()


def token_f1(prediction: str, answer: str) -> float:
    """SQuAD's F1: harmonic mean of precision and recall of the words, as multisets."""
    found = squad_words(prediction)
    wanted = squad_words(answer)
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    if not same:
        return 0.0
    return 2 * same / (len(found) + len(wanted))


def measure(subjects: list[Subject], options: dict) -> dict:
    """{"table": rows {"model", "passages", "right", "f1", "n", "by_length", "by_place"}}.

    right: share of the answers that contain a reference answer. by_length: right answers by tokens
    of the context, see by_doubling. by_place: [right, asked] where the gold passage lay in the
    first, middle and last third. passages and by_place are None in the row of questions that bring
    their own contexts.
    """
    path = options["examples"]
    corpus = Corpus(path, {"strict": True, "questions": 1})
    # In the order by which pairs are built: another shuffle would ask about documents trained on.
    order = by_document(corpus, options["seed"])[-options["questions"]:]
    own_contexts = []
    with_passages = []
    for i in order:
        row = corpus[i]
        if not row.get("question") or not row.get("answers"):
            raise BadInput(f"{path}: example {i} has no question or no answers, expected both")
        if "context" in row:
            own_contexts.append(row)
        else:
            with_passages.append(i)

    table = []
    for subject in subjects:
        if own_contexts:
            table.append(measure_row(subject, own_contexts, None, None, options))
        for passages in options["passages"] if with_passages else []:
            # The other documents' passages are the distractors.
            documents = {corpus.document_of[i] for i in with_passages}
            size = min(passages, len(documents))
            examples = list(Examples(corpus, with_passages, size, options["seed"]))
            places = []
            for i, example in zip(with_passages, examples):
                places.append(example["context"].index(corpus[i]["passage"]))
            table.append(measure_row(subject, examples, places, size, options))
    return {"table": table}


def measure_row(subject: Subject, examples: list[dict], places: list[int] | None,
                passages: int | None, options: dict) -> dict:
    """Ask all examples; a row of the table, printed. places: number of each gold passage."""
    prompts = []
    shared = []
    tokens = []
    for example in examples:
        tail = options["prompt_tail"].replace("{question}", example["question"])
        ids, context = subject.prompt(text_of(example["context"]), "", tail)
        prompts.append(ids)
        shared.append(context.stop)
        tokens.append(len(context))
    said = subject.answers(prompts, shared, options["max_new_tokens"])

    right = []
    f1 = []
    for text, example in zip(said, examples):
        answers = example["answers"]
        right.append(is_right(text, answers))
        # The answers are ways to say one thing: the nearest counts.
        f1.append(max(token_f1(text, answer) for answer in answers))
    n = len(right)
    row = {
        "model": subject.name,
        "passages": passages,
        "right": sum(right) / n,
        "f1": sum(f1) / n,
        "n": n,
        "by_length": by_doubling(right, tokens),
        "by_place": None,
    }
    cells = [f"right {share(sum(right), n)}", f"F1 {row['f1']:.3f}"]
    if places is not None:
        row["by_place"] = by_thirds(right, places, passages)
        thirds = [f"{good}:{asked}" for good, asked in row["by_place"]]
        cells.insert(0, f"{passages:3d} passages")
        cells.append(f"gold in first / middle / last third {' / '.join(thirds)}")
    print_row(subject.name, *cells)
    for low, high, good, asked in row["by_length"]:
        print_row(subject.name, f"{low:7d} to {high:7d} tokens", f"right {share(good, asked)}")
    return row


def by_doubling(right: list[bool], tokens: list[int]) -> list[list[int]]:
    """[fewest tokens, most, right answers, questions] of contexts, from each power of two to the
    next, those without a question left out; nothing where all lie in one."""
    counts = {}
    for good, length in zip(right, tokens):
        low = 1 << (length.bit_length() - 1)
        count = counts.setdefault(low, [0, 0])
        count[0] += good
        count[1] += 1
    if len(counts) == 1:
        return []
    buckets = []
    for low in sorted(counts):
        buckets.append([low, 2 * low - 1, *counts[low]])
    return buckets


def text_of(context: str | list[str]) -> str:
    """A context as one text; passages end with an empty line, as in training."""
    if isinstance(context, str):
        return context
    return "".join(passage + "\n\n" for passage in context)


def by_thirds(right: list[bool], places: list[int], passages: int) -> list[list[int]]:
    """[right answers, questions] for each third of the places."""
    counts = [[0, 0], [0, 0], [0, 0]]
    for good, place in zip(right, places):
        third = counts[3 * place // passages]
        third[0] += good
        third[1] += 1
    return counts
