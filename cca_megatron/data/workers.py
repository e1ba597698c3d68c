"""A few processes that work through items, with the results in order.

Unlike the standard library's pools they can be stopped at any moment: each has a pipe of its own, so a
worker that is killed half-way through a result leaves nobody waiting, and ends by itself if its parent dies.
"""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

_AHEAD = 4
"""Items that may be under way or finished for each worker, before the oldest result is taken."""


class WorkerDiedError(Exception):
    """A worker process ended without a result."""


def map_in_order[Item, Result](
    make_function: Callable[[], Callable[[Item], Result]], items: Sequence[Item], workers: int
) -> Generator[tuple[Item, Result]]:
    """Yield each item with its result, in order; closing the generator stops the workers.

    Args:
        make_function: called once in every worker, gives the function of an item; picklable.
        items: picklable.
        workers: processes.

    Raises:
        WorkerDiedError: a worker died.
        Exception: whatever the function raised.
    """
    context = multiprocessing.get_context("spawn")
    idle: list[Connection] = []
    busy: dict[Connection, int] = {}
    processes: dict[Connection, BaseProcess] = {}
    finished: dict[int, Result] = {}
    sent = taken = 0
    try:
        with _interrupts_held():  # the workers inherit it; this process stops them
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(make_function, theirs), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
                idle.append(ours)
        while taken < len(items):
            while idle and sent < min(len(items), taken + _AHEAD * workers):
                connection = idle.pop()
                busy[connection] = sent
                with contextlib.suppress(OSError):  # a worker that died is noticed when it has no answer
                    connection.send(items[sent])
                sent += 1
            for connection in [c for c in wait(list(busy)) if isinstance(c, Connection)]:
                try:
                    succeeded, value = connection.recv()
                except (EOFError, OSError) as error:
                    processes[connection].join(timeout=5)
                    status = processes[connection].exitcode
                    raise WorkerDiedError(f"a worker process died of status {status}") from error
                if not succeeded:
                    raise value
                finished[busy.pop(connection)] = value
                idle.append(connection)
            while taken in finished:
                result = finished.pop(taken)
                taken += 1
                yield items[taken - 1], result
    finally:
        for connection, worker in processes.items():
            worker.terminate()
            worker.join()
            connection.close()


def _work(make_function: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        try:
            function = make_function()
        except Exception as error:
            connection.recv()
            connection.send((False, error))
            return
        while True:
            item = connection.recv()
            try:
                answer = (True, function(item))
            except Exception as error:
                answer = (False, error)
            connection.send(answer)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C in a terminal reaches every process; processes started here do not hear it, we hear it after."""
    resource_tracker.ensure_running()  # starting it later would let signals through again
    heard = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, lambda *_: heard.append(True)) if in_main_thread else None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)
    if heard:
        raise KeyboardInterrupt
