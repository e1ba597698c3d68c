"""Whole attention layers of megatron-core and of this project beside each other, matched in one respect."""

import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cca_megatron.bench import clock
from cca_megatron.bench.live_bytes import LiveBytes
from cca_megatron.bench.modules import build, remove_projections, rotary_angles
from cca_megatron.bench.results import Event, Measured
from cca_megatron.bench.sizes import BASELINE, Matching, heads_of, matched, parameters
from cca_megatron.plan.attention import Attention, LatentAttention

PASSES = ("forward", "backward", "both")


def start_alone() -> None:
    """Megatron's process groups for this process alone."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def measure_matched(
    matchings: Sequence[Matching],
    lengths: Sequence[int],
    hidden: int,
    dim: int,
    dtype: torch.dtype,
    rounds: int,
    started: Callable[[str], None] = lambda case: None,
) -> Iterator[Event]:
    """One row for each length and matching, with all methods in it, of one sequence each.

    The time of a method is taken in turn with that of the others, and its ratio to MHA round by round.

    Args:
        matchings: see :func:`cca_megatron.bench.sizes.matched`.
        lengths: tokens of the sequence.
        hidden: the hidden size.
        dim: channels of a head.
        dtype: of weights and activations.
        rounds: how often each is timed, after a warm-up.
        started: called with the name of each case as it begins.

    Raises:
        ValueError: the sizes do not fit.
    """
    layers = {matching: matched(matching, hidden, dim) for matching in matchings}
    for tokens, matching in itertools.product(lengths, matchings):
        started(f"matched {matching}, {tokens:,} tokens")
        methods = _measure(layers[matching], tokens, dtype, rounds, with_core=matching == "width")
        case = {"matched": matching, "tokens": tokens, "hidden": hidden, "head_dim": dim}
        yield Measured(case | {"dtype": str(dtype).removeprefix("torch."), "methods": methods})


def _measure(
    layers: dict[str, Attention], tokens: int, dtype: torch.dtype, rounds: int, with_core: bool
) -> dict[str, dict[str, Any]]:
    torch.manual_seed(1)
    hidden = next(iter(layers.values())).hidden_size
    x, gradient = (torch.randn(tokens, 1, hidden, dtype=dtype).cuda() for _ in range(2))
    x.requires_grad_()
    modules = {name: build(layer, dtype) for name, layer in layers.items()}
    angles = {name: rotary_angles(layer, tokens) for name, layer in layers.items()}
    found = {
        name: _sizes(layer, tokens, dtype) | _memory(modules[name], x, angles[name], gradient)
        for name, layer in layers.items()
    }
    runs = {name: _timed(module, x, angles[name], gradient) for name, module in modules.items()}
    seconds = clock.in_turn(runs, rounds)
    for name, which in itertools.product(layers, PASSES):
        found[name][which] = clock.summary(seconds[name][which], seconds[BASELINE][which])
    if with_core:
        # MLA has projections between its projections, so its core alone compares with nothing.
        names = [name for name, layer in layers.items() if not isinstance(layer, LatentAttention)]
        for name in names:
            remove_projections(modules[name], x)
        seconds = clock.in_turn({name: _forward(modules[name], x, angles[name]) for name in names}, rounds)
        for name in names:
            found[name]["core"] = clock.summary(seconds[name]["core"], seconds[BASELINE]["core"])
    return found


def _sizes(layer: Attention, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    element = dtype.itemsize
    return {
        "heads": heads_of(layer),
        "parameters": parameters(layer),
        "cache_bytes_per_token": layer.cache_elements() * element,
        "forward_flops_per_token": sum(layer.flops().values()) + layer.pair_flops() * tokens // 2,
        "planned_kept_bytes": int(sum(layer.kept(1, element).values()) * tokens),
    }


def _memory(module: nn.Module, x: Tensor, angles: Tensor | None, gradient: Tensor) -> dict[str, int]:
    """Bytes kept for the backward pass, but for the layer's input; and those of all live tensors at most."""
    outside = [x, gradient, *module.parameters()] + ([] if angles is None else [angles])
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.view_as(tensor)  # held by the graph alone: what it lets go of is not kept
        saved.append(weakref.ref(tensor))
        return tensor

    with LiveBytes(made_before=outside) as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out, _ = module(x, None, rotary_pos_emb=angles)
        alive = [tensor for tensor in (reference() for reference in saved) if tensor is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        del alive
        torch.autograd.grad(out, [x, *module.parameters()], gradient)
    for tensor in outside:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return {"kept_bytes": sum(storages.values()), "peak_bytes": live.peak}


def _timed(module: nn.Module, x: Tensor, angles: Tensor | None, gradient: Tensor) -> clock.Run:
    leaves = [x, *module.parameters()]

    def run() -> dict[str, float]:
        begin = clock.now()
        out, _ = module(x, None, rotary_pos_emb=angles)
        middle = clock.now()
        torch.autograd.grad(out, leaves, gradient)
        end = clock.now()
        return {"forward": middle - begin, "backward": end - middle, "both": end - begin}

    return run


def _forward(module: nn.Module, x: Tensor, angles: Tensor | None) -> clock.Run:
    def run() -> dict[str, float]:
        begin = clock.now()
        module(x, None, rotary_pos_emb=angles)
        return {"core": clock.now() - begin}

    return run
