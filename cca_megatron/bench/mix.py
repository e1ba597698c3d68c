"""The mix alone: fused, eager and compiled, against what the machine can do at most."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cca_kernels import cca_mix, cca_mix_reference
from cca_kernels.triton.accuracy import Mix, arguments, random_gradients
from cca_kernels.triton.launch import Inputs
from cca_megatron.bench import measure
from cca_megatron.bench.check import Checking, MixCheck, measured_if_right
from cca_megatron.bench.measure import PASSES, Ceilings, Timer, Workload
from cca_megatron.bench.results import Checked, Event
from cca_megatron.bench.shapes import MixShape

CHECKED_TOKENS = 2048
TAPS = 3  # of the folded filter, K0 + K1 - 1
ROTARY_TABLES = 2 * 4  # cos and sin in fp32


@dataclass(frozen=True)
class Variant:
    """One way to compute the mix."""

    name: str
    mix: Mix
    baseline: bool
    """An implementation of the reference in PyTorch alone; see :class:`MixCheck`."""


def variants() -> tuple[Variant, ...]:
    """The fused kernels and what they are compared with.

    The compiled reference has max-autotune without its own CUDA graphs, which copy their inputs at every
    call: graphs are captured here, for all variants alike. ``fullgraph`` makes it an error where it would
    silently go on uncompiled.
    """
    compiled = torch.compile(
        cca_mix_reference, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True
    )
    return (
        Variant("fused", partial(cca_mix, backend="triton"), baseline=False),
        Variant("eager", partial(cca_mix, backend="reference"), baseline=True),
        Variant("compile", compiled, baseline=True),
    )


def moved_bytes(shape: MixShape, tokens: int, element_size: int = 2) -> dict[str, int]:
    """Bytes that any implementation must move, for each of ``PASSES``.

    Forward reads the projected latents and values and the tables of cos and sin, and writes q, k and v.
    Backward reads the gradients of q, k and v, q and k themselves, which attention keeps anyway (their norm
    and direction give the gradient of the conv outputs without a second conv), the latents (for the gradient
    of the filters) and the tables, and writes the gradients of latents and values. Weights and norms are left
    out: they are about 3 % at 4,096 tokens and less at more.
    """
    qk = (shape.query_heads + shape.key_heads) * shape.dim * element_size
    value = shape.key_heads * shape.dim * element_size
    tables = shape.dim // 2 * ROTARY_TABLES
    forward = tokens * (2 * (qk + value) + tables)
    backward = tokens * (4 * qk + 2 * value + tables)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def flops(shape: MixShape, tokens: int) -> dict[str, int]:
    """Operations of the folded filter, for each of ``PASSES``; the same number for every variant.

    Forward is one D x D product per head, token and tap, 2 * D * D operations; backward has two of these, for
    the latents and for the filters.
    """
    heads = shape.query_heads + shape.key_heads
    forward = 2 * tokens * heads * shape.dim**2 * TAPS
    return {"forward": forward, "backward": 2 * forward, "both": 3 * forward}


def measure_mix(
    timer: Timer,
    ceilings: Ceilings,
    shapes: Sequence[MixShape],
    lengths: Sequence[int],
    choices: Sequence[Variant],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    checked_tokens: int = CHECKED_TOKENS,
    started: Callable[[str], None] = lambda case: None,
) -> Iterator[Event]:
    """Check every variant of every shape, then time it at every length with and without CUDA graphs."""
    checks = MixChecks(device, dtype, checked_tokens)
    for tokens, shape, variant in itertools.product(lengths, shapes, choices):
        started(f"{shape.name} {variant.name}, {tokens:,} tokens")
        measure.release()
        case = {"shape": shape.name, "variant": variant.name, "tokens": tokens}
        rows = _rows(timer, ceilings, shape, tokens, variant, device, dtype)
        yield from measured_if_right(case, checks.of(shape, variant), rows)


class MixChecks:
    """The check of each variant of each shape, made once."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tokens: int = CHECKED_TOKENS) -> None:
        self._device, self._dtype, self._tokens = device, dtype, tokens
        self._problems: dict[tuple[MixShape, str], list[str]] = {}

    def of(self, shape: MixShape, variant: Variant) -> Checking:
        """Make the check if it is not made yet."""
        key = shape, variant.name
        if key not in self._problems:
            check = MixCheck(shape.inputs(self._tokens, self._dtype, self._device), shape.settings)
            errors = check.errors(variant.mix)
            self._problems[key] = check.problems(errors, baseline=variant.baseline)
            yield Checked(shape.name, variant.name, self._tokens, errors, self._problems[key])
        return self._problems[key]


def _rows(
    timer: Timer,
    ceilings: Ceilings,
    shape: MixShape,
    tokens: int,
    variant: Variant,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    moved, operations = moved_bytes(shape, tokens, dtype.itemsize), flops(shape, tokens)
    seeds = range(measure.copies(moved["forward"], device))
    workloads = [_workload(variant.mix, shape, shape.inputs(tokens, dtype, device, seed)) for seed in seeds]
    for which, graph in itertools.product(PASSES, (True, False)):
        timing = timer([workload.job(which) for workload in workloads], graph=graph)
        gb_per_s, tflop_per_s = (amount[which] / timing.median for amount in (moved, operations))
        yield {
            "pass": which,
            "cuda_graph": graph,
            **measure.as_microseconds(timing),
            "gb_per_s": gb_per_s / 1e9,
            "tflop_per_s": tflop_per_s / 1e12,
            "of_copy": gb_per_s / 1e9 / ceilings.copy_gb_per_s,
            "of_gemm": tflop_per_s / 1e12 / ceilings.gemm_tflop_per_s,
        }


def _workload(mix: Mix, shape: MixShape, inputs: Inputs) -> Workload:
    leaves = [getattr(inputs, name).requires_grad_() for name in inputs.differentiable]
    positional, optional = arguments(inputs, shape.settings)
    return Workload(
        forward=lambda: mix(*positional, **optional),
        leaves=leaves,
        gradients=random_gradients(inputs, shape.settings),
    )
