"""The folder of a run on a cluster: where everything about it lies, and which job owns it.

::

    RUN/recipe.yaml  arguments.txt  job.sbatch  site.env  environment.txt  code/
    RUN/job.json                     the job that owns the folder
    RUN/checkpoints  tensorboard
    RUN/logs/job-ID.log              output of the batch script
    RUN/logs/job-ID/attempt-N/       one start of the training processes
        attempt.json                 when, where, what came of it
        NODE/node.json               what the agent of a node saw
        NODE/rank-00003.out, .err    output of a rank
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Verdict = Literal["finished", "again", "requeue", "resubmit", "stop"]
"""What follows an attempt: nothing, another in the same allocation, the job once more, a new job on other
nodes, or nothing because it would fail again."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None if it is not there."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content


class _Record:
    """A dataclass that lies in a JSON file."""

    def write(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a file, or None if there is none."""
        content = read_json(path)
        return None if content is None else cls(**content)


@dataclass
class Job(_Record):
    """The SLURM job that owns a run directory."""

    job_id: str
    nodes: int
    submitted: float = field(default_factory=time.time)
    """When the user did, in seconds since 1970; what goes on by itself keeps it."""
    state: Literal["submitted", "running", "resubmitted", "finished", "stopped"] = "submitted"
    reason: str = ""
    """Why it stopped."""
    bad_nodes: list[str] = field(default_factory=list)
    """Nodes that this run's jobs stay away from."""


@dataclass
class Attempt(_Record):
    """One start of the training processes on all nodes."""

    attempt: int
    """Counted from 1 within the job."""
    restart: int
    """How often SLURM had requeued the job."""
    nodes: list[str]
    begun: float = field(default_factory=time.time)
    ended: float | None = None
    srun_status: int | None = None
    time_limit: bool = False
    """Whether the warning before the time limit came."""
    iteration_before: int | None = None
    """That of the checkpoint it went on from."""
    iteration_after: int | None = None
    """That of the last checkpoint when it ended."""
    verdict: Verdict | None = None
    reason: str = ""

    @property
    def progressed(self) -> bool:
        """Whether it saved a checkpoint further on than the one it began from."""
        return (self.iteration_after or 0) > (self.iteration_before or 0)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, and its records."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def arguments(self) -> Path:
        return self.root / "arguments.txt"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def job_file(self) -> Path:
        return self.root / "job.json"

    def job_log(self, job_id: str) -> Path:
        """Output of the batch script; ``%j`` stands for the id before there is one."""
        return self.root / "logs" / f"job-{job_id}.log"

    def attempt_folder(self, job_id: str, attempt: int) -> Path:
        return self.root / "logs" / f"job-{job_id}" / f"attempt-{attempt}"

    def attempts(self, job_id: str | None = None) -> list[tuple[Path, Attempt]]:
        """All attempts with their folders, or those of one job, the oldest first."""
        folders = self.root.glob(f"logs/job-{job_id or '*'}/attempt-*")
        found = [(folder, Attempt.read(folder / "attempt.json")) for folder in folders]
        return sorted(
            ((folder, attempt) for folder, attempt in found if attempt), key=lambda item: item[1].begun
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder alone, for the few moments in which its owner is looked up and changed."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def run_of(attempt_folder: Path) -> tuple[RunDirectory, str]:
    """The run that an attempt's folder belongs to, and the id of its job."""
    match = re.fullmatch(r"job-(\S+)", attempt_folder.parent.name)
    if match is None:
        raise ValueError(f"{attempt_folder}: is no folder of an attempt (RUN/logs/job-ID/attempt-N)")
    return RunDirectory(attempt_folder.parents[2]), match[1]
