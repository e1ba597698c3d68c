"""How long something takes on a GPU, how much memory it needs, and what the machine can do at most."""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Workload:
    """Something differentiable, bound to one set of inputs."""

    forward: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    """Tensors whose gradients the backward pass finds."""
    gradients: Sequence[Tensor]
    """Of the outputs."""

    def job(self, which: str) -> "Job":
        """One of ``PASSES`` as something to time. The backward pass has its forward pass prepared."""

        def backward(outputs: Sequence[Tensor]) -> object:
            return torch.autograd.grad(outputs, self.leaves, self.gradients)

        prepared: list[Sequence[Tensor]] = []
        return {
            "forward": Job(self.forward),
            "backward": Job(lambda: backward(prepared.pop()), lambda: prepared.append(self.forward())),
            "both": Job(lambda: backward(self.forward())),
        }[which]


@dataclass(frozen=True)
class Job:
    """What is timed, and what has to happen before each time."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float
    peak_bytes: int
    """Memory allocated at most during one job, beyond its inputs."""


class Timer(Protocol):
    """Times one thing."""

    def __call__(self, jobs: Sequence[Job], *, graph: bool) -> Timing:
        """Time the same thing on several copies of its inputs in turn, so that no cache holds them.

        Args:
            jobs: one for each copy.
            graph: replay CUDA graphs instead of starting kernel after kernel from Python.
        """


def copies(bytes_each: int, device: torch.device) -> int:
    """How many sets of inputs exceed the L2 cache three times."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(1, min(16, math.ceil(3 * cache / bytes_each)))


class CudaTimer:
    """CUDA events around each job, after a warm-up.

    With ``graph`` the copies are captured one behind the other in one graph, and a sample is the time of a
    replay divided by their number: events around one short graph would measure its launch. Without,
    a sample is one job, and where Python is slower than the GPU the sample says so.

    Args:
        seconds: of measuring; there are 10 to 100 rounds over the copies.
    """

    def __init__(self, seconds: float = 0.15) -> None:
        self._seconds = seconds
        # Backward kernels run on the stream of their forward pass, and that has to be the captured one.
        self._stream = torch.cuda.Stream()

    def __call__(self, jobs: Sequence[Job], *, graph: bool) -> Timing:
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                _rounds(jobs, 2)  # compiles, chooses algorithms
                peak = _peak_bytes(jobs[0])
                timed = [_captured(jobs, self._stream)] if graph else jobs
                estimate = sum(_rounds(timed, 2)) / 2
                rounds = max(10, min(100, math.ceil(self._seconds / max(estimate, 1e-6))))
                samples = [sample * len(timed) / len(jobs) for sample in _rounds(timed, rounds)]
        finally:
            torch.cuda.synchronize()
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        return Timing(statistics.median(samples), low, high, peak)


def _rounds(jobs: Sequence[Job], count: int) -> list[float]:
    """Seconds of every job in every round."""
    kept: list[object] = [None] * len(jobs)  # so that outputs do not land in the same, cached place
    events = []
    for _ in range(count):
        for job in jobs:
            if job.prepare is not None:
                job.prepare()
        for place, job in enumerate(jobs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kept[place] = job.run()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _captured(jobs: Sequence[Job], stream: torch.cuda.Stream) -> Job:
    """All jobs as one graph, and what they need before as another. Replays keep the order of capture."""
    prepares = [job.prepare for job in jobs if job.prepare is not None]
    pool = torch.cuda.graph_pool_handle()

    def capture(steps: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            kept = [step() for step in steps]
        del kept
        return graph

    before = capture(prepares).replay if prepares else None
    return Job(capture([job.run for job in jobs]).replay, before)


def _peak_bytes(job: Job) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if job.prepare is not None:
        job.prepare()
    job.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, measured."""

    copy_gb_per_s: float
    """Bytes read and written by a copy on the device."""
    gemm_tflop_per_s: float
    """bf16 matrix product."""


def measure_ceilings(
    timer: Timer, device: torch.device, *, megabytes: int = 1024, side: int = 8192
) -> Ceilings:
    """Copy ``megabytes`` and multiply square matrices of this side."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timer([Job(lambda: target.copy_(source))], graph=False)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = timer([Job(lambda: a @ b)], graph=False)
    return Ceilings(
        copy_gb_per_s=2 * source.numel() / copied.median / 1e9,
        gemm_tflop_per_s=2 * side**3 / product.median / 1e12,
    )


def release() -> None:
    """Give the memory of what was measured back, compiled code included, before the next case."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_microseconds(timing: Timing) -> dict[str, Any]:
    """The part of a result's row that says how long it took."""
    return {
        "us": 1e6 * timing.median,
        "us_low": 1e6 * timing.low,
        "us_high": 1e6 * timing.high,
        "peak_bytes": timing.peak_bytes,
    }
