"""What a model folder can do, before and after: needles, questions, perplexity, preferences.

    python -m evals needle      MODEL [key=value]      facts hidden in long contexts, by length and depth
    python -m evals qa          MODEL [key=value]      questions over passages: right answers and F1, by number and place
    python -m evals perplexity  MODEL [key=value]      of texts, by context length; and where a long context helps
    python -m evals preferences MODEL [key=value]      margins and accuracy on pairs
    python -m evals questions   MODEL CONFIG [key=value]  a training config's fresh questions, as train_logo.py counts them

Each prints a table and writes it to out/eval/COMMAND.json and, where matplotlib is installed, COMMAND.png. compare=FOLDER
measures a second model beside the first. Generation is greedy, at ordinary contiguous positions.
"""
import os
import sys
import time

import torch

from configs import BadInput, exit_on_bad_input, with_arguments, write_json
from evals.common import Subject
from evals.needle import needle
from evals.perplexity import perplexity
from evals.preferences import preferences
from evals.qa import qa
from evals.questions import questions

COMMON = dict(
    compare="",              # a second model folder, measured in the same way
    out="out/eval",          # folder of the results
    template="auto",         # chat template, as in configs/default.py
    dtype="float32",         # or bfloat16
    threads=0,               # CPU threads; 0: PyTorch's choice
    batch=8,                 # prompts generated together
    seed=0)
OPTIONS = {
    "needle": dict(
        **COMMON,
        tasks="single",      # of single, multikey, multivalue, multiquery, variables; comma-separated
        lengths=[512, 1024, 2048, 4096],  # tokens of the context
        depths=[0, 25, 50, 75, 100],      # where the needle lies, in per cent of the context
        samples=4,           # in each cell
        haystack="",         # text files or a folder; empty: generated; a .py with needle(task, size, depth, seed)
        prompt_tail="",      # around the question; empty: the task's own
        max_new_tokens=40,
        window=0,            # mark this window in the picture; 0: the first model's own
        retrieval=False),    # also which attention heads copied (App. B, Eq. 5)
    "qa": dict(
        **COMMON,
        examples="",         # a corpus of passages, see corpus.py
        passages=[1, 4, 8, 16],
        questions=100,       # the last of the shuffled corpus: pairs are built from its head
        prompt_tail="Answer this question in a few words: {question}?",
        max_new_tokens=64),
    "perplexity": dict(
        **COMMON,
        text="",             # text files, or a folder of them
        lengths=[256, 512, 1024, 2048],  # tokens that a prediction may look back on
        stride=256,          # tokens scored in each window
        tokens=8192,         # of each document, from its beginning
        documents=8,
        gain=2.0),           # nats that a long context has to gain on a token for LongPPL
    "preferences": dict(**COMMON, pairs="", config="", last=64),  # last: so many pairs of the file; 0: all
}



COMMANDS = {"needle": needle, "qa": qa, "perplexity": perplexity, "preferences": preferences}
NEEDED = {"qa": "examples", "perplexity": "text", "preferences": "pairs"}


def main(argv):
    if len(argv) < 2 or argv[0] not in (*COMMANDS, "questions"):
        raise BadInput(f"expected: python -m evals {'|'.join(COMMANDS)}|questions MODEL [key=value]")
    command, folder, *rest = argv
    if command == "questions":
        return questions(folder, rest)
    options = with_arguments(OPTIONS[command], rest)
    if command in NEEDED and not options[NEEDED[command]]:
        raise BadInput(f"{command}: {NEEDED[command]} is empty, expected a file or a folder")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    subjects = [Subject(path, options) for path in (folder, options["compare"]) if path]
    if len(subjects) == 2:
        subjects[0].name, subjects[1].name = os.path.normpath(folder), os.path.normpath(options["compare"])
    start = time.time()
    table, more = COMMANDS[command](subjects, options)
    os.makedirs(options["out"], exist_ok=True)
    path = os.path.join(options["out"], f"{command}.json")
    write_json({"command": ["evals", *argv], "options": options, "seconds": round(time.time() - start, 1), "table": table, **more}, path)
    print(path)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    main(sys.argv[1:])
