"""Bugs, planted one at a time in a copy of the tree: the tests that should see each, and the bugs that none saw.

    python tests/planted.py [WORD ...]     those whose file or description holds a WORD; none: all

The first ones are what the method's public code gets wrong. A bug whose text is no longer in its file is stale, and
counts as a failure of this table, as a test does that fails without any bug.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

import importlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from readability import HERE

sys.dont_write_bytecode = True
for slow in ("torch", "hypothesis", "transformers", "trl", "peft", "torch.distributed.fsdp", "matplotlib.pyplot"):
    try:
        importlib.import_module(slow)
    except ImportError:
        pass  # the tests that need it are skipped as well


class Bug(NamedTuple):
    what: str
    file: str
    old: str      # stands in the file exactly once
    new: str
    tests: str    # arguments of pytest: those that must turn red


DATA, MODEL, LOSS, GENERATE = (f"tests/test_{name}.py" for name in ("data", "model", "loss", "generate"))
BRANCHES = f"{MODEL} -k 'branches_equal_full_rows and not rope'"
SELECTION = f"{DATA} -k 'selection or side or cap or short_document'"
POSITIONS = f"{DATA} -k 'positions or slots or draws or chunks_have or pose'"
GROUP = f"{DATA} -k 'group or window or collating or batch'"
ROWS = f"{DATA} -k 'trained_on or whatever or refused'"

BUGS = [
    # ---- what the public code gets wrong
    Bug("the second rejected answer is everything after the chosen one", "model.py",
        "            answer_of[answer.start:answer.end] = i\n", "            answer_of[answer.start:] = min(i, 1)\n", BRANCHES),
    Bug("targets are not shifted", "data.py",
        "        targets.append(np.array(answer))\n", "        targets.append(np.array([prompt[P], *answer[:-1]]))\n", GROUP),
    Bug("each answer repeats the prompt", "data.py",
        "        tokens.append(np.array([prompt[P], *answer[:-1]]))\n",
        "        tokens.append(np.array([*prompt[:P], prompt[P], *answer[:-1]]))\n", GROUP),
    Bug("positions run past the window", "data.py",
        "(Placing(chunk_lengths, window - used, draw", "(Placing(chunk_lengths, window - used + tail, draw", POSITIONS),
    Bug("groups are packed without moving their segments", "data.py",
        "            segments.append(segment.moved(offset))\n", "            segments.append(segment)\n", GROUP),
    Bug("the prompt is labelled with token 0 instead of nothing", "data.py",
        "    targets = [np.full(P, IGNORE)]\n", "    targets = [np.full(P, 0)]\n", GROUP),
    Bug("the logits of every token are made", "model.py",
        "        scored = (targets != IGNORE).nonzero()[:, 0]\n", "        scored = (targets > -200).nonzero()[:, 0]\n",
        f"{MODEL} -k 'prompt_tokens_are_not_scored or branches_equal_full_rows'"),
    Bug("one answer's length for all", "model.py",
        "torch.bincount(owner, minlength=len(answers))", "torch.bincount(owner, minlength=len(answers)).max().expand(len(answers))",
        BRANCHES),

    # ---- chunks and scores
    Bug("the last, shorter chunk is lost", "data.py",
        "        for start in range(0, len(ids), size):\n", "        for start in range(0, len(ids) - size + 1, size):\n",
        f"{DATA} -k chunks_are"),
    Bug("passages are joined", "data.py",
        '        texts = [passage + "\\n\\n" for passage in context]\n', '        texts = ["\\n\\n".join(context)]\n',
        f"{DATA} -k chunks_are"),
    Bug("numbers are cut at their points", "data.py",
        'WORD = re.compile(r"\\w+(?:[.,]\\d+)*")', 'WORD = re.compile(r"\\w+")', f"{DATA} -k evaluator"),
    Bug("common words count", "data.py", "word.lower() not in COMMON", "word not in COMMON", f"{DATA} -k evaluator"),
    Bug("a word counts as often as it occurs", "data.py",
        "        shared = wanted & evaluator(tokenizer.decode(np.asarray(ids).tolist()))\n        scores.append(len(shared))\n",
        "        text = tokenizer.decode(np.asarray(ids).tolist())\n"
        "        scores.append(sum(text.lower().count(word) for word in wanted & evaluator(text)))\n", f"{DATA} -k scores"),

    # ---- selection
    Bug("a chunk at delta is critical", "data.py", "if scores[c] > delta]", "if scores[c] >= delta]", SELECTION),
    Bug("max_critical wins over n_chunks", "data.py",
        "min(max_critical or n_chunks, n_chunks))", "max_critical or n_chunks)", SELECTION),
    Bug("evidence over the cap counts as irrelevant", "data.py",
        "    return critical[:most], others\n", "    return critical[:most], critical[most:] + others\n", SELECTION),
    Bug("the best chunk of a poor document counts as irrelevant as well", "data.py",
        "        others = ranked[1:]\n", "        others = ranked\n", SELECTION),
    Bug("a document without any evidence makes a pair", "data.py",
        "if not critical and ranked and scores[ranked[0]] > 0:", "if not critical and ranked:", SELECTION),
    Bug("ties go to the later chunk", "data.py", "(-scores[c], c))", "(-scores[c], -c))", SELECTION),
    Bug("a lone irrelevant chunk", "data.py",
        "    irrelevant = others[-max(n_chunks, len(others) // 2):]\n", "    irrelevant = others[-1:]\n", SELECTION),
    Bug("half right has the best chunk", "data.py",
        "    weaker_half = critical[(len(critical) + 1) // 2:]\n", "    weaker_half = critical[:(len(critical) + 1) // 2]\n",
        SELECTION),
    Bug("a chunk twice in a prompt", "data.py", " if c not in half_right]", "]", SELECTION),
    Bug("two kinds of rejected prompts are one", "data.py",
        "    if not weaker_half and len(others) <= n_chunks:\n", "    if False:\n", SELECTION),
    Bug("half right is called by the other's name", "data.py",
        "            evidence.append(PARTIAL if weaker_half else NEAR)\n", "            evidence.append(PARTIAL)\n", SELECTION),
    Bug("the training prompt lacks evidence", "data.py",
        "    training = critical + near_misses", "    training = critical[:1] + near_misses", SELECTION),
    Bug("a prompt is not in document order", "data.py", "        rejected.append(sorted(picked))\n",
        "        rejected.append(picked)\n", SELECTION),

    # ---- positions
    Bug("rooms lose the remainder", "data.py",
        "        room = (c + 1) * slack // N - c * slack // N\n", "        room = slack // N\n", POSITIONS),
    Bug("a chunk may leave its slot", "data.py",
        "        offset = int(share * (room + 1))\n", "        offset = int(share * (2 * room + 1))\n", POSITIONS),
    Bug("draws are not stratified", "data.py",
        "        stratum = p.shared.permutation(p.draws)[p.draw]\n", "        stratum = p.own.integers(p.draws)\n", POSITIONS),
    Bug("all draws of an example are the same", "data.py",
        '    own = random_stream("positions of a draw", *seed, draw)\n',
        '    own = random_stream("positions of a draw", *seed, 0)\n', POSITIONS),
    Bug("sparse positions are not sorted", "data.py", "start + np.sort(places)", "start + places", POSITIONS),
    Bug("PoSE skips by half the slack", "data.py",
        "    skip = p.own.integers(0, p.slack + 1)\n", "    skip = p.own.integers(0, p.slack // 2 + 1)\n", POSITIONS),
    Bug("the share of sparse draws is turned round", "data.py",
        '"sparse" if chance < cfg["sparse_share"]', '"sparse" if chance > cfg["sparse_share"]', f"{DATA} -k mix"),
    Bug("a stream without its tag", "data.py",
        "    return np.random.default_rng([zlib.crc32(tag.encode()), *numbers])\n", "    return np.random.default_rng([*numbers])\n",
        f"{DATA} -k streams"),

    # ---- groups, batches, order
    Bug("answers lack their end", "data.py", "tokenizer.encode(text) + stops[:1]", "tokenizer.encode(text)", GROUP),
    Bug("answers follow each other's positions", "data.py",
        "        positions.append(prompt_positions[P] + np.arange(len(answer)))\n",
        "        positions.append(prompt_positions[P] + start - P + np.arange(len(answer)))\n", GROUP),
    Bug("an answer sees the one before it", "data.py",
        "start + len(answer), 0, P))", "start + len(answer), 0, start))", GROUP),
    Bug("the chosen answer says how much slack there is", "data.py",
        "    longest = max(len(answer) for answer in answers)\n    # By the pair", "    longest = len(answers[0])\n    # By the pair", GROUP),
    Bug("a batch does not check itself", "data.py",
        '            assert segment.start == end, "segments cover the stream in order"\n', "", GROUP),
    Bug("each step begins the epoch anew", "data.py",
        '    for i in range(step * cfg["batch_size"], (step + 1) * cfg["batch_size"]):\n',
        '    for i in range(cfg["batch_size"]):\n', f"{DATA} -k every_sample"),
    Bug("every epoch has the same order", "data.py",
        'random_stream("order of an epoch", cfg["seed"], epoch)', 'random_stream("order of an epoch", cfg["seed"], 0)',
        f"{DATA} -k every_sample"),
    Bug("a held-out document is trained on", "data.py",
        "        if document_of(pair) not in unseen:\n", "        if True:\n", f"{DATA} -k document"),
    Bug("a pair without a document is taken for the document of its number", "data.py",
        '        return "pair", pair["id"]\n', '        return "document", pair["id"]\n', f"{DATA} -k document"),
    Bug("more held-out pairs than there are wrap round", "data.py",
        "    border = max(0, len(pairs) - held_out)\n", "    border = len(pairs) - held_out\n", f"{DATA} -k document"),

    # ---- the pairs' file
    Bug("True is an id", "data.py", "if type(value) is not int or", "if not isinstance(value, int) or", ROWS),
    Bug("an id of two words", "data.py", "not 0 <= value < 1 << 32:", "value < 0:", ROWS),
    Bug("300.7 is a token id", "data.py", "set(map(type, ids)) != {int}:", "not set(map(type, ids)) <= {int, float}:", ROWS),
    Bug("negative token ids", "data.py", "if min(ids) < 0 or max(ids)", "if max(ids)", ROWS),
    Bug("token ids past the vocabulary", "data.py", "max(ids) >= vocab_size:", "max(ids) > vocab_size:", ROWS),
    Bug("more than n_chunks", "data.py", "1 <= len(chunks) <= n_chunks:", "1 <= len(chunks):", ROWS),
    Bug('"No." becomes three answers', "data.py",
        "    if not isinstance(rejected, list) or len(rejected)", "    if not rejected or len(rejected)", ROWS),
    Bug("an answer equal to the chosen but for spaces", "data.py",
        "        if text.strip() == chosen.strip():\n", "        if text == chosen:\n", ROWS),
    Bug("blank answers", "data.py", "if not is_text(text) or not text.strip():", "if not is_text(text):", ROWS),
    Bug("an answer too long for the window is met at its step", "data.py",
        '    if prompt + longest > cfg["window"]:\n', "    if False:\n", ROWS),
    Bug("one position too many", "data.py",
        '    if prompt + longest > cfg["window"]:\n', '    if prompt + longest > cfg["window"] + 1:\n', f"{DATA} -k just_fits"),
    Bug("half a character reaches the tokenizer", "data.py", "    try:\n        value.encode()\n", "    try:\n        str(value)\n", ROWS),
    Bug("two pairs of one id", "data.py", "        if first != number:\n", "        if False:\n", ROWS),
    Bug("pairs of another tokenizer", "data.py", "    if built_with != tokenizer.digest:\n", "    if False:\n", ROWS),

    # ---- the model
    Bug("an answer sees the other answers", "model.py",
        "    mask = torch.full((sum(lengths), P + sum(lengths)), -math.inf)\n",
        "    mask = torch.full((sum(lengths), P + sum(lengths)), 0.0)\n", BRANCHES),
    Bug("an answer sees its own future", "model.py",
        "        mask[row:row + n, P + row:P + row + n].triu_(1)\n", "        mask[row:row + n, P + row:P + row + n] = 0\n", BRANCHES),
    Bug("rotary pairs neighbours' signs the other way", "model.py", "torch.cat([-b, a], dim=-1)", "torch.cat([b, -a], dim=-1)",
        f"{MODEL} -k logits_equal_transformers"),
    Bug("angles in bf16", "model.py",
        "    angles = positions[:, None].float() * frequencies\n",
        "    angles = (positions[:, None].bfloat16() * frequencies.bfloat16()).float()\n", f"{MODEL} -k angles"),
    Bug("llama3 keeps what it should interpolate", "model.py",
        "    return (1 - keep) * frequencies / rope[\"factor\"] + keep * frequencies\n",
        "    return keep * frequencies / rope[\"factor\"] + (1 - keep) * frequencies\n", f"{MODEL} -k frequencies"),
    Bug("the keys of a varlen call lack the prompt", "model.py",
        "            key_index.append(torch.arange(segment.prefix_start, segment.prefix_end))\n", "", f"{MODEL} -k varlen"),
    Bug("log-probs in the model's dtype", "model.py",
        "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype", BRANCHES),
    Bug("a group's segments move, their prefix does not", "model.py",
        "self.prefix_start + offset, self.prefix_end + offset)", "self.prefix_start, self.prefix_end)",
        f"{MODEL} -k 'move or another_group'"),
    Bug("LoRA is not scaled", "model.py", "        self.scale = alpha / r\n", "        self.scale = 1.0\n",
        "tests/test_checkpoint.py -k peft"),
    Bug("everything trains beside LoRA", "model.py",
        "            p.requires_grad = of_lora or asked_for\n", "            p.requires_grad = True\n", "tests/test_checkpoint.py -k peft"),

    # ---- the loss
    Bug("gamma stands inside beta", "loss.py", "-F.logsigmoid(margin - gamma)", "-F.logsigmoid(margin - beta * gamma)", LOSS),
    Bug("Eq. 3 as printed", "loss.py", "    sft = -chosen\n", "    sft = chosen\n", LOSS),
    Bug("rejected answers are added up", "loss.py",
        "    margin = beta * (chosen - rejected.mean(dim=1))\n", "    margin = beta * (chosen - rejected.sum(dim=1))\n", LOSS),
    Bug("only the first rejected answer counts", "loss.py",
        "    margin = beta * (chosen - rejected.mean(dim=1))\n", "    margin = beta * (chosen - rejected[:, 0])\n", LOSS),
    Bug("the logarithm of a sigmoid that can be 0", "loss.py",
        "-F.logsigmoid(margin - gamma)", "-(margin - gamma).sigmoid().log()", LOSS),
    Bug("accuracy counts ties", "loss.py", '"rewards/accuracies": chosen > rejected', '"rewards/accuracies": chosen >= rejected', LOSS),

    # ---- decoding
    Bug("a row sees slots that nobody filled", "generate.py",
        "        seen = torch.arange(S, device=device) <= new[:, None]\n",
        "        seen = torch.arange(S, device=device) <= new.max().expand_as(new)[:, None]\n", f"{GENERATE} -k 'neighbours or cached'"),
    Bug("a token's position is one too many", "generate.py",
        "    positions = cache.lengths.to(tokens.device)\n", "    positions = cache.lengths.to(tokens.device) + 1\n",
        f"{GENERATE} -k 'greedy or cached'"),
    Bug("the nucleus lacks the token that crosses top_p", "generate.py",
        "mass_before >= top_p", "mass_before + probs >= top_p", f"{GENERATE} -k nucleus"),
    Bug("noise for the rows that go on alone", "generate.py",
        "(probs / noise[alive])", "(probs / noise[:len(alive)])", f"{GENERATE} -k rows_that_ended"),
    Bug("heads look in the model's dtype", "generate.py",
        "grouped.float() @ keys.float().transpose(2, 3)", "(grouped @ keys.transpose(2, 3)).float()", f"{GENERATE} -k fp32"),
]


def copy_of_the_tree(folder):
    """The files that git knows, or would know, in a new folder."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=HERE, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and (HERE / name).is_file():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / name, target)
    if (HERE / "tests" / ".cache").is_dir():
        (Path(folder) / "tests" / ".cache").symlink_to(HERE / "tests" / ".cache")


