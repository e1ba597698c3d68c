"""The agent of one node: runs torchrun for the node's ranks, watches them, and writes down what it saw.

The job script starts one on every node::

    srun --ntasks-per-node=1 python -m cca_megatron.cluster.node RUN/logs/job-1/attempt-1

torchrun does not restart anything here: what follows a failure is decided for the whole job, in one place
(:mod:`cca_megatron.cluster.job`). Where nvidia-resiliency-ext is installed its launcher takes torchrun's
place: Megatron then tells it the sections of each step, and it learns how long each takes.
"""

import importlib
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cca_megatron.cluster.run_directory import Attempt, RunDirectory, run_of, write_json
from cca_megatron.training.command import MODULE
from cca_megatron.training.heartbeat import FOLDER_VARIABLE, read_heartbeats
from cca_megatron.training.recipe import load_recipe

SAVE_SIGNAL = signal.SIGUSR1
"""Asks for a checkpoint and an end. torchrun would forward SIGTERM alone, and kill its workers after 30 s."""
_SECONDS_TO_REPORT = 3
"""A failed node lets the others write down their part before srun ends them."""
_WATCH_SECONDS = 1
_REPORTING = ("--enable-ft-package", "--calc-ft-timeouts")
"""With these Megatron reports to nvidia-resiliency-ext."""


def main(attempt_folder: Path) -> int:
    """Run this node's part of an attempt; returns the exit status."""
    # Before anything starts: every process of the step gets the signal, and those that inherit the mask
    # do not die of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {SAVE_SIGNAL})
    run, job_id = run_of(attempt_folder)
    attempt = Attempt.read(attempt_folder / "attempt.json")
    if attempt is None:
        raise SystemExit(f"error: {attempt_folder}: has no attempt.json; the job script makes it")
    record = _NodeRecord(attempt_folder)
    threading.Thread(target=_save_when_asked, daemon=True).start()
    status = _torchrun(run, job_id, attempt, record)
    if record.end != "finished":
        time.sleep(_SECONDS_TO_REPORT)
    return status


class _NodeRecord:
    """``node.json`` of this node."""

    def __init__(self, attempt_folder: Path):
        self.name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.folder = attempt_folder / self.name
        self.heartbeats = Path(tempfile.mkdtemp(prefix="cca-heartbeats-"))
        self.begun = time.time()
        self.end: str | None = None
        self.hung = False
        self._failures: list[dict[str, Any]] = []
        self._lock = threading.Lock()  # the thread that watches writes too
        self.write()

    def close(self, end: str, failures: list[dict[str, Any]] | None = None) -> None:
        with self._lock:
            self.end, self._failures = ("hung" if self.hung else end), failures or []
            self._write()
            shutil.rmtree(self.heartbeats, ignore_errors=True)

    def write(self) -> None:
        """Bring it up to date; what :meth:`close` wrote stays."""
        with self._lock:
            if self.end is None:
                self._write()

    def _write(self) -> None:
        ranks = sorted(_rank(log) for log in self.folder.glob("rank-*.out"))
        write_json(
            self.folder / "node.json",
            {
                "node": self.name,
                "begun": self.begun,
                "ended": time.time() if self.end else None,
                "end": self.end,
                "ranks": ranks,
                "failures": self._failures,
                "heartbeats": {
                    str(rank): {"count": beat.count, "time": beat.time}
                    for rank, beat in read_heartbeats(self.heartbeats).items()
                },
            },
        )


