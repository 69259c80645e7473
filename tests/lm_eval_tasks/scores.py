"""The scorers that lm-evaluation-harness has for RULER and for QASPER (SQuAD's script), on rows of our own."""
from lm_eval.tasks.qasper.metrics import f1_abstractive
from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all


def ruler(doc, results):
    return {"string_match_all": string_match_all(postprocess_pred(results), [doc["outputs"]])}


def longbench(doc, results):
    return {"qa_f1_score": max(f1_abstractive(results, [answer]) for answer in doc["answers"])}
