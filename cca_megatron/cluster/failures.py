"""Which rank of one attempt of a job failed first, and why: not the ranks that fell with it.

When a worker dies, the others notice as closed connections, time-outs of collectives, or the SIGTERM of their
agent, and say so at length in their logs. These endings count only where nothing else explains the attempt.
"""

import dataclasses
import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cca_megatron.cluster.kinds import FailureKind, Verdict, judge
from cca_megatron.cluster.logs import Raised, Tail, final_exception, line_number, read_tail, search_tail
from cca_megatron.cluster.run_directory import Attempt, read_json
from cca_megatron.cluster.slurm_log import SlurmLog, read_slurm_log

_UNEXPECTED = re.compile(r"\w+:megatron\.core\.rerun_state_machine:(Unexpected result .+)")
_SECOND_RERUN = re.compile(r"\w+:megatron\.core\.rerun_state_machine:(Second rerun: .+)")
_DIAGNOSIS = re.compile(
    r"ERROR:megatron\.core\.rerun_state_machine:(Rank \d+, node .+, iteration #\d+: .+|Got rescheduled .+)"
)
"""Of results that Megatron does not accept: it warns, too, of those that it lets pass."""
_CURRENT_STACK = re.compile(r"Current thread 0x[0-9a-f]+.* \(most recent call first\):")
"""Written by Python's faulthandler when an agent ends a worker that hangs."""
_WORDS = 400
"""Last lines of a log in which a crash is looked for: it may be followed by the stacks of all threads."""

Progress = Callable[[int, int], None]
"""Told (logs read, logs in all)."""


@dataclass(frozen=True)
class Failure:
    """The failure that ended an attempt."""

    kind: FailureKind
    rank: int | None
    node: str | None
    time: float | None
    """Unix seconds; when the worker ended, or gave its last sign."""
    message: str
    """The essence, in one to a few lines."""
    log: Path | None
    """Where to read on."""
    line: int | None
    """Line in it, from 1."""


@dataclass(frozen=True)
class _Node:
    name: str
    folder: Path
    record: dict[str, Any] | None
    """What its agent wrote; None if it wrote nothing."""

    @property
    def end(self) -> str | None:
        return None if self.record is None else self.record.get("end")

    @property
    def heartbeats(self) -> dict[int, dict[str, Any]]:
        """By rank."""
        return {int(rank): beat for rank, beat in ((self.record or {}).get("heartbeats") or {}).items()}

    @property
    def last_sign(self) -> float | None:
        return max((beat["time"] for beat in self.heartbeats.values() if beat.get("time")), default=None)


@dataclass(frozen=True)
class _Ending:
    """How one worker ended, by its agent's record."""

    node: _Node
    rank: int | None
    """None if it is the agent itself that failed."""
    exit_code: int
    time: float
    message: str


@dataclass(frozen=True)
class _Run:
    """One attempt with all that is known of it."""

    folder: Path
    record: Attempt
    nodes: list[_Node]
    slurm: SlurmLog

    @property
    def was_cut_off(self) -> bool:
        """Whether the job script did not live to see the end of the attempt; the next one closes it."""
        number = int(self.folder.name.rpartition("-")[2])
        has_next = (self.folder.parent / f"attempt-{number + 1}").is_dir()
        return self.record.srun_status is None and (self.record.ended is not None or has_next)

    @property
    def is_over(self) -> bool:
        """Whether a node that has not written how it ended never will."""
        return self.record.ended is not None or self.was_cut_off

    @property
    def went_wrong(self) -> bool:
        ends = {node.end for node in self.nodes}
        return self.record.srun_status not in (None, 0) or bool(ends & {"failed", "hung"})

    def logs(self, suffix: str) -> Iterator[tuple[int, _Node, Path]]:
        """Rank, node and path of the workers' logs, by rank."""
        found = [
            (int(path.stem.rpartition("-")[2]), node, path)
            for node in self.nodes
            for path in node.folder.glob(f"rank-*.{suffix}")
        ]
        yield from sorted(found, key=lambda log: log[0])


