"""One process of a measurement: ``python -m cca_megatron.cluster.preflight.rank inside|across FILE``.

Its results are in the file as soon as each is there, so a rank that hangs shows how far it came. Ranks and
the meeting point are in torchrun's variables. NCCL on GPUs, gloo without.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cca_megatron.cluster.preflight import gpus
from cca_megatron.training.device import select_device

_ROUNDS = 3
"""The fastest counts."""
_LOAD_SECONDS = 3.0
"""For which the GPUs are kept at work while nvidia-smi looks at them."""


def main() -> None:
    """Measure, and write the results."""
    where, file = sys.argv[1], Path(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    kind = select_device()
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    results: dict[str, object] = {}

    def note(name: str, value: object) -> None:
        results[name] = value
        part = file.with_suffix(".part")
        part.write_text(json.dumps(results))
        part.replace(file)

    note("begun", True)
    if where == "inside":
        note("gemm", matrix_product_rate(device))
        note("copy", copy_rate(device))
        if kind == "cuda":
            note("host", host_rate(device))
            _multiply_for(_LOAD_SECONDS, device)
            if local_rank == 0:
                note("under_load", [asdict(gpu) for gpu in gpus.query()])
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=60))
        note("all_reduce", all_reduce_rate(device))
        note("all_to_all", all_to_all_rate(device))
        note("p2p", ring_rate(device, 1 if where == "inside" else local_size))
        if where == "across" and local_rank == 0:
            note("skew", clock_skew(device, range(local_size, size, local_size)))
        dist.barrier()
        dist.destroy_process_group()
    note("ended", True)
    print(f"rank {rank}: done", flush=True)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """For one call, the fastest of some rounds, after a first call that is not timed."""
    fastest = float("inf")
    run()
    for _ in range(_ROUNDS):
        if dist.is_initialized():
            dist.barrier()
        _finish(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        _finish(device)
        fastest = min(fastest, (time.perf_counter() - begun) / repeats)
    return fastest


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _matrices(device: torch.device) -> tuple[Tensor, Tensor]:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    return torch.randn(size, size, device=device, dtype=dtype), torch.randn(
        size, size, device=device, dtype=dtype
    )


def matrix_product_rate(device: torch.device) -> float:
    """TFLOP/s of square matrices: bf16 on a GPU, fp32 on a CPU."""
    a, b = _matrices(device)
    seconds = _seconds(lambda: torch.matmul(a, b), device, 50 if device.type == "cuda" else 3)
    return 2 * a.shape[0] ** 3 / seconds / 1e12


def _large(device: torch.device) -> Tensor:
    """Bytes to copy: far more than any cache holds."""
    return torch.ones((1 << 30) if device.type == "cuda" else (1 << 26), dtype=torch.uint8, device=device)


def copy_rate(device: torch.device) -> float:
    """GB/s within the device's memory, what is read and what is written together."""
    source = _large(device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device, 5) / 1e9


def host_rate(device: torch.device) -> float:
    """GB/s from pinned memory of the host to the GPU."""
    source = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.numel() / _seconds(lambda: target.copy_(source, non_blocking=True), device, 5) / 1e9


def _multiply_for(seconds: float, device: torch.device) -> None:
    """Give a GPU as much work; returns before it is done."""
    a, b = _matrices(device)
    product = torch.empty_like(a)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    torch.matmul(a, b, out=product)
    ended.record()
    torch.cuda.synchronize()
    for _ in range(int(seconds * 1000 / begun.elapsed_time(ended))):
        torch.matmul(a, b, out=product)


def _message(device: torch.device) -> Tensor:
    """What a rank contributes to an exchange: 256 MB, or 4 MB over gloo."""
    return torch.ones((1 << 26) if device.type == "cuda" else (1 << 20), device=device)


# Rates are bus bandwidths as nccl-tests defines them (PERFORMANCE.md): they do not depend on the number of
# ranks.


def all_reduce_rate(device: torch.device) -> float:
    """Bus bandwidth in GB/s."""
    message, size = torch.zeros_like(_message(device)), dist.get_world_size()
    seconds = _seconds(lambda: dist.all_reduce(message), device, 5)
    return message.nbytes * 2 * (size - 1) / size / seconds / 1e9


def all_to_all_rate(device: torch.device) -> float:
    """Bus bandwidth in GB/s."""
    size = dist.get_world_size()
    message = _message(device)
    message = message[: message.numel() // size * size]
    received = torch.empty_like(message)
    seconds = _seconds(lambda: dist.all_to_all_single(received, message), device, 5)
    return message.nbytes * (size - 1) / size / seconds / 1e9


def ring_rate(device: torch.device, stride: int) -> float:
    """GB/s that a rank sends to the rank ``stride`` after it while it receives from the one before it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    message = _message(device)
    received = torch.empty_like(message)

    def exchange() -> None:
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, message, (rank + stride) % size),
                dist.P2POp(dist.irecv, received, (rank - stride) % size),
            ]
        )
        for request in work:
            request.wait()

    return message.nbytes / _seconds(exchange, device, 5) / 1e9


def clock_skew(device: torch.device, others: range, rounds: int = 10) -> float:
    """Seconds by which this clock is ahead of rank 0's, from the fastest of some questions and answers.

    Args:
        device: of the messages.
        others: the ranks that ask rank 0, one after the other.
        rounds: questions of each.
    """
    rank, now = dist.get_rank(), torch.zeros(1, dtype=torch.float64, device=device)
    if rank == 0:
        for other in others:
            for _ in range(rounds):
                dist.recv(now, other)
                dist.send(now.fill_(time.time()), other)
        return 0.0
    answers = []
    for _ in range(rounds):
        asked = time.time()
        dist.send(now, 0)
        dist.recv(now, 0)
        theirs, answered = now.item(), time.time()
        answers.append((answered - asked, (asked + answered) / 2 - theirs))
    return min(answers)[1]


if __name__ == "__main__":
    main()
