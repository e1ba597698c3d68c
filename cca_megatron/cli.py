"""The command line: ``cca-megatron train | submit | status | diagnose | preflight | plan | data | ...``.

Imports are inside the commands, so that ``--help`` answers at once.
"""

import logging
import os
import warnings
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cca_megatron.bench.command import app as bench_app
from cca_megatron.cluster.command import status, submit
from cca_megatron.cluster.diagnose import diagnose
from cca_megatron.cluster.preflight.command import preflight
from cca_megatron.convert import app as convert_app
from cca_megatron.generate import generate
from cca_megatron.plan.command import plan
from cca_megatron.terminal import OverridesArgument, RecipeArgument, console, fail

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train models with Compressed Convolutional Attention on Megatron-Core.\n\n"
    "Start with `cca-megatron doctor`, then "
    "`cca-megatron train configs/recipes/quickstart.yaml`.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make datasets for Megatron.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")
app.command()(generate)
app.command()(submit)
app.command()(status)
app.command()(diagnose)
app.command()(plan)
app.command()(preflight)


def main() -> None:
    """Entry point of the ``cca-megatron`` command."""
    # Megatron warns of every optional package that is absent; `doctor` says what each means.
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # in worker processes too
    logging.disable(logging.WARNING)
    app()


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    print_args: Annotated[
        bool, typer.Option("--print-args", help="Print the equivalent command and stop.")
    ] = False,
) -> None:
    """Train a model as a recipe says, on this machine.

    Everything is checked before a process starts. A run that is started again goes on from its last
    checkpoint; Ctrl-C saves one and stops. Without a GPU the CPU backend is used; `CCA_DEVICE=cpu` or
    `CCA_DEVICE=cuda` decides otherwise.
    """
    from cca_megatron.cluster.ownership import JobError, refuse_owned_folder
    from cca_megatron.data.sources import DataError
    from cca_megatron.training import session
    from cca_megatron.training.launch import TrainingError
    from cca_megatron.training.recipe import RecipeError

    try:
        command, device = session.prepare_command(recipe, overrides or [])
        if print_args:
            print(command.text())
            return
        session.check_machine(command.recipe, device)
        refuse_owned_folder(command.recipe.output)
        if not session.train(command, device, console):
            raise typer.Exit(130)
    except (RecipeError, DataError, JobError, TrainingError, ValueError, OSError) as error:
        fail(error)


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files or folders; `python-stdlib` is the source of Python's standard library. "
            "A `.jsonl` line or a `.parquet` row is a document, any other file is one.",
        ),
    ],
    output: Annotated[str, typer.Option(metavar="PREFIX", help="Where to write: PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[str, typer.Option(help="`bytes`, `hf:NAME_OR_PATH` or `sentencepiece:PATH`.")],
    text_key: Annotated[
        str, typer.Option(help="Field of a JSON line, or column, that holds the text.")
    ] = "text",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail on binary, empty or non-UTF-8 input instead of skipping it."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is already there.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one per core.")] = None,
) -> None:
    """Turn text into a Megatron dataset.

    An end-of-document token follows each document. Files appear only when they are complete. For
    example: `cca-megatron data prepare corpus/ --output data/corpus --tokenizer bytes`.
    """
    from cca_megatron.data.sources import DataError
    from cca_megatron.training import session
    from cca_megatron.training.recipe import RecipeError

    try:
        session.load_megatron("cpu")
        session.prepare_data(
            console,
            inputs,
            output,
            tokenizer,
            text_key=text_key,
            strict=strict,
            overwrite=overwrite,
            workers=workers,
        )
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        raise typer.Exit(130) from None
    except (RecipeError, DataError, OSError) as error:
        fail(error)


@app.command()
def doctor() -> None:
    """Show what is installed, and what each absence means.

    Ends with status 1 only if training cannot work.
    """
    from cca_megatron.doctor import examine

    colors = {"ok": "green", "absent": "yellow", "problem": "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    with console.status("looking around"):
        findings = examine()
    for finding in findings:
        mark = f"[{colors[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, mark, escape(finding.detail))
    console.print(table)
    problems = [finding.name for finding in findings if finding.status == "problem"]
    if problems:
        fail(f"training cannot work until this is solved: {', '.join(problems)}")
    console.print("training can work here", style="green")


if __name__ == "__main__":
    main()
