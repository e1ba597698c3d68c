"""What is installed here, and what each absence means."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    """``problem`` keeps training from working; ``absent`` only narrows what is possible."""
    detail: str


def examine() -> list[Finding]:
    """Look at everything that training can use."""
    return [
        _python(),
        _torch(),
        *_gpus(),
        _nccl(),
        _triton(),
        _megatron(),
        _transformer_engine(),
        _apex(),
        _optional("flash_attn", "flash-attn", "core attention uses Transformer Engine's or PyTorch's"),
        _optional("mpi4py", "mpi4py", "launching with mpirun needs it: pip install mpi4py"),
        _optional(
            "transformers",
            "transformers",
            "hf: tokenizers and ZAYA1 weights need it: pip install 'transformers>=5.23'",
        ),
        _compiler(),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional(module: str, distribution: str, without: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(distribution, "absent", without)
    return Finding(distribution, "ok", _version(distribution) or "installed")


def _python() -> Finding:
    return Finding("python", "ok", ".".join(map(str, sys.version_info[:3])))


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding("torch", "problem", f"cannot be imported ({error}). Run: pip install torch")
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Finding("torch", "ok", f"{torch.__version__}, {cuda}")


def _gpus() -> list[Finding]:
    try:
        import torch
    except Exception:
        return []
    if not torch.cuda.is_available():
        without = "training runs on the CPU backend, for development and tests"
        return [Finding("GPU", "absent", without)]
    return [
        Finding(
            f"GPU {index}",
            "ok",
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}",
        )
        for index in range(torch.cuda.device_count())
        for gpu in [torch.cuda.get_device_properties(index)]
    ]


def _nccl() -> Finding:
    try:
        import torch
        import torch.distributed

        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    except Exception as error:
        return Finding("NCCL", "absent", f"cannot be asked ({error}); collectives go through gloo")
    return Finding("NCCL", "absent", "not used without a GPU; collectives go through gloo")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("triton", "absent", "fused kernels need it; the PyTorch reference runs instead")
    version = _version("triton") or "installed"
    return Finding("triton", "ok", f"{version}; on a GPU the mix runs in fused kernels")


def _megatron() -> Finding:
    version = _version("megatron-core")
    if version is None:
        return Finding("megatron-core", "problem", "absent. Run: pip install 'megatron-core>=0.19,<0.20'")
    if not version.startswith("0.19."):
        detail = f"{version}; 0.19 is supported. Run: pip install 'megatron-core>=0.19,<0.20'"
        return Finding("megatron-core", "problem", detail)
    return _importable("megatron-core", "megatron.core", version)


def _importable(name: str, module: str, version: str) -> Finding:
    """Import in a process of its own: a broken package must not take the report with it."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import {module}"], capture_output=True, text=True
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(name, "problem", f"{version} is installed and cannot be imported: {last}")
    return Finding(name, "ok", version)


def _transformer_engine() -> Finding:
    name = "transformer-engine"
    if importlib.util.find_spec("transformer_engine") is None:
        without = "no FP8, no fused layers: the local backend is used"
        return Finding(name, "absent", f"{without}. pip install 'transformer-engine[pytorch]'")
    finding = _importable(name, "transformer_engine.pytorch", _version(name) or "")
    if finding.status == "problem":
        # Megatron tolerates a missing Transformer Engine, but not one that fails to import.
        hint = "Remove it (pip uninstall transformer-engine) or install one that fits this machine"
        return Finding(name, "problem", f"{finding.detail}. {hint}")
    return finding


def _apex() -> Finding:
    if importlib.util.find_spec("apex") is None:
        return Finding("apex", "absent", "Megatron falls back to Transformer Engine's or torch's optimizer")
    if importlib.util.find_spec("amp_C") is None:
        # The package called apex on PyPI is another project, and Megatron would trip over it.
        detail = "this is not NVIDIA's Apex but its namesake. Run: pip uninstall apex"
        return Finding("apex", "problem", detail)
    return Finding("apex", "ok", _version("apex") or "NVIDIA's")


def missing_build_tools() -> list[str]:
    """What Megatron needs, beside torch, to compile the helper of its selective recomputation."""
    return [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]


def _compiler() -> Finding:
    missing = missing_build_tools()
    if missing:
        without = f"{' and '.join(missing)} not found; recompute_mix compiles a helper with it"
        return Finding("compiler", "absent", without)
    return Finding("compiler", "ok", "c++ and ninja")
