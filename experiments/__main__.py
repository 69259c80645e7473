"""Runs in the tiny world, and the tables that follow from them.

    python -m experiments NAME [jobs=2]      the runs of a list that have no line yet
    python -m experiments report             write the tables of EXPERIMENTS.md and README.md

Lists are in lists.py. A run is a process of its own and ends as one line of results/NAME.jsonl.
A run that was killed or failed has no line, so that the same command does it again.
"""
import json
import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool

from configs import BadInput, exit_on_bad_input, nearest, with_arguments
from console import asked_for_help, print_help
from data import read_lines
from experiments.lists import LISTS
from experiments.report import report
from experiments.run import ROOT, WORK, run
from guard import lock

OPTIONS = dict(
    jobs=1,                  # runs at a time
)
RESULTS = os.path.join(ROOT, "experiments", "results")


def missing(name: str, folder: str) -> list[dict]:
    """The runs {"cell", "difference", "seed"} of a list that have no line yet."""
    path = os.path.join(folder, name + ".jsonl")
    done = []
    if os.path.exists(path):
        # By what was run, not by its name: a renamed cell is not run again, a changed one is.
        for _, row in read_lines(path):
            done.append((row["difference"], row["seed"]))
    cells, seeds = LISTS[name]
    wanted = []
    # Seed by seed: a list that is cut short has few seeds of all its cells.
    for seed in seeds:
        for cell, difference in cells.items():
            if (difference, seed) not in done:
                wanted.append({"cell": cell, "difference": difference, "seed": seed})
    return wanted


def run_list(name: str, jobs: int, folder: str = RESULTS) -> int:
    """Run what is missing, `jobs` at a time. The number of runs that failed."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name + ".jsonl")
    # Of two at a time, both would do what is missing.
    at_work = lock(os.path.join(WORK, "lists", name))

    def failed(wanted: dict) -> bool:
        words = [sys.executable, "-m", "experiments", "one", path, json.dumps(wanted)]
        # A run outlives a list that is killed, and keeps its lock.
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True,
                              pass_fds=[at_work.fileno()])
        # What a run that ended well has said of its progress is not worth a line.
        said = done.stderr[-2000:] if done.returncode else "done"
        print(wanted["cell"], wanted["seed"], said, flush=True)
        return done.returncode != 0

    with at_work, ThreadPool(jobs) as pool:
        return sum(pool.map(failed, missing(name, folder), chunksize=1))


def one(path: str, wanted: dict) -> int:
    """A run, and its line at the end of a file. In a process of its own."""
    line = {**wanted, **run(wanted["difference"], wanted["seed"])}
    # One write of a whole line: those of several jobs do not mix.
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")
    return 0


def main(argv: list[str]) -> int:
    """The command line. 1 where a run failed."""
    if argv[:1] == ["report"]:
        for document in ("EXPERIMENTS.md", "README.md"):
            report(RESULTS, os.path.join(ROOT, document))
        return 0
    if argv[:1] == ["one"]:
        return one(argv[1], json.loads(argv[2]))
    if asked_for_help(argv) or not argv:
        text = f"{__doc__.strip()}\n\nNAME is one of {', '.join(LISTS)}."
        print_help(text, {"keys:": OPTIONS}, __file__)
        return 0 if argv else 2
    if argv[0] not in LISTS:
        raise BadInput(f"expected report or one of {', '.join(LISTS)}, found {argv[0]}"
                       f"{nearest(argv[0], LISTS)}")
    options = with_arguments(OPTIONS, argv[1:])
    return int(run_list(argv[0], options["jobs"]) > 0)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    sys.exit(main(sys.argv[1:]))
