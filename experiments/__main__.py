"""Runs in the tiny world, and the tables that follow from them.

    python -m experiments NAME [jobs=2]      the runs of a list of experiments/lists.py that have no line yet
    python -m experiments report             write the tables of EXPERIMENTS.md from the lines

A run is a process of its own and ends as one line of experiments/results/NAME.jsonl. A run that was killed or failed
has no line, so that the same command does it again.
"""
import json
import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool

from configs import BadInput, exit_on_bad_input, with_arguments
from data import read_lines
from experiments.lists import LISTS
from experiments.report import report
from experiments.run import ROOT, run

RESULTS = os.path.join(ROOT, "experiments", "results")


def missing(name: str, folder: str) -> list[dict]:
    """The runs {"cell", "difference", "seed"} of a list that have no line yet."""
    path = os.path.join(folder, name + ".jsonl")
    done = []
    if os.path.exists(path):
        done = [(row["difference"], row["seed"]) for _, row in read_lines(path)]
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

    def one(wanted: dict) -> bool:
        done = subprocess.run([sys.executable, "-m", "experiments", "one", json.dumps(wanted)],
                              cwd=ROOT, capture_output=True, text=True)
        print(name, wanted, "done" if not done.returncode else done.stderr[-2000:], flush=True)
        if done.returncode:
            return True
        # One write of a whole line to a file opened for appending: lines of several jobs do not mix.
        with open(path, "a") as f:
            f.write(done.stdout.splitlines()[-1] + "\n")
        return False

    with ThreadPool(jobs) as pool:
        failed = pool.map(one, missing(name, folder), chunksize=1)
    return sum(failed)


def main(argv: list[str]) -> int:
    """The command line. 1 where a run failed."""
    if argv[:1] == ["report"]:
        report(RESULTS, os.path.join(ROOT, "EXPERIMENTS.md"))
        return 0
    if argv[:1] == ["one"]:
        wanted = json.loads(argv[1])
        print(json.dumps({**wanted, **run(wanted["difference"], wanted["seed"])}))
        return 0
    if not argv or argv[0] not in LISTS:
        raise BadInput(f"expected report or one of {', '.join(LISTS)}, found {' '.join(argv[:1]) or 'nothing'}")
    options = with_arguments({"jobs": 1}, argv[1:])
    return int(run_list(argv[0], options["jobs"]) > 0)


if __name__ == "__main__":
    sys.excepthook = exit_on_bad_input
    sys.exit(main(sys.argv[1:]))
