"""What a run says: every step in metrics.jsonl, some on the screen, what has changed at its end.

    append_metrics, keep_metrics    metrics.jsonl holds every step once, whatever happened
    Report, sentence, throughput    what is printed of a step
    open_tracker                    the same curves in TensorBoard, W&B or Trackio
    show_group                      a training prompt as the model gets it
    say_end                         what has changed, where it lies, what to type next
"""
import importlib
import json
import os
import shlex
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from configs import BadInput, reading, saving
from console import SILENT, clock, say
from data import Batch
from tokenizer import Tokenizer

SHOWN = 2000  # characters, and a tenth of it ids, of a prompt's beginning and of its end


# ----------------------------------------------------------------------------------- metrics.jsonl

def append_metrics(folder: str, metrics: dict) -> None:
    """Append a step's line; one that cannot be written whole is taken back, with a warning."""
    # Half a line, of a full disk, would spoil the file for everything that reads it later.
    path = os.path.join(folder, "metrics.jsonl")
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(metrics) + "\n")
    except OSError as e:
        say(f"warning: {path}: step {metrics['step']} is not in it ({e.strerror})")
        # A disk that has gone, or lets itself be read alone, refuses this as well.
        with suppress(OSError):
            os.truncate(path, size)


def keep_metrics(folder: str, steps: int) -> None:
    """Leave the first steps' lines: what was done after the checkpoint is done again."""
    path = os.path.join(folder, "metrics.jsonl")
    kept = []
    if steps and os.path.exists(path):
        with reading(path), open(path, encoding="utf-8") as f:
            for line in f:
                # A kill may have cut the last one short.
                whole = line.endswith("\n")
                if whole and json.loads(line)["step"] <= steps:
                    kept.append(line)
    with saving(path):
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)


def is_due(done: int, interval: int, steps: int) -> bool:
    """Every so many steps (0: never), and after the last."""
    if done == steps:
        return True
    return interval > 0 and done % interval == 0


# ------------------------------------------------------------------------------- what a step says

def sentence(step: int, metrics: dict) -> str:
    """A step as aligned numbers; metrics are named as TRL names them."""
    accuracy = metrics["rewards/accuracies"]
    margin = metrics["rewards/margins"]
    chosen = metrics["logps/chosen"]
    rejected = metrics["logps/rejected"]
    return (f"step {step:5d}  loss {metrics['loss']:.4f}  accuracy {accuracy:.2f}  "
            f"margin {margin:+6.2f}  chosen {chosen:7.3f}  rejected {rejected:7.3f}  "
            f"nll {metrics['nll']:6.3f}")


def throughput(metrics: dict, peak: float | None, processes: int, seconds_left: float) -> str:
    """Tokens and TFLOP a second over all processes, their share of the datasheet's, time left."""
    tokens = metrics["tokens"] / metrics["seconds"]
    tflops = metrics["tflop"] / metrics["seconds"]
    share = ""
    if peak:
        share = f"  MFU {1e12 * tflops / (peak * processes):.1%}"
    return (f"  {tokens:7,.0f} tokens/s  {tflops:6.3g} TFLOP/s{share}"
            f"  left {clock(seconds_left)}")


class Report:
    """Every step in metrics.jsonl; every log_interval steps, and at a fault, a sentence.

    Where that would be more than ten seconds of silence, a sentence comes earlier.
    """

    def __init__(self, folder: str, cfg: dict, processes: int, peak: float | None,
                 tracker: "Tracker"):
        self.folder = folder
        self.cfg = cfg
        self.processes = processes
        self.peak = peak
        self.tracker = tracker
        self.recent = deque(maxlen=20)  # seconds of the last steps
        self.said = time.time()

    def step(self, metrics: dict, first: dict) -> None:
        """metrics: of a step, with "held_out" where that was evaluated. first: held-out, before."""
        if os.environ.get("RANK", "0") == "0":
            append_metrics(self.folder, metrics)
        self.track(metrics)
        steps = self.cfg["steps"]
        done = metrics["step"]
        text = sentence(done, metrics)
        text += f"  lr {metrics['lr']:.2e}  |grad| {metrics['grad_norm']:6.2f}"
        text += f"  {metrics['seconds']:.2f}s"
        first_step = not self.recent
        if not first_step:  # that one also warms up, and says nothing about speed
            pace = sum(self.recent) / len(self.recent)
            text += throughput(metrics, self.peak, self.processes, pace * (steps - done))
        faulty = "skipped" in metrics
        if faulty:
            text += f"  not finite, left out from here on: pairs {metrics['skipped']}"
        silent = time.time() - self.said > SILENT
        if first_step or faulty or silent or is_due(done, self.cfg["log_interval"], steps):
            say(text)
            self.said = time.time()
        self.recent.append(metrics["seconds"])
        if "held_out" in metrics:
            say(sentence(done, metrics["held_out"]) + "  held-out")
            warn_of_displacement(first["logps/chosen"], metrics["held_out"]["logps/chosen"])


    def track(self, metrics: dict) -> None:
        try:
            self.tracker.log(as_trl(metrics), metrics["step"])
        # Another's package, on a full disk or a broken network: it may raise whatever it likes, and
        # metrics.jsonl has the same numbers.
        except Exception as e:
            say(f"warning: log={self.cfg['log']} has failed, the run goes on without it ({e!r})")
            self.tracker = Tracker()

    def close(self) -> None:
        """The last of the curves reach their place, or a warning says that they did not."""
        try:
            self.tracker.close()
        except Exception as e:  # as in track; what was trained is not exported yet
            say(f"warning: log={self.cfg['log']} could not be ended ({e!r})")


