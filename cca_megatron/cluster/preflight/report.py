"""What is known of a node, and the files by which nodes tell each other."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cca_megatron.cluster.preflight.gpus import Gpu

Rates = dict[str, list[float]]
"""By measure, one of each rank."""


@dataclass
class NodeReport:
    """What a node found out about itself."""

    node: str
    address: str = ""
    """By which other nodes reach it."""
    port: int = 0
    """Free there for the length of the check."""
    gpus: list[Gpu] = field(default_factory=list)
    under_load: list[Gpu] = field(default_factory=list)
    """The same GPUs while they multiply matrices."""
    processes: list[str] = field(default_factory=list)
    """That compute on its GPUs."""
    versions: dict[str, str] = field(default_factory=dict)
    free_gib: dict[str, float] = field(default_factory=dict)
    """Free space by what it is for, in GiB."""
    rates: Rates = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What could not be found out, and why."""

    @property
    def local_size(self) -> int:
        """Ranks that measure on this node."""
        return len(self.gpus) or 2

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "NodeReport":
        """The report that :func:`dataclasses.asdict` made a dictionary of."""
        lists = {name: [Gpu(**gpu) for gpu in content[name]] for name in ("gpus", "under_load")}
        return cls(**(content | lists))


@dataclass
class ExchangeReport:
    """What the ranks of one node found in an exchange with other nodes."""

    node: str
    partners: list[str]
    rates: Rates
    skew: float | None
    """Seconds by which its clock is ahead of the first partner's."""
    problems: list[str]


def write_json(file: Path, content: object) -> None:
    """Write a file that others only ever see whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content if isinstance(content, dict) else asdict(content), indent=1))  # type: ignore[call-overload]
    part.replace(file)


def read_json(file: Path) -> Any:
    """A file that another node may write, or None as long as it is not there."""
    try:
        # Asking for the file itself could be answered from NFS's memory of its absence.
        if file.name in os.listdir(file.parent):
            return json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def wait_for(files: dict[str, Path], seconds: float, say: Callable[[int, int], None]) -> dict[str, Any]:
    """Contents by name of the files that are there within this time.

    Args:
        files: by name.
        seconds: to wait at most.
        say: told how many are there, and of how many.
    """
    found: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    while True:
        for name, file in files.items():
            if name not in found and (content := read_json(file)) is not None:
                found[name] = content
        say(len(found), len(files))
        if len(found) == len(files) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
