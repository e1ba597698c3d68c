"""The first failure in one log of all ranks, as ``cca-megatron train`` writes it, by torchrun's report."""

import re
from dataclasses import dataclass
from pathlib import Path

from cca_megatron.cluster.failures import Failure
from cca_megatron.cluster.kinds import judge
from cca_megatron.cluster.logs import exceptions, final_exception, line_number, read_tail

_WINDOW = 16 << 20
"""Bytes at the end of the log that are read."""
_REPORT = re.compile(r"torch\.distributed\.elastic\.multiprocessing\.errors\.ChildFailedError:\s*")
_TORCHRUN = "Traceback (most recent call last):"
_RANK = re.compile(r"  rank      : (\d+) \(local_rank: \d+\)")
_EXIT_CODE = re.compile(r"  exitcode  : (-?\d+) \(pid: \d+\).*")
_MARKED = re.compile(r"\[rank\d+\]:")
"""A line of which PyTorch says whose it is."""
_WORDS = 400


@dataclass(frozen=True)
class _Ending:
    rank: int
    exit_code: int


def failure_in_log(log: Path) -> Failure | None:
    """The first real failure in the log of a run on this machine; None if torchrun reports none.

    Other ranks' words about the one that failed count only if there is nothing else.
    """
    tail = read_tail(log, _WINDOW)
    report = next((i for i in range(len(tail.lines) - 1, -1, -1) if _REPORT.fullmatch(tail.lines[i])), None)
    if report is None:
        return None
    begin = next((i for i in range(report, -1, -1) if tail.lines[i] == _TORCHRUN), report)
    before = tail.lines[:begin]
    raised_by_rank = {raised.rank: raised for raised in exceptions(before) if raised.rank is not None}
    unmarked = ["" if _MARKED.match(line) else line for line in before]
    judged = []
    for ending in _endings(tail.lines[report:]):
        raised = raised_by_rank.get(ending.rank) or final_exception(unmarked)
        verdict = judge(ending.exit_code, raised, unmarked[-_WORDS:])
        index = raised.index if raised is not None and verdict.kind != "killed" else report
        failure = Failure(verdict.kind, ending.rank, None, None, verdict.text, log, line_number(tail, index))
        if not verdict.is_consequence:
            return failure
        judged.append(failure)
    return judged[0] if judged else None


def _endings(report: list[str]) -> list[_Ending]:
    """The workers that failed, the first, which torchrun reports last, before the others."""
    ranks = [int(match[1]) for line in report if (match := _RANK.fullmatch(line))]
    codes = [int(match[1]) for line in report if (match := _EXIT_CODE.fullmatch(line))]
    endings = [_Ending(rank, code) for rank, code in zip(ranks, codes, strict=False)]
    return endings[-1:] + endings[:-1]
