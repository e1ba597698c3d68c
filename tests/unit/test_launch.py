"""What happens in this process between a signal and the end of its workers."""

import io
import os
import signal
import subprocess
import sys
import threading

from cca_megatron.training.launch import _Stopper


class _InterruptedDevice(io.RawIOBase):
    """Gets a signal in the middle of the first line that is written to it."""

    def __init__(self):
        self.lines = []

    def writable(self):
        return True

    def write(self, data):
        self.lines.append(bytes(data).decode())
        if len(self.lines) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return len(data)


def test_a_signal_in_the_middle_of_a_line_is_answered():
    device = _InterruptedDevice()
    stream = io.TextIOWrapper(io.BufferedWriter(device))

    def say(text):
        print(text, file=stream, flush=True)

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stopper = _Stopper(process, say, saves=True)
    stopper.trains = True
    previous = signal.signal(signal.SIGUSR2, stopper.handle)
    threads = threading.enumerate()
    try:
        say("iteration 3")
        for thread in set(threading.enumerate()) - set(threads):
            thread.join()
    finally:
        signal.signal(signal.SIGUSR2, previous)
        process.kill()
        process.wait()
    assert "".join(device.lines).splitlines() == [
        "iteration 3",
        "stopping: a checkpoint is saved after this step; once more stops at once",
    ]
