"""answers.py: what counts as right, which answers make a pair, and what the audit says."""
from pathlib import Path

import pytest

from configs import load_config
from data import words_evaluator
from pairs.answers import audit, fault_of_chosen, gives, is_right, keep_rejected

ROOT = Path(__file__).parent.parent


def config(*args):
    return load_config([str(ROOT / "configs" / "tiny.py"), *args])


# -------------------------------------------------------------------------------------------- comparing

@pytest.mark.parametrize("text, answer", [
    ("2008年，北京举办了奥运会。", "北京"), ("在2008年", "2008年"), ("答案是：东京大学", "「东京大学」"), ("東京タワーは高い。", "東京タワー"),
    ("서울에 산다", "서울"), ("他在IBM工作", "IBM"), ("日々の暮らし", "日々"), ("𠮷野家です", "𠮷野家")])
def test_right_answers_are_found_inside_text_without_spaces(text, answer):
    assert is_right(text, [answer])


@pytest.mark.parametrize("text, answer", [("在12008年", "2008年"), ("東京", "東京タワー"), ("北方和京都", "北京"), ("他在IBMX工作", "IBM")])
def test_numbers_and_words_keep_their_ends_between_ideographs(text, answer):
    assert not is_right(text, [answer])


@pytest.mark.parametrize("text, answer", [
    ("It cost 1,000 dollars.", "1000"), ("It cost 1000 dollars.", "1,000"), ("12,345,678 people", "12345678"), ("in 1900,1901", "1900")])
def test_thousands_separators_do_not_matter(text, answer):
    assert is_right(text, [answer])


@pytest.mark.parametrize("text, answer", [("21,000", "1,000"), ("1,0000", "10000"), ("12,345,678", "345"), ("3,14", "314")])
def test_other_commas_part_numbers(text, answer):
    assert not is_right(text, [answer])


@pytest.mark.parametrize("text, answer", [("It is 3.14.", "14"), ("some 3.5 million", "5 million"), ("13.14", "3.14"), ("It cost $2.50.", "50"), ("3.14", "3")])
def test_a_part_of_a_number_is_another_number(text, answer):
    assert not is_right(text, [answer])


@pytest.mark.parametrize("text, answer", [
    ("It is 3.14.", "3.14"), ("$1,000.50", "1000.50"), ("on 24.11.2026", "2026"), ("in 1990.", "1990"), ("v3.14", "v3.14"), ("在3.14年", "3.14")])
def test_the_point_of_a_number_is_no_full_stop(text, answer):
    assert is_right(text, [answer])


@pytest.mark.parametrize("text, answer, right", [
    ("It is vitamin C.", "vitamin A", False), ("Hepatitis A is an infection.", "Hepatitis A", True), ("Hepatitis B", "the Hepatitis A", False),
    ("A", "A", True), ("(a)", "A", True), ("B", "A", False), ("", "A", False), ("The", "A", False), ("A cat.", "A", False), ("", "!", False), ("?", "!", False),
    ("a cat", "the cat", True)])
def test_an_article_at_the_end_is_a_name(text, answer, right):
    assert is_right(text, [answer]) == right


@pytest.mark.parametrize("rejected, reason", [
    ([" b", ""], "rejected empty"), ([" b", " B."], "rejected equals another answer"), ([" a.", " b"], "rejected equals another answer"),
    ([" b", None], "rejected unfinished"), ([" b", " Turin"], "rejected right"), ([" b", "", " c"], None)])
def test_degenerate_rejected_answers_are_refused(rejected, reason):
    row = {"chosen": " a", "answers": ["Turin"]}
    kept, fault = keep_rejected(row, rejected, config())
    assert fault == reason and (fault or kept == [0, 2])


@pytest.mark.parametrize("text, answers, fault", [
    ("Naples", ["Naples"], None), ("Rome", ["Naples"], "chosen wrong"), ("Rome", [], None), (None, [], "chosen unfinished"),
    (" ", [], "chosen empty"), ("who is rosa", [], "chosen repeats the question")])
def test_degenerate_chosen_answers_are_refused(text, answers, fault):
    assert fault_of_chosen(text, {"question": "Who is Rosa?", "answers": answers}, config()) == fault


def test_right_folds_case_articles_and_punctuation():
    assert is_right("It was the Gospel-of Luke!", ["gospel of luke"])
    assert not is_right("Turing", ["Turin"]) and not is_right("", ["Turin"])


def test_a_long_reference_answer_need_not_be_repeated_word_by_word():
    reference = "The treaty was signed at Versailles in June 1919 after months of negotiation between thirty-two countries, without Germany."
    said = "In 1919, after long negotiation among the countries, Germany received the treaty that was signed at Versailles."
    assert not is_right(said, [reference]) and gives(said, [reference], 0.5) and not gives(said, [reference], 0.9)
    assert not gives("Naples", ["Naples or Turin"], 0.1)   # short answers are compared as they are


def test_the_audit_of_a_pair():
    row = {"question": "When did Rosa paint Naples?", "answers": ["1923"], "chosen": "Rosa painted it in 1923.",
           "rejected": ["Rosa painted it in 1931.", "I cannot say.", "In 1923."]}
    found = audit(config(), words_evaluator, row, [True, True, False, False], ["irrelevant", "near misses", "irrelevant"])
    assert found == {"chosen_right": True, "chosen_saw_evidence": True, "rejected_right": [False, False, True], "rejected_saw_evidence": [True, False, False],
                     "evidence": ["irrelevant", "near misses", "irrelevant"], "error": ["hallucination", "unfollowing", "right"],
                     "length_ratio": 1.5, "overlap": [0.667, 0.0, 0.4]}
    none = audit(config(), words_evaluator, {**row, "answers": []}, [None] * 4, ["irrelevant"] * 3)
    assert none["chosen_right"] is None and none["rejected_right"] == [None] * 3