def red(folder, tests):
    """Whether one of the tests fails in a copy; the first line that says so. No test at all is an error of the table.

    In a fork of this process, which has imported what takes long and nothing of the tree.
    """
    report = Path(folder) / "report.txt"
    child = os.fork()
    if not child:
        os.chdir(folder)
        with open(report, "w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.path[:] = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(HERE)]
        for name in ("readability", "planted"):
            sys.modules.pop(name, None)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)])
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = report.read_text(errors="replace").splitlines()
    if code not in (0, 1, 2):
        raise SystemExit(f"pytest {tests}: {lines[-20:]}")
    told = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return code != 0, told[0][:150] if told else ""


def plant(bug):
    """("caught" | "SURVIVED" | "stale", which test saw it, seconds)."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_tree(folder)
        path = Path(folder) / bug.file
        text = path.read_text() if path.is_file() else ""
        if text.count(bug.old) != 1:
            return "stale", f"its text is there {text.count(bug.old)} times", 0
        path.write_text(text.replace(bug.old, bug.new))
        caught, told = red(folder, bug.tests)
    return "caught" if caught else "SURVIVED", told, time.time() - start


def main(words):
    bugs = []
    for bug in BUGS:
        if not words or any(word in f"{bug.file} {bug.what}" for word in words):
            bugs.append(bug)
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_tree(folder)
        for tests in sorted({bug.tests for bug in bugs}):
            failed, told = red(folder, tests)
            if failed:
                raise SystemExit(f"without any bug, {tests} fails already: {told}")
    print(f"{len(bugs)} bugs; without any, their tests pass", flush=True)
    found = {"caught": 0, "SURVIVED": 0, "stale": 0}
    for bug in bugs:
        end, told, seconds = plant(bug)
        found[end] += 1
        print(f"{end:9} {bug.file:17} {bug.what}  ({seconds:.0f} s)  {told}", flush=True)
    print(", ".join(f"{number} {end}" for end, number in found.items()))
    return found["SURVIVED"] + found["stale"]


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
