"""Why a worker ended: its exit code and last words, as one of a few kinds of failure.

The exit codes 16 and 17 are those of Megatron's ``core/rerun_state_machine.py``.
"""

import re
import signal
from dataclasses import dataclass
from typing import Literal

from cca_megatron.cluster.logs import Raised

FailureKind = Literal[
    "out of memory",
    "NaN",
    "data",
    "network",
    "node lost",
    "time limit",
    "hang",
    "checkpoint",
    "killed",
    "GPU",
    "transient fault",
    "result validation",
    "settings",
    "program",
]

_EXIT_CODES: dict[int, tuple[FailureKind, str]] = {
    16: ("transient fault", "Megatron asks to repeat an iteration elsewhere"),
    17: ("result validation", "Megatron's validation of results failed"),
}
_BAD_USAGE = 2
"""argparse's exit code."""
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
"""Signals that a process does not send itself; SIGTERM is how others are ended after the first failure."""

_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|\bout of memory\b|\bMemoryError\b|CUBLAS_STATUS_ALLOC_FAILED|allocate memory", re.I
)
_GPU = re.compile(
    r"uncorrectable ECC|fallen off the bus|unspecified launch failure|\bXid\b|NVLink error"
    r"|no CUDA-capable device|devices? (?:is|are) busy or unavailable|system not yet initialized"
)
_NAN = re.compile(
    r"Unexpected result \S+ \(message=|Detected NaN or Inf|returned nan values|\bfound (?:NaN|Inf) in\b"
)
_WORKER_KILLED = re.compile(r"DataLoader worker .*(?:killed by signal|exited unexpectedly)")
_TIMEOUT = re.compile(
    r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|watchdog got stuck", re.I
)
_CONNECTION = re.compile(
    r"Connection (?:was )?(?:closed|reset|refused)|Broken pipe|ncclRemoteError|ncclSystemError"
    r"|unhandled system|remote process exited|ncclInternalError|watchdog thread terminated"
    r"|communicator was aborted"
    r"|DistNetworkError|DistStoreError|Rendezvous\w*Error|(?:Socket|wait|Store) timeout|recvValue failed"
    r"|sendBytes failed|got 0 bytes|pair closure|client socket has|connectFullMesh|SignalException"
    r"|Address already in use|Network is unreachable|No route to host",
    re.I,
)
"""What the ranks say that waited for one that is gone, and what a network says that is broken."""

_SETTINGS_TEXT = re.compile(r"CCA cannot run with these settings|\.py: error: |RecipeError")
_DATA_TEXT = re.compile(r"\bDataError\b|\S\.(?:bin|idx)\b")
_FILES: tuple[tuple[FailureKind, re.Pattern[str]], ...] = (
    (
        "checkpoint",
        re.compile(
            r"core/dist_checkpointing/|torch/distributed/checkpoint/|training/checkpointing\.py"
            r"|cca_megatron/training/checkpoint\.py"
        ),
    ),
    (
        "data",
        re.compile(
            r"megatron/core/datasets/|megatron/training/datasets/|torch/utils/data/|cca_megatron/data/"
        ),
    ),
    (
        "settings",
        re.compile(
            r"megatron/training/arguments\.py|core/transformer/transformer_config\.py"
            r"|core/model_parallel_config\.py|cca_megatron/config\.py|cca_megatron/parallel/rules\.py"
            r"|cca_megatron/training/argument_rules\.py|cca_megatron/zaya/settings\.py"
        ),
    ),
)
"""Files that an exception passed through, and what that makes of it."""

_FATAL = re.compile(
    r"Fatal Python error: .+|terminate called after .+|\s+what\(\): .+|.*Watchdog caught .+"
    r"|.*watchdog got stuck.+"
)


@dataclass(frozen=True)
class Verdict:
    """What an ending means."""

    kind: FailureKind
    text: str
    is_consequence: bool = False
    """Whether it can follow from the failure of another rank; the kind is for the case that it does not."""


def judge(exit_code: int, raised: Raised | None, last_lines: list[str]) -> Verdict:
    """Why a worker ended.

    Args:
        exit_code: its exit code; minus the signal that ended it.
        raised: the exception that ended it, if it left one.
        last_lines: of its output.
    """
    if exit_code in _EXIT_CODES:
        return Verdict(*_EXIT_CODES[exit_code])
    # A signal leaves no time for words: what a log then holds is an exception that was caught long before,
    # unless PyTorch says that it ended the process, which hung on its way out.
    if raised is not None and (exit_code >= 0 or raised.rank is not None):
        return _of_exception(raised)
    if -exit_code in _FROM_OUTSIDE:
        return Verdict("killed", f"killed by {_name(exit_code)}")
    if exit_code >= 0:
        return _of_last_words(exit_code, last_lines)
    fatal = [line.strip() for line in last_lines if _FATAL.fullmatch(line)]
    text = f"ended by {_name(exit_code)}"
    if fatal:
        text += f": {next((line for line in fatal if line.startswith('what():')), fatal[0])}"
    waiting = _while_waiting("\n".join(fatal))
    if waiting is not None:
        return Verdict(waiting, text, is_consequence=True)
    if -exit_code == signal.SIGTERM:
        return Verdict("killed", text, is_consequence=True)
    return Verdict(_of_text(text) or "program", text)


def _name(exit_code: int) -> str:
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def _of_exception(raised: Raised) -> Verdict:
    text = raised.text
    if raised.last_frames:
        frame = raised.last_frames[-1]
        text += f"\n  in {frame.function}, {frame.file}:{frame.line}"
    if kind := _of_text("\n".join(raised.texts)):
        return Verdict(kind, text)
    waiting = _while_waiting(raised.root)
    if waiting is not None:
        return Verdict(waiting, text, is_consequence=True)
    if _SETTINGS_TEXT.search(raised.text):
        return Verdict("settings", text)
    for kind, files in _FILES:
        if any(files.search(frame.file) for frame in raised.frames):
            return Verdict(kind, text)
    return Verdict("data" if _DATA_TEXT.search(raised.text) else "program", text)


def _while_waiting(text: str) -> FailureKind | None:
    """What it would be if no other rank had failed, of the words of one that waited for others."""
    if _TIMEOUT.search(text):
        return "hang"
    return "network" if _CONNECTION.search(text) else None


def _of_text(text: str) -> FailureKind | None:
    """The kinds that are told by their words alone."""
    if _WORKER_KILLED.search(text):
        return "killed"
    if _OUT_OF_MEMORY.search(text):
        return "out of memory"
    if _GPU.search(text):
        return "GPU"
    return "NaN" if _NAN.search(text) else None


def _of_last_words(exit_code: int, last_lines: list[str]) -> Verdict:
    said = [line.strip() for line in last_lines if line.strip()]
    text = f"ended with exit code {exit_code}" + (f": {said[-1]}" if said else " and without a word")
    return Verdict("settings" if exit_code == _BAD_USAGE else "program", text)
