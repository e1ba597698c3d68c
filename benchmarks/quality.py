"""Train attention variants side by side: the paper's ablation ladder, temperature forms, and MHA, GQA, MLA.

    python benchmarks/quality.py --seeds 1 2 3 --jobs 2 --json quality.json --plot quality.png

trains every variant with every seed by the entry that ``cca-megatron train`` uses, each with the same number
of parameters, the same data and schedule, and reports the validation loss. Another RECIPE, and settings after
it, choose another model, dataset or length. Finished runs are not repeated: the same command goes on where it
was stopped. The report has the runs that are finished.
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from quality_variants import VARIANTS
from rich.progress import MofNCompleteColumn

from cca_megatron.terminal import console, counted_bar

if TYPE_CHECKING:
    from quality_runs import Run

    from cca_megatron.training.device import Device


def main() -> None:
    """Train what is missing, and report."""
    args = _parser().parse_args()
    # Megatron warns of every optional package that is absent, when it is imported.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import quality_runs
    from own_process import write
    from quality_report import plot, tables

    from cca_megatron.data.sources import DataError
    from cca_megatron.training.launch import TrainingError
    from cca_megatron.training.recipe import RecipeError

    try:
        runs, device = quality_runs.plan_runs(
            args.recipe, args.settings, args.variants, args.seeds, args.output
        )
        ended = _train(runs, args.jobs, device)
    except (RecipeError, DataError, TrainingError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    result = quality_runs.collect(runs)
    if result["runs"]:
        print(tables(result["runs"]))
        if args.json:
            write(args.json, result)
        if args.plot:
            plot(result, args.plot)
    if not ended:
        raise SystemExit(f"stopped after {len(result['runs'])} of {len(runs)} runs; the same command goes on")


def _train(runs: list["Run"], jobs: int, device: "Device") -> bool:
    """Train what is missing, with a bar over all runs; whether it went to the end."""
    from quality_runs import train_all

    from cca_megatron.training import session

    missing = [run for run in runs if run.result() is None]
    for run in missing:
        session.prepare_start(run.command, console)
    with counted_bar(console, "training", MofNCompleteColumn()) as progress:

        def show(run: "Run", loss: float, left: int) -> None:
            progress(len(runs) - left, len(runs))
            console.print(f"{run.variant}, seed {run.seed}: {loss:.4f} nats per token ({left} runs left)")

        progress(len(runs) - len(missing), len(runs))
        try:
            train_all(missing, jobs, device, show)
        except KeyboardInterrupt:
            return False
    return True


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


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
    parser.add_argument("--jobs", type=_jobs, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    parser.add_argument("--plot", type=Path, help="draw them to this file")
    return parser


if __name__ == "__main__":
    main()