def warn_of_displacement(before: float, now: float) -> None:
    """Likelihood displacement: margins grow while the chosen answer is lost with the others."""
    if now < before - 0.5:
        say(f"warning: chosen log-prob fell from {before:.3f} to {now:.3f}: "
            "raise sft_weight or lower lr")


# ----------------------------------------------------------------------------------------- curves

class Tracker:
    """Where curves are watched while the run goes on: nowhere. metrics.jsonl has them anyway."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard(Tracker):

    def __init__(self, folder: str, start: int):
        from torch.utils.tensorboard import SummaryWriter
        # What was done after the checkpoint is done again, and would be there twice.
        self.writer = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=start + 1)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Hosted(Tracker):
    """W&B, and Trackio, which took over its interface."""

    def __init__(self, package: str, cfg: dict):
        self.package = importlib.import_module(package)
        self.package.init(project="nanologo", name=cfg["name"], config=cfg)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.package.log(metrics, step=step)

    def close(self) -> None:
        self.package.finish()


def open_tracker(cfg: dict, folder: str, start: int) -> Tracker:
    """The tracker that `log` names, which shows the steps after `start`. BadInput: not installed.

    It shows in process 0, and nothing in the others.
    """
    if not cfg["log"] or os.environ.get("RANK", "0") != "0":
        return Tracker()
    try:
        if cfg["log"] == "tensorboard":
            return TensorBoard(folder, start)
        return Hosted(cfg["log"], cfg)
    except ImportError as e:
        raise BadInput(f"log={cfg['log']}: pip install {cfg['log']} ({e})") from e


def as_trl(metrics: dict) -> dict[str, float]:
    """A step's metrics by the names under which TRL's trainers show theirs: curves lie together."""
    names = {"nll": "nll_loss", "lr": "learning_rate"}
    found = {}
    for group, values in (("train", metrics), ("eval", metrics.get("held_out", {}))):
        for name, value in values.items():
            if isinstance(value, float):
                found[f"{group}/{names.get(name, name)}"] = value
    return found


# ------------------------------------------------------------------------------- what goes in

def show_group(group: Batch, tokenizer: Tokenizer) -> None:
    """Print the prompt of a batch of one group: its text, ids and positions, as training has it."""
    prompt, answer, *_ = group.segments
    # The prompt's last token opens each answer's branch instead.
    end = prompt.end + 1
    ids = group.tokens[:end].tolist()
    text = tokenizer.decode(ids, skip_special=False)
    begins = ids.count(tokenizer.bos_id)
    say(f"the first training prompt, {len(ids)} tokens, control tokens as text:")
    say(shortened(text, SHOWN))
    say(f"its ids, with {begins} BOS: {listed(ids)}")
    say(f"its positions: {listed(group.positions[:end].tolist())}")
    say(f"answers of {', '.join(str(each.length) for each in group.segments[1:])} tokens follow, "
        f"all from position {int(group.positions[answer.start]) + 1} on")


def shortened(text: str, half: int) -> str:
    """A long text without its middle."""
    if len(text) <= 2 * half:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def listed(numbers: list[int]) -> str:
    half = SHOWN // 20
    if len(numbers) <= 2 * half:
        return " ".join(map(str, numbers))
    left_out = f"[... {len(numbers) - 2 * half:,} ...]"
    return " ".join([*map(str, numbers[:half]), left_out, *map(str, numbers[-half:])])


# ------------------------------------------------------------------------------- what has changed

HELD_OUT = {
    "rewards/margins": "+.3f",
    "rewards/accuracies": ".3f",
    "logps/chosen": ".3f",
    "logps/rejected": ".3f",
    "nll": ".3f",
    "loss": ".4f",
}


LIES = {
    "hf": "the aligned model, as transformers and vLLM open it",
    "adapter": "LoRA alone, for PEFT",
    "metrics.jsonl": "every step",
    "curves.png": "the same as a picture",
    "tensorboard": "tensorboard --logdir",
    "result.json": "all of the above, and every setting",
}


def changes(before: dict, after: dict) -> Iterator[str]:
    """The lines of a table: right answers by length, and held-out metrics, before and after.

    Beside them stands the model before with its longer RoPE alone, where that was asked.
    """
    rope = before.get("right_answers_rope", {})
    yield row_of("", "before", "after", "longer RoPE alone" if rope else "")
    for size, counts in after["right_answers"].items():
        # A resumed run may ask at sizes at which its first part did not.
        old = share_of(before["right_answers"].get(size))
        untrained = share_of(rope.get(size)) if rope else ""
        yield row_of(f"right answers, context {size}", old, share_of(counts), untrained)
    for name, form in HELD_OUT.items():
        if name in after["held_out"]:
            old = format(before["held_out"][name], form)
            now = format(after["held_out"][name], form)
            yield row_of(f"held-out {name}", old, now)


def row_of(name: str, *cells: str) -> str:
    line = f"{name:30}"
    for cell in cells:
        line += f"{cell:>20}"
    return line.rstrip()


def share_of(counts: list[int] | None) -> str:
    if not counts:
        return "not asked"
    right, asked = counts
    return f"{right} of {asked}  {right / asked:.3f}"


def said_before_and_after(before: list[dict], after: list[dict]) -> Iterator[str]:
    """Lines of the questions that both have: the right answer, what the model said, and says."""
    known = {(each["context"], each["question"]): each for each in before}
    for new in after:
        old = known.get((new["context"], new["question"]))
        if not old:  # asked since a resume alone
            continue
        right = one_line(new["answers"][0])
        yield f"{one_line(new['question'])}   (context {new['context']}; right: {right})"
        for when, answer in (("before", old), ("now", new)):
            verdict = "right" if answer["right"] else "wrong"
            yield f"  {when:8}{verdict:7}{one_line(answer['said'])}"


def one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."


def say_end(result: dict, folder: str, pairs: str) -> None:
    """Print of a finished run what has changed, where it lies, and what to type next.

    result: what result.json says. pairs: the pairs' file, which need not be in the run's folder.
    """
    before = result["before"]
    after = result["after"]
    say("\n" + "\n".join(changes(before, after)))
    lines = list(said_before_and_after(before.get("said", []), after["said"]))
    if lines:
        say("\nThe first fresh questions, and what the model said of them:")
        say("\n".join(lines))
    spent = [f"{name.replace('_', ' ')} {clock(took)}" for name, took in result["seconds"].items()]
    say(f"\nTime: {', '.join(spent)}. Where everything lies:")
    for path, what in LIES.items():
        path = os.path.join(folder, path)
        if os.path.exists(path):
            say(f"  {path:40} {what}")
    say(f"  {pairs:40} the pairs")
    say("\nNext:")
    for command in result["next"]:
        say(f"  {command}")


def next_commands(cfg: dict, model: str, pairs: str, said: list[dict]) -> list[str]:
    """What to type now: ask the new model something; see it beside the one before.

    said: fresh questions, of which the first is asked. The second command spells out what the pairs
    do not say, since the run's own command line may have changed its config.
    """
    ask = ["sample.py", model, said[0]["question"] if said else "QUESTION", "context=FILE"]
    for key, default in (("head", ""), ("tail", "\n\nQuestion: {question}")):
        value = cfg[f"prompt_{key}"]
        if value != default:
            ask.append(f"{key}={value}")
    compare = ["-m", "evals", "preferences", model, f"pairs={pairs}", f"compare={cfg['model']}"]
    # As many as were held out: what was trained on would look better than it is.
    compare.append(f"last={cfg['held_out']}")
    for key in ("window", "positions", "sparse_share", "draws", "beta", "gamma"):
        compare.append(f"{key}={cfg[key]}")
    return [shell_line(ask), shell_line(compare)]


def shell_line(words: list[str]) -> str:
    """python WORDS, as a shell takes it, on one line."""
    line = "python"
    for word in words:
        quoted = shlex.quote(word)
        if "\n" in word:
            # As bash and zsh read it.
            plain = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
            quoted = f"$'{plain}'"
        line += f" {quoted}"
    return line
