"""The runs of ``quality.py``: their recipes, with as many parameters each, and their training."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from own_process import facts, write
from quality_variants import REFERENCE, VARIANTS, Variant, sections

from cca_megatron.plan.shapes import model_from_args
from cca_megatron.training import session
from cca_megatron.training.checkpoint import count_parameters, latest_iteration
from cca_megatron.training.command import Command, build_command
from cca_megatron.training.device import Device
from cca_megatron.training.launch import TrainingError, explain
from cca_megatron.training.recipe import RecipeError, load_recipe, resolve
from cca_megatron.training.report import read_curves

TOLERANCE = 0.01
"""Of parameters, relative."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    folder: Path
    command: Command

    @property
    def _file(self) -> Path:
        return self.folder / "result.json"

    def result(self) -> dict[str, Any] | None:
        """What came of it; None if it is not finished."""
        return json.loads(self._file.read_text()) if self._file.exists() else None

    def finish(self) -> float:
        """Store the losses of a run whose training has ended, and return the last one.

        Raises:
            TrainingError: the model is not the planned one, or there is no loss of the last iteration.
        """
        checkpoints, tensorboard = self.command.recipe.checkpoints, self.command.recipe.tensorboard
        assert checkpoints is not None
        assert tensorboard is not None
        iteration, last = latest_iteration(checkpoints), self.command.args.train_iters
        if iteration != last:
            raise TrainingError(f"{self.folder}: ended at iteration {iteration} of {last}")
        planned, built = parameters(self.command), count_parameters(checkpoints, last)
        if planned != built:
            raise TrainingError(f"{self.folder}: has {built:,} parameters, not the {planned:,} planned")
        curve = read_curves(tensorboard).validation
        if not curve or curve[-1][0] != last:
            raise TrainingError(
                f"{self.folder}: no validation loss of iteration {last}; eval-iters must be set"
            )
        result = {"variant": self.variant, "seed": self.seed, "parameters": built, "validation": curve}
        partial = self._file.with_suffix(".part")
        write(partial, result)
        partial.replace(self._file)  # a result that exists is whole
        return curve[-1][1]


def plan_runs(
    recipe: Path, settings: list[str], variants: list[str], seeds: list[int], output: Path
) -> tuple[list[Run], Device]:
    """All runs, all variants with a seed before the next seed, each with its recipe in a folder of its own.

    Raises:
        RecipeError: a recipe cannot run, or a folder has runs with other settings.
    """
    device = session.load_megatron_here()
    base = resolve(recipe, settings)
    for name in ("model", "megatron"):
        base[name] = {key.replace("_", "-"): value for key, value in base.get(name, {}).items()}
    base.pop("output", None)
    own = sections(base, VARIANTS[REFERENCE], seeds[0], base["model"].get("ffn-hidden-size"))
    reference = write_recipe(own, output / "trial.yaml", device)
    session.check_machine(reference.recipe, device)
    target, runs = parameters(reference), []
    widths = {name: matched_ffn(base, VARIANTS[name], target, output, device) for name in variants}
    for seed in dict.fromkeys(seeds):
        for name in widths:
            folder = output / f"{name}-seed{seed}"
            content = sections(base, VARIANTS[name], seed, widths[name]) | {"output": str(folder)}
            path = folder / "recipe.yaml"
            if path.exists() and yaml.safe_load(path.read_text()) != content:
                raise RecipeError(f"output={output}: {path} has other settings; another --output works")
            runs.append(Run(name, seed, folder, write_recipe(content, path, device)))
    return runs, device


def train_all(runs: list[Run], jobs: int, device: Device, on_end: Callable[[Run, float, int], None]) -> None:
    """Train runs, a number of them at a time; stopping ends them with a checkpoint, from which they go on.

    Args:
        runs: what to train.
        jobs: how many at a time.
        device: where.
        on_end: called when a run has ended, with its loss and the number of runs that are left.

    Raises:
        TrainingError: one failed; the others are stopped.
    """
    waiting, active = deque(runs), list[tuple[Run, subprocess.Popen[bytes]]]()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.popleft()
                active.append((run, _start(run, jobs, device)))
            for run, process in [pair for pair in active if pair[1].poll() is not None]:
                active.remove((run, process))
                if process.returncode:
                    lines = _log(run).read_text(errors="replace").splitlines()
                    raise TrainingError(f"{run.folder}: {explain(lines, process.returncode)}")
                on_end(run, run.finish(), len(waiting) + len(active))
            time.sleep(_POLL_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for _, process in active:
            process.terminate()
        for _, process in active:
            process.wait()


def _start(run: Run, jobs: int, device: Device) -> subprocess.Popen[bytes]:
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "CCA_DEVICE": device}
    if device == "cpu":
        processes = jobs * run.command.recipe.launch.gpus_per_node
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    with _log(run).open("wb") as log, _owned(run.folder) as lock:
        # A session of its own: the terminal's Ctrl-C reaches this process alone, which then ends the run.
        return subprocess.Popen(
            run.command.torchrun(),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )


def _log(run: Run) -> Path:
    return run.folder / "train.log"


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[int]:
    """A lock that lives as long as the process that gets it: a run outlives a sweep that was killed."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{folder}: another process still trains it; wait for it, or end it"
            ) from None
        yield file.fileno()


def collect(runs: list[Run]) -> dict[str, Any]:
    """The result file: model and training, losses of the runs that are finished, machine and versions."""
    args = runs[0].command.args
    names = (
        "num_layers",
        "hidden_size",
        "kv_channels",
        "seq_length",
        "global_batch_size",
        "train_iters",
        "lr",
    )
    return {
        **{name: getattr(args, name) for name in names},
        "data": runs[0].command.recipe.data.prefix,
        "runs": [result for run in runs if (result := run.result()) is not None],
        "machine": facts(),
    }


def write_recipe(content: dict[str, Any], path: Path, device: Device) -> Command:
    """Write the sections of a recipe, and check that they can run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return build_command(load_recipe(path, []), device)


def parameters(command: Command) -> int:
    """Of the model that this command trains, as the planner counts them."""
    return sum(part.count for part in model_from_args(command.args).parts())


def matched_ffn(base: dict[str, Any], variant: Variant, target: int, folder: Path, device: Device) -> int:
    """The width of the MLPs that brings a variant nearest to as many parameters.

    Args:
        base: the sections of the recipe.
        variant: to match.
        target: parameters to reach.
        folder: for the recipes that are tried.
        device: where they will run.

    Raises:
        RecipeError: no width comes within 1 percent.
    """
    width = base["model"]["ffn-hidden-size"]

    def count(ffn: int) -> int:
        return parameters(write_recipe(sections(base, variant, 1, ffn), folder / "trial.yaml", device))

    at_width = count(width)
    per_channel = count(width + 1) - at_width
    found = width
    if per_channel:
        # Megatron warms up SwiGLU with the width itself, so it must be even, on every tensor-parallel rank.
        unit = 2 * base["megatron"].get("tensor-model-parallel-size", 1)
        found = unit * round((width + (target - at_width) / per_channel) / unit)
    if found < 1 or abs(count(found) - target) > TOLERANCE * target:
        raise RecipeError(
            f"model.ffn-hidden-size={width}: no width of dense MLPs gives {variant.kind} the {target:,} "
            "parameters of the reference; a model with dense layers that are wider works"
        )
    return found
