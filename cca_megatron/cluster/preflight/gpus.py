"""What nvidia-smi says about the GPUs of this machine."""

import csv
import io
import shutil
from dataclasses import dataclass

from cca_megatron.cluster.preflight.bounded import output_of

_FIELDS = (
    "index,name,uuid,driver_version,ecc.mode.current,ecc.errors.uncorrected.volatile.total,"
    "clocks.current.sm,clocks.max.sm,clocks_event_reasons.active,pcie.link.width.current,pcie.link.width.max"
)
_SECONDS = 60

# Bits of nvmlClocksEventReasons (NVML API reference) for what a healthy GPU does not show, even under load.
_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Gpu:
    """One line of ``nvidia-smi --query-gpu``; None for what the GPU does not have ("[N/A]")."""

    index: int
    name: str
    uuid: str
    driver: str
    ecc: str | None
    """"Enabled" or "Disabled"."""
    uncorrected_errors: int | None
    """ECC errors since the driver was loaded that could not be corrected."""
    clock: int | None
    """Of the multiprocessors, in MHz."""
    max_clock: int | None
    clock_reasons: int
    pcie_width: int | None
    """Lanes."""
    max_pcie_width: int | None

    @property
    def slowdowns(self) -> list[str]:
        """What holds the clock down now, beyond power limits and idleness."""
        return [text for bit, text in _SLOWDOWNS.items() if self.clock_reasons & bit]


def query() -> list[Gpu]:
    """The GPUs of this machine; none where there is no nvidia-smi.

    Raises:
        RuntimeError: nvidia-smi fails, or does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    return parse(
        output_of(["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"], _SECONDS)
    )


def parse(text: str) -> list[Gpu]:
    """GPUs from the CSV of ``nvidia-smi --query-gpu`` with the fields asked for here, no header, no units."""
    return [_gpu(row) for row in csv.reader(io.StringIO(text), skipinitialspace=True) if row]


def _gpu(row: list[str]) -> Gpu:
    index, name, uuid, driver, ecc, errors, clock, max_clock, reasons, width, max_width = row
    return Gpu(
        index=int(index),
        name=name,
        uuid=uuid,
        driver=driver,
        ecc=None if _is_absent(ecc) else ecc,
        uncorrected_errors=_number(errors),
        clock=_number(clock),
        max_clock=_number(max_clock),
        clock_reasons=0 if _is_absent(reasons) else int(reasons, 16),
        pcie_width=_number(width),
        max_pcie_width=_number(max_width),
    )


def _is_absent(text: str) -> bool:
    return text.startswith("[")  # [N/A], [Not Supported], [Unknown Error]


def _number(text: str) -> int | None:
    return None if _is_absent(text) else int(text)


def processes() -> list[str]:
    """Programs that compute on the GPUs now, one line each.

    Raises:
        RuntimeError: nvidia-smi fails, or does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    return parse_processes(output_of(query, _SECONDS))


def parse_processes(text: str) -> list[str]:
    """Processes from the CSV of ``nvidia-smi --query-compute-apps=pid,process_name,used_memory``."""
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    return [f"process {row[0]} ({row[1]}, {row[2]})" for row in rows if row]
