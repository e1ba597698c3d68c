"""What a job decides around its attempts: whether to begin, from which checkpoint, and what follows.

The job script calls it before and after each start of the training processes::

    python -m cca_megatron.cluster.job prepare RECIPE ...   prints the run directory; by hand only
    python -m cca_megatron.cluster.job begin RUN            prints the attempt's folder
    python -m cca_megatron.cluster.job end ATTEMPT STATUS   prints the verdict
    python -m cca_megatron.cluster.job hand-over RUN JOB    makes a new job the owner

All that it knows is in the run directory, so it goes on after the loss of any node.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cca_megatron.cluster.failures import Failure, first_failure
from cca_megatron.cluster.ownership import JobError, claim, refuse_second_owner
from cca_megatron.cluster.run_directory import Attempt, Job, RunDirectory, Verdict, read_json, run_of
from cca_megatron.training.checkpoint import latest_iteration
from cca_megatron.training.recipe import LaunchSection

_REPEATS_ITSELF = {"settings", "result validation", "NaN"}
"""What another attempt would run into again."""
_MAY_REPEAT_ITSELF = {"data", "out of memory"}
"""What it would, if this one made no progress."""
_ELSEWHERE = {"transient fault", "GPU"}
"""What another node may not have."""


def begin(
    run: RunDirectory, job_id: str, nodes: list[str], restart: int, is_active: Callable[[str], bool]
) -> Path:
    """Check the bounds, repair checkpoints, make what the nodes need, and open an attempt.

    Args:
        run: the run.
        job_id: this job.
        nodes: names of its nodes.
        restart: how often SLURM has requeued it.
        is_active: whether SLURM still has a job of this id.

    Returns:
        The attempt's folder.

    Raises:
        JobError: it must not begin.
    """
    from cca_megatron.training import session
    from cca_megatron.training.checkpoint_repair import repair
    from cca_megatron.training.command import check_data

    job = claim(run, job_id, len(nodes), is_active)
    _close_open_attempts(run)
    command, device = session.prepare_command(run.recipe, [])
    if len(nodes) != command.recipe.launch.nodes:
        raise JobError(
            f"launch.nodes={command.recipe.launch.nodes}: the job has {len(nodes)}; submit it with as many"
        )
    _check_bounds(run, job, command.recipe.launch)
    for warning in repair(run.checkpoints, command.args.ckpt_format, _distrusted(run)):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    session.ensure_data(command.recipe, Console(stderr=True, highlight=False))
    check_data(command)
    run.arguments.write_text("".join(f"{argument}\n" for argument in command.argv))
    attempt = Attempt(
        attempt=len(run.attempts(job_id)) + 1,
        restart=restart,
        nodes=nodes,
        iteration_before=latest_iteration(run.checkpoints),
    )
    folder = run.attempt_folder(job_id, attempt.attempt)
    attempt.write(folder / "attempt.json")
    where = "the start" if attempt.iteration_before is None else f"iteration {attempt.iteration_before}"
    print(
        f"attempt {attempt.attempt} of job {job.job_id} on {', '.join(nodes)} ({device}), from {where}",
        file=sys.stderr,
    )
    return folder


def _close_open_attempts(run: RunDirectory) -> None:
    """Attempts that nobody could close: the job was ended from outside."""
    for folder, attempt in run.attempts():
        if attempt.verdict is None:
            attempt.ended = time.time()
            attempt.iteration_after = latest_iteration(run.checkpoints)
            attempt.verdict, attempt.reason = "requeue", "the job was ended from outside (a node was lost)"
            attempt.write(folder / "attempt.json")


def _check_bounds(run: RunDirectory, job: Job, launch: LaunchSection) -> None:
    attempts = [attempt for _, attempt in run.attempts() if attempt.begun >= job.submitted]
    if len(attempts) > launch.max_restarts:
        raise JobError(
            f"launch.max_restarts={launch.max_restarts}: so many restarts are over; submit again to go on"
        )
    stalled = _stalled(attempts)
    if stalled >= launch.max_stalls:
        raise JobError(
            f"launch.max_stalls={launch.max_stalls}: {stalled} attempts in a row saved no new checkpoint; "
            f"cca-megatron diagnose {run.root} says why, submit again to go on"
        )


def _stalled(attempts: list[Attempt]) -> int:
    """How many of the last attempts made no progress."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.progressed:
            break
        count += 1
    return count


def _distrusted(run: RunDirectory) -> int | None:
    """The checkpoint that the last attempt could not load; None if it trained, and failed to save another."""
    attempts = run.attempts()
    if not attempts or attempts[-1][1].reason != "checkpoint":
        return None
    folder, attempt = attempts[-1]
    records = [read_json(folder / node / "node.json") for node in attempt.nodes]
    trained = any(record and record["heartbeats"] for record in records)
    return None if trained else attempt.iteration_before


def end(folder: Path, srun_status: int, time_limit: bool, stop_asked: bool) -> tuple[str, str]:
    """Close an attempt and decide what follows.

    Args:
        folder: of the attempt.
        srun_status: exit status of the step that ran the nodes' agents.
        time_limit: whether the warning before the time limit came.
        stop_asked: whether the user asked the job to save and stop.

    Returns:
        The verdict, with the nodes to stay away from where a new job is to be made, and a reason for people.
    """
    run, _ = run_of(folder)
    attempt = Attempt.read(folder / "attempt.json")
    assert attempt is not None
    attempt.ended, attempt.srun_status, attempt.time_limit = time.time(), srun_status, time_limit
    attempt.iteration_after = latest_iteration(run.checkpoints)
    attempt.write(folder / "attempt.json")
    failure = _failure(folder) if srun_status else None
    is_complete = _is_complete(run, attempt, time_limit or stop_asked)
    attempt.verdict, attempt.reason = _decide(attempt, failure, stop_asked, is_complete)
    attempt.write(folder / "attempt.json")
    with run.locked():
        job = Job.read(run.job_file)
        assert job is not None
        if attempt.verdict in ("finished", "stop"):
            job.state = "finished" if attempt.verdict == "finished" else "stopped"
            job.reason = attempt.reason
        if attempt.verdict == "resubmit" and failure is not None and failure.node:
            job.state = "resubmitted"
            job.bad_nodes = sorted({*job.bad_nodes, failure.node})
        job.write(run.job_file)
    verdict: str = attempt.verdict
    if attempt.verdict == "resubmit":
        verdict += f" {','.join(job.bad_nodes)}"
    return verdict, _explained(run, attempt, failure)


