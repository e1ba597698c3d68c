"""Result files: one for each run of a command, under ``benchmarks/results``."""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path("benchmarks/results")
CPU_FIGURES = "CPU: figures compare within one run only, as ratios; they say nothing about a GPU"
"""What results of a machine without a GPU are labelled with, in their files and wherever they are shown."""


@dataclass(frozen=True)
class Checked:
    """How far a variant is from the reference in fp64."""

    shape: str
    variant: str
    tokens: int
    errors: dict[str, float]
    problems: list[str]
    """What keeps it from being timed; empty if it passed."""


@dataclass(frozen=True)
class Measured:
    """One figure with what it is of."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A case without a figure: its check failed, or it raised."""

    case: dict[str, Any]
    problem: str


Event = Checked | Measured | Refused


def describe(event: Event) -> str:
    """One line for the terminal."""
    match event:
        case Checked(shape, variant, tokens, errors, problems):
            verdict = "; ".join(problems) or f"largest relative error {max(errors.values()):.1e}"
            return f"{shape} {variant}: checked at {tokens:,} tokens, {verdict}"
        case Refused(case, problem):
            return f"{_name(case)}: no speed; {problem}"
        case Measured(row):
            how = "graph" if row["cuda_graph"] else "no graph"
            part = "" if row.get("part", "block") == "block" else " core"
            line = f"{_name(row)}{part} {row['pass']}, {how}: {row['us']:,.1f} us "
            line += f"({row['us_low']:,.1f} to {row['us_high']:,.1f}), {row['peak_bytes'] / 2**20:,.0f} MiB"
            if "gb_per_s" in row:
                line += f", {row['gb_per_s']:,.0f} GB/s ({row['of_copy']:.0%} of a copy)"
                line += f", {row['tflop_per_s']:,.0f} TFLOP/s ({row['of_gemm']:.0%} of a matrix product)"
            return line


def label(row: dict[str, Any]) -> str:
    """Shape or method, and variant if it has several."""
    return " ".join(filter(None, [row.get("shape") or row.get("method"), row["variant"]]))


def _name(row: dict[str, Any]) -> str:
    return f"{label(row)} {row['tokens']:,} tokens"


@dataclass
class Result:
    """What one command found on one machine."""

    benchmark: str
    machine: dict[str, str | None]
    ceilings: dict[str, float] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Put it where it belongs."""
        match event:
            case Checked():
                self.checks.append(asdict(event))
            case Measured(row):
                self.rows.append(row)
            case Refused(case, problem):
                self.refused.append(case | {"problem": problem})

    def write(self, folder: Path) -> Path:
        """Store it under the names of command and device and the date, down to the second."""
        path = folder / f"{self.benchmark}-{slug(self.machine['device'])}-{slug(self.machine['date'])}.json"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
        return path


def is_of_cpu(machine: dict[str, str | None]) -> bool:
    """Whether the figures are of a CPU, and so ratios alone."""
    return machine.get("figures") == CPU_FIGURES


def slug(text: str | None) -> str:
    """The text as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", (text or "none").lower()).strip("-")


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every result in the folder, the oldest first.

    Raises:
        ValueError: a file is no result; the message names it.
    """
    return sorted(map(_read, sorted(folder.glob("*.json"))), key=lambda result: result["machine"]["date"])


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        missing = {"benchmark", "machine", "rows", "refused"} - result.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no result of cca-megatron bench: {error}") from error
    if missing:
        raise ValueError(f"{path} is no result of cca-megatron bench: it has no {', '.join(sorted(missing))}")
    return result


def newest(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last result with rows of each command and device."""
    last = {(r["benchmark"], r["machine"]["device"]): r for r in results if r["rows"]}
    return list(last.values())
