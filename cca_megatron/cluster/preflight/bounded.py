"""Programs that may hang without taking us with them."""

import subprocess
import time
from collections.abc import Sequence


def output_of(command: Sequence[str], seconds: float) -> str:
    """What a program prints.

    A process that hangs in a driver cannot be killed, so after the time it is left behind.

    Raises:
        RuntimeError: it fails, or does not end in this time.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"{command[0]} did not end within {seconds:.0f} s") from None
    if process.returncode:
        last = (errors or output).strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{command[0]} failed with status {process.returncode}: {last[0]}")
    return output


def wait_all(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for processes; what still runs after this time is killed and left behind."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.kill()
