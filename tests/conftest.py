"""Put this process on the CPU backend before Megatron is imported, where there is no GPU."""

import os

from cca_megatron.training.device import select_device

if select_device() == "cpu":
    from cca_megatron.training import cpu_backend

    cpu_backend.install()
    os.environ["CCA_DEVICE"] = "cpu"  # from here on PyTorch seems to have a GPU