def first_failure(attempt: Path, progress: Progress | None = None) -> Failure | None:
    """The first real failure of an attempt, or None if nothing failed, or it goes on and nothing failed yet.

    Only the agents' records are read of all nodes; logs are read of those that failed, in the order in which
    they did, and of all where none of these explains it.

    Args:
        attempt: folder of the attempt; ``ended`` must stand in its record for a lost node to be told from one
            that still runs.
        progress: called while many logs are read.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run = _read_attempt(attempt)
    consequences: list[tuple[_Ending, Verdict, Tail | None, int]] = []
    endings = _endings(run)
    for count, ending in enumerate(endings):
        if progress is not None:
            progress(count, len(endings))
        verdict, tail, index = _judge_ending(run, ending)
        if not verdict.is_consequence:
            return _worker_failure(run, ending, verdict, tail, index, progress)
        consequences.append((ending, verdict, tail, index))
    if consequences or run.went_wrong:
        unrecorded = _unrecorded_failure(run, {c[0].rank for c in consequences}, progress)
        if unrecorded is not None:
            return unrecorded
    for explanation in (_node_failure, _time_limit, _lost_node, _hang):
        failure = explanation(run)
        if failure is not None:
            return failure
    if consequences:
        consequences.sort(key=lambda c: c[1].kind == "killed")  # an agent's SIGTERM says least
        ending, verdict, tail, index = consequences[0]
        failure = _worker_failure(run, ending, verdict, tail, index, progress)
        straggler = _straggler(run) if verdict.kind == "hang" else None
        if straggler is None:
            return failure
        # Those that waited say so, not the one that they waited for.
        message = f"{straggler.message}\n  {verdict.text}"
        return dataclasses.replace(failure, rank=straggler.rank, node=straggler.node, message=message)
    return _launch_failure(run) if run.went_wrong else None


def _read_attempt(folder: Path) -> _Run:
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such attempt", folder)
    record = Attempt.read(folder / "attempt.json")
    if record is None:
        raise FileNotFoundError(errno.ENOENT, "no attempt (there is no attempt.json)", folder)
    nodes = [_Node(name, folder / name, _node_record(folder / name)) for name in record.nodes]
    return _Run(folder, record, nodes, read_slurm_log(folder))


def _node_record(folder: Path) -> dict[str, Any] | None:
    """What an agent wrote; None where that is lost, as it may be with its node."""
    try:
        return read_json(folder / "node.json")
    except ValueError:
        return None


def _endings(run: _Run) -> list[_Ending]:
    """The workers that failed, in the order in which they did."""
    endings = [
        _Ending(node, failure["rank"], failure["exit_code"], failure["time"], failure["message"] or "")
        for node in run.nodes
        for failure in (node.record or {}).get("failures") or []
    ]
    return sorted(endings, key=lambda ending: (ending.time, ending.rank or 0))


def _judge_ending(run: _Run, ending: _Ending) -> tuple[Verdict, Tail | None, int]:
    """The verdict, and the line to read: a log and the index in its tail."""
    if ending.rank is None:
        return judge(ending.exit_code, Raised((ending.message,), (), (), None, 0), []), None, 0
    reported = final_exception(ending.message.splitlines())
    insist = ending.exit_code > 0 and reported is None
    tail, raised = search_tail(ending.node.folder / f"rank-{ending.rank:05}.err", insist)
    if not tail.lines:
        tail, raised = search_tail(ending.node.folder / f"rank-{ending.rank:05}.out", insist)
    if reported is not None:  # the worker's own report: surely what ended it, and perhaps more than its log
        index = _index_of(reported, raised, tail)
        raised = dataclasses.replace(reported, rank=ending.rank)
    elif raised is not None:
        index = raised.index
    verdict = judge(ending.exit_code, raised, tail.lines[-_WORDS:])
    if raised is None:
        index = _index_of_words(verdict.text, tail)
    ends_workers = ending.node.end in ("hung", "stopped") or run.record.time_limit
    if ends_workers and ending.exit_code < 0 and (raised is None or raised.rank is None):
        verdict = dataclasses.replace(verdict, kind="killed", is_consequence=True)  # by its agent, or SLURM
    return verdict, tail if tail.lines else None, max(index, 0)


def _index_of(reported: Raised, raised: Raised | None, tail: Tail) -> int:
    """Where in the log is what the worker reported."""
    if raised is not None and raised.text == reported.text:
        return raised.index
    line = reported.text.partition("\n")[0]
    found = [index for index, other in enumerate(tail.lines) if other.endswith(line)]
    return found[-1] if found else len(tail.lines) - 1


def _index_of_words(text: str, tail: Tail) -> int:
    """Where in the log are the words that a verdict quotes; the end, if it quotes none."""
    for index in range(len(tail.lines) - 1, -1, -1):
        if tail.lines[index].strip() and text.endswith(tail.lines[index].strip()):
            return index
    return len(tail.lines) - 1


def _worker_failure(
    run: _Run, ending: _Ending, verdict: Verdict, tail: Tail | None, index: int, progress: Progress | None
) -> Failure:
    failure = Failure(
        kind=verdict.kind,
        rank=ending.rank,
        node=ending.node.name,
        time=ending.time,
        message=verdict.text,
        log=None if tail is None else tail.path,
        line=None if tail is None else line_number(tail, index),
    )
    if verdict.kind in ("transient fault", "result validation"):
        return _rejected_result(run, failure, progress)
    if verdict.kind == "killed" and run.slurm.out_of_memory is not None:
        message = f"{verdict.text}, of host memory: {run.slurm.out_of_memory}"
        return dataclasses.replace(failure, kind="out of memory", message=message)
    if verdict.kind == "killed" and verdict.is_consequence and run.slurm.cancelled is not None:
        return dataclasses.replace(failure, message=f"{verdict.text}: {run.slurm.cancelled}")
    return failure


def _rejected_result(run: _Run, failure: Failure, progress: Progress | None) -> Failure:
    """All ranks exit with Megatron's code; the one with the result that it rejects says so in its log."""
    logs = list(run.logs("out"))
    for count, (rank, node, path) in enumerate(logs):
        if progress is not None:
            progress(count, len(logs))
        tail = read_tail(path)
        said = list(enumerate(tail.lines))
        diagnosis = [(index, m[1]) for index, line in said if (m := _DIAGNOSIS.match(line))]
        if not diagnosis:
            continue
        before = said[: diagnosis[0][0]]
        unexpected = [(index, m[1]) for index, line in before if (m := _UNEXPECTED.match(line))]
        second = [(index, m[1]) for index, line in before if (m := _SECOND_RERUN.match(line))]
        found = (second or unexpected)[-1:] + diagnosis
        return dataclasses.replace(
            failure,
            rank=rank,
            node=node.name,
            message="\n  ".join(text for _, text in found),
            log=path,
            line=line_number(tail, found[0][0]),
        )
    return failure


