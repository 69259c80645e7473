"""What commands say beside their results: help, how far long work is, and why they end.

    say, clock                     one line for all processes; seconds as 1:02:05
    asked_for_help, print_help     what a command does, its keys with their comments and values
    Progress                       a line every ten seconds, on a terminal one that moves
    on_error, leave                one line says what was wrong, where it is seen; the end

PyTorch is not imported here: what is wrong with a command line is said before that takes seconds.
"""
import json
import os
import re
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from configs import (
    HERE,
    BadInput,
    default_groups,
    exit_on_bad_input,
    load_config,
)

KEY = re.compile(r"    (\w+)=.*?  # (.*)")       # a key of a dict, with its comment
GOES_ON = re.compile(r" {8,}# (.*)")              # the rest of a comment, below it
COLUMN = 34                                      # where comments begin
SILENT = 10.0                                    # seconds that work may take without a word


def say(text: str) -> None:
    """Print a line, once for all processes. Where nothing takes it, work goes on without."""
    if int(os.environ.get("RANK", "0")) == 0:
        with still_at_work():
            print(text, flush=True)


@contextmanager
def still_at_work() -> Iterator[None]:
    """What is printed here may find a log's disk full, or its terminal or reader gone."""
    try:
        yield
    except OSError as e:
        # Standard error may lie elsewhere. Where it does not, nobody is left to be told.
        with suppress(OSError):
            print(f"warning: output cannot be written ({e.strerror})", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


# --------------------------------------------------------------------------------------------- help

def asked_for_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


def print_help(text: str, keys: dict[str, dict], *sources: str) -> None:
    """Print what a command does, and its keys with values and comments.

    text: a docstring. keys: {heading: {key: value}}. sources: files in which the keys are written
    as `key=value,  # comment`; a comment stands nowhere else, so that the two cannot differ.
    """
    if int(os.environ.get("RANK", "0")):
        return
    comments = {}
    for path in sources:
        comments.update(comments_of(path))
    lines = [text.strip()]
    for heading, values in keys.items():
        lines += ["", heading]
        for key, value in values.items():
            lines.append(key_line(key, value, comments.get(key, "")))
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Its reader, as head, has seen enough: no error, also when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_settings_help(text: str, words: list[str]) -> None:
    """print_help for a command that takes a config: its keys with the values of a command line."""
    cfg = load_config([word for word in words if word not in ("-h", "--help")])
    groups = {}
    for name, keys in default_groups().items():
        groups[f"keys of {cfg['name']}.py and the command line, {name}:"] = {
            key: cfg[key] for key in keys
        }
    print_help(text, groups, os.path.join(HERE, "default.py"))


def comments_of(path: str) -> dict[str, str]:
    """{key: comment} of the dicts in a Python file."""
    found = {}
    key = None
    with open(path, encoding="utf-8") as f:
        for line in f:
            first = KEY.match(line)
            more = GOES_ON.match(line)
            if first:
                key = first.group(1)
                found[key] = first.group(2)
            elif more and key:
                found[key] += " " + more.group(1)
            else:
                key = None
    return found


def key_line(key: str, value: object, comment: str) -> str:
    """`  key=value    comment`, as a command line takes it; long ones go on below."""
    shown = f"  {key}={value}".replace("\n", "\\n")
    below = " " * COLUMN
    if len(shown) >= COLUMN:
        shown += "\n" + below
    lines = textwrap.wrap(comment, 100 - COLUMN) or [""]
    return f"{shown:{COLUMN}}" + ("\n" + below).join(lines)


# ----------------------------------------------------------------------------------------- progress

class Progress:
    """Says how far long work is and how long the rest will take, on standard error.

        with Progress("pairs", 1200) as progress:
            progress.update(32)

    A plain line every ten seconds, which a log and a pipe keep as well; on a terminal one line that
    is written anew. Shorter work is silent. total 0: not known, so that only the time is told.
    """

    def __init__(self, what: str, total: int = 0, done: int = 0):
        self.what = what
        self.total = total
        self.done = done
        self.before = done     # the work of an earlier run says nothing of this one's pace
        self.ended = threading.Event()
        self.terminal = sys.stderr.isatty()

    def update(self, n: int = 1) -> None:
        """So much more is done."""
        self.done += n

    def __enter__(self) -> "Progress":
        self.start = time.time()
        # A thread of its own speaks: work that tells nothing for minutes, as the compiling of a
        # step, is the work that one wonders about.
        self.thread = threading.Thread(target=self.speak, daemon=True)
        if int(os.environ.get("RANK", "0")) == 0:
            self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def speak(self) -> None:
        spoken = False
        while not self.ended.wait(1.0 if self.terminal else SILENT):
            end = "\033[K\r" if self.terminal else "\n"
            print(self.line(time.time() - self.start), end=end, file=sys.stderr, flush=True)
            spoken = True
        if spoken and self.terminal:
            print("\033[K", end="", file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Where the work is after so many seconds."""
        if not self.total:
            return f"{self.what}: {clock(seconds)} so far"
        text = f"{self.what}: {self.done:,} of {self.total:,}, {clock(seconds)} so far"
        here = self.done - self.before
        if here:
            left = seconds / here * (self.total - self.done)
            text += f", about {clock(left)} left"
        return text


# ---------------------------------------------------------------------------------------------- end

def leave(code: int) -> None:
    """End this process, without the interpreter's own end.

    gloo's threads outlive destroy_process_group, and one that lets go of a tensor while Python is
    being taken down aborts the process (PyTorch issue 190489).
    """
    with still_at_work():
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def on_error(kind, error, trace) -> None:
    """sys.excepthook of a run: bad input and Ctrl-C are one line each; every error ends it."""
    if issubclass(kind, KeyboardInterrupt):
        if int(os.environ.get("RANK", "0")) == 0:
            print("interrupted: the same command goes on from what is written "
                  "(with resume=auto, where there is a step_ folder)", file=sys.stderr)
        leave(130)  # 128 + SIGINT, as shells have it: no success
    if "TORCHELASTIC_RUN_ID" in os.environ:
        error = tell_torchrun(kind, error)
    exit_on_bad_input(kind, error, trace)
    leave(1)


def tell_torchrun(kind, error) -> Exception:
    """The error, with a word on what follows it: torchrun adds some 25 lines of its own.

    torchrun ends its report with what it finds in a file that it has named, so that the cause
    stands in the last lines as well, not only far above them.
    """
    message = "".join(traceback.format_exception_only(kind, error)).strip()
    if issubclass(kind, BadInput):
        message = (f"{error} (this is the cause; torchrun's own lines only say that a process has "
                   "ended. One process does without them: python train_logo.py, or -m pairs)")
        error = BadInput(message)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as f:
            json.dump({"message": f"error: {message}", "timestamp": int(time.time())}, f)
    return error
