"""Versions that all nodes must have alike; ``python -m cca_megatron.cluster.preflight.versions``."""

import importlib.metadata
import json
import os
import platform

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "cca-megatron")


def versions() -> dict[str, str]:
    """By name; "absent" for a package that is not installed."""
    import torch

    found = {"python": platform.python_version(), "kernel": os.uname().release}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found["CUDA of torch"] = torch.version.cuda or "absent"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


if __name__ == "__main__":
    print(json.dumps(versions()))
