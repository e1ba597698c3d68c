"""Count the bytes that this rank sends through torch.distributed."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Payload by operation, forward and backward; collectives as a ring runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: dict[str, float] = defaultdict(float)

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.by_operation.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.__name__.split(".")[0]
            self.by_operation[name] += _sent(name, args)
        return function(*args, **(kwargs or {}))


def _sent(name: str, args: Any) -> float:
    if name == "send":
        return args[0][0].nbytes
    if name in ("recv_", "barrier"):
        return 0
    size = next(dist.ProcessGroup.unbox(arg).size() for arg in args if isinstance(arg, torch.ScriptObject))
    if name in ("allreduce_", "allreduce_coalesced_"):
        return 2 * (size - 1) / size * _nbytes(args[0])
    if name in ("allgather_", "allgather_into_tensor_coalesced_"):
        return (size - 1) * _nbytes(args[1])
    if name == "reduce_scatter_":
        return (size - 1) / size * sum(map(_nbytes, args[1]))
    if name == "reduce_scatter_tensor_coalesced_":
        return (size - 1) / size * _nbytes(args[1])
    if name == "_allgather_base_":
        return (size - 1) * args[1].nbytes
    if name == "_reduce_scatter_base_":
        return (size - 1) / size * args[1].nbytes
    if name == "alltoall_base_":
        tensor, splits = args[1], list(args[4])
        row = tensor.nbytes / max(tensor.shape[0], 1)
        rank = dist.ProcessGroup.unbox(args[2]).rank()
        own = splits[rank] if splits else tensor.shape[0] / size
        return (tensor.shape[0] - own) * row
    raise NotImplementedError(name)


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
