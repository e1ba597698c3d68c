"""What a run says while it trains: Megatron's lines read back, and a live bar made of them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_FIELD = re.compile(r"\| ([^|]+?): ([-+.\deE]+|nan|inf) (?=\|)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+)(?: on (\w+) set)? \| lm loss value: (\S+)")
_SAVED = re.compile(r"successfully saved checkpoint from iteration\s+(\d+)")
_LOADED = re.compile(r"successfully loaded checkpoint .* at iteration\s+(\d+)")


@dataclass(frozen=True)
class Iteration:
    """One logged training iteration."""

    number: int
    total: int
    loss: float | None
    seconds: float
    """Per iteration, averaged over the iterations since the line before."""


@dataclass(frozen=True)
class Note:
    """An event worth a line of its own."""

    text: str


def parse(line: str) -> Iteration | Note | None:
    """The meaning of one of Megatron's log lines, or None for the many that have none here."""
    if match := _ITERATION.search(line):
        values = dict(_FIELD.findall(line[match.end() - 1 :]))
        loss = values.get("lm loss")
        milliseconds = values.get("elapsed time per iteration (ms)", "nan")
        return Iteration(
            number=int(match[1]),
            total=int(match[2]),
            loss=None if loss is None else float(loss),
            seconds=float(milliseconds) / 1000,
        )
    if match := _VALIDATION.search(line):
        which = f"final {match[2]}" if match[2] else "validation"
        return Note(f"iteration {match[1]}: {which} loss {float(match[3]):.4f}")
    if match := _SAVED.search(line):
        return Note(f"iteration {match[1]}: checkpoint saved")
    if match := _LOADED.search(line):
        return Note(f"resumed from the checkpoint of iteration {match[1]}")
    return None


class LiveBar:
    """A bar with loss, tokens per second, step time and time left; feed it every line."""

    def __init__(self, console: Console, total: int, tokens_per_iteration: int):
        self._tokens = tokens_per_iteration
        self._progress = Progress(
            TextColumn("[bold]{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: TaskID = self._progress.add_task("", total=total, state="starting")

    @contextmanager
    def shown(self) -> Iterator["LiveBar"]:
        """Draw the bar for the length of the block."""
        with self._progress:
            yield self

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def finish(self) -> None:
        """Fill the bar: the last lines of a run may not have been logged."""
        self._progress.update(self._task, completed=self._progress.tasks[0].total)

    def feed(self, line: str) -> None:
        """Advance by one line of the log."""
        event = parse(line)
        if isinstance(event, Note):
            self.note(event.text)
        elif isinstance(event, Iteration):
            parts = [] if event.loss is None else [f"loss {event.loss:.3f}"]
            if event.seconds > 0:
                parts += [f"{self._tokens / event.seconds:,.0f} tokens/s", f"{event.seconds:.2f} s/step"]
            self._progress.update(
                self._task, completed=event.number, total=event.total, state="  ".join(parts)
            )
