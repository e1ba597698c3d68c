"""``cca-megatron bench block --matched | cp | step | data``: what runs Megatron, with a GPU or without."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cca_megatron.bench import lines
from cca_megatron.bench.collect import collect
from cca_megatron.bench.results import FOLDER, Event, Result
from cca_megatron.terminal import console, fail

Minutes = Annotated[
    float | None, typer.Option(min=0, help="Stop then; the cases that are left are not measured.")
]
Output = Annotated[Path, typer.Option(help="Folder for the result file.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each case is timed; medians count.")]
Recipe = Annotated[Path, typer.Argument(help="A recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that replace the recipe's."),
]
_QUICKSTART = Path("configs/recipes/quickstart.yaml")


def bench_matched(
    matchings: str,
    tokens: str | None,
    hidden_size: int | None,
    head_dim: int | None,
    rounds: int,
    minutes: float | None,
    output: Path,
) -> None:
    """Time whole attention layers of megatron-core and CCA beside each other, matched in some respect.

    Args:
        matchings: of :func:`cca_megatron.bench.sizes.matched`, with commas between them.
        tokens: lengths of the sequence, with commas between them; None is 1k to 128k on a GPU, to 4k without.
        hidden_size: None is 2,048 on a GPU, 1,024 without.
        head_dim: None is 128 on a GPU, 64 without.
        rounds: how often each is timed.
        minutes: stop then.
        output: folder for the result file.
    """
    import torch

    from cca_megatron.bench import machine
    from cca_megatron.bench.sizes import matched
    from cca_megatron.training import session
    from cca_megatron.training.recipe import RecipeError

    result = Result("matched", machine.facts())
    try:
        device = session.load_megatron_here()
        from cca_megatron.bench.matched import measure_matched, start_alone

        on_gpu = device == "cuda"
        width, dim = hidden_size or (2048 if on_gpu else 1024), head_dim or (128 if on_gpu else 64)
        names = [name.strip() for name in matchings.split(",")]
        for name in names:
            matched(name, width, dim)  # type: ignore[arg-type]
        lengths = _numbers("tokens", tokens) or [1024 * 2**n for n in range(8 if on_gpu else 3)]
    except (RecipeError, ValueError) as error:
        fail(error)
    if not on_gpu:
        torch.set_num_threads(1)  # so that the time of the process is that of its work
    start_alone()

    def events(started: Callable[[str], None]) -> Iterator[Event]:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        return measure_matched(names, lengths, width, dim, dtype, rounds, started)  # type: ignore[arg-type]

    collect(result, events, len(names) * len(lengths), minutes, output, lines.matched_line)


def bench_cp(
    ranks: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Numbers of context-parallel ranks.")
    ] = "1,2,4",
    tokens: Annotated[int, typer.Option(min=1, help="Of the sequence, over all ranks.")] = 4096,
    hidden_size: Annotated[int, typer.Option(min=1)] = 512,
    head_dim: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Rounds = 5,
    output: Output = FOLDER,
) -> None:
    """Spread one attention layer over context-parallel ranks, by every way of exchange.

    Processes are started here, with gloo on a CPU. Counted are the bytes that the rank sends that sends most,
    forward and backward, beside those that `cca-megatron plan` reckons with; the time is the work of the
    busiest rank. For example: `cca-megatron bench cp --ranks 1,2 --tokens 2048`.
    """
    from cca_megatron.bench import machine
    from cca_megatron.bench.context import measure_context
    from cca_megatron.training.device import select_device
    from cca_megatron.training.launch import TrainingError

    result = Result("cp", machine.facts())
    try:
        device, sizes = select_device(), _numbers("ranks", ranks)
        if 1 not in sizes:
            raise ValueError(f"ranks={ranks}: one rank is what the others are compared with; ranks=1,2 works")

        def events(started: Callable[[str], None]) -> Iterator[Event]:
            return measure_context(sorted(sizes), tokens, hidden_size, head_dim, rounds, device, started)

        collect(result, events, len(sizes), None, output, lines.context_line)
    except (ValueError, TrainingError) as error:
        fail(error)


def bench_step(
    recipe: Recipe = _QUICKSTART,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 5,
    output: Output = FOLDER,
) -> None:
    """Train a few steps of a recipe by the real entry: tokens per second, and where the time goes.

    Nothing is saved and nothing evaluated; data that is missing is prepared. For example, with both convs
    taken out: `cca-megatron bench step configs/recipes/quickstart.yaml cca.conv0=false cca.conv1=false`.
    """
    from cca_megatron.bench import machine
    from cca_megatron.data.sources import DataError
    from cca_megatron.training.launch import TrainingError
    from cca_megatron.training.recipe import RecipeError

    result = Result("step", machine.facts())
    try:
        from cca_megatron.bench.step import measure_step

        def events(started: Callable[[str], None]) -> Iterator[Event]:
            started(f"{warmup + steps} steps of {recipe.stem}")
            yield measure_step(recipe, overrides or [], steps, warmup, console)

        collect(result, events, 1, None, output, lines.step_line)
    except (RecipeError, DataError, TrainingError, ValueError, OSError) as error:
        fail(error)


def bench_data(
    recipe: Recipe = _QUICKSTART,
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(min=1, help="Micro-batches that are read in a round.")] = 500,
    rounds: Rounds = 5,
    output: Output = FOLDER,
) -> None:
    """Make the recipe's dataset anew and read it: tokens/s of `data prepare` and of Megatron's loader.

    The dataset goes to a temporary folder. For example, on text of your own:
    `cca-megatron bench data configs/recipes/quickstart.yaml data.inputs=[corpus/]`.
    """
    from cca_megatron.bench import machine
    from cca_megatron.data.sources import DataError
    from cca_megatron.training import session
    from cca_megatron.training.recipe import RecipeError, load_recipe

    result = Result("data", machine.facts())
    try:
        loaded = load_recipe(recipe, overrides or [])
        session.load_megatron("cpu")
        from cca_megatron.bench.data import measure_data

        def events(started: Callable[[str], None]) -> Iterator[Event]:
            return measure_data(loaded, batches, rounds, started)

        collect(result, events, 2 * rounds + 1, None, output, lines.data_line)
    except (RecipeError, DataError, ValueError, OSError) as error:
        fail(error)


def _numbers(name: str, text: str | None) -> list[int]:
    """Of an option with commas; empty where it is not given.

    Raises:
        ValueError: it holds something else.
    """
    if text is None:
        return []
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"{name}={text}: must be whole numbers of at least 1; {name}=1024,4096 works")
    return numbers
