"""LongBench's scores (arXiv 2308.14508), as its official scripts compute them, to the last quirk.

F1 of words (QA), ROUGE-L (summaries), classification, retrieval, counting, edit similarity (code). Chinese datasets need
jieba, summaries rouge, code fuzzywuzzy: pip install jieba rouge fuzzywuzzy.
"""
import re
import string
from collections import Counter
from importlib import import_module

from model import BadInput

CHINESE_MARKS = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def needs(package):
    """An optional package."""
    try:
        return import_module(package)
    except ImportError as e:
        raise BadInput(f"this dataset's score needs: pip install {package}") from e


def f1(found, wanted):
    """Harmonic mean of precision and recall of two lists of tokens, as multisets."""
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def words(text):
    """Lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def chinese_words(text):
    marks = set(string.punctuation + CHINESE_MARKS)
    cut = ("".join(c for c in word.lower() if c not in marks) for word in needs("jieba").cut(text))
    return [word for word in ("".join(w.split()) for w in cut) if word]


def qa_f1(prediction, answer, classes=None):
    return f1(words(prediction), words(answer))


def qa_f1_zh(prediction, answer, classes=None):
    return f1(chinese_words(prediction), chinese_words(answer))


def rouge_l(prediction, answer, classes=None):
    """ROUGE-L F1 of the rouge package; a text without a word in it scores 0."""
    rouge = needs("rouge").Rouge()
    try:
        return rouge.get_scores([prediction], [answer])[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):  # "Hypothesis is empty"; or too long for its recursion
        return 0.0


def rouge_l_zh(prediction, answer, classes=None):
    jieba = needs("jieba")
    return rouge_l(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(answer)))


def classification(prediction, answer, classes):
    """One over the number of classes that the prediction names, if the right one is among them.

    A named class that is part of the right one's name does not count; of two such neighbours in the list of classes, the
    official loop overlooks the second.
    """
    named = [name for name in classes if name in prediction]
    i = 0
    while i < len(named):
        if named[i] in answer and named[i] != answer:
            named.remove(named[i])
        i += 1
    return 1.0 / len(named) if answer in named else 0.0


def share_of_numbers(prediction, wanted):
    numbers = re.findall(r"\d+", prediction)
    return sum(n == wanted for n in numbers) / len(numbers) if numbers else 0.0


def count(prediction, answer, classes=None):
    return share_of_numbers(prediction, str(answer))


def retrieval(prediction, answer, classes=None):
    return share_of_numbers(prediction, re.findall(r"(?:Paragraph |段落)(\d+)", answer)[0])


def code(prediction, answer, classes=None):
    """Edit similarity of the first line that looks like code."""
    lines = [line for line in prediction.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//"))]
    return needs("fuzzywuzzy.fuzz").ratio(lines[0] if lines else "", answer) / 100


METRICS = {
    "narrativeqa": qa_f1, "qasper": qa_f1, "multifieldqa_en": qa_f1, "multifieldqa_zh": qa_f1_zh, "hotpotqa": qa_f1, "2wikimqa": qa_f1,
    "musique": qa_f1, "dureader": rouge_l_zh, "gov_report": rouge_l, "qmsum": rouge_l, "multi_news": rouge_l, "vcsum": rouge_l_zh,
    "trec": classification, "triviaqa": qa_f1, "samsum": rouge_l, "lsht": classification, "passage_retrieval_en": retrieval,
    "passage_count": count, "passage_retrieval_zh": retrieval, "lcc": code, "repobench-p": code}
GROUPS = {  # the columns of the paper's table
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarisation": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p")}


def score_dataset(name, predictions, answers, classes=None):
    """Mean over predictions of the best score against any reference answer, in per cent, two decimals."""
    metric, total = METRICS[name], 0.0
    for prediction, references in zip(predictions, answers):
        if name in ("trec", "triviaqa", "samsum", "lsht"):  # few-shot: what comes after the first line is the next example
            prediction = prediction.lstrip("\n").split("\n")[0]
        total += max([0.0, *(metric(prediction, reference, classes) for reference in references)])
    return round(100 * total / len(predictions), 2)
