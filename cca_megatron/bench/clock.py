"""Time several things beside each other, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], dict[str, float]]
"""Runs something once; seconds of each of its passes."""


def now() -> float:
    """Seconds: of the GPU once it is done, else of this process's work on the CPU, without waiting.

    On a CPU that is comparable only where every process has one thread.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_name() != "cpu":  # as the CPU backend calls it
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turn(runs: Mapping[str, Run], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Run everything once to warm up, then once a round; by name and pass the seconds of each round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            for which, taken in run().items():
                if number:
                    seconds[name].setdefault(which, []).append(taken)
    return seconds


def summary(own: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Median seconds, and the ratio to the baseline: the median over rounds, the lowest and the highest."""
    ratios = [mine / other for mine, other in zip(own, baseline, strict=True)]
    return {
        "seconds": statistics.median(own),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