def _unrecorded_failure(run: _Run, recorded: set[int | None], progress: Progress | None) -> Failure | None:
    """Of a worker that printed its exception and then hung, until its agent ended it with the others."""
    logs = [log for log in run.logs("err") if log[0] not in recorded]
    found: list[Failure] = []
    for count, (rank, node, path) in enumerate(logs):
        if progress is not None:
            progress(count, len(logs))
        tail = read_tail(path)
        raised = final_exception(tail.lines)
        if raised is None or raised.rank is None:
            continue
        verdict = judge(1, raised, [])
        if not verdict.is_consequence:
            time, line = path.stat().st_mtime, line_number(tail, raised.index)
            found.append(Failure(verdict.kind, rank, node.name, time, verdict.text, path, line))
    return min(found, key=lambda failure: failure.time or 0, default=None)


def _node_failure(run: _Run) -> Failure | None:
    """A node whose failure SLURM tells."""
    if run.slurm.node_failure is None:
        return None
    silent = [node.name for node in run.nodes if node.end is None]
    name = run.slurm.lost_node or (silent[0] if len(silent) == 1 else None)
    time = next((node.last_sign for node in run.nodes if node.name == name), None)
    return Failure("node lost", None, name, time, run.slurm.node_failure, run.slurm.path, None)


