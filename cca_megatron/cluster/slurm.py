"""SLURM's commands."""

import shutil
import subprocess
import tempfile
from pathlib import Path


class SlurmError(Exception):
    """A command of SLURM failed, or is not there."""


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]}: is not on the PATH; run this on a login node of a SLURM cluster "
            "(launch/torchrun.sh and launch/mpirun.sh need no SLURM)"
        )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{command[0]} failed: {said.removeprefix(command[0] + ': ')}")
    return done.stdout.strip()


def sbatch(options: list[str], script: Path, *arguments: str) -> str:
    """Submit a script; returns the job's id."""
    return _run("sbatch", "--parsable", *options, str(script), *arguments).partition(";")[0]


def check(script: str) -> None:
    """Raise SlurmError if SLURM would refuse this script."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        _run("sbatch", "--test-only", file.name)


def job_state(job_id: str) -> str | None:
    """State of a job that waits or runs (``PENDING``, ``RUNNING``, ``COMPLETING``, ...); None if it is over.

    Raises:
        SlurmError: SLURM does not answer.
    """
    try:
        return _run("squeue", "--noheader", "--jobs", job_id, "--format", "%T") or None
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def pending_reason(job_id: str) -> str:
    """Why a job waits, in SLURM's words."""
    return _run("squeue", "--noheader", "--jobs", job_id, "--format", "%r")
