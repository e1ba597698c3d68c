"""Model FLOPs utilization (MFU): the throughput in the log as a share of what the GPU could do."""

import functools
import re
from collections.abc import Callable

from cca_megatron.plan.hardware import GPUS
from cca_megatron.training.tensorboard import write_scalars

_THROUGHPUT = re.compile(r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+) \|")
_CHIP = re.compile(r"\b(GH200|B200|H200|H100|A100)\b")

# Dense bf16 TFLOP/s of forms that run slower than the planner's, half of the sparse figures in NVIDIA's data
# sheets (H100 PCIe and NVL, H200 NVL).
_OTHER_FORMS = {"H100 PCIe": 756.0, "H100 NVL": 835.5, "H200 NVL": 835.5}


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU; None for one that is not known, and for a slice of one (MIG).

    Args:
        name: as ``torch.cuda.get_device_name`` gives it.
    """
    chip = _CHIP.search(name)
    if chip is None or "MIG" in name:
        return None
    form = next((form for form in ("NVL", "PCIe") if form in name), "")
    if peak := _OTHER_FORMS.get(f"{chip[1]} {form}"):
        return peak
    return GPUS[chip[1].removeprefix("G").lower()].peak / 1e12


def log_mfu() -> None:
    """Add the MFU to the throughput in Megatron's log, and to TensorBoard, on GPUs whose peak is known.

    Replaces ``print_rank_last`` in the module that trains; needs ``--log-throughput``. It is a share of the
    dense bf16 peak, in whatever precision the run computes.
    """
    from megatron.training import training

    training.print_rank_last = with_mfu(training.print_rank_last, _own_peak)


@functools.cache
def _own_peak() -> float | None:
    import torch

    return peak_tflops(torch.cuda.get_device_name())


def with_mfu(show: Callable[[str], None], peak: Callable[[], float | None]) -> Callable[[str], None]:
    """A function that shows lines as ``show`` does, with the MFU after the throughput if a line has one.

    Args:
        show: takes a line.
        peak: gives the peak in TFLOP/s, or None; asked when a line is shown, as this process may not have
            chosen its GPU before.
    """

    @functools.wraps(show)
    def show_with_mfu(line: str) -> None:
        match = _THROUGHPUT.search(line)
        if match is not None and (tflops := peak()) is not None:
            mfu = 100 * float(match[1]) / tflops
            line = f"{line[: match.end()]} MFU (% of {tflops:g} TFLOP/s): {mfu:.1f} |{line[match.end() :]}"
            _write(mfu)
        show(line)

    return show_with_mfu


def _write(mfu: float) -> None:
    from megatron.training import get_args

    write_scalars({"MFU (%)": mfu}, get_args().curr_iteration + 1)
