"""Start torchrun on this machine, follow it, and pass a wish to stop on to Megatron."""

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Literal

import psutil

from cca_megatron.training.command import Command, Rendezvous
from cca_megatron.training.device import Device

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL = 400
"""Lines kept to explain a failure."""


_TRAINING_BEGINS = "[before the start of training step]"
"""In Megatron's log; from here on its workers answer a signal with a checkpoint."""
_EMPTY_EXCEPTIONS = ("CheckpointException", "ChildFailedError")
"""Exceptions around the one that matters."""

_TRACEBACK = re.compile(r"((?:\[rank\d+\]: )?)Traceback \(most recent call last\):(?: \(RANK \d+\))?")

Outcome = Literal["finished", "saved", "stopped"]


class TrainingError(Exception):
    """The training processes ended with an error; the message has its essence."""


def run(
    command: Command,
    device: Device,
    log: Path | None,
    on_line: Callable[[str], None],
    say: Callable[[str], None],
    rendezvous: Rendezvous | None = None,
) -> Outcome:
    """Train, handing on every line of output.

    On the first Ctrl-C, SIGTERM or SIGHUP the workers are asked to save and exit (Megatron's
    ``--exit-signal-handler``), if they train already; on the second everything is stopped at once.

    Args:
        command: what to run.
        device: where it runs.
        log: file that gets all lines too; None keeps no log.
        on_line: called for each line, without its end.
        say: called with what the user should read at once.
        rendezvous: of several machines; a wish to stop that reaches one of them stops all.

    Returns:
        Whether it went to its end, or was stopped after saving a checkpoint, or without.

    Raises:
        TrainingError: the processes failed.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=_TAIL)
    process = subprocess.Popen(
        command.torchrun(rendezvous),
        env=_environment(command, device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # A session of its own: the terminal's Ctrl-C reaches us alone, and we decide.
        start_new_session=True,
    )
    saves = bool(command.args.exit_signal_handler and command.args.save)
    stopper = _Stopper(process, say, saves)
    stopper.trains = rendezvous is not None and rendezvous.node_rank > 0  # rank 0 alone says when
    previous = {s: signal.signal(s, stopper.handle) for s in _STOP_SIGNALS}
    try:
        assert process.stdout is not None
        with open(log or os.devnull, "a") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line.rstrip("\n"))
                stopper.trains |= _TRAINING_BEGINS in line
                on_line(tail[-1])
        status = process.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if process.poll() is None:
            stopper.kill()
    if stopper.killed:
        return "stopped"
    if status and not stopper.stopped:
        raise TrainingError(explain(list(tail), status))
    if status and saves:
        raise TrainingError(f"stopped without saving a checkpoint: {explain(list(tail), status)}")
    if not stopper.stopped:
        return "finished"
    return "saved" if saves else "stopped"


def _environment(command: Command, device: Device) -> dict[str, str]:
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    environment["CCA_DEVICE"] = device  # every worker decides as we did
    if device == "cpu":
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // command.recipe.launch.gpus_per_node)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


class _Stopper:
    def __init__(self, process: subprocess.Popen[str], say: Callable[[str], None], saves: bool):
        self._process = process
        self._say = say
        self._saves = saves
        self.trains = self.stopped = self.killed = False

    def handle(self, signum: int, frame: object) -> None:
        if self.stopped:
            self.kill()
            return
        self.stopped = True
        if not self.trains:
            self._tell("stopping: training has not begun, so there is nothing to save")
            self.kill()
            return
        what = "a checkpoint is saved after this step" if self._saves else "no checkpoint is saved"
        self._tell(f"stopping: {what}; once more stops at once")
        # torchrun would give its workers 30 seconds, so they are asked directly. Their own children are
        # left alone: Megatron saves through one of them.
        for worker in self._descendants(recursive=False):
            with suppress(psutil.NoSuchProcess):
                if "--module" not in worker.cmdline():
                    worker.send_signal(signal.SIGTERM)

    def _tell(self, text: str) -> None:
        # The signal may have come while this thread writes a line, and a stream cannot be entered twice.
        Thread(target=self._say, args=(text,)).start()

    def kill(self) -> None:
        self.killed = True
        for child in [*self._descendants(), psutil.Process(self._process.pid)]:
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def _descendants(self, recursive: bool = True) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=recursive)
        except psutil.NoSuchProcess:
            return []


def explain(lines: list[str], status: int) -> str:
    """The essence of a failed run's output: the first exception that says something."""
    found = list(_exceptions(lines))
    for text in found:
        if not text.split(":")[0].rpartition(".")[2].startswith(_EMPTY_EXCEPTIONS):
            return text
    for line in lines:
        if match := re.search(r"(Signal \d+ \(\w+\)) received", line):  # torchrun on a worker that crashed
            return f"a worker died of {match[1]}"
    if found:
        return found[0]
    return lines[-1] if lines else f"torchrun ended with status {status} and without output"


def _exceptions(lines: list[str]) -> Iterator[str]:
    """The last line of each traceback."""
    for number, line in enumerate(lines):
        begin = _TRACEBACK.fullmatch(line)
        if begin is None:
            continue
        prefix = begin[1]
        body = [other.removeprefix(prefix) for other in lines[number + 1 :]]
        for index, text in enumerate(body):
            if text and not text[0].isspace():
                source = [b.strip() for b in body[:index] if b.strip(" ~^")]
                # A bare assertion says nothing; the line of code that failed does.
                yield text if ":" in text or not source else f"{text}: {source[-1]}"
                break
