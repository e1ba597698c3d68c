# ruff: noqa: E501, W291  (lines of logs as they are)
"""What workers, Megatron and SLURM write when they fail, shortened from runs that really failed, and attempts
made of it.

The texts of gloo, Python, PyTorch and Megatron are from torchrun jobs of two ranks on CPUs; those of NCCL and
of CUDA's memory are as PyTorch users report them.
"""

import json
import os
from pathlib import Path
from typing import Any

from cca_megatron.cluster.run_directory import Attempt

_SITE = "/opt/env/lib/python3.12/site-packages"


def prefixed(rank: int, text: str) -> str:
    """As PyTorch prints an exception that ends a rank: blank lines have no prefix."""
    return "".join(f"[rank{rank}]: {line}\n" if line else "\n" for line in text.rstrip("\n").split("\n"))


def traceback(error: str, *files: str) -> str:
    """A traceback through these files, which ends in this error."""
    frames = "".join(
        f'  File "{file if file.startswith("/") else f"{_SITE}/{file}"}", line {number}, in step\n'
        "    return function(*args)\n           ^^^^^^^^^^^^^^^\n"
        for number, file in enumerate(("/home/me/cca_megatron/training/pretrain.py", *files), 52)
    )
    return f"Traceback (most recent call last):\n{frames}{error}\n"


DIRECT_CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
IN_HANDLING = "\nDuring handling of the above exception, another exception occurred:\n\n"

GLOO_CLOSED = traceback(
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:52938. This is typically caused by a remote worker crashing. Check the logs of the remote "
    "worker before reporting an error.",
    "torch/distributed/c10d_logger.py",
    "torch/distributed/distributed_c10d.py",
)
GLOO_RESET = GLOO_CLOSED.replace("pair.cc:553] Connection closed by peer", "pair.cc:537] Read error").replace(
    "52938. This is typically caused by a remote worker crashing", "62656: Connection reset by peer"
)
GLOO_TIMEOUT = traceback(
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting "
    "4000ms for recv operation to complete",
    "torch/distributed/distributed_c10d.py",
)
STORE_TIMEOUT = traceback(
    "torch.distributed.DistStoreError: wait timeout after 4000ms, keys: /default_pg/0//cpu//0/1",
    "torch/distributed/distributed_c10d.py",
)
NCCL_REMOTE = traceback(
    "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "
    "remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketPollConnect: connect returned Connection refused",
    "torch/distributed/distributed_c10d.py",
)
# Of a process that C++ ends: no Python exception.
NCCL_WATCHDOG = """\
[rank{rank}]:[E1128 06:24:44.903 ProcessGroupNCCL.cpp:616] [Rank {rank}] Watchdog caught collective operation \
timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) ran for \
600020 milliseconds before timing out.
[rank{rank}]:[E1128 06:24:44.906 ProcessGroupNCCL.cpp:1785] [PG ID 0 PG GUID 0(default_pg) Rank {rank}] Exception \
(either an error or timeout) detected by watchdog at work: 808, last enqueued NCCL work: 811, last completed: 807.
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank {rank}] Process group watchdog thread terminated with exception: \
[Rank {rank}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE) ran for 600020 \
milliseconds before timing out.
Exception raised from checkTimeout at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:618:
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x7f3b6e7236fc in libc10.so)
frame #1: clone + 0x43 (0x7f3c750b0353 in libc.so.6)

Fatal Python error: Aborted

Thread 0x00007fa7b9318b80 (most recent call first):
  <no Python frame>
"""
SEGMENTATION_FAULT = """\
Fatal Python error: Segmentation fault

Current thread 0x00007f28e0f3fb80 (most recent call first):
  File "/home/me/train.py", line 21 in main

Extension modules: numpy._core._multiarray_umath, torch._C (total: 2)
"""
ABORTED_BY_AGENT = SEGMENTATION_FAULT.replace("Segmentation fault", "Aborted").replace(
    '"/home/me/train.py", line 21 in main', '"/home/me/train.py", line 77 in read_batch'
)

