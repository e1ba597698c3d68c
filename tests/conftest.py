"""Put this process on the CPU backend before Megatron is imported, where there is no GPU."""

import os
import sys
from pathlib import Path

import hypothesis

from cca_megatron.training.device import select_device

if select_device() == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined: they run on a CPU, to be tested
    from cca_megatron.training import cpu_backend

    cpu_backend.install()
    os.environ["CCA_DEVICE"] = "cpu"  # from here on PyTorch seems to have a GPU

# Programs of the environment (ninja) are found as if it were activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# The same examples in every run, so that a test passes or fails for its code alone; on a loaded machine an
# example may take its time.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")
