"""Peak memory of a Python program in a process of its own, and what a result file says of where it ran."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def peak_bytes(*words: str) -> tuple[int, str]:
    """Run ``python WORDS``: the peak of its resident memory, as the operating system counts it; its output.

    Raises:
        SystemExit: the program failed.
    """
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(words)} failed:\n{output[-4000:]}")
    return 1024 * usage.ru_maxrss, output


class PeakBytes:
    """Peak of this process's resident memory from here on, beside what it holds here; Linux only."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
        self._before = self._peak()

    def beside(self) -> int:
        """Bytes until now."""
        return self._peak() - self._before

    @staticmethod
    def _peak() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        return 1024 * int(line.split()[1])


def facts() -> dict[str, Any]:
    """Machine, versions, date and command."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
