"""Run Megatron's own training loop where there is no GPU: the device called "cuda" becomes the CPU.

Megatron's loop names the device "cuda" in hundreds of places. :func:`install` replaces the functions of
torch that take a device, and the calls into ``torch.cuda``, for this process; it has to come before
Megatron is imported. Nothing else changes: schedules, optimizer, checkpoints and data are Megatron's.
Collectives go through gloo. It is a way to develop and to test, not to be fast.
"""

import contextlib
import functools
import logging
import os
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

# fmt: off
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like",
    "linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like",
    "randperm", "tensor", "zeros", "zeros_like",
)
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_CUDA_NOTHING = (
    "empty_cache", "reset_peak_memory_stats", "set_device", "set_per_process_memory_fraction",
    "set_stream", "synchronize",
)
_CUDA_ZERO = (
    "max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved",
)
# fmt: on


_installed = False


def install() -> None:
    """Make "cuda" mean the CPU in this process, from now on. A second call changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling for seconds to save milliseconds
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    _patch_tensor()
    _patch_cuda()
    _patch_distributed()
    _patch_megatron()


def _cpu_for_cuda(device: Any) -> Any:
    """The CPU for whatever names a GPU ("cuda:1", torch.device("cuda"), 0); other values pass."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    return device


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its ``device`` argument led to the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        kwargs.pop("pin_memory", None)  # without a GPU there is nothing to pin memory for
        return function(*args, **kwargs)

    return call


def _returning(value: Any = None) -> Callable[..., Any]:
    """A function of its own for every name: torch keeps registries keyed by function identity."""
    return lambda *args, **kwargs: value


def _patch_tensor() -> None:
    to, type_name = torch.Tensor.to, torch.Tensor.type

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return to(self, *map(_cpu_for_cuda, args[:1]), *args[1:], **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_name(self, *args, **kwargs)
        # Megatron's optimizer tells gradients apart by this name.
        return type_name(self).replace("torch.", "torch.cuda.")

    tensor: Any = torch.Tensor
    tensor.to, tensor.type = tensor_to, tensor_type
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
    optimizer: Any = torch.optim.Optimizer
    optimizer._accelerator_graph_capture_health_check = _returning()


class _Stream:
    """Stands in for CUDA streams and events: everything has already happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Stream") -> float:
        return 0.0

    def record_event(self, *args: Any) -> "_Stream":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _returning()


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    for name in _CUDA_NOTHING:
        setattr(cuda, name, _returning())
    for name in _CUDA_ZERO:
        setattr(cuda, name, _returning(0))
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.is_available = _returning(True)
    cuda.is_current_stream_capturing = _returning(False)
    cuda.current_device = _returning(0)
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.Stream, cuda.Event = type("Stream", (_Stream,), {}), type("Event", (_Stream,), {})
    cuda.current_stream, cuda.default_stream = _returning(_Stream()), _returning(_Stream())
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.get_device_capability = _returning((9, 0))
    cuda.get_device_name = _returning("cpu")
    cuda.get_device_properties = _returning(
        types.SimpleNamespace(name="cpu", total_memory=0, major=9, minor=0, multi_processor_count=1)
    )
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _returning(), _returning()
    accelerator: Any = torch.accelerator
    accelerator.is_available = _returning(False)  # the DataLoader pins memory by this one


def _patch_distributed() -> None:
    init_process_group = torch.distributed.init_process_group

    @functools.wraps(init_process_group)
    def without_device(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return init_process_group(*args, **kwargs)

    torch.distributed.init_process_group = without_device


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    # Its tracker watches the CPU's generator while it uses the GPU's, which are the same here.
    about_random = logging.getLogger(random.__name__)
    about_random.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    def splits_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron's own turns split sizes into numpy only when they sit on a GPU.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = splits_to_host
