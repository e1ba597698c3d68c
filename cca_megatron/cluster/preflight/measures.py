"""What is measured on every node, and how slow is too slow."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measure:
    """A rate of every rank of a node; the slowest rank counts."""

    title: str
    unit: str
    least: float
    """Part of the median over all ranks of all nodes below which a GPU node is slow."""


INSIDE = {
    "gemm": Measure("GEMM", "TFLOP/s", 0.9),
    "copy": Measure("copy", "GB/s", 0.9),
    "host": Measure("host link", "GB/s", 0.8),
    "all_reduce": Measure("all-reduce", "GB/s", 0.85),
    "all_to_all": Measure("all-to-all", "GB/s", 0.85),
    "p2p": Measure("p2p", "GB/s", 0.85),
}
ACROSS = {"p2p_across": Measure("p2p across", "GB/s", 0.8)}
DISK = {"write": Measure("write", "GB/s", 0.3), "read": Measure("read", "GB/s", 0.3)}
MEASURES = INSIDE | ACROSS | DISK

CPU_LEAST = 0.3
"""The same where there are no GPUs: the ranks share cores with whatever else runs."""

FREE_GIB = {"output": 20.0, "temporary files": 2.0, "/dev/shm": 1.0}
"""Least free space: for checkpoints (one of an 8B model with optimizer takes over 100 GB: ``--free-gib``),
for caches of compiled kernels, and for NCCL and data loaders (a container's default is 64 MB)."""


@dataclass(frozen=True)
class Limits:
    """What the user asks for."""

    gpus: int | None = None
    """Of each node; None takes as many as the best node has."""
    least: float | None = None
    """Part of the median below which a node is slow, in place of each measure's own."""
    free_gib: dict[str, float] = field(default_factory=lambda: dict(FREE_GIB))


SKEW_SECONDS = 1.0
"""Clocks that differ by more make logs of different nodes useless together."""


@dataclass(frozen=True)
class GpuKind:
    """Peak rates of a data sheet: dense bf16 TFLOP/s, and GB/s; of links in one direction."""

    name: re.Pattern[str]
    """As nvidia-smi prints it."""
    tflops: float
    memory: float
    nvlink: float
    pcie: float

    def floors(self) -> dict[str, float]:
        """Least rates, below which something is broken and not just slower than its neighbours.

        Half of the data sheet's (of a copy, which reads and writes each byte, the sum of both). The half is
        chosen to lie below any healthy GPU and is no measurement.
        """
        inside = dict.fromkeys(("all_reduce", "all_to_all", "p2p"), self.nvlink / 2)
        return {"gemm": self.tflops / 2, "copy": self.memory / 2, "host": self.pcie / 2, **inside}


# NVIDIA's data sheets of the A100 (June 2021), H100, H200 and HGX B200. Collectives of few bytes do not reach
# the link's rate, so the exchange is one of large messages.
KINDS = (
    GpuKind(re.compile(r"A100-SXM4-40GB"), 312, 1555, 300, 32),
    GpuKind(re.compile(r"A100-SXM4-80GB"), 312, 2039, 300, 32),
    GpuKind(re.compile(r"H100 80GB HBM3"), 989, 3350, 450, 64),
    GpuKind(re.compile(r"H200$"), 989, 4800, 450, 64),
    GpuKind(re.compile(r"B200$"), 2250, 7700, 900, 64),
)


def floors(gpu_name: str | None) -> dict[str, float]:
    """Least rates of a kind of GPU by measure; none for a kind that is not known."""
    for kind in KINDS:
        if gpu_name is not None and kind.name.search(gpu_name):
            return kind.floors()
    return {}
