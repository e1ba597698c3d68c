"""One rank of ``cca-megatron bench cp``; torchrun starts it, and rank 0 writes what all found.

torchrun --nproc-per-node 2 -m cca_megatron.bench.context_worker 1024 512 64 5 rows.json
"""

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cca_megatron.training import session


def main(tokens: int, hidden: int, dim: int, rounds: int, path: Path) -> None:
    """Time and count every method and way of exchange on as many ranks as there are."""
    device = session.load_megatron_here()
    torch.set_num_threads(1)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=datetime.timedelta(minutes=5))
    rows = list(_rows(tokens, hidden, dim, rounds))
    if dist.get_rank() == 0:
        path.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _rows(tokens: int, hidden: int, dim: int, rounds: int) -> Iterator[dict[str, Any]]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from cca_megatron.bench.context import METHODS, ways
    from cca_megatron.bench.sizes import matched

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    layers = matched("width", hidden, dim)
    for method in METHODS:
        for comm_type in ways(layers[method], ranks):
            case = {"method": method, "ranks": ranks, "comm_type": comm_type, "tokens": tokens}
            yield case | _measured(layers[method], tokens // ranks, rounds, ranks, comm_type)


def _measured(layer: Any, here: int, rounds: int, ranks: int, comm_type: str | None) -> dict[str, float]:
    from cca_megatron.bench import clock
    from cca_megatron.bench.modules import build, rotary_angles
    from cca_megatron.bench.sent_bytes import SentBytes

    torch.manual_seed(1)
    module = build(layer, torch.float32, ranks, comm_type)
    x = torch.randn(here, 1, layer.hidden_size).cuda().requires_grad_()
    gradient, angles = torch.randn_like(x), rotary_angles(layer, here)

    def step() -> None:
        out, _ = module(x, None, rotary_pos_emb=angles)
        torch.autograd.grad(out, [x, *module.parameters()], gradient)

    with SentBytes() as counted:  # and it warms up
        step()
    work, wall = [], []
    for _ in range(rounds):
        dist.barrier()
        began, begin = time.perf_counter(), clock.now()
        step()
        work.append(clock.now() - begin)
        wall.append(time.perf_counter() - began)
    fullest = torch.tensor([counted.total, statistics.median(work), statistics.median(wall)]).double().cuda()
    dist.all_reduce(fullest, dist.ReduceOp.MAX)
    sent, busiest, longest = fullest.tolist()
    return {"sent_bytes": sent, "work_seconds": busiest, "wall_seconds": longest}


if __name__ == "__main__":
    tokens, hidden, dim, rounds = map(int, sys.argv[1:5])
    main(tokens, hidden, dim, rounds, Path(sys.argv[5]))
