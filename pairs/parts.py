"""How processes share the writing of a pairs' file: each leaves its blocks in files of their own.

    pairs.jsonl.parts/96.jsonl     the lines of the block that begins with example 96
    pairs.jsonl                    what process 0 has put together, in the examples' order

No process waits for another in a collective, which would have a time limit, and would end in a
traceback everywhere when one process fails. What they have to tell each other, they tell by files.
"""
import json
import os
import time
from collections import deque
from collections.abc import Sequence

from configs import BadInput
from console import Progress

PAUSE = 0.2  # seconds between two looks at what the other processes have done


def parts_of(path: str) -> str:
    """The folder of finished blocks that wait for their turn in a pairs' file."""
    return path + ".parts"


def part_of(folder: str, first: int) -> str:
    """The file of the block that begins with this example."""
    return os.path.join(folder, f"{first}.jsonl")


def write_part(folder: str, first: int, lines: list[str]) -> None:
    """A block's lines as a file, which appears whole or not at all.

    It says the same whoever writes it. So a later build takes what lies here, however many
    processes it has, and a process that outlives its killed build does no harm.
    """
    part = part_of(folder, first)
    unfinished = f"{part}.{os.getpid()}"
    try:
        with open(unfinished, "w", encoding="utf-8") as f:
            f.writelines(lines)
        os.replace(unfinished, part)
    except OSError as e:
        raise BadInput(f"{part}: cannot be written ({e.strerror}): the same command goes on") from e


class Merge:
    """Takes finished blocks, whoever wrote them, into the pairs' file, in the examples' order."""

    def __init__(self, path: str, missing: list[Sequence[int]], done: set[int],
                 bar: Progress):
        """missing: the blocks that are not wholly in the file; done: the examples that are."""
        self.path = path
        self.folder = parts_of(path)
        self.done = done
        self.bar = bar
        self.waiting = deque(block[0] for block in missing)
        self.unseen = {os.path.basename(part_of("", ids[0])): len(ids) for ids in missing}

    def take(self) -> None:
        """Append the blocks whose turn it is. The bar counts those as well that still wait."""
        for name in os.listdir(self.folder):
            self.bar.update(self.unseen.pop(name, 0))
        while self.waiting:
            part = part_of(self.folder, self.waiting[0])
            if not os.path.exists(part):
                break
            self.append(part)
            # Only now. A kill in between leaves a part whose lines are all there: it is ignored.
            os.remove(part)
            self.waiting.popleft()

    def append(self, part: str) -> None:
        try:
            with open(part, encoding="utf-8") as lines, \
                    open(self.path, "a", encoding="utf-8") as f:
                for line in lines:
                    # An earlier build may have been killed in the middle of this block.
                    if json.loads(line)["id"] not in self.done:
                        f.write(line)
        except OSError as e:
            raise BadInput(f"{self.path}: cannot be written ({e.strerror}): "
                           "the same command goes on") from e


def pause(parent: int) -> None:
    """Give the other processes a moment.

    parent: the process that started this one, torchrun. It ends all when one has failed, so nobody
    waits for ever, if it is there itself.
    """
    if os.getppid() != parent:
        raise BadInput("torchrun has ended, this process waits for others in vain: "
                       "the same command goes on")
    time.sleep(PAUSE)
