"""What a node finds out about itself, and its part in exchanges with others."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cca_megatron.cluster.preflight import gpus
from cca_megatron.cluster.preflight.bounded import output_of, wait_all
from cca_megatron.cluster.preflight.gpus import Gpu
from cca_megatron.cluster.preflight.measures import INSIDE
from cca_megatron.cluster.preflight.report import ExchangeReport, NodeReport, Rates, read_json

_DISK_BYTES, _CHUNK = 128 << 20, 16 << 20
_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Exchange:
    """Some nodes, whose ranks measure together."""

    nodes: list[str]
    address: str
    """Of the first."""
    port: int
    local_size: int

    @classmethod
    def among(cls, reports: list[NodeReport]) -> "Exchange":
        """The nodes of these reports, with as many ranks on each as all of them have."""
        first = reports[0]
        size = min(report.local_size for report in reports)
        return cls([report.node for report in reports], first.address, first.port, size)


def examine(node: str, address: str, port: int, folder: Path, seconds: float) -> NodeReport:
    """Everything about this node that does not need another one.

    Args:
        node: its name.
        address: by which other nodes reach it.
        port: free here.
        folder: on the shared file system, where nodes write.
        seconds: for the measurements; what takes longer is given up.
    """
    report = NodeReport(node, address, port)

    def attempt(name: str, find_out: Callable[[], Any]) -> None:
        try:
            setattr(report, name, find_out())
        except (RuntimeError, OSError, ValueError) as error:
            report.problems.append(str(error))

    attempt("gpus", gpus.query)
    attempt("processes", gpus.processes)
    attempt("versions", lambda: _versions(seconds) | _driver(report.gpus))
    attempt("free_gib", lambda: _free(folder))
    own = Exchange([node], "127.0.0.1", port, report.local_size)
    results, problems = _run_ranks("inside", own, node, folder / "inside", seconds)
    report.rates = _rates(results, list(INSIDE))
    report.under_load = [Gpu(**gpu) for result in results for gpu in result.get("under_load", [])]
    report.problems += problems
    try:
        report.rates |= disk_rates(folder / f"{node}.probe")
    except OSError as error:
        report.problems.append(f"cannot write to the shared folder: {error}")
    return report


def take_part(exchange: Exchange, node: str, folder: Path, seconds: float) -> ExchangeReport:
    """Measure with other nodes.

    Args:
        exchange: who measures.
        node: this one.
        folder: for the results of its ranks.
        seconds: after which it is given up.
    """
    results, problems = _run_ranks("across", exchange, node, folder, seconds)
    skews = [result["skew"] for result in results if "skew" in result]
    partners = [other for other in exchange.nodes if other != node]
    rates = _rates(results, ["all_reduce", "all_to_all", "p2p"])
    return ExchangeReport(node, partners, rates, skews[0] if skews else None, problems)


def _run_ranks(
    where: str, exchange: Exchange, node: str, folder: Path, seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Results of this node's ranks, as far as they came, and what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    size = exchange.local_size
    outer = {k: v for k, v in os.environ.items() if not k.startswith(_SET_BY_LAUNCHERS)}
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    processes, files, logs = [], [], []
    for local_rank in range(size):
        variables = {
            "RANK": exchange.nodes.index(node) * size + local_rank,
            "WORLD_SIZE": len(exchange.nodes) * size,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": exchange.address,
            "MASTER_PORT": exchange.port,
        }
        name = f"{node}-{local_rank}"
        files.append(folder / f"{name}.json")
        logs.append(folder / f"{name}.log")
        with logs[-1].open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cca_megatron.cluster.preflight.rank", where, str(files[-1])],
                    env={"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", **outer}
                    | {key: str(value) for key, value in variables.items()},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    begun = time.monotonic()
    wait_all(processes, seconds)
    results = [read_json(file) or {} for file in files]
    problems = []
    for local_rank, (result, log) in enumerate(zip(results, logs, strict=True)):
        if "ended" not in result:
            last = next(reversed(result), "its start")
            text = log.read_text(errors="replace").strip().splitlines()
            after = f"{text[-1].strip()}" if text else f"nothing for {time.monotonic() - begun:.0f} s"
            problems.append(f"{where}: rank {local_rank} did not get beyond {last}: {after}")
    return results, problems


def _rates(results: list[dict[str, Any]], names: list[str]) -> Rates:
    return {
        name: [result[name] for result in results if name in result]
        for name in names
        if any(name in result for result in results)
    }


def _versions(seconds: float) -> dict[str, str]:
    """Of what all nodes must have alike; in a process of its own, as importing may hang or fail."""
    command = [sys.executable, "-W", "ignore", "-m", "cca_megatron.cluster.preflight.versions"]
    return json.loads(output_of(command, seconds))


def _driver(found: list[Gpu]) -> dict[str, str]:
    return {"driver": found[0].driver, "GPU": found[0].name} if found else {}


def _free(folder: Path) -> dict[str, float]:
    places: dict[str, str | Path] = {
        "output": folder,
        "temporary files": tempfile.gettempdir(),
        "/dev/shm": "/dev/shm",
    }
    return {name: shutil.disk_usage(place).free / 2**30 for name, place in places.items()}


def disk_rates(file: Path, size: int = _DISK_BYTES) -> Rates:
    """GB/s of writing a file to the disk, and of reading it back from there; removes it."""
    chunk = os.urandom(min(_CHUNK, size))
    try:
        with file.open("wb", buffering=0) as target:
            begun = time.perf_counter()
            for _ in range(size // len(chunk)):
                target.write(chunk)
            os.fsync(target.fileno())
            written = size / (time.perf_counter() - begun) / 1e9
        with file.open("rb", buffering=0) as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would answer
            begun = time.perf_counter()
            while source.read(_CHUNK):
                pass
            read = size / (time.perf_counter() - begun) / 1e9
    finally:
        file.unlink(missing_ok=True)
    return {"write": [written], "read": [read]}
