"""``cca-megatron bench``. Imports of PyTorch are inside: ``--help`` answers at once."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cca_megatron.bench.collect import collect
from cca_megatron.bench.results import FOLDER, Event, Result, read_all
from cca_megatron.bench.run_command import (
    Minutes,
    Output,
    bench_cp,
    bench_data,
    bench_matched,
    bench_step,
)
from cca_megatron.terminal import console, fail

if TYPE_CHECKING:
    import torch

app = typer.Typer(no_args_is_help=True, help="Measure kernels, layers, steps and data.")

Quick = Annotated[
    bool, typer.Option("--quick", help="4,096 and 16,384 tokens alone; of blocks those of one width.")
]
app.command("cp")(bench_cp)
app.command("step")(bench_step)
app.command("data")(bench_data)


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

    collect(result, events, len(lengths) * len(shapes.SHAPES) * len(choices), minutes, output)


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
def bench_block(
    quick: Quick = False,
    matched: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[,KIND...]",
            help="Compare layers of megatron-core instead, also without a GPU, with equal `parameters` or "
            "`kv-cache`, or of the `width` that the paper compares.",
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="With --matched: lengths of the sequence.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, help="With --matched.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="With --matched.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="With --matched: how often each is timed.")] = 5,
    minutes: Minutes = None,
    output: Output = FOLDER,
) -> None:
    """Time a whole attention block against MHA, GQA and MLA.

    On a GPU the fused, eager and compiled mix, where core attention is PyTorch's on the same backend for all.
    With --matched megatron-core's own layers and CCA's in one process, on the same core attention: times of
    the passes, bytes kept for the backward pass and memory. For example, on a CPU:
    `cca-megatron bench block --matched parameters,kv-cache --tokens 1024,2048`.
    """
    if matched is not None:
        bench_matched(matched, tokens, hidden_size, head_dim, rounds, minutes, output)
        return
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

    collect(result, events, len(lengths) * len(choices), minutes, output)


@app.command("report")
def bench_report(
    results: Annotated[Path, typer.Option(help="Folder of result files.")] = FOLDER,
    plots: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("benchmarks/plots"),
    readme: Annotated[Path, typer.Option(help="File whose table is replaced.")] = Path("README.md"),
    docs: Annotated[Path, typer.Option(help="File whose tables are replaced.")] = Path("docs/benchmarks.md"),
) -> None:
    """Make the plots and the tables of README and documentation from the stored results. Needs no GPU."""
    from cca_megatron.bench import report
    from cca_megatron.bench.plots import plot
    from cca_megatron.bench.run_plots import plot_runs
    from cca_megatron.bench.tables import update_docs

    try:
        found = read_all(results)
        for path in [*plot(found, plots), *plot_runs(found, plots)]:
            console.print(f"plotted {path}", markup=False, soft_wrap=True)
        report.update_readme(readme, results)
        update_docs(docs, results)
    except (OSError, ValueError) as error:
        fail(error)
    console.print(
        f"{readme} and {docs} have the tables of {len(found)} result files", markup=False, soft_wrap=True
    )
