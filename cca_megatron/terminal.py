"""How every command speaks: shared arguments, output, errors, and bars that count."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

console = Console(highlight=False)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, such as configs/recipes/quickstart.yaml.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings that replace the recipe's: `megatron.train-iters=100`, "
        "`cca.temperature=exp`, `output=runs/mine`. Any Megatron argument can be set.",
    ),
]


def fail(message: object, status: int = 1) -> NoReturn:
    """Say what is wrong in one line, and end the command."""
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.strerror}: {Path(message.filename).resolve()}"
    Console(stderr=True, highlight=False).print(f"error: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def counted_bar(console: Console, text: str, count: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """A bar for the length of the block, which gets the function to tell (done, total).

    Args:
        console: where to draw; nothing is drawn where that is no terminal.
        text: what is being done.
        count: how the two numbers are shown.
    """
    with Progress(
        TextColumn(text),
        BarColumn(),
        count,
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
