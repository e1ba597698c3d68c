"""One attention layer over context-parallel ranks: work of the busiest rank, bytes that are sent."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cca_megatron.bench.results import Event, Measured
from cca_megatron.bench.sizes import matched
from cca_megatron.parallel.rules import exchanged_kv_heads
from cca_megatron.plan.attention import Attention
from cca_megatron.plan.traffic import traffic

METHODS = ("MHA", "GQA", "CCA", "CCGQA")
"""Of :func:`cca_megatron.bench.sizes.matched` those whose bytes the planner tells by way of exchange."""
WAYS = ("p2p", "all_gather", "a2a")
_ELEMENT = 4
"""Bytes of a number: layers are in fp32."""


def ways(layer: Attention, ranks: int) -> tuple[str | None, ...]:
    """How so many ranks can exchange keys and values of this layer; None alone where one rank has all."""
    if ranks == 1:
        return (None,)
    shape = layer.traffic_shape(_ELEMENT)
    divides = exchanged_kv_heads(shape.query_heads, shape.kv_heads, ranks) is not None
    return tuple(way for way in WAYS if way != "a2a" or divides)


def planned_bytes(layer: Attention, tokens: int, ranks: int, comm_type: str | None) -> float:
    """Bytes that the rank that sends most sends, forward and backward, for a sequence of so many tokens."""
    # Of two ranks each sends the rows before one chunk; the chunks in the middle are on one rank.
    times = {"token": tokens // ranks, "chunk": min(ranks - 1, 2)}
    return sum(
        times[row.unit] * (row.forward + row.backward)
        for row in traffic(layer.traffic_shape(_ELEMENT), 1, ranks)
        if row.name.startswith(("context:", f"context, {comm_type}:"))
    )


def measure_context(
    sizes: Sequence[int],
    tokens: int,
    hidden: int,
    dim: int,
    rounds: int,
    device: str,
    started: Callable[[str], None] = lambda case: None,
) -> Iterator[Event]:
    """One row for each method, number of ranks and way of exchange.

    Args:
        sizes: numbers of ranks, the baseline first.
        tokens: of the sequence, over all ranks.
        hidden: the hidden size.
        dim: channels of a head.
        rounds: how often each is timed, after a warm-up.
        device: where the ranks run, "cpu" or "cuda".
        started: called with the name of each case as it begins.

    Raises:
        ValueError: the sizes do not fit.
        TrainingError: the ranks failed; the message has the first exception.
    """
    layers = matched("width", hidden, dim)
    for ranks in sizes:
        if tokens % (2 * ranks):
            raise ValueError(
                f"tokens={tokens} over {ranks} ranks: each has two chunks; tokens={2 * ranks * 512} works"
            )
    alone: dict[str, dict[str, Any]] = {}
    for ranks in sizes:
        started(f"{ranks} ranks")
        for row in _run(ranks, (tokens, hidden, dim, rounds), device):
            base = alone.setdefault(row["method"], row)
            planned = planned_bytes(layers[row["method"]], tokens, ranks, row["comm_type"])
            ratio = row["work_seconds"] / base["work_seconds"]
            yield Measured(
                row | {"hidden": hidden, "head_dim": dim, "planned_bytes": planned, "work_ratio": ratio}
            )


def _run(ranks: int, numbers: tuple[int, ...], device: str) -> list[dict[str, Any]]:
    from cca_megatron.training.launch import TrainingError, explain

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        worker = ["-m", "cca_megatron.bench.context_worker", *map(str, numbers), str(path)]
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *worker]
        with subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CCA_DEVICE": device},
        ) as process:
            try:
                output, _ = process.communicate()
            finally:
                process.terminate()  # torchrun takes its ranks along, where we are stopped
        if process.returncode:
            raise TrainingError(f"{ranks} ranks failed: {explain(output.splitlines(), process.returncode)}")
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows
