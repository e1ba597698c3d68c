"""One run directory belongs to one job at a time."""

import time
from collections.abc import Callable
from pathlib import Path

from cca_megatron.cluster.run_directory import Job, RunDirectory
from cca_megatron.cluster.slurm import SlurmError, job_state


class JobError(Exception):
    """A job cannot begin, or must not go on."""


def claim(run: RunDirectory, job_id: str, nodes: int, is_active: Callable[[str], bool]) -> Job:
    """Make this job the owner of the run.

    Args:
        run: the run.
        job_id: this job.
        nodes: how many it has.
        is_active: whether SLURM still has a job of this id.

    Raises:
        JobError: another job has it.
    """
    with run.locked():
        job = Job.read(run.job_file)
        if job is None:
            job = Job(job_id, nodes)
        elif job.job_id != job_id:
            refuse_second_owner(run, job, is_active)
            goes_on = job.state == "resubmitted"
            began = job.submitted if goes_on else time.time()
            job = Job(job_id, nodes, began, bad_nodes=job.bad_nodes if goes_on else [])
        job.state = "running"
        job.write(run.job_file)
    return job


def refuse_second_owner(run: RunDirectory, job: Job, is_active: Callable[[str], bool]) -> None:
    """Raise JobError if the job that owns the folder waits or runs."""
    if is_active(job.job_id):
        raise JobError(
            f"output={run.root}: belongs to job {job.job_id}, which waits or runs; "
            f"scancel {job.job_id} ends it, output=FOLDER starts another run"
        )


def refuse_owned_folder(output: Path | None) -> None:
    """Raise JobError if a job that waits or runs writes to this folder, as far as can be seen from here."""
    job = None if output is None else Job.read(RunDirectory(output).job_file)
    if output is None or job is None:
        return
    try:
        refuse_second_owner(RunDirectory(output), job, lambda job_id: job_state(job_id) is not None)
    except SlurmError:
        return  # no SLURM here, so none of its jobs either
