"""What a result must name: on what, with what and when it was measured."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from cca_megatron.bench.results import CPU_FIGURES

_VARIABLES = ("CCA_KERNELS", "CCA_KERNELS_TUNE")
_ROOT = Path(__file__).parents[2]


def facts() -> dict[str, str | None]:
    """Device, driver, versions, commit, date and command; None for what is absent or cannot be found out.

    Where there is no GPU, the CPU, how busy it was, and what its figures are good for. It has to be called
    before the CPU backend pretends that there is a GPU.
    """
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu(),
        "load": None if cuda else f"{os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores",
        "figures": None if cuda else CPU_FIGURES,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cudnn": str(torch.backends.cudnn.version()) if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformer-engine": _version("transformer-engine"),
        "megatron-core": _version("megatron-core"),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": _command(),
    }


def _cpu() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return str(names[0]) if names else platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line of what a program prints; None if it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip().partition("\n")[0]


def _commit() -> str | None:
    """Of the repository that this code is in, with "+changes" if its code is not as committed."""
    if _output("git", "ls-files", "--error-unmatch", __file__) is None:  # installed below another repository
        return None
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--", "cca_megatron", "kernels", "pyproject.toml")
    return f"{commit}+changes" if commit and changes else commit


def _command() -> str:
    """With the variables that choose kernels and tiles."""
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return shlex.join([*variables, "cca-megatron", *sys.argv[1:]])
