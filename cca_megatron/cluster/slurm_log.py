"""What SLURM itself said of an attempt, in the output of the batch script."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from cca_megatron.cluster.logs import Tail, read_tail

_NODE_FAILURE = re.compile(r"Node failure on (?P<node>\S+)|DUE TO NODE FAILURE")
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|OOM Killed|task \d+: Out Of Memory|Out of memory: Killed process")
_TIME_LIMIT = re.compile(r"DUE TO TIME LIMIT")
_CANCELLED = re.compile(r"\*\*\* (?:JOB|STEP) .* CANCELLED AT \S+(?: \*\*\*| DUE TO PREEMPTION.*)")
"""What the job asks for itself, DUE TO JOB REQUEUE, is not among them."""
_WINDOW = 16 << 20
"""Bytes at the end that are read."""
_ERROR = re.compile(r"(?:srun|slurmstepd|sbatch): (?:fatal|error): .+")


@dataclass(frozen=True)
class SlurmLog:
    """The lines that say why SLURM ended something; None where there is no such line."""

    path: Path | None
    tail: Tail
    node_failure: str | None = None
    lost_node: str | None = None
    """Its name, where SLURM says it."""
    out_of_memory: str | None = None
    time_limit: str | None = None
    cancelled: str | None = None
    error: str | None = None
    """The first error."""


def attempt_mark(number: int) -> str:
    """The line that the job script writes into its output before an attempt.

    All attempts of a job share that file.
    """
    return f"== attempt {number} =="


def read_slurm_log(attempt: Path) -> SlurmLog:
    """The part of the batch script's output that belongs to an attempt.

    Without marks that is all of it, if the job has no other attempt, and else nothing.
    """
    path = attempt.parent / "slurm.log"
    tail = _part(read_tail(path, _WINDOW), attempt)
    if not tail.lines:
        return SlurmLog(None, tail)
    failures = [(line.strip(), m["node"]) for line in tail.lines if (m := _NODE_FAILURE.search(line))]
    named = [failure for failure in failures if failure[1]]
    text, name = next(iter(named or failures), (None, None))
    return SlurmLog(
        path=path,
        tail=tail,
        node_failure=text,
        lost_node=name,
        out_of_memory=_first(_OUT_OF_MEMORY, tail.lines),
        time_limit=_first(_TIME_LIMIT, tail.lines),
        cancelled=_first(_CANCELLED, tail.lines),
        error=_first(_ERROR, tail.lines),
    )


def _part(tail: Tail, attempt: Path) -> Tail:
    number = int(attempt.name.rpartition("-")[2])
    marks = [attempt_mark(number), attempt_mark(number + 1)]
    begin, end = (tail.lines.index(mark) if mark in tail.lines else None for mark in marks)
    if begin is None:
        is_alone = len(list(attempt.parent.glob("attempt-*"))) == 1
        return tail if is_alone else replace(tail, lines=[])
    # Lines before are made blank, so that the numbers of those after stay.
    return replace(tail, lines=[""] * (begin + 1) + tail.lines[begin + 1 : end])


def _first(pattern: re.Pattern[str], lines: list[str]) -> str | None:
    return next((line.strip() for line in lines if pattern.search(line)), None)
