"""Whole training steps of a recipe, by the real entry, and where their time goes."""

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from cca_megatron.bench.results import Measured
from cca_megatron.training import launch, progress, session
from cca_megatron.training.launch import TrainingError
from cca_megatron.training.recipe import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

PARTS = ("batch-generator", "forward-compute", "backward-compute", "optimizer")
"""Megatron's timers that are shown. The first runs within the second, the others beside each other."""
_TIMER = re.compile(r"^\s+([a-z-]+) \.+: \(([\d.]+), ([\d.]+)\)")
_UNSAVED = (
    "output=null",
    "megatron.log-interval=1",
    "megatron.timing-log-level=2",
    "megatron.eval-iters=0",
    "megatron.exit-signal-handler=false",
)


def measure_step(recipe: Path, overrides: list[str], steps: int, warmup: int, console: "Console") -> Measured:
    """Train so many steps behind as many to warm up; nothing is saved or evaluated.

    Args:
        recipe: what to train.
        overrides: settings that replace the recipe's.
        steps: that count.
        warmup: steps before them.
        console: where the preparation of missing data is shown.

    Returns:
        A row with the median seconds of a step, its tokens per second, and the share of each of ``PARTS`` in
        all steps, on the rank that takes longest for it; "all else" is what none of them covers.

    Raises:
        RecipeError: it cannot run, or logged no step.
        TrainingError: the training processes failed, or were stopped.
    """
    settings = [*overrides, *_UNSAVED, f"megatron.train-iters={warmup + steps}"]
    command, device = session.prepare_command(recipe, settings)
    session.check_machine(command.recipe, device)
    session.prepare_start(command, console)
    reader = _Reader()
    if launch.run(command, device, None, reader.feed, console.print) != "finished":
        raise TrainingError(
            f"stopped after {len(reader.seconds)} of {warmup + steps} steps; nothing is stored"
        )
    counted = reader.seconds[warmup:]
    if not counted:
        raise RecipeError(f"{recipe}: Megatron logged no step after {warmup}; steps=10 works")
    step = statistics.median(counted)
    args = command.args
    tokens = args.global_batch_size * args.seq_length
    return Measured(
        {
            "recipe": recipe.stem,
            "overrides": overrides,
            "processes": command.recipe.world_size,
            "dtype": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "steps": len(counted),
            "tokens_per_step": tokens,
            "seconds": step,
            "seconds_low": min(counted),
            "seconds_high": max(counted),
            "tokens_per_second": tokens / step,
            "share": reader.shares(warmup),
        }
    )


class _Reader:
    """Seconds of each step and of each timer in it, from Megatron's log."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {}

    def feed(self, line: str) -> None:
        event = progress.parse(line)
        if isinstance(event, progress.Iteration):
            self.seconds.append(event.seconds)
        elif match := _TIMER.match(line):
            self.parts.setdefault(match[1], []).append(float(match[3]) / 1000)

    def shares(self, warmup: int) -> dict[str, float]:
        """Of each of ``PARTS`` in the steps after these, and of all else."""
        whole = sum(self.seconds[warmup:])
        shares = {name: sum(self.parts[name][warmup:]) / whole for name in PARTS if name in self.parts}
        covered = sum(share for name, share in shares.items() if name != PARTS[0])
        return shares | {"all else": 1 - covered}
