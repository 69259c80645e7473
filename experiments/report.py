"""Tables and pictures of EXPERIMENTS.md and README.md, from the lines of runs.

In the document a table stands between two comments, and `report` writes it anew; a picture is drawn
where a comment asks for it. NAME is a list, or several, as recipe+references:

    <!-- table NAME: right_1x right_8x ppl_64 -->              a row a cell
    <!-- differences NAME from CELL: right_8x ppl_64 -->       a row a cell, less CELL seed by seed
    <!-- table NAME of CELL | CELL: right_8x ppl_64 -->        these rows, in this order; so may
                                                               differences NAME of CELL from CELL
    <!-- questions NAME from CELL: each_8p -->        a row a cell, less CELL by question
    | ... |
    <!-- end -->
    <!-- picture NAME in experiments/answers.png: CELL | CELL -->
"""
import os
import re
import statistics
from collections.abc import Callable

from configs import BadInput
from data import read_lines
from experiments.picture import draw

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom: the spread of five seeds says
# little of how far their mean may be off, and the normal's 1.96 would claim too much.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TABLE = re.compile(
    r"<!-- (table|differences|questions) ([\w+]+)(?: of ([^:\n]+?))?(?: from ([^:\n]+))?: "
    r"([\w ]+) -->\n"
    r".*?<!-- end -->",
    re.DOTALL,
)
PICTURE = re.compile(r"<!-- picture ([\w+]+) in (\S+): (.+) -->")


def mean_and_half(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % t interval over seeds; None with one seed."""
    mean = statistics.fmean(values)
    n = len(values)
    if n == 1:
        return mean, None
    return mean, STUDENT[n - 2] * statistics.stdev(values) / n ** 0.5


def columns(line: dict) -> dict:
    """A line's columns, with those that are made from others: numbers, and outcomes as "0110".

    Beside them "built", what the pairs were built at where the difference says it.
    """
    found = {"built": line.get("difference", {}).get("built")}
    for key, value in line.items():
        if isinstance(value, (int, float)) or key.startswith("each_"):
            found[key] = value
    # The margin is beta times how far the chosen answer leads: of SFT, 0 whatever it leads by.
    if line.get("difference", {}).get("beta") == 0:
        found.pop("margin", None)
    if "chosen_before" in found:
        found["chosen_drop"] = found["chosen_before"] - found["chosen_after"]
    if "peak_memory" in found:
        found["peak_GiB"] = found["peak_memory"] / 2**30
    return found


def by_cell(lines: list[dict]) -> dict[str, list[dict]]:
    """The columns of each cell's runs, in the order in which cells came first."""
    cells = {}
    difference_of = {}
    for line in lines:
        cell = line["cell"]
        # A cell that was changed and kept its name would be a mean of two things.
        difference = line.get("difference")
        if difference_of.setdefault(cell, difference) != difference:
            raise BadInput(f"the lines of {cell!r} are of two differences: {difference_of[cell]} "
                           f"and {difference}")
        cells.setdefault(cell, []).append(columns(line))
    for cell, runs in cells.items():
        seeds = [run["seed"] for run in runs if "seed" in run]
        # Twice the same seed would narrow the interval, and nothing more would be known.
        if len(set(seeds)) < len(seeds):
            raise BadInput(f"two lines of {cell!r} are of one seed, expected one: {seeds}")
    return cells


def table(lines: list[dict], names: list[str], wanted: str | None = None) -> str:
    """A Markdown table, a row a cell: how many seeds, then "mean ±half" of the named columns.

    A column named worst_X is the smallest X of all seeds. A cell that lacks a column has a dash.
    wanted: "CELL | CELL", the cells to show and their order; None: all.
    """
    rows = []
    for cell, runs in shown(by_cell(lines), wanted).items():
        row = [cell, str(len(runs))]
        for name in names:
            row.append(entry(runs, name))
        rows.append(row)
    return markdown(names, rows)


def runs_of(cells: dict[str, list[dict]], cell: str) -> list[dict]:
    """The runs of a cell. BadInput where there are none."""
    if cell not in cells:
        raise BadInput(f"no lines of {cell!r}, expected one of {', '.join(cells)}")
    return cells[cell]


def shown(cells: dict[str, list[dict]], wanted: str | None) -> dict[str, list[dict]]:
    """The cells named "CELL | CELL", in this order; None: all."""
    if not wanted:
        return cells
    found = {}
    for cell in wanted.split(" | "):
        found[cell] = runs_of(cells, cell)
    return found


def difference_of_two(both: list[tuple[dict, dict]], name: str) -> str:
    """One entry of differences(), of (run, the reference's run) of each seed."""
    values = []
    for run, reference in both:
        if name not in run or name not in reference:
            return "–"
        values.append(run[name] - reference[name])
    mean, half = mean_and_half(values)
    if half is None:
        return sign(mean) + number(mean)
    return with_half(mean, half)


def differences(lines: list[dict], reference: str, names: list[str],
                wanted: str | None = None,
                entry_of: Callable[[list, str], str] = difference_of_two) -> str:
    """A Markdown table: the named columns of each other cell less the reference's, seed by seed.

    The cells of a seed share pairs, positions and questions, so that much of what seeds differ by
    falls out. Bold: the 95 % interval does not hold 0. entry_of(runs and the reference's, column).
    """
    cells = by_cell(lines)
    of_reference = {run["seed"]: run for run in runs_of(cells, reference)}
    del cells[reference]
    rows = []
    for cell, runs in shown(cells, wanted).items():
        both = []
        for run in runs:
            if run["seed"] in of_reference:
                both.append((run, of_reference[run["seed"]]))
        if not both:
            continue
        row = [cell, str(len(both))]
        for name in names:
            row.append(entry_of(both, name))
        rows.append(row)
    return markdown(names, rows)


def with_half(mean: float, half: float) -> str:
    """A difference and half its interval, bold where that does not hold 0."""
    text = f"{sign(mean)}{number(mean)} ±{number(half)}"
    return f"**{text}**" if abs(mean) > half else text


def questions(lines: list[dict], reference: str, names: list[str],
              wanted: str | None = None) -> str:
    """differences() over questions, of columns each_8p, each_16p: 1 for right, 0 for wrong.

    For runs that are asked the same questions; refused if their pairs are built apart. What a
    question says is its mean over seeds, so that the interval is over questions: what others than
    these would have moved. Lines that lack one of the columns are left out.
    """
    kept = [line for line in lines if all(name in line for name in names)]
    return differences(kept, reference, names, wanted, over_questions)


def over_questions(both: list[tuple[dict, dict]], name: str) -> str:
    """One entry of questions(), of (run, the reference's run) of each seed."""
    by_seed = []
    for run, reference in both:
        # The questions go with the pairs.
        if run["built"] != reference["built"]:
            raise BadInput(f"runs that were asked different questions are compared, of pairs built "
                           f"at {run['built']} and {reference['built']}")
        by_question = []
        for one, other in zip(run[name], reference[name], strict=True):
            by_question.append(int(one) - int(other))
        by_seed.append(by_question)
    values = []
    for of_question in zip(*by_seed, strict=True):
        values.append(statistics.fmean(of_question))
    # Student's t is near: 2.01 of 50 questions, 1.97 of 200.
    error = statistics.stdev(values) / len(values) ** 0.5
    return with_half(statistics.fmean(values), 1.96 * error)


def sign(value: float) -> str:
    """A plus, which numbers leave out."""
    return "+" if value > 0 else ""


def markdown(names: list[str], rows: list[list[str]]) -> str:
    """Rows of a cell, its seeds and its columns, under a head."""
    head = ["", "seeds", *[name.replace("_", " ") for name in names]]
    rules = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rules, *rows])


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


