"""Right or wrong: how answers are compared, which make a pair, and what an audit says of it."""
import re

from data import Evaluator, words_evaluator

# Why an example makes no pair: what to turn if there are many.
REASONS = {
    "no critical chunk": "score_with=question+answer compares with the answer too",
    "no irrelevant chunk": "a lower chunk_size, or longer contexts",
    "chosen wrong": "chosen_from=reference; or require_correct_chosen=False, a lower correct_share",
    "chosen unfinished": "a higher max_new_tokens",
    "chosen empty": "template, prompt_tail",
    "chosen repeats the question": "prompt_tail, template",
    "no reference answer": "chosen_from=generated",
    "rejected right": "more candidates; or require_wrong_rejected=False",
    "rejected unfinished": "a higher max_new_tokens, more candidates",
    "rejected empty": "more candidates",
    "rejected equals another answer": "a higher temperature, more candidates",
    "fewer than M rejected answers": "n_rejected, to as many as the rows have: of TRL's mostly 1",
    "prompt longer than n_chunks": "a higher n_chunks",
    "longer than window": "a higher window, or a lower n_chunks",
    "no question written": "question_prompt",
    "written question is not about its chunk": "question_prompt, or a higher chunk_size",
}
LONG_ANSWER = 10  # uncommon words from which on a right answer need not be repeated word by word

# Chinese, Japanese and Korean: kana, ideographs, Hangul, and the halfwidth forms of kana.
CJK = re.compile(r"([\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
                 r"\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f])")
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
# A decimal number is one word: neither 3 nor 14 is what 3.14 says. A date (1.2.2034) is three.
PUNCTUATION = re.compile(r"(?<![\w.])(\d+\.\d+)(?!\d|\.\d)|[^\w\s]|_")
ARTICLES = ("a", "an", "the")
LAST_WORD = (" a", " an", " the")


# -------------------------------------------------------------------------------- comparing answers

def plain(text: str) -> str:
    """Lower case, single spaces, no punctuation but the point of 3.14, 1,000 as 1000."""
    text = THOUSANDS.sub(lambda number: number.group().replace(",", ""), text.lower())
    # Chinese and Japanese have no spaces. With every character a word of its own, "words in a row"
    # means what "characters in a row" means there, and a number beside them still begins and ends
    # where it does.
    text = CJK.sub(r" \1 ", text)
    text = PUNCTUATION.sub(r" \1 ", text)
    return " ".join(text.split())


def normalize(text: str) -> str:
    """plain, without articles: what is compared."""
    return " ".join(word for word in plain(text).split() if word not in ARTICLES)


def is_right(text: str, answers: list[str]) -> bool:
    """Whether a generated text contains one of the right answers, as whole words in a row."""
    with_articles = plain(text)
    without = normalize(text)
    for answer in answers:
        said = without
        wanted = normalize(answer)
        # No article ends an answer: it is the A of vitamin A, which is not any vitamin.
        if plain(answer).endswith(LAST_WORD):
            said = with_articles
            wanted = plain(answer)
        # With spaces around, so that "Turin" is not found in "Turing".
        if wanted and f" {wanted} " in f" {said} ":
            return True
        # A letter to choose by. Most sentences have that word: it is an answer where it is alone.
        if not wanted and plain(answer) and plain(answer) == with_articles:
            return True
    return False


def gives(text: str, answers: list[str], share: float) -> bool:
    """is_right, or of a long right answer: whether the text has its share of uncommon words."""
    if is_right(text, answers):
        return True
    # A sentence can be put in many ways; its names, numbers and rare words cannot be done without.
    said = words_evaluator(text)
    for answer in answers:
        words = words_evaluator(answer)
        if len(words) >= LONG_ANSWER and len(words & said) >= share * len(words):
            return True
    return False


def overlap(a: str, b: str) -> float:
    """Words that two texts share, of all their words."""
    a_words = set(normalize(a).split())
    b_words = set(normalize(b).split())
    return len(a_words & b_words) / max(1, len(a_words | b_words))


# -------------------------------------------------------------------------------- which make a pair

def fault_of_chosen(text: str | None, row: dict, cfg: dict) -> str | None:
    """Why a generated chosen answer makes no pair, or None. text: None where it did not end."""
    if text is None:
        return "chosen unfinished"
    if not text.strip():
        return "chosen empty"
    if normalize(text) == normalize(row["question"]):
        return "chosen repeats the question"
    # Without a reference there is nothing to be wrong by.
    comparable = cfg["require_correct_chosen"] and row["answers"]
    if comparable and not gives(text, row["answers"], cfg["correct_share"]):
        return "chosen wrong"
    return None


def fault_of_rejected(text: str | None, seen: set[str], row: dict, cfg: dict) -> str | None:
    """Why a rejected answer is not used, or None. seen: the pair's other answers, normalized."""
    if text is None:
        return "rejected unfinished"
    if not text.strip():
        return "rejected empty"
    # Equal answers would be pushed up and down at once.
    if normalize(text) in seen:
        return "rejected equals another answer"
    if cfg["require_wrong_rejected"] and gives(text, row["answers"], cfg["correct_share"]):
        return "rejected right"
    return None


def keep_rejected(row: dict, candidates: list[str | None], cfg: dict
                  ) -> tuple[list[int], str | None]:
    """(numbers of the first M usable candidates, None); with fewer, the last one's fault."""
    kept = []
    seen = {normalize(row["chosen"])}
    last_fault = None
    for j, text in enumerate(candidates):
        fault = fault_of_rejected(text, seen, row, cfg)
        if fault:
            last_fault = fault
        else:
            kept.append(j)
            seen.add(normalize(text))
    if len(kept) < cfg["n_rejected"]:
        return kept, last_fault
    return kept[:cfg["n_rejected"]], None


# -------------------------------------------------------------------------------------------- audit

def kind_of_error(text: str, right: bool | None, asked: set[str], evaluator: Evaluator) -> str:
    """What a rejected answer looks like, by entities (App. C): it shares none with the question
    ("unfollowing"), or some, and is wrong ("hallucination"). The paper calls such rules too rough
    to select by: they only describe."""
    if right:
        return "right"
    return "hallucination" if asked & evaluator(text) else "unfollowing"


def audit(cfg: dict, evaluator: Evaluator, row: dict, saw: list[bool | None],
          evidence: list[str]) -> dict:
    """What can be said of a pair without a judge. None: there is nothing to tell it by.

    saw: whether the prompts of the chosen and of each rejected answer held a right answer.
    evidence: what each rejected prompt held (data.IRRELEVANT, PARTIAL, NEAR). length_ratio: words
    of the chosen to a rejected one's.
    """
    texts = [row["chosen"], *row["rejected"]]
    right = [None] * len(texts)
    if row["answers"]:
        right = [gives(text, row["answers"], cfg["correct_share"]) for text in texts]
    asked = evaluator(row["question"])
    errors = []
    for text, good in zip(row["rejected"], right[1:]):
        errors.append(kind_of_error(text, good, asked, evaluator))
    chosen_words, *rejected_words = [len(text.split()) for text in texts]
    ratio = chosen_words * len(rejected_words) / max(1, sum(rejected_words))
    return {"chosen_right": right[0], "chosen_saw_evidence": saw[0],
            "rejected_right": right[1:], "rejected_saw_evidence": saw[1:],
            "evidence": evidence, "error": errors, "length_ratio": round(ratio, 3),
            "overlap": [round(overlap(row["chosen"], text), 3) for text in row["rejected"]]}
