"""``cca-megatron bench mix | block | report``. Imports of PyTorch are inside: ``--help`` answers at once."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cca_megatron.bench.results import FOLDER, Event, Result, describe, read_all
from cca_megatron.terminal import console, fail

if TYPE_CHECKING:
    import torch

app = typer.Typer(no_args_is_help=True, help="Measure the fused kernels on a GPU.")

Quick = Annotated[
    bool, typer.Option("--quick", help="4,096 and 16,384 tokens alone; of blocks those of one width.")
]
Minutes = Annotated[
    float | None, typer.Option(min=0, help="Stop then; the cases that are left are not measured.")
]
Output = Annotated[Path, typer.Option(help="Folder for the result file.")]


def _gpu(command: str) -> "torch.device":
    import torch

    if not torch.cuda.is_available():
        fail(
            f"cca-megatron bench {command} needs a CUDA GPU, and PyTorch sees none here; "
            "make test checks the kernels without one",
            2,
        )
    torch.backends.cudnn.benchmark = True  # the baselines get cuDNN's best convs
    return torch.device("cuda", torch.cuda.current_device())


@app.command("mix")
def bench_mix(
    quick: Quick = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Only search for the fastest tiles here, and print them for the table."),
    ] = False,
    head_dim: Annotated[int, typer.Option(help="Head dim to tune for.")] = 128,
    minutes: Minutes = None,
    output: Output = FOLDER,
) -> None:
    """Time the mix alone: fused, eager and compiled.

    Each is first compared with the reference in fp64, outputs and gradients; what fails gets no speed.
    """
    device = _gpu("mix")
    from cca_megatron.bench import machine, measure, mix, shapes

    if tune:
        _tune(head_dim, device)
        return
    timer = measure.CudaTimer()
    ceilings = measure.measure_ceilings(timer, device)
    result = Result("mix", machine.facts(), asdict(ceilings))
    choices = mix.variants()
    lengths = shapes.QUICK_TOKENS if quick else shapes.ALL_TOKENS

    def events(started: Callable[[str], None]) -> Iterator[Event]:
        return mix.measure_mix(timer, ceilings, shapes.SHAPES, lengths, choices, device, started=started)

    _measure(result, events, len(lengths) * len(shapes.SHAPES) * len(choices), minutes, output)


def _tune(head_dim: int, device: "torch.device") -> None:
    import torch

    from cca_kernels.triton.tuning import TIMED_TOKENS, tune
    from cca_megatron.bench.shapes import ZAYA1

    shape, dtype = replace(ZAYA1, dim=head_dim), torch.bfloat16
    try:
        with console.status("tuning"):
            config = tune(
                shape.inputs(TIMED_TOKENS, dtype, device),
                shape.settings,
                report=lambda line: console.print(line, markup=False, soft_wrap=True),
            )
    except RuntimeError as error:
        fail(error)
    arch = 10 * torch.cuda.get_device_capability(device)[0]
    console.print(f"\nTABLE[{arch}, {dtype.itemsize}, {head_dim}] = {config}", markup=False, soft_wrap=True)


@app.command("block")
def bench_block(quick: Quick = False, minutes: Minutes = None, output: Output = FOLDER) -> None:
    """Time a whole attention block: CCA fused, eager and compiled, against MHA, GQA and MLA.

    Core attention is PyTorch's on the same backend for all.
    """
    device = _gpu("block")
    import torch

    from cca_megatron.bench import attention, block, machine, measure, mix, shapes

    try:
        core = attention.choose_core(device, torch.bfloat16)
    except RuntimeError as error:
        fail(error)
    timer = measure.CudaTimer()
    result = Result("block", machine.facts(), asdict(measure.measure_ceilings(timer, device)))
    lengths = shapes.QUICK_TOKENS if quick else shapes.ALL_TOKENS
    choices = block.methods(shapes.QUICK_SHAPES if quick else shapes.SHAPES, mix.variants())

    def events(started: Callable[[str], None]) -> Iterator[Event]:
        return block.measure_block(timer, choices, lengths, core, device, started=started)

    _measure(result, events, len(lengths) * len(choices), minutes, output)


def _measure(
    result: Result,
    events: Callable[[Callable[[str], None]], Iterator[Event]],
    cases: int,
    minutes: float | None,
    output: Path,
) -> None:
    """Go through the cases under a progress bar, print what comes, and store it, however it ends."""
    ceilings = (f"{name} {value:,.0f}" for name, value in result.ceilings.items())
    console.print(f"{result.machine['device']}: {', '.join(ceilings)}", markup=False)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    begun = 0
    bar = Progress(
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("", total=cases)

    def started(case: str) -> None:
        nonlocal begun
        bar.update(task, completed=begun, description=case)
        begun += 1

    try:
        with bar:
            for event in events(started):
                result.add(event)
                console.print(describe(event), markup=False, soft_wrap=True)
                if end is not None and time.monotonic() > end:
                    console.print(
                        f"stopped after {minutes:g} minutes; {cases - begun} cases are not measured"
                    )
                    break
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None
    finally:
        if result.rows or result.refused:
            console.print(f"stored in {result.write(output)}", markup=False, soft_wrap=True)


@app.command("report")
def bench_report(
    results: Annotated[Path, typer.Option(help="Folder of result files.")] = FOLDER,
    plots: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("benchmarks/plots"),
    readme: Annotated[Path, typer.Option(help="File whose table is replaced.")] = Path("README.md"),
) -> None:
    """Make the plots and the README's table from the stored results. Needs no GPU."""
    from cca_megatron.bench import report
    from cca_megatron.bench.plots import plot

    try:
        found = read_all(results)
        for path in plot(found, plots):
            console.print(f"plotted {path}", markup=False, soft_wrap=True)
        report.update_readme(readme, results)
    except (OSError, ValueError) as error:
        fail(error)
    console.print(f"{readme} has the table of {len(found)} result files", markup=False, soft_wrap=True)
