"""``cca-megatron submit | status``."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cca_megatron.terminal import OverridesArgument, RecipeArgument, console, fail


def submit(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes; by default the recipe's launch.nodes.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit of one job, as SLURM writes it: `4:00:00`, `1-12:00:00`.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that pays.")] = None,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Run in this image; the cluster needs pyxis.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="One more option of sbatch, such as `--sbatch=--qos=high`."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print all that would be written and submitted, and stop.")
    ] = False,
) -> None:
    """Train a recipe on a SLURM cluster.

    The recipe is checked for that number of nodes first. Everything about the run goes into its output
    folder. The job saves before its time limit and queues itself again, and goes on from the last checkpoint
    after failures. `slurm/site.env` holds what is different at your site.
    """
    from cca_megatron.cluster import submit as submission
    from cca_megatron.cluster.ownership import JobError
    from cca_megatron.cluster.slurm import SlurmError
    from cca_megatron.data.sources import DataError
    from cca_megatron.training import session
    from cca_megatron.training.recipe import RecipeError

    settings = [*(overrides or []), *([] if nodes is None else [f"launch.nodes={nodes}"])]
    request = submission.Request(time, partition, account, container, list(sbatch or []))
    try:
        command, _ = session.prepare_command(recipe, settings)
        if dry_run:
            run, files = submission.run_files(command, request)
            for name, text in files.items():
                console.rule(str(run.root / name), style="dim")
                console.print(text, markup=False, soft_wrap=True)
            console.rule("would be submitted with", style="dim")
            console.print(shlex.join(["sbatch", str(run.root / "job.sbatch"), str(run.root)]), soft_wrap=True)
            return
        job = submission.submit(command, request)
    except (RecipeError, DataError, JobError, SlurmError, ValueError, OSError) as error:
        fail(error)
    root = shlex.quote(str(command.recipe.output))
    plural = "" if job.nodes == 1 else "s"
    lines = [
        ("job", f"{job.job_id} on {job.nodes} node{plural}"),
        ("status", f"cca-megatron status {root}"),
        ("log", f"tail -F {root}/logs/job-{job.job_id}.log"),
        ("save and stop", f"scancel --batch --signal=USR2 {job.job_id}"),
        ("end at once", f"scancel {job.job_id}"),
    ]
    _show(lines)


def status(
    run: Annotated[Path, typer.Argument(help="A run's output folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show where a submitted run stands: its job, attempts, last step and last checkpoint."""
    from cca_megatron.cluster.status import describe, read_status

    try:
        found = read_status(run)
    except OSError as error:
        fail(error)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        _show(describe(found))


def _show(lines: list[tuple[str, str]]) -> None:
    for name, text in lines:
        console.print(f"{name:<16}{text}", markup=False, soft_wrap=True)
