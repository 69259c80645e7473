"""The tables of EXPERIMENTS.md, from the lines of runs: mean and 95 % interval over seeds.

In the document a table stands between two comments, and `report` writes it anew:

    <!-- table NAME: right_1x right_8x ppl_64 -->
    | ... |
    <!-- end -->
"""
import os
import re
import statistics

from configs import BadInput
from data import read_lines

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom: the spread of five seeds says
# little of how far their mean may be off, and the normal's 1.96 would claim too much.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TABLE = re.compile(r"<!-- table (\S+): ([\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def mean_and_half(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % t interval over seeds; None with one seed."""
    mean = statistics.fmean(values)
    n = len(values)
    if n == 1:
        return mean, None
    return mean, STUDENT[n - 2] * statistics.stdev(values) / n ** 0.5


def columns(line: dict) -> dict:
    """A line's numbers by column, with those that are made from others."""
    found = {}
    for key, value in line.items():
        if isinstance(value, (int, float)):
            found[key] = value
    if "chosen_before" in found:
        found["chosen_drop"] = found["chosen_before"] - found["chosen_after"]
    if "peak_memory" in found:
        found["peak_GiB"] = found["peak_memory"] / 2**30
    return found


def by_cell(lines: list[dict]) -> dict[str, list[dict]]:
    """The columns of each cell's runs, in the order in which cells came first."""
    cells = {}
    for line in lines:
        cells.setdefault(line["cell"], []).append(columns(line))
    return cells


def table(lines: list[dict], names: list[str]) -> str:
    """A Markdown table, a row a cell: how many seeds, then "mean ±half" of the named columns.

    A column named worst_X is the smallest X of all seeds. A cell that lacks a column has a dash.
    """
    rows = [["", "seeds", *[name.replace("_", " ") for name in names]],
            ["---"] * (len(names) + 2)]
    for cell, runs in by_cell(lines).items():
        row = [cell, str(len(runs))]
        for name in names:
            row.append(entry(runs, name))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def entry(runs: list[dict], name: str) -> str:
    """One entry of a table."""
    key = name.removeprefix("worst_")
    # A mean over the seeds that happen to have a value would be another figure under one name.
    if any(key not in run for run in runs):
        return "–"
    values = [run[key] for run in runs]
    if key != name:
        return number(min(values))
    mean, half = mean_and_half(values)
    if half is None:
        return number(mean)
    return f"{number(mean)} ±{number(half)}"


def number(value: float) -> str:
    """Three digits behind the point for shares, fewer for what is larger."""
    if abs(value) < 2:
        return f"{value:.3f}".replace("0.", ".", 1)
    if abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.0f}"


def report(folder: str, document: str) -> None:
    """Write every table of a document anew from folder/NAME.jsonl."""
    with open(document, encoding="utf-8") as f:
        text = f.read()

    def written(match: re.Match) -> str:
        name, wanted = match.groups()
        path = os.path.join(folder, name + ".jsonl")
        lines = []
        for _, line in read_lines(path):
            lines.append(line)
        if not lines:
            raise BadInput(f"{path}: no lines, expected a line a run")
        return f"<!-- table {name}: {wanted} -->\n{table(lines, wanted.split())}\n<!-- end -->"

    # Written, then renamed: a kill leaves the document as it was.
    with open(document + ".tmp", "w", encoding="utf-8") as f:
        f.write(TABLE.sub(written, text))
    os.replace(document + ".tmp", document)