def _time_limit(run: _Run) -> Failure | None:
    if not run.record.time_limit and run.slurm.time_limit is None:
        return None
    text = "the job's time limit came"
    if run.record.progressed:
        text += f"; the checkpoint of iteration {run.record.iteration_after} is saved"
    elif run.is_over:
        text += ", and no checkpoint was saved in this attempt"
    return Failure("time limit", None, None, run.record.ended, text, run.slurm.path, None)


def _lost_node(run: _Run) -> Failure | None:
    """A node whose agent never wrote how it ended."""
    lost = [node for node in run.nodes if node.end is None]
    began = any(node.record is not None for node in run.nodes)
    if not run.is_over or not lost or not (began or run.was_cut_off):
        return None
    log = run.slurm.path
    if run.slurm.cancelled is not None:
        return Failure("killed", None, None, None, run.slurm.cancelled, log, None)
    names = ", ".join(node.name for node in lost)
    if len(lost) == len(run.nodes) > 1:
        text = f"no node wrote how it ended ({names}): one failed, or the job was ended from outside"
        return Failure("node lost", None, None, None, text, log, None)
    node = lost[0]
    text = f"{names} never wrote how {'it' if len(lost) == 1 else 'they'} ended"
    return Failure("node lost", None, node.name, node.last_sign, text, log, None)


def _hang(run: _Run) -> Failure | None:
    """Workers that an agent ended because they went on no longer."""
    hung = [node for node in run.nodes if node.end == "hung"]
    if not hung:
        return None
    return _straggler(run) or Failure("hang", None, hung[0].name, None, "no rank began to train", None, None)


def _straggler(run: _Run) -> Failure | None:
    """Of ranks that wait for each other, the one that stopped first; None if none gave a sign of life."""
    beats = {rank: (node, beat) for node in run.nodes for rank, beat in node.heartbeats.items()}
    if not beats:
        return None
    rank = min(beats, key=lambda r: (beats[r][1]["count"], beats[r][1]["time"]))
    node, beat = beats[rank]
    most = max(other["count"] for _, other in beats.values())
    tail = read_tail(node.folder / f"rank-{rank:05}.err")
    stacks = [index for index, line in enumerate(tail.lines) if _CURRENT_STACK.match(line)]
    text = f"rank {rank} stopped after {beat['count']} forward passes, others after up to {most}"
    if most == beat["count"]:
        text = f"all ranks stopped after {most} forward passes"
    if stacks:
        text += f"; rank {rank} was at {' '.join(line.strip() for line in tail.lines[stacks[-1] + 1 :][:1])}"
    return Failure(
        kind="hang",
        rank=None if most == beat["count"] else rank,
        node=None if most == beat["count"] else node.name,
        time=beat["time"],
        message=text,
        log=tail.path if stacks else None,
        line=line_number(tail, stacks[-1]) if stacks else None,
    )


def _launch_failure(run: _Run) -> Failure | None:
    """No worker says anything: what srun or the agents said."""
    path = run.slurm.path
    raised = final_exception(run.slurm.tail.lines)
    if raised is not None:
        verdict = judge(1, raised, [])
        line = line_number(run.slurm.tail, raised.index)
        return Failure(verdict.kind, None, None, run.record.ended, verdict.text, path, line)
    status = run.record.srun_status
    text = run.slurm.error or f"srun ended with status {status} and no worker says why"
    return Failure("program", None, None, run.record.ended, text, path, None)
