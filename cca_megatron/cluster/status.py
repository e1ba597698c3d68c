"""Where a run stands: its job, its attempts, the last step, the last checkpoint."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cca_megatron.cluster.run_directory import Attempt, Job, RunDirectory
from cca_megatron.cluster.slurm import SlurmError, job_state, pending_reason
from cca_megatron.training.checkpoint import latest_iteration
from cca_megatron.training.progress import Iteration, parse

_TAIL_BYTES = 200_000
_OVER = "over"
"""What SLURM no longer knows, or only as ended."""


@dataclass(frozen=True)
class Status:
    """What is known of a run."""

    run: Path
    job: Job
    slurm: str
    """What SLURM says of the job."""
    attempts: list[tuple[Path, Attempt]]
    checkpoint: int | None
    last_step: Iteration | None
    last_output: float | None
    """When a rank last wrote something, in seconds since 1970."""

    @property
    def was_cut_off(self) -> bool:
        """Whether SLURM ended the job before it could say so itself, as scancel does."""
        return self.slurm == _OVER and self.job.state not in ("finished", "stopped")

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run": str(self.run),
            "job": asdict(self.job),
            "slurm": self.slurm,
            "attempts": [asdict(attempt) for _, attempt in self.attempts],
            "checkpoint": self.checkpoint,
            "last_step": self.last_step and asdict(self.last_step),
            "last_output": self.last_output,
        }


def read_status(root: Path) -> Status:
    """Look at a run directory and ask SLURM.

    Raises:
        FileNotFoundError: no job was submitted into that folder.
    """
    run = RunDirectory(root.resolve())
    job = Job.read(run.job_file)
    if job is None:
        raise FileNotFoundError(2, "no job was submitted into this folder (there is no job.json)", root)
    attempts = run.attempts()
    step, written = _last_step(attempts[-1][0]) if attempts else (None, None)
    return Status(run.root, job, _slurm(job), attempts, latest_iteration(run.checkpoints), step, written)


def _slurm(job: Job) -> str:
    try:
        state = job_state(job.job_id)
        if state == "PENDING":
            state += f" ({pending_reason(job.job_id)})"
    except SlurmError as error:
        return f"unknown: {error}"
    return state or _OVER


def _last_step(attempt: Path) -> tuple[Iteration | None, float | None]:
    """The last step in the logs of an attempt: Megatron writes it on the last rank.

    Ranks may change places while nodes are still finding each other, so of two logs the newer one counts.
    """
    logs = sorted(attempt.glob("*/rank-*.out"), key=lambda log: (log.stem, log.stat().st_mtime))
    if not logs:
        return None, None
    written = max(log.stat().st_mtime for log in logs)
    with open(logs[-1], "rb") as file:
        file.seek(max(0, logs[-1].stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    steps = [event for line in lines if isinstance(event := parse(line), Iteration)]
    return (steps[-1] if steps else None), written


def describe(status: Status) -> list[tuple[str, str]]:
    """Lines for people: a name and a text each."""
    job = status.job
    plural = "" if job.nodes == 1 else "s"
    ended = f": {job.reason}" if job.reason else ""
    state = "ended from outside" if status.was_cut_off else job.state
    lines = [
        ("run", str(status.run)),
        ("job", f"{job.job_id} on {job.nodes} node{plural}, {state}{ended}; SLURM: {status.slurm}"),
    ]
    for folder, attempt in status.attempts:
        lines.append(("attempt", f"{_attempt(attempt, status)}  {folder.relative_to(status.run)}"))
    if status.last_step is not None:
        step = status.last_step
        loss = "" if step.loss is None else f", loss {step.loss:.4f}"
        lines.append(("step", f"{step.number} of {step.total}{loss}, {step.seconds:.2f} s each"))
    if status.last_output is not None:
        lines.append(("last output", f"{time.time() - status.last_output:.0f} s ago"))
    lines.append(("checkpoint", "none" if status.checkpoint is None else f"iteration {status.checkpoint}"))
    lines.append(("log", str(RunDirectory(status.run).job_log(job.job_id))))
    if job.state == "stopped" or any(attempt.verdict == "again" for _, attempt in status.attempts):
        lines.append(("next", f"cca-megatron diagnose {status.run}"))
    return lines


def _attempt(attempt: Attempt, status: Status) -> str:
    begun = time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.begun))
    last_sign = status.last_output or attempt.begun if status.was_cut_off else time.time()
    minutes = ((attempt.ended or last_sign) - attempt.begun) / 60
    saved = f"{attempt.iteration_before or 0} to {attempt.iteration_after or '...'}"
    what = attempt.verdict or ("ended from outside" if status.was_cut_off else "running")
    reason = f" ({attempt.reason})" if attempt.reason else ""
    return f"{begun}, {minutes:.1f} min, iterations {saved}: {what}{reason}"
