"""``cca-megatron plan``: parameters, memory, communication and time of a recipe, without a GPU."""

import gc
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cca_megatron.terminal import OverridesArgument, RecipeArgument, console, fail

_GPUS_PER_NODE = 8


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=16384, help="GPUs in all, eight to a node; by default the recipe's."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Their kind: `h100`, `h200`, `b200` or `a100`.")] = "h100",
    seq_length: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="Sequence lengths in tokens, such as `4096,131072`."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="KIND[,KIND...]", help="Put other attention beside it: `mha`, `gqa`, `mla`."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Rank the parallel layouts that fit, the fastest first.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw memory and time here (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Say what a recipe will take, before it runs: no GPU is needed, and nothing is started.

    Parameters and FLOPs by part, memory of the fullest GPU, bytes sent on each parallel axis, the time of
    a step and where it goes. What cannot be reckoned is refused. For example, ZAYA1-8B beside the same
    model with ordinary attention:

    `cca-megatron plan configs/recipes/zaya1_8b_32k_64gpu.yaml --compare mha,gqa,mla`
    """
    from cca_megatron.plan.hardware import GPUS
    from cca_megatron.training.recipe import RecipeError

    try:
        gpu = gpu.lower()
        if gpu not in GPUS:
            raise RecipeError(f"gpu={gpu}: unknown; {', '.join(GPUS)} are known, h100 works")
        if search and (compare or (seq_length and "," in seq_length)):
            raise RecipeError(
                "search with several attentions or lengths: one at a time; leave out the others"
            )
        _import_megatron()
        from cca_megatron.plan import plots, report

        size, lengths = _size(gpus), _lengths(seq_length)
        # A search has layouts of its own: the recipe's need not fit that many GPUs.
        here = [*(overrides or []), *([] if search else size)]
        plans = _plans(recipe, here, gpu, lengths, _names(compare))
        found: list[dict[str, Any]] = [one.as_json() for one in plans]
        if search:
            from cca_megatron.plan.search import search as search_layouts

            only = plans[0]
            with console.status("trying layouts"):
                layouts = search_layouts(only.model, gpus or only.parallel.gpus, only.run, only.gpu)
            typed = [*here, *size, *(f"megatron.seq-length={length}" for length in lengths)]
            changes = [[*typed, *c.overrides(only.parallel, only.run)] for c in layouts]
            report.show_search(console, only, gpus or only.parallel.gpus, layouts, changes)
            plans = [replace(only, parallel=c.parallel, run=c.run) for c in layouts]
            found = [one.as_json() | {"overrides": c} for one, c in zip(plans, changes, strict=True)]
        elif len(plans) == 1:
            report.show_plan(console, plans[0])
        else:
            report.show_comparison(console, plans)
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=1) + "\n")
            console.print(f"figures: {json_file.resolve()}", markup=False, soft_wrap=True)
        if plot is not None and plans:
            plot = plot if plot.suffix else plot.with_suffix(".png")
            plots.plot_plans(plans[:1] if search else plans, plot)
            console.print(f"picture: {plot.resolve()}", markup=False, soft_wrap=True)
    except (RecipeError, ValueError, OSError) as error:
        fail(error)


def _plans(path: Path, overrides: list[str], gpu: str, lengths: list[int], kinds: list[str]) -> list[Any]:
    """One for each length and attention."""
    from cca_megatron.plan.compare import with_attention
    from cca_megatron.plan.hardware import GPUS
    from cca_megatron.plan.shapes import model_from_args, parallel_from_args, run_from_args
    from cca_megatron.plan.summary import Plan

    plans = []
    for length in lengths or (None,):
        changes = [] if length is None else [f"megatron.seq-length={length}"]
        args = _arguments(path, [*overrides, *changes], length)
        model, parallel, run = model_from_args(args), parallel_from_args(args), run_from_args(args)
        plans.append(Plan("cca", model, parallel, run, GPUS[gpu]))
        plans += [Plan(kind, with_attention(model, kind), parallel, run, GPUS[gpu]) for kind in kinds]  # type: ignore[arg-type]
    return plans


def _arguments(path: Path, overrides: list[str], length: int | None) -> Namespace:
    """The recipe's arguments, checked as for training."""
    from cca_megatron.training.command import build_command
    from cca_megatron.training.recipe import load_recipe

    recipe = load_recipe(path, overrides)
    if recipe.arguments.get("bf16") == "auto":  # every GPU here multiplies it in hardware
        recipe.arguments["bf16"] = True
    positions = recipe.arguments.get("max-position-embeddings")
    if length is not None and positions is not None and positions < length:
        recipe.arguments["max-position-embeddings"] = length
    return build_command(recipe, "cpu").args


def _import_megatron() -> None:
    """Import Megatron in half the time.

    Without PyTorch's compiler, which Megatron's decorators would load, and without looking for garbage, of
    which imports make little.
    """
    gc.disable()
    import torch

    def as_it_is(model: Any = None, **_: Any) -> Any:
        return as_it_is if model is None else model

    compiler: Any = torch.compile
    torch.compile = as_it_is
    try:
        from cca_megatron.training.session import load_megatron

        load_megatron("cpu")
        import megatron.training.arguments  # noqa: F401
    finally:
        torch.compile = compiler
        gc.freeze()
        gc.enable()


def _size(gpus: int | None) -> list[str]:
    """The overrides that give a recipe this many GPUs."""
    if gpus is None:
        return []
    nodes, rest = divmod(gpus, _GPUS_PER_NODE)
    if rest and nodes:
        raise ValueError(f"gpus={gpus}: nodes have {_GPUS_PER_NODE}; gpus={nodes * _GPUS_PER_NODE} works")
    return [f"launch.nodes={max(1, nodes)}", f"launch.gpus_per_node={_GPUS_PER_NODE if nodes else gpus}"]


def _lengths(text: str | None) -> list[int]:
    lengths = [] if text is None else text.split(",")
    for length in lengths:
        if not length.strip().isdecimal() or int(length) < 1:
            raise ValueError(f"seq_length={text}: must be whole numbers with commas; 4096,32768 works")
    return list(dict.fromkeys(int(length) for length in lengths))


def _names(text: str | None) -> list[str]:
    return [] if text is None else list(dict.fromkeys(name.strip() for name in text.split(",")))
