"""Read the ends of large logs, and the exceptions in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

_WINDOW, _WIDE_WINDOW = 256 << 10, 16 << 20
"""Bytes at the end of a log that are read; the second where the first has nothing to say."""
_BLOCK = 1 << 20
_LONGEST_LINE = 4000
_MOST_MESSAGE_LINES = 8
_MOST_LAST_LINES = 50
"""Where an exception without a traceback can be, at the end of a log."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
_RANK = re.compile(r"\[rank(\d+)\]: ?")
_GROUP_MARK = re.compile(r"[ |+-]*(?:\| |\+ )")
_GROUP_RULE = re.compile(r"[\s+\-\d]*")
"""What Python draws around the members of an exception group."""
_TRACEBACK = re.compile(
    r"(?:Exception Group |(Original ))?Traceback \(most recent call last\):(?: \(RANK \d+\))?"
)
_NESTED = re.compile(r"Original Traceback|Traceback .*\(RANK \d+\)")
_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_LINKS = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
_NOT_FATAL = ("Exception ignored in", "Exception in thread", "--- Logging error")
"""Before a traceback that did not end its process."""
_WITHOUT_TRACEBACK = re.compile(
    r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)(?:: .+)?|\S+\.py: error: .+"
)
_WRAPPERS = ("CheckpointException", "ChildFailedError")
"""Exceptions around the one that matters."""


@dataclass(frozen=True)
class Tail:
    """The last lines of a log, without colours, and of a line that was overwritten its last state."""

    path: Path
    start: int
    """Byte at which the first line begins."""
    lines: list[str]


@dataclass(frozen=True)
class Frame:
    """One call in a traceback."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Raised:
    """An exception as a process printed it, with those that led to it."""

    texts: tuple[str, ...]
    """``Type: message`` of the exceptions, in the order in which they were raised; wrappers are left out."""
    frames: tuple[Frame, ...]
    """Calls of all their tracebacks; none where no traceback was printed."""
    last_frames: tuple[Frame, ...]
    """Calls of the traceback of the last."""
    rank: int | None
    """As PyTorch prints it before the lines of an exception that ended the process, and of no other."""
    index: int
    """Number, from 0, of the line with the last exception."""

    @property
    def root(self) -> str:
        """The exception with which it began."""
        return self.texts[0]

    @property
    def text(self) -> str:
        """The exception that says what happened; with the line of code, where it has no message."""
        return self.texts[-1]


def read_tail(path: Path, size: int = _WINDOW) -> Tail:
    """The last ``size`` bytes of a log as whole lines; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, 2) - size)
            file.seek(start)
            if start:
                start += len(file.readline())
            raw = file.read(size)
    except OSError:
        return Tail(path, 0, [])
    lines = raw.decode("utf-8", errors="replace").removesuffix("\n")
    return Tail(path, start, [_cleaned(line) for line in lines.split("\n")] if raw else [])


def _cleaned(line: str) -> str:
    line = _ANSI.sub("", line[: 4 * _LONGEST_LINE])
    return line.rstrip("\r").rpartition("\r")[2][:_LONGEST_LINE]


def search_tail(path: Path, insist: bool) -> tuple[Tail, Raised | None]:
    """The end of a log and the exception that ended its process.

    Args:
        path: the log.
        insist: whether to look far back if there is none at its end.
    """
    tail = read_tail(path)
    raised = final_exception(tail.lines)
    if raised is None and tail.start and insist:
        wide = read_tail(path, _WIDE_WINDOW)
        raised = final_exception(wide.lines)
        if raised is not None:
            tail = wide
    return tail, raised


