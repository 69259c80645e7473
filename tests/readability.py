"""What a reader meets, in numbers: the table of a tree, and of others beside it.

    python tests/readability.py                    this tree
    python tests/readability.py TREE [TREE ...]    others, as a worktree of an earlier commit; with files=1 each file too

Counted are the Python files that are no tests. A node is one of Python's syntax tree; "loaded" are the lines of this
repository that the imports at the top of train_logo.py bring in, itself included; "touched" is what runs between the
samples of a step and its gradients (encode, collate, forward, loss, backward) for two groups of configs/tiny.py.
"""
import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Counts:
    """Of one file, or of several added up."""
    lines: int = 0
    nodes: int = 0
    comprehensions: int = 0
    comments: int = 0              # lines that hold nothing else
    over_100: int = 0              # lines of more than 100 columns
    longest: tuple[int, str] = (0, "")

    def __add__(self, other):
        return Counts(self.lines + other.lines, self.nodes + other.nodes, self.comprehensions + other.comprehensions,
                      self.comments + other.comments, self.over_100 + other.over_100, max(self.longest, other.longest))

    @property
    def nodes_a_line(self):
        return self.nodes / max(1, self.lines)

    @property
    def comprehensions_in_100(self):
        return 100 * self.comprehensions / max(1, self.lines)

    @property
    def comment_share(self):
        return self.comments / max(1, self.lines)


def count(path, name):
    text = path.read_text(encoding="utf-8")
    lines, nodes = text.splitlines(), list(ast.walk(ast.parse(text)))
    functions = [(node.end_lineno - node.lineno + 1, f"{name}: {node.name}") for node in nodes if isinstance(node, FUNCTIONS)]
    return Counts(len(lines), len(nodes), sum(isinstance(node, COMPREHENSIONS) for node in nodes),
                  sum(line.lstrip().startswith("#") for line in lines), sum(len(line) > 100 for line in lines),
                  max(functions, default=(0, "")))