def lines_of(names: str, folder: str) -> list[dict]:
    """The lines of lists, as recipe+references, from folder/NAME.jsonl."""
    lines = []
    for name in names.split("+"):
        path = os.path.join(folder, name + ".jsonl")
        before = len(lines)
        for _, line in read_lines(path):
            lines.append(line)
        if len(lines) == before:
            raise BadInput(f"{path}: no lines, expected a line a run")
    return lines


def report(folder: str, document: str) -> None:
    """Write every table of a document anew from folder/NAME.jsonl, and draw its pictures."""
    with open(document, encoding="utf-8") as f:
        text = f.read()

    def written(match: re.Match) -> str:
        kind, names, cells, reference, wanted = match.groups()
        lines = lines_of(names, folder)
        if kind == "table":
            found = table(lines, wanted.split(), cells)
        elif kind == "questions":
            found = questions(lines, reference, wanted.split(), cells)
        else:
            found = differences(lines, reference, wanted.split(), cells)
        head, _, _ = match.group().partition("\n")
        return f"{head}\n{found}\n<!-- end -->"

    # Written, then renamed: a kill leaves the document as it was.
    with open(document + ".tmp", "w", encoding="utf-8") as f:
        f.write(TABLE.sub(written, text))
    os.replace(document + ".tmp", document)
    for names, path, wanted in PICTURE.findall(text):
        curves = {}
        for cell, runs in shown(by_cell(lines_of(names, folder)), wanted).items():
            curves[cell] = right_by_length(runs)
        draw(curves, os.path.join(os.path.dirname(document), path))


def right_by_length(runs: list[dict]) -> dict[int, tuple[float, float | None]]:
    """{windows of context: (mean share of right answers, half its interval)}, where measured."""
    found = {}
    for times in (1, 2, 4, 8, 16):
        column = f"right_{times}x"
        if all(column in run for run in runs):
            found[times] = mean_and_half([run[column] for run in runs])
    return found