def line_number(tail: Tail, index: int) -> int:
    """Number in the whole file, from 1, of a line of its tail."""
    count, left = 0, tail.start
    with open(tail.path, "rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count + index + 1


def excerpt(path: Path, line: int, before: int, after: int) -> list[tuple[int, str]]:
    """Numbered lines around one of a log; empty if it cannot be read."""
    first = max(1, line - before)
    try:
        with open(path, errors="replace", newline="\n") as file:
            found = [_cleaned(text.rstrip("\n")) for text in islice(file, first - 1, line + after)]
    except OSError:
        return []
    return list(enumerate(found, first))


def final_exception(lines: list[str]) -> Raised | None:
    """The exception that ended the process of this log, or None if it shows none."""
    found = list(exceptions(lines))
    uncaught = [raised for raised in found if raised.rank is not None]
    if found:
        return (uncaught or found)[-1]
    for index in range(len(lines) - 1, max(-1, len(lines) - _MOST_LAST_LINES), -1):
        if _WITHOUT_TRACEBACK.fullmatch(lines[index]):
            return Raised((_message(lines, index, ""),), (), (), None, index)
    return None


def exceptions(lines: list[str]) -> Iterator[Raised]:
    """The exceptions printed with a traceback, each once with all that led to it, in order.

    Lines of several ranks may be mixed where PyTorch printed the rank before each. What Python prints of an
    exception that it ignores is left out.
    """
    chains: list[list[_Printed]] = []
    latest: dict[str, list[_Printed]] = {}
    for printed in _printed(lines):
        chain = latest.get(printed.prefix)
        if printed.follows and chain is not None:
            chain.append(printed)
        else:
            latest[printed.prefix] = [printed]
            chains.append(latest[printed.prefix])
    for chain in chains:
        if chain[0].is_ignored:
            continue
        telling = [p for p in chain if not _type(p.text).startswith(_WRAPPERS)] or chain
        rank = _RANK.match(chain[0].prefix)
        yield Raised(
            texts=tuple(p.text for p in telling),
            frames=tuple(frame for p in chain for frame in p.frames),
            last_frames=telling[-1].frames,
            rank=None if rank is None else int(rank[1]),
            index=telling[-1].index,
        )


@dataclass(frozen=True)
class _Printed:
    """One traceback."""

    prefix: str
    follows: bool
    """Whether it goes on from the one before."""
    is_ignored: bool
    text: str
    frames: tuple[Frame, ...]
    index: int


def _type(text: str) -> str:
    """The exception's name without its module."""
    return text.partition(":")[0].rpartition(".")[2]


def _printed(lines: list[str]) -> Iterator[_Printed]:
    for begin, line in enumerate(lines):
        prefix, text = _split(line)
        match = _TRACEBACK.fullmatch(_ungrouped(text))
        if match is None:
            continue
        frames: list[Frame] = []
        source = ""
        for index in range(begin + 1, len(lines)):
            body = lines[index]
            if _split(body)[0] != prefix:
                continue  # a line of another rank
            body = _ungrouped(body[len(prefix) :])
            if frame := _FRAME.fullmatch(body):
                frames.append(Frame(frame["file"], int(frame["line"]), frame["function"]))
            elif not body.strip():
                continue
            elif body[0].isspace():
                source = body.strip() if body.strip(" ~^") else source
            else:
                message = _message(lines, index, prefix)
                # A bare assertion says nothing; the line of code that failed does.
                message = message if ":" in message or not source else f"{message}: {source}"
                before = _text_before(lines, begin, prefix)
                yield _Printed(
                    prefix=prefix,
                    follows=before in _LINKS or _NESTED.match(text) is not None,
                    is_ignored=before.startswith(_NOT_FATAL),
                    text=message,
                    frames=tuple(frames),
                    index=index,
                )
                break


def _split(line: str) -> tuple[str, str]:
    match = _RANK.match(line)
    return ("", line) if match is None else (match[0], line[match.end() :])


def _ungrouped(text: str) -> str:
    match = _GROUP_MARK.match(text)
    return text if match is None else text[match.end() :]


def _message(lines: list[str], index: int, prefix: str) -> str:
    """An exception's text, which may go over several lines."""
    message = [_ungrouped(lines[index][len(prefix) :])]
    for line in lines[index + 1 : index + _MOST_MESSAGE_LINES]:
        if not line.startswith(prefix):
            break
        text = _ungrouped(line[len(prefix) :])
        starts_anew = text.startswith(("[", *_NOT_FATAL, *_LINKS)) or "Traceback (most recent" in text
        if not text.strip() or starts_anew:
            break
        if not _GROUP_RULE.fullmatch(text):
            message.append(text)
    return "\n".join(message)


def _text_before(lines: list[str], begin: int, prefix: str) -> str:
    """The last line with text before a traceback, of the same rank."""
    for line in reversed(lines[max(0, begin - 3) : begin]):
        text = line.removeprefix(prefix).strip()
        if text:
            return text
    return ""
