"""``cca-megatron diagnose``: what ended a run first, where to read on, and what to do."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn
from rich.table import Table

from cca_megatron.cluster.advice import advice
from cca_megatron.cluster.failures import Failure, first_failure
from cca_megatron.cluster.logs import excerpt, read_tail
from cca_megatron.cluster.run_directory import Attempt, Job, RunDirectory
from cca_megatron.cluster.torchrun_log import failure_in_log
from cca_megatron.terminal import console, counted_bar, fail
from cca_megatron.training.progress import Iteration, parse

_LINES_BEFORE, _LINES_AFTER = 12, 4


@dataclass(frozen=True)
class Diagnosis:
    """What is known of the end of a run."""

    subject: str
    """What was looked at: an attempt, or a log."""
    failure: Failure | None
    state: str
    """How it stands where nothing failed."""
    attempts: list[tuple[Path, Attempt]]
    """All of the job; none where the run is no job."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        failure = self.failure
        return {
            "subject": self.subject,
            "failure": failure and asdict(failure) | {"log": failure.log and str(failure.log)},
            "advice": advice(failure) if failure else [],
            "state": self.state,
            "attempts": [asdict(attempt) for _, attempt in self.attempts],
        }


def diagnose(
    run: Annotated[Path, typer.Argument(help="A run's output folder, of a job or of `cca-megatron train`.")],
    job: Annotated[
        str | None, typer.Option(metavar="ID", help="SLURM job; by default the last that made an attempt.")
    ] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt of that job; by default the last.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Find the first real failure of a run over all its ranks, and say what to do.

    When one rank fails the others fail with it, and say so at length: closed connections, time-outs of NCCL,
    SIGTERM. These are left out. For example: `cca-megatron diagnose runs/quickstart`.
    """
    try:
        found = _look_at(run, job, attempt)
    except (OSError, ValueError) as error:
        fail(error)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        _show(found)


def _look_at(root: Path, job_id: str | None, number: int | None) -> Diagnosis:
    run = RunDirectory(root)
    attempts = run.attempts(job_id)
    if not attempts and job_id is None and number is None:
        return _look_at_log(root)
    last_job = attempts[-1][0].parent if attempts else None
    attempts = [found for found in attempts if found[0].parent == last_job]
    wanted = [found for found in attempts if number in (None, found[1].attempt)]
    if not wanted:
        ids = sorted({folder.parent.name.partition("-")[2] for folder, _ in run.attempts()}) or ["none"]
        has = f"it has {len(attempts)}" if attempts else f"jobs with attempts: {', '.join(ids)}"
        what = f"attempt {number or 1}" + (f" of job {job_id}" if job_id else "")
        raise FileNotFoundError(2, f"no {what} in this run ({has})", root)
    folder, record = wanted[-1]
    bar = Console(stderr=True)  # not into what a program reads
    with counted_bar(bar, "reading logs", MofNCompleteColumn()) as progress:
        failure = first_failure(folder, progress)
    subject = f"attempt {record.attempt} of job {folder.parent.name.partition('-')[2]}"
    return Diagnosis(subject, failure, _state(run, record), attempts)


def _state(run: RunDirectory, attempt: Attempt) -> str:
    job = Job.read(run.job_file)
    if attempt.ended is None:
        return "it goes on, or nobody lived to close it: cca-megatron status tells"
    if job is not None and job.state == "stopped" and job.reason:
        return f"the job stopped: {job.reason}"
    return attempt.reason or "it went to its end"


def _look_at_log(root: Path) -> Diagnosis:
    """A run of ``cca-megatron train``, whose ranks write one log."""
    logs = sorted((root / "logs").glob("train-*.log"))  # named by time
    if not logs:
        raise FileNotFoundError(2, "no run (neither logs/job-*/attempt-* nor logs/train-*.log)", root)
    failure = failure_in_log(logs[-1])
    steps = [event for line in read_tail(logs[-1]).lines if isinstance(event := parse(line), Iteration)]
    state = "it ended before its first logged step, and torchrun reports no failure"
    if steps:
        state = f"the last step logged is {steps[-1].number} of {steps[-1].total}"
    return Diagnosis(f"log {logs[-1].name}", failure, state, [])


def _show(found: Diagnosis) -> None:
    failure = found.failure
    if failure is None:
        console.print(f"{found.subject}: nothing failed; {found.state}", markup=False, soft_wrap=True)
    else:
        _show_failure(found.subject, failure)
    if found.attempts:
        console.print()
        console.print(_table(found.attempts))


def _show_failure(subject: str, failure: Failure) -> None:
    where = [] if failure.rank is None else [f"rank {failure.rank}"]
    where += [] if failure.node is None else [failure.node]
    where += [] if failure.time is None else [_clock(failure.time)]
    console.print(f"{subject} failed first with: [bold red]{escape(failure.kind)}[/]", soft_wrap=True)
    for name, text in (("where", ", ".join(where)), ("what", failure.message)):
        for line in text.splitlines():
            console.print(f"{name:<8}{line}", markup=False, soft_wrap=True)
            name = ""
    if failure.log is not None:
        place = str(failure.log.resolve()) + (f":{failure.line}" if failure.line else "")
        console.print(f"{'log':<8}{place}", markup=False, soft_wrap=True)
        around = excerpt(failure.log, failure.line, _LINES_BEFORE, _LINES_AFTER) if failure.line else []
        for number, line in around:
            if line.removeprefix(f"[rank{failure.rank}]:").strip(" ~^"):  # not what underlines code
                mark = ">" if number == failure.line else "|"
                console.print(f"{number:>8} {mark} {line}", markup=False, soft_wrap=True)
    for number, step in enumerate(advice(failure)):
        console.print(f"{'' if number else 'to do':<8}{step}", markup=False, soft_wrap=True)


def _table(attempts: list[tuple[Path, Attempt]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("attempt", "begun", "minutes", "iterations", "then", "reason"):
        table.add_column(name, justify="right" if name == "minutes" else "left")
    for _, attempt in attempts:
        minutes = "" if attempt.ended is None else f"{(attempt.ended - attempt.begun) / 60:.1f}"
        last = "..." if attempt.ended is None else str(attempt.iteration_after or 0)
        table.add_row(
            str(attempt.attempt),
            _clock(attempt.begun),
            minutes,
            f"{attempt.iteration_before or 0} to {last}",
            attempt.verdict or "running",
            escape(attempt.reason),
        )
    return table


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