CUDA_OUT_OF_MEMORY = traceback(
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has a total capacity of "
    "79.11 GiB of which 12.35 GiB is free.",
    "megatron/core/transformer/mlp.py",
)
HOST_OUT_OF_MEMORY = traceback(
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
)
NAN = traceback(
    "RuntimeError: Rank 1, node node1, device 0, iteration 3: Unexpected result nan (message='NaN in the loss')",
    "megatron/core/pipeline_parallel/schedules.py",
    "megatron/core/rerun_state_machine.py",
)
NO_DATA = traceback(
    "AssertionError: One or both of the .idx and .bin files cannot be found at the path prefix data/none",
    "megatron/core/datasets/gpt_dataset.py",
    "megatron/core/datasets/indexed_dataset.py",
)
SHORT_DATA = traceback(
    "ValueError: offset must be non-negative and no greater than buffer length (3000)",
    "torch/utils/data/_utils/fetch.py",
    "megatron/core/datasets/indexed_dataset.py",
)
# Printed by Python after NO_DATA, and no reason for anything.
EXCEPTION_IGNORED = "Exception ignored in: <function IndexedDataset.__del__ at 0x7f2a1696a0c0>\n" + traceback(
    "AttributeError: 'IndexedDataset' object has no attribute 'bin_reader'",
    "megatron/core/datasets/indexed_dataset.py",
)
LOADER = (
    traceback("IndexError: Caught IndexError in DataLoader worker process 0.", "torch/_utils.py")
    + "Original "
    + traceback("IndexError: index 9 is out of bounds", "megatron/core/datasets/gpt_dataset.py")
)
BAD_CHECKPOINT = (
    traceback(
        "torch.distributed.checkpoint.api.CheckpointException: CheckpointException ranks:dict_keys([0])",
        "megatron/core/dist_checkpointing/serialization.py",
        "torch/distributed/checkpoint/utils.py",
    )
    + traceback("EOFError: Ran out of input", "torch/serialization.py").replace(":\n", ": (RANK 0)\n", 1)
    + "\n"
)
DISK_FULL = traceback(
    "OSError: [Errno 28] No space left on device",
    "megatron/training/checkpointing.py",
    "torch/serialization.py",
)
BAD_SETTINGS = """\
ValueError: CCA cannot run with these settings:
  - num_attention_heads=4: must be a multiple of tensor_model_parallel_size=3; tensor_model_parallel_size=1 works
  - world size 2 (nodes * processes on each): must be a multiple of 3; 3 works
"""
GROUP = """\
  + Exception Group Traceback (most recent call last):
  |   File "/home/me/train.py", line 3, in main
  |     raise group
  | ExceptionGroup: many (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: a
    +---------------- 2 ----------------
    | TypeError: b
    +------------------------------------
"""
BARE_ASSERTION = traceback("AssertionError", "megatron/training/arguments.py")
BAD_ARGUMENT = "usage: pretrain.py [-h] [--data-path DATA]\npretrain.py: error: unrecognized arguments: --no-such-arg 3\n"
ECC = traceback(
    "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "torch/cuda/__init__.py"
)
MACHINE = "megatron.core.rerun_state_machine"
REPRODUCIBLE_NAN = f"""\
ERROR:{MACHINE}:Unexpected result nan on rank {{rank}} at iteration #3 invocation #1 (message='NaN in the loss')
ERROR:{MACHINE}:Rank {{rank}}, node node1, device 0, iteration #3: First rerun: unexpected result is reproducible \
within the tolerance (nan = nan). Need to rerun on a different GPU to verify correctness.!
"""
TRANSIENT = f"""\
ERROR:{MACHINE}:Unexpected result 162.5 on rank {{rank}} at iteration #3 invocation #1 (message='NaN in the loss')
ERROR:{MACHINE}:Rank {{rank}}, node node1, device 0, iteration #3: First rerun: unexpected result is not \
reproducible within the tolerance (162.5 != 5.08)!
ERROR:{MACHINE}:Rank {{rank}}, node node1, device 0, iteration #3: Possible transient error!!
"""
SPIKE = f"""\
ERROR:{MACHINE}:Unexpected result 99.0 on rank {{rank}} at iteration #2 invocation #1 (message='spike in the loss')
WARNING:{MACHINE}:Rank {{rank}}, node node1, device 0, iteration #2: First rerun: unexpected result is reproducible \
within the tolerance (99.0 = 99.0). Need to rerun on a different GPU to verify correctness.!
"""
OTHER_GPU_AGREES = f"""\
WARNING:{MACHINE}:Second rerun: unexpected result is reproducible on a different GPU, therefore it was likely \
correct (nan = nan)
ERROR:{MACHINE}:Rank {{rank}}, node node1, device 0, iteration #3: Correct result (but possible Application error) \
(NaN in the loss)!
"""
TRAINING = """\
INFO: no error so far, nan-safe softmax on; number of nan iterations:   0 | errors: 0
 [2026-11-28 10:42:20.008] iteration        1/       6 | lm loss: 5.527536E+00 | number of nan iterations:   0 |
WARNING: retrying after an error (Connection refused by the metrics server), going on
"""

