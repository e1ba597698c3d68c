"""Which device this process trains on. Imported before Megatron, so it imports nothing of it."""

import os
from typing import Literal

Device = Literal["cpu", "cuda"]


def select_device() -> Device:
    """``CCA_DEVICE`` if set, otherwise a GPU where there is one.

    Raises:
        ValueError: ``CCA_DEVICE`` is neither "cpu" nor "cuda", or asks for a GPU that is not there.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    choice = os.environ.get("CCA_DEVICE")
    if choice is None:
        return "cuda" if has_gpu else "cpu"
    if choice == "cpu":
        return "cpu"
    if choice == "cuda":
        if not has_gpu:
            raise ValueError("CCA_DEVICE=cuda: PyTorch sees no GPU here; CCA_DEVICE=cpu works")
        return "cuda"
    raise ValueError(f"CCA_DEVICE={choice}: must be cpu or cuda; unset it to choose by itself")


def describe(device: Device) -> str:
    """The line in the log that says what was chosen and why."""
    if device == "cuda":
        return "device: cuda (NCCL)"
    reason = "CCA_DEVICE=cpu" if os.environ.get("CCA_DEVICE") else "no GPU found"
    return f"device: cpu ({reason}): Megatron's training loop runs on the CPU backend with gloo"


def choose_connections(uses_fsdp: bool) -> None:
    """Set ``CUDA_DEVICE_MAX_CONNECTIONS`` as Megatron asks for it, unless the user has.

    Before Blackwell it is 1 with tensor or context parallelism, so that communication starts in the order
    of the calls; fully sharded data parallelism must not have 1.
    """
    if not uses_fsdp:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
