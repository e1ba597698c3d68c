"""Signs of life: each rank counts its forward passes in a file, where its node's agent looks for them."""

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "CCA_HEARTBEATS"
"""Environment variable with the folder, on the node's own disk; without it nothing is written."""
_FORMAT = struct.Struct("<qd")


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a rank."""

    count: int
    """Forward passes so far."""
    time: float
    """Seconds since 1970."""


class _Heart:
    def __init__(self, folder: str):
        self._file = os.open(Path(folder) / os.environ.get("RANK", "0"), os.O_WRONLY | os.O_CREAT, 0o644)
        self._count = 0

    def beat(self) -> None:
        self._count += 1
        os.pwrite(self._file, _FORMAT.pack(self._count, time.time()), 0)


_heart: _Heart | None = None


def beat() -> None:
    """Give a sign of life: a write of 16 bytes, if an agent asked for it."""
    global _heart
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return
    if _heart is None:
        _heart = _Heart(folder)
    _heart.beat()


def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """The last sign of life of every rank that gave one."""
    beats = {}
    for file in folder.glob("*"):
        try:
            content = file.read_bytes()
        except FileNotFoundError:  # its agent has just ended
            continue
        if len(content) == _FORMAT.size:
            beats[int(file.name)] = Heartbeat(*_FORMAT.unpack(content))
    return beats
