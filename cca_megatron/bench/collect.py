"""Go through the cases of a benchmark, showing and storing what comes."""

import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cca_megatron.bench.results import CPU_FIGURES, Event, Result, describe, is_of_cpu
from cca_megatron.terminal import console, fail


def collect(
    result: Result,
    events: Callable[[Callable[[str], None]], Iterator[Event]],
    cases: int,
    minutes: float | None,
    output: Path,
    describe: Callable[[Event], str] = describe,
) -> None:
    """Go through the cases under a progress bar, print what comes, and store it, however it ends.

    Args:
        result: what is filled and stored.
        events: given a function to call with the name of each case as it begins, what the benchmark finds.
        cases: how many there are.
        minutes: stop then; None goes to the end.
        output: folder of the result file.
        describe: a line for the terminal.
    """
    _check_writable(output)
    ceilings = (f"{name} {value:,.0f}" for name, value in result.ceilings.items())
    console.print(", ".join([str(result.machine["device"]), *ceilings]), markup=False)
    if is_of_cpu(result.machine):
        console.print(CPU_FIGURES)
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

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
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
        signal.signal(signal.SIGTERM, previous)
        if result.rows or result.refused:
            console.print(f"stored in {result.write(output)}", markup=False, soft_wrap=True)


def _check_writable(folder: Path) -> None:
    """Fail now and not at the end, when what was measured would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(error)
