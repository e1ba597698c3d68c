"""What SLURM itself said of an attempt, in the output of the batch script."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from cca_megatron.cluster.logs import Tail, read_tail
from cca_megatron.cluster.run_directory import run_of

_BEGIN = re.compile(r"attempt (\d+) of job \S+ on ")
"""Written by the job script (``cluster.job begin``) before an attempt: all of a job share its output."""
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


def read_slurm_log(attempt: Path) -> SlurmLog:
    """The part of the batch script's output that belongs to an attempt.

    Where it does not say where that part begins, it is all if the job has no other attempt, and else nothing.
    """
    run, job_id = run_of(attempt)
    path = run.job_log(job_id)
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
    begins = {int(m[1]): index for index, line in enumerate(tail.lines) if (m := _BEGIN.match(line))}
    number = int(attempt.name.rpartition("-")[2])
    if number not in begins:
        is_alone = len(list(attempt.parent.glob("attempt-*"))) == 1
        return tail if is_alone else replace(tail, lines=[])
    begin, end = begins[number], begins.get(number + 1)
    # Lines before are made blank, so that the numbers of those after stay.
    return replace(tail, lines=[""] * begin + tail.lines[begin:end])


def _first(pattern: re.Pattern[str], lines: list[str]) -> str | None:
    return next((line.strip() for line in lines if pattern.search(line)), None)
