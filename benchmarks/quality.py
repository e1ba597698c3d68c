"""Train attention variants side by side: the paper's ablation ladder, temperature forms, and MHA, GQA, MLA.

    python benchmarks/quality.py --seeds 1 2 3 --jobs 2 --json quality.json --plot quality.png

trains every variant with every seed by the entry that ``cca-megatron train`` uses, each with the same number of
parameters, data and schedule, and reports the validation loss. Another RECIPE, and
SECTION.KEY=VALUE settings, choose another model, dataset or length. Finished runs are not repeated: the same
command goes on where it was stopped.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from own_process import facts, write
from quality_report import plot, tables
from quality_variants import REFERENCE, VARIANTS, matched_ffn, parameters, sections, write_recipe
from rich.progress import MofNCompleteColumn

from cca_megatron.data.sources import DataError
from cca_megatron.terminal import console, counted_bar
from cca_megatron.training import session
from cca_megatron.training.checkpoint import count_parameters, latest_iteration
from cca_megatron.training.command import Command, check_data
from cca_megatron.training.device import Device
from cca_megatron.training.launch import TrainingError, explain
from cca_megatron.training.recipe import RecipeError, resolve
from cca_megatron.training.report import read_curves

_POLL_SECONDS = 0.5


def main() -> None:
    """Train what is missing, and report."""
    args = _parser().parse_args()
    # Megatron warns of every optional package that is absent.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        runs, device = plan_runs(args.recipe, args.settings, args.variants, args.seeds, args.output)
        prepare_data(runs[0].command)
        missing = [run for run in runs if run.result() is None]
        with counted_bar(console, "training", MofNCompleteColumn()) as progress:
            progress(len(runs) - len(missing), len(runs))
            train_all(missing, args.jobs, device, lambda left: progress(len(runs) - left, len(runs)))
    except (RecipeError, DataError, TrainingError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    result = collect(runs)
    print(tables(result["runs"]))
    if args.json:
        write(args.json, result)
    if args.plot:
        plot(result, args.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).with_name("quality.yaml")
    parser.add_argument("recipe", nargs="?", type=Path, default=default, help="default: quality.yaml, beside")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="SECTION.KEY=VALUE",
        help="that replace the recipe's, as in megatron.train-iters=1000; RECIPE must then be given",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    parser.add_argument("--plot", type=Path, help="draw them to this file")
    return parser


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

    def finish(self) -> None:
        """Read the losses of a run whose training has ended.

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
        write(self._file, result)


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
    own_width = base["model"]["ffn-hidden-size"]
    reference = write_recipe(
        sections(base, VARIANTS[REFERENCE], seeds[0], own_width), output / "trial.yaml", device
    )
    session.check_machine(reference.recipe, device)
    target, runs = parameters(reference), []
    widths = {name: matched_ffn(base, VARIANTS[name], target, output, device) for name in variants}
    for seed in seeds:
        for name in variants:
            folder = output / f"{name}-seed{seed}"
            content = sections(base, VARIANTS[name], seed, widths[name]) | {"output": str(folder)}
            path = folder / "recipe.yaml"
            if path.exists() and yaml.safe_load(path.read_text()) != content:
                raise RecipeError(f"output={output}: {path} has other settings; another --output works")
            runs.append(Run(name, seed, folder, write_recipe(content, path, device)))
    return runs, device


def prepare_data(command: Command) -> None:
    """Make the dataset of all runs, if it is not there."""
    session.ensure_data(command.recipe, console)
    check_data(command)


def train_all(runs: list[Run], jobs: int, device: Device, on_end: Callable[[int], None]) -> None:
    """Train runs, a number of them at a time; stopping ends them with a checkpoint, from which they go on.

    Args:
        runs: what to train.
        jobs: how many at a time.
        device: where.
        on_end: called with the number of runs that are left when one has ended.

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
                run.finish()
                on_end(len(waiting) + len(active))
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
    """The result file: settings of the model and the training, losses by run, machine and versions."""
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
        "runs": [run.result() for run in runs],
        "machine": facts(),
    }


if __name__ == "__main__":
    main()