def _failure(folder: Path) -> Failure | None:
    """The first failure; None where logs cannot be read, which must not end a run."""
    try:
        return first_failure(folder)
    except Exception as error:
        print(f"warning: {folder}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _is_complete(run: RunDirectory, attempt: Attempt, interrupted: bool) -> bool:
    """Whether processes that ended well did so because there is nothing left to do.

    Megatron also ends well when it is signalled, or at ``exit-duration-in-mins``. With ``exit-interval`` it
    ends where the user wants it.
    """
    arguments = run.arguments.read_text().splitlines() if run.arguments.is_file() else []
    if attempt.iteration_after is None or "--exit-interval" in arguments or "--train-iters" not in arguments:
        return not interrupted
    return attempt.iteration_after >= int(arguments[arguments.index("--train-iters") + 1])


def _decide(
    attempt: Attempt, failure: Failure | None, stop_asked: bool, is_complete: bool
) -> tuple[Verdict, str]:
    kind = failure.kind if failure else "unknown"
    if attempt.srun_status == 0 and is_complete:
        return "finished", ""
    if stop_asked:
        return "stop", "asked to stop"
    if kind in _REPEATS_ITSELF:
        return "stop", kind
    if attempt.time_limit:
        return "requeue", "time limit"
    if attempt.srun_status == 0:
        return "requeue", "ended before the last iteration"
    if kind in _ELSEWHERE:
        return ("resubmit" if failure and failure.node else "requeue"), kind
    if kind in _MAY_REPEAT_ITSELF and not attempt.progressed:
        return "stop", kind
    return "again", kind


def _explained(run: RunDirectory, attempt: Attempt, failure: Failure | None) -> str:
    then = {
        "finished": "finished",
        "again": "another attempt from the last checkpoint",
        "requeue": "the job is requeued and goes on from the last checkpoint",
        "resubmit": "a new job goes on without the node",
        "stop": "the job stops",
    }[attempt.verdict or "stop"]
    if failure is None:
        return f"{attempt.reason}: {then}" if attempt.reason else then
    at = "" if failure.rank is None else f" on rank {failure.rank}"
    at += "" if failure.node is None else f" of {failure.node}"
    message = failure.message.splitlines()[0] if failure.message else ""
    return f"{failure.kind}{at}: {message}\n{then}; cca-megatron diagnose {run.root} shows more"


def _main(arguments: list[str]) -> int:
    """Called by the job script; what it is told is the last line of the output."""
    from cca_megatron.data.sources import DataError
    from cca_megatron.training.recipe import RecipeError

    what, path, *rest = arguments
    try:
        if what == "prepare":
            print(_prepare(Path(path), rest).root)
        elif what == "begin":
            active = os.environ["CCA_ACTIVE_JOBS"].split()
            job_id, nodes = os.environ["SLURM_JOB_ID"], os.environ["CCA_NODES"].split()
            restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            print(begin(RunDirectory(Path(path)), job_id, nodes, restart, active.__contains__))
        elif what == "hand-over":
            _hand_over(RunDirectory(Path(path)), rest[0])
        else:
            status, *events = rest
            verdict, explanation = end(Path(path), int(status), "time-limit" in events, "stop" in events)
            print(explanation, file=sys.stderr)
            print(verdict)
    except (JobError, RecipeError, DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if what == "begin":
            _stopped(RunDirectory(Path(path)), os.environ["SLURM_JOB_ID"], str(error))
        return 1
    return 0


def _prepare(recipe: Path, overrides: list[str]) -> RunDirectory:
    """The run directory for a job that was submitted by hand, which has the number of nodes to say."""
    from cca_megatron.cluster.submit import Request, run_files, store
    from cca_megatron.training import session

    given = os.environ
    asked = Request(
        given.get("CCA_TIME_LIMIT") or None,
        given.get("SLURM_JOB_PARTITION") or None,
        given.get("SLURM_JOB_ACCOUNT") or None,
    )
    overrides = [*overrides, f"launch.nodes={given['SLURM_NNODES']}"]
    run, files = run_files(session.prepare_command(recipe, overrides)[0], asked)
    owner = Job.read(run.job_file)
    if owner is not None and owner.job_id == given["SLURM_JOB_ID"]:
        return run  # requeued: it goes on with the recipe that it began with
    if owner is not None:
        refuse_second_owner(run, owner, given["CCA_ACTIVE_JOBS"].split().__contains__)
    store(run, files)
    return run


def _hand_over(run: RunDirectory, job_id: str) -> None:
    """Make the job that goes on elsewhere the owner while it waits, so that no other gets between."""
    with run.locked():
        job = Job.read(run.job_file)
        assert job is not None
        job.job_id = job_id
        job.write(run.job_file)


def _stopped(run: RunDirectory, job_id: str, reason: str) -> None:
    with run.locked():
        job = Job.read(run.job_file)
        if job is not None and job.job_id == job_id:
            job.state, job.reason = "stopped", reason
            job.write(run.job_file)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