def source_files(tree):
    """{path inside the tree: path} of the files that are counted: those that git knows, without tests."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=tree, capture_output=True, text=True)
    names = listed.stdout.split() if listed.returncode == 0 else [str(path.relative_to(tree)) for path in tree.rglob("*.py")]
    return {name: tree / name for name in sorted(names) if not name.startswith("tests/") and (tree / name).is_file()}


LOADED = """
import ast, os, sys
sys.path.insert(0, os.getcwd())
top = [node for node in ast.parse(open("train_logo.py").read()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
exec(compile(ast.Module(top, []), "train_logo.py", "exec"))
files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
here = os.path.realpath(os.getcwd()) + os.sep
packages = os.path.realpath(sys.prefix) + os.sep  # the environment may lie inside the tree, as the README has it
files = [f for f in files if os.path.realpath(f).startswith(here) and not os.path.realpath(f).startswith(packages)]
files = [f for f in files if os.path.isfile(f)] + ["train_logo.py"]
print(json.dumps({os.path.relpath(os.path.realpath(f)): len(open(f).read().splitlines()) for f in files}))
"""

TOUCHED = """
import os, sys
sys.path.insert(0, os.getcwd())
import numpy as np
from checkpoint import load_pretrained
from configs import load_config
from data import collate, encode_group, step_samples
from loss import logo_loss
from tokenizer import load_tokenizer

cfg = {**load_config([]), "batch_size": 2}
tokenizer, model = load_tokenizer(cfg["model"]), load_pretrained(cfg["model"])
pairs = [{"id": i, "question": "Who is Rosa?", "chunks": [np.arange(60, 76), np.arange(80, 90)], "chosen": " Rosa paints.",
          "rejected": [" Rosa sings.", " Ida paints."]} for i in range(2)]
here, lines, functions = os.path.realpath(os.getcwd()) + os.sep, set(), set()

def trace(frame, event, argument):
    code = frame.f_code
    if not os.path.realpath(code.co_filename).startswith(here):
        return None
    lines.add((code.co_filename, frame.f_lineno))
    if not code.co_name.startswith("<"):          # a comprehension is no function to a reader
        functions.add((code.co_filename, code.co_firstlineno))
    return trace

sys.settrace(trace)
batch = collate([encode_group(pairs[i], tokenizer, cfg, draw, epoch) for i, draw, epoch in step_samples(2, cfg, 0)])
if not isinstance(batch, tuple):
    batch = batch.tokens, batch.positions, batch.targets, batch.segments
sums, lengths = model(*batch)
logps = (sums / lengths).view(2, -1)
loss, metrics = logo_loss(logps[:, 0], logps[:, 1:], cfg["beta"], cfg["gamma"], cfg["sft_weight"])
loss.backward()
sys.settrace(None)
lines = [line for line in lines if os.path.isfile(line[0])]
print(json.dumps([len(functions), len(lines)]))
"""

SETTINGS = """
import importlib, os, sys
sys.path.insert(0, os.getcwd())
from configs import load_config
keys = set(load_config([])) - {"name"}
for family, names in {"evals": ("eval", "evals.__main__"), "sample": ("sample",), "bench": (
        "bench", "bench.step", "bench.limit", "bench.generate", "bench.plan")}.items():
    for name in names:
        try:
            options = getattr(importlib.import_module(name), "OPTIONS", {})
        except ModuleNotFoundError:
            continue
        for key, value in options.items():
            keys |= {(family, own) for own in value} if isinstance(value, dict) else {(family, key)}
print(json.dumps([len([key for key in keys if isinstance(key, str)]), len(keys)]))
"""


def ask(tree, code):
    """What a piece of code prints last, as JSON, in a fresh Python inside the tree."""
    done = subprocess.run([sys.executable, "-c", "import json" + code], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(tree):
    """The rows (what, value) of a tree."""
    counts = {name: count(path, name) for name, path in source_files(tree).items()}
    total = sum(counts.values(), Counts())
    loaded, (functions, lines) = ask(tree, LOADED), ask(tree, TOUCHED)
    settings, with_commands = ask(tree, SETTINGS)
    length, longest = total.longest
    readme = (tree / "README.md").read_text(encoding="utf-8").splitlines()
    return [
        ("Python files at the top", sum("/" not in name for name in counts)),
        ("Python files", len(counts)),
        ("lines", total.lines),
        ("nodes a line", f"{total.nodes_a_line:.1f}"),
        ("comprehensions in 100 lines", f"{total.comprehensions_in_100:.1f}"),
        ("comment lines", f"{total.comment_share:.1%}"),
        ("longest function", f"{length} ({longest})"),
        ("lines over 100 columns", total.over_100),
        ("lines loaded before a step", f"{sum(loaded.values())} ({sum(loaded.values()) / total.lines:.0%})"),
        ("nodes loaded before a step", sum(count(tree / name, name).nodes for name in loaded)),
        ("functions that a step touches", functions),
        ("lines that a step touches", lines),
        ("settings of a run", settings),
        ("with those of the commands", with_commands),
        ("README lines", len(readme)),
    ]


def by_file(tree):
    for name, path in source_files(tree).items():
        found = count(path, name)
        print(f"{name:26} {found.lines:5} lines  {found.nodes_a_line:5.1f} nodes a line  {found.comprehensions_in_100:5.1f} comprehensions "
              f"in 100  {found.comment_share:6.1%} comments  {found.over_100:3} over 100  longest {found.longest[0]}")


if __name__ == "__main__":
    trees = [Path(word) for word in sys.argv[1:] if word != "files=1"] or [HERE]
    tables = [table(tree) for tree in trees]
    names = [tree.resolve().name for tree in trees]
    print(f"{'':32}" + "".join(f"{name:>36}" for name in names))
    for row in zip(*tables):
        print(f"{row[0][0]:32}" + "".join(f"{value!s:>36}" for _, value in row))
    if "files=1" in sys.argv:
        for tree in trees:
            by_file(tree)
