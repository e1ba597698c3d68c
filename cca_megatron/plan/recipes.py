"""Recipes side by side: the layout, memory and speed that the planner gives each.

    python -m cca_megatron.plan.recipes configs/recipes/ccgqa_7b_*.yaml

prints them as a Markdown table, one row for a recipe: GPUs of the axes, tokens of a step, what is computed
twice or lies elsewhere to save memory, and for H100s the planner's model of the rest.
"""

import argparse
import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from cca_megatron.plan.hardware import GPUS
from cca_megatron.plan.parts import Parallel
from cca_megatron.plan.shapes import Run, model_from_args, parallel_from_args, run_from_args
from cca_megatron.plan.summary import Plan
from cca_megatron.training.command import build_command
from cca_megatron.training.recipe import RecipeError, load_recipe

_HEAD = (
    "| recipe | GPUs | layout | tokens a step | to save memory | GB per GPU | s a step | MFU | saved every |",
    "|---|---|---|---|---|---|---|---|---|",
)


def table(recipes: Mapping[str, Namespace]) -> str:
    """The rows of these recipes, by sequence length and number of GPUs.

    Args:
        recipes: by name, their arguments (:func:`cca_megatron.training.command.build_command`).

    Raises:
        RecipeError: a setting that is not reckoned.
    """
    rows = sorted(_row(name, args) for name, args in recipes.items())
    return "\n".join([*_HEAD, *(row for _, row in rows)])


def _row(name: str, args: Namespace) -> tuple[tuple[int, int], str]:
    plan = Plan("cca", model_from_args(args), parallel_from_args(args), run_from_args(args), GPUS["h100"])
    parallel, run, step = plan.parallel, plan.run, plan.step
    cells = [
        f"`{name}`",
        f"{parallel.gpus}",
        _layout(parallel),
        f"{run.global_batch * run.sequence / 2**20:.0f}M",
        _saved(run),
        f"{plan.memory.total / 1e9:.0f}",
        f"{step.seconds:.2g}" if step.seconds < 10 else f"{step.seconds:.0f}",
        f"{step.mfu:.0%}",
        f"{args.save_interval * step.seconds / 60:.0f} min",
    ]
    return (run.sequence, parallel.gpus), "| " + " | ".join(cells) + " |"


def _layout(parallel: Parallel) -> str:
    """The axes that are more than one GPU wide; experts lie across the others."""
    axes = {"TP": parallel.tensor, "CP": parallel.context, "PP": parallel.pipeline, "DP": parallel.data}
    wide = [f"{name} {size}" for name, size in axes.items() if size > 1]
    experts = f", EP {parallel.expert}" if parallel.expert > 1 else ""
    return " x ".join(wide) + experts


def _saved(run: Run) -> str:
    ways = []
    if run.recompute == "full":
        ways.append("all recomputed")
    elif run.recompute_modules:
        ways.append(f"{', '.join(sorted(run.recompute_modules))} recomputed")
    if run.loss_chunk is not None:
        ways.append("loss in chunks")
    if run.optimizer_on_gpu < 1:
        ways.append("optimizer on the host")
    return ", ".join(ways) or "-"


def main() -> None:
    """Entry point of ``python -m cca_megatron.plan.recipes``."""
    from cca_megatron.training.session import load_megatron

    parser = argparse.ArgumentParser(
        prog="python -m cca_megatron.plan.recipes",
        description="Layout, memory and speed of recipes on H100s, as the planner reckons them, in Markdown.",
    )
    parser.add_argument("recipes", nargs="+", type=Path, help="such as configs/recipes/ccgqa_7b_*.yaml")
    paths = parser.parse_args().recipes
    load_megatron("cpu")
    logging.disable(logging.WARNING)  # Megatron's own go to the standard output, into the table
    try:
        print(table({path.stem: build_command(load_recipe(path, []), "cpu").args for path in paths}))
    except RecipeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