# What torchrun reports at the end; to be filled in with the exit code of rank 1.
TORCHRUN = """\
E1128 10:40:50.139000 7606 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 1
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/opt/env/lib/python3.12/site-packages/torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
============================================================
cca_megatron.training.pretrain FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-28_10:40:49
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 7611)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 7611
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-28_10:40:49
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 7612) 
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


class AttemptFolder:
    """An attempt as the job script and the nodes' agents leave it; two ranks a node."""

    def __init__(self, run: Path, number: int = 1, nodes: int = 2, **record: Any):
        self.run = run
        self.path = run / "logs" / "job-7" / f"attempt-{number}"
        self._nodes = [f"node{index + 1}" for index in range(nodes)]
        self._ends = dict.fromkeys(self._nodes, "finished")
        self._failures: dict[str, list[dict[str, Any]]] = {name: [] for name in self._nodes}
        self._heartbeats: dict[str, dict[str, Any]] = {name: {} for name in self._nodes}
        self._lost: set[str] = set()
        self.record = Attempt(
            number, 0, self._nodes, begun=1000.0, ended=2000.0, **({"srun_status": 1} | record)
        )
        for rank in range(2 * nodes):
            self.log(rank, out=TRAINING)

    def node_of(self, rank: int) -> str:
        return self._nodes[rank // 2]

    def log(self, rank: int, err: str | bytes = "", out: str | bytes = "") -> Path:
        """Write the logs of a rank; returns that of errors."""
        stem = self.path / self.node_of(rank) / f"rank-{rank:05}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        for text, suffix in ((err, ".err"), (out, ".out")):
            stem.with_suffix(suffix).write_bytes(text.encode() if isinstance(text, str) else text)
        return stem.with_suffix(".err")

    def failed(self, rank: int, exit_code: int, time: float, message: str = "", end: str = "failed") -> None:
        """What the agent writes of a worker that ended with an error."""
        node = self.node_of(rank)
        self._ends[node] = end
        self._failures[node].append(
            {"rank": rank, "local_rank": rank % 2, "pid": 4000 + rank, "exit_code": exit_code, "time": time}
            | {"message": message or f"Signal {-exit_code} received by PID {4000 + rank}"}
        )

    def raised(self, rank: int, text: str, time: float, exit_code: int = 1) -> Path:
        """A worker that ended with an exception, which its log shows."""
        self.failed(rank, exit_code, time, "To enable traceback see: https://pytorch.org/docs/stable/elastic")
        return self.log(rank, err=prefixed(rank, text), out=TRAINING)

    def agent_failed(self, node: int, time: float, message: str) -> None:
        name = self._nodes[node]
        self._ends[name] = "failed"
        self._failures[name].append(
            {"rank": None, "local_rank": None, "pid": 9, "exit_code": 1, "time": time, "message": message}
        )

    def end(self, node: int, how: str | None) -> None:
        self._ends[self._nodes[node]] = how

    def lose(self, node: int) -> None:
        """The node leaves no record at all."""
        self._lost.add(self._nodes[node])

    def heartbeat(self, rank: int, count: int, time: float) -> None:
        self._heartbeats[self.node_of(rank)][str(rank)] = {"count": count, "time": time}

    def slurm(self, text: str) -> None:
        """Add to the output of the batch script."""
        with open(self.run / "logs" / "job-7.log", "a") as file:
            file.write(text)

    def write(self) -> Path:
        """Write all records; returns the attempt's folder."""
        for number, name in enumerate(self._nodes):
            folder = self.path / name
            folder.mkdir(parents=True, exist_ok=True)
            content = {
                "node": name,
                "begun": 1000.0,
                "ended": None if self._ends[name] is None else 1990.0,
                "end": self._ends[name],
                "ranks": [2 * number, 2 * number + 1],
                "failures": self._failures[name],
                "heartbeats": self._heartbeats[name],
            }
            if name not in self._lost:
                (folder / "node.json").write_text(json.dumps(content))
        self.record.write(self.path / "attempt.json")
        return self.path


def touch(path: Path, time: float) -> None:
    """Make a log as old as what it tells."""
    os.utime(path, (time, time))