def _torchrun(run: RunDirectory, job_id: str, attempt: Attempt, record: _NodeRecord) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launch = load_recipe(run.recipe, []).launch
    threading.Thread(target=_watch, args=(record, 60 * launch.hang_minutes), daemon=True).start()
    os.environ[FOLDER_VARIABLE] = str(record.heartbeats)
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a hung worker shows where it is when it is ended
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    options = [
        f"--nnodes={len(attempt.nodes)}",
        f"--nproc-per-node={launch.gpus_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={attempt.nodes[0]}:{_port(job_id, attempt.restart, attempt.attempt)}",
        f"--rdzv-id={job_id}-{attempt.attempt}",
        f"--local-addr={record.name}",
        "--max-restarts=0",
        f"--log-dir={record.folder}",
        "--logs-specs=cca_ranks",
        "--module",
    ]
    arguments = run.arguments.read_text().splitlines()
    launcher = importlib.import_module("torch.distributed.run")
    if importlib.util.find_spec("nvidia_resiliency_ext") is not None and "--save" in arguments:
        launcher = importlib.import_module("nvidia_resiliency_ext.fault_tolerance.launcher")
        limit = 60 * launch.hang_minutes
        options[:0] = [
            f"--ft-rank-section-timeouts=setup:{2 * limit},step:{limit},checkpointing:{limit}",
            f"--ft-rank-out-of-section-timeout={limit}",
        ]
        arguments += [option for option in _REPORTING if option not in arguments]
    try:
        launcher.run(launcher.parse_args([*options, MODULE, *arguments]))
    except ChildFailedError as error:
        record.close("failed", [_failure(rank, failure) for rank, failure in error.failures.items()])
        return 1
    except SignalException as error:
        record.close("stopped")
        return 128 + error.sigval
    except Exception as error:  # the rendezvous, or the launcher itself
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

        # nvidia-resiliency-ext's launcher does not say which ranks failed; their error files do.
        files = sorted(record.folder.glob("rank-*.error.json"))
        failures = [_failure(_rank(file), ProcessFailure(-1, 0, 1, str(file))) for file in files]
        message = f"{launcher.__name__}: {type(error).__name__}: {error}"
        print(message, file=sys.stderr)
        itself = {"rank": None, "local_rank": None, "pid": os.getpid(), "exit_code": 1}
        record.close("failed", failures or [{**itself, "time": time.time(), "message": message}])
        return 1
    record.close("finished")
    return 0


def _failure(rank: int, failure: Any) -> dict[str, Any]:
    """What torch knows of a worker that failed, for ``node.json``."""
    return {
        "rank": rank,
        "local_rank": failure.local_rank,
        "pid": failure.pid,
        "exit_code": failure.exitcode,
        "time": failure.timestamp,
        "message": _text(failure.message),
    }


def _rank(log: Path) -> int:
    """The rank in the name of a log file."""
    return int(log.name.partition("-")[2][:5])


def _port(job_id: str, restart: int, attempt: int) -> int:
    """A port that other jobs on the node, and the attempts before, are unlikely to have."""
    number = int("".join(filter(str.isdigit, job_id)) or 0)
    return 20000 + (number * 101 + restart * 11 + attempt) % 10000


def _text(message: Any) -> str:
    """What a worker's error file says: text, or the parts of an exception."""
    if isinstance(message, dict):
        return str(message.get("extraInfo", {}).get("py_callstack") or message.get("message"))
    return str(message)


def _workers() -> list[psutil.Process]:
    """The ranks' processes. Their own children are left alone: Megatron saves through one of them."""
    return [child for child in psutil.Process().children() if MODULE in " ".join(_command_line(child))]


def _command_line(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _signal_workers(signum: signal.Signals) -> None:
    for worker in _workers():
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signum)


def _save_when_asked() -> None:
    """Hand each :data:`SAVE_SIGNAL` to the workers as the signal on which Megatron saves and exits."""
    while True:
        signal.sigwait({SAVE_SIGNAL})
        print(f"{time.strftime('%H:%M:%S')} asked to save a checkpoint and to end", flush=True)
        while not _workers():  # they are about to start
            time.sleep(_WATCH_SECONDS)
        _signal_workers(signal.SIGTERM)


def _watch(record: _NodeRecord, limit: float) -> None:
    """End the workers if one makes no step for ``limit`` seconds; twice as long before the first."""
    written = time.time()
    while record.end is None:
        time.sleep(_WATCH_SECONDS)
        beats = read_heartbeats(record.heartbeats)
        now = time.time()
        if now - written > min(30, limit / 4):
            record.write()
            written = now
        last = min((beat.time for beat in beats.values()), default=record.begun + limit)
        if now - last <= limit:
            continue
        record.hung = True
        record.write()
        print(f"no step for {now - last:.0f} s: the workers are ended", file=sys.stderr, flush=True)
        _signal_workers(signal.SIGABRT)  # shows where each is
        time.sleep(5)
        _signal_workers(signal.SIGKILL)
        return


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
