"""From a recipe to a job in SLURM's queue, with a run directory that says all about it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cca_megatron.cluster import slurm
from cca_megatron.cluster.ownership import refuse_second_owner
from cca_megatron.cluster.run_directory import Job, RunDirectory
from cca_megatron.training.command import Command
from cca_megatron.training.recipe import RecipeError, resolve

PROJECT = Path(__file__).parents[2]
_RECORDED = ("CCA_", "CUDA_", "NCCL_", "NVTE_", "OMP_", "TORCH", "TRITON_", "SLURM_CLUSTER", "VIRTUAL_ENV")
"""Environment variables that are written down begin so: those of others may hold secrets."""


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM; None leaves it to the site's file and to SLURM's own defaults."""

    time: str | None = None
    """Time limit as SLURM writes it: minutes, or days-hours:minutes:seconds."""
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    """Image for pyxis."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, as they are."""


def shared_file(name: str) -> Path:
    """A file of ``slurm/`` or ``launch/``: of the checkout, or where pip put it."""
    for root in (PROJECT, Path(sys.prefix) / "share" / "cca-megatron"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(2, "not in the checkout and not installed", name)


def sbatch_options(command: Command, request: Request, run: RunDirectory) -> list[str]:
    """Options of sbatch for a run. Of two that say the same the last holds, so the user's come last."""
    launch = command.recipe.launch
    named = {"time": request.time, "partition": request.partition, "account": request.account}
    options = [f"--nodes={launch.nodes}", f"--job-name={run.root.name}"]
    own_gpus = any(option.startswith(("--gres", "--gpus")) for option in request.options)
    if os.environ.get("CCA_DEVICE") != "cpu" and not own_gpus:
        options.append(f"--gpus-per-node={launch.gpus_per_node}")
    options += [f"--{name}={value}" for name, value in named.items() if value is not None]
    options.append(f"--signal=B:USR1@{_lead_seconds()}")
    log = RunDirectory(Path(str(run.root).replace("%", "%%"))).job_log("%j")
    return [*options, f"--output={log}", *request.options]


def _lead_seconds() -> int:
    """How long before its time limit a job is warned, as the site's file says."""
    lead = re.search(r"^CCA_LEAD_SECONDS=(\d+)", shared_file("slurm/site.env").read_text(), re.MULTILINE)
    if lead is None:
        raise RecipeError("slurm/site.env: has no CCA_LEAD_SECONDS; CCA_LEAD_SECONDS=300 works")
    return int(lead[1])


def _seconds(limit: str) -> int | None:
    """A time limit as SLURM writes it (``90``, ``4:00:00``, ``1-12``); None if it is none of these."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    days, first, second, third = match.groups()
    if days is None and third is None:  # minutes, or minutes:seconds
        return int(first) * 60 + int(second or 0)
    return int(days or 0) * 86400 + int(first) * 3600 + int(second or 0) * 60 + int(third or 0)


def run_files(command: Command, request: Request) -> tuple[RunDirectory, dict[str, str]]:
    """What the run directory of a checked recipe would hold.

    Returns:
        The directory, and its files by name.

    Raises:
        RecipeError: the recipe has no output.
    """
    recipe = command.recipe
    if recipe.output is None:
        raise RecipeError(f"{recipe.path}: has no output; output=runs/NAME works")
    run = RunDirectory(recipe.output.resolve())
    content: dict[str, Any] = resolve(recipe.path, list(recipe.overrides)) | {"output": str(run.root)}
    files = {
        "recipe.yaml": yaml.safe_dump(content, sort_keys=False),
        "arguments.txt": "".join(f"{argument}\n" for argument in command.argv),
        "job.sbatch": _script(sbatch_options(command, request, run)),
        "site.env": _site(request, [run.root, Path(recipe.data.prefix or ".").resolve().parent]),
        "environment.txt": "".join(f"{line}\n" for line in _environment()),
        **_code(),
    }
    return run, files


def submit(command: Command, request: Request) -> Job:
    """Write the run directory and submit its script.

    Raises:
        RecipeError: the recipe has no output.
        JobError: another job owns the directory.
        SlurmError: SLURM refuses.
    """
    run, files = run_files(command, request)
    lead, limit = _lead_seconds(), _seconds(request.time or "")
    if limit is not None and limit <= lead:
        raise RecipeError(
            f"--time {request.time}: must be longer than the {lead} s before the end when the job saves "
            f"(CCA_LEAD_SECONDS in slurm/site.env); --time {lead // 60 + 10} works"
        )
    slurm.check(files["job.sbatch"])
    with run.locked():
        owner = Job.read(run.job_file)
        if owner is not None:
            refuse_second_owner(run, owner, lambda job_id: slurm.job_state(job_id) is not None)
        store(run, files)
        job = Job(slurm.sbatch([], run.root / "job.sbatch", str(run.root)), command.recipe.launch.nodes)
        job.write(run.job_file)
    return job


def store(run: RunDirectory, files: dict[str, str]) -> None:
    """Write the files of a run."""
    (run.root / "logs").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = run.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def _script(options: Iterable[str]) -> str:
    first, _, body = shared_file("slurm/pretrain.sbatch").read_text().partition("\n")
    lines = [f"#SBATCH {_quoted(option)}" for option in options]
    own = {line.split("=")[0] for line in lines}
    kept = [line for line in body.split("\n") if line.split("=")[0] not in own]
    return "\n".join([first, "# Made by cca-megatron submit.", *lines, *kept])


def _quoted(option: str) -> str:
    """An option as sbatch reads it in a script, where a space ends it."""
    name, equals, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else option


def _site(request: Request, folders: list[Path]) -> str:
    """The site's values, and those of this submission after them; a container sees these folders too."""
    given = {
        "CCA_ROOT": str(shared_file("launch/h100.env").parents[1]),
        "CCA_CONTAINER": request.container,
        "CCA_DEVICE": os.environ.get("CCA_DEVICE"),
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in given.items() if value is not None]
    outside = [str(folder) for folder in folders if not folder.is_relative_to(Path.cwd())]
    mounts = shlex.quote("".join(f",{folder}:{folder}" for folder in outside))
    lines += [f"CCA_CONTAINER_MOUNTS=$CCA_CONTAINER_MOUNTS{mounts}"] if outside else []
    # Not in a container, which does not have it, and not in place of one that the site names.
    lines.append(f'[ -n "$CCA_CONTAINER$CCA_PYTHON" ] || CCA_PYTHON={shlex.quote(sys.executable)}')
    return shared_file("slurm/site.env").read_text() + "\n# Of this submission.\n" + "\n".join(lines) + "\n"


def _environment() -> list[str]:
    packages = {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_RECORDED)]
    return [
        f"python {sys.version.split()[0]} ({sys.executable})",
        *variables,
        *sorted(packages, key=str.lower),
    ]


def _code() -> dict[str, str]:
    """Commit and uncommitted changes of the checkout that runs; nothing where there is no git."""
    if shutil.which("git") is None or not (PROJECT / ".git").exists():
        return {"code/commit.txt": f"cca-megatron {metadata.version('cca-megatron')}, no git checkout\n"}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PROJECT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout

    return {
        "code/commit.txt": git("rev-parse", "HEAD") + git("status", "--short"),
        "code/diff.patch": git("diff", "HEAD"),
    }
