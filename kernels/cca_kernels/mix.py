"""The public op: checks its inputs and hands them to a backend."""

import logging
import os
from functools import cache

import torch
from torch import Tensor

from cca_kernels.reference import Boundary, MixOptions, MixWeights, cca_mix_reference
from cca_kernels.triton.support import can_run, kernel_problems

BACKENDS = ("reference", "triton")
VARIABLE = "CCA_KERNELS"
"""Environment variable that ``backend="auto"`` obeys: auto, reference or triton."""

_logger = logging.getLogger(__name__)


def available_backends() -> tuple[str, ...]:
    """Those of ``BACKENDS`` that can run here."""
    return BACKENDS if can_run() else BACKENDS[:1]


def cca_mix(
    mixed: Tensor,
    weights: MixWeights,
    options: MixOptions,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    boundary: Boundary | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Convs, query-key mean, norm, temperature, RoPE and value shift in one call.

    Arguments, shapes and results are those of :func:`cca_kernels.cca_mix_reference`, which defines
    them. ``backend="auto"`` takes the fused kernels on a GPU and the reference elsewhere, or what the
    environment variable ``CCA_KERNELS`` says. Where the kernels do not take a call, ``"auto"`` falls back to
    the reference and says so once in the log; ``"triton"`` is an error then.

    Raises:
        ValueError: a shape or an option does not fit, or the backend does not take it; the message names it
            and what would.
    """
    _check(mixed, weights, options, rotary, cu_seqlens, boundary)
    mix = cca_mix_reference
    if _choose(backend, mixed, weights, rotary) == "triton":
        from cca_kernels.triton.operator import fused_mix as mix  # Triton is optional
    return mix(mixed, weights, options, rotary=rotary, cu_seqlens=cu_seqlens, boundary=boundary)


def _choose(backend: str, mixed: Tensor, weights: MixWeights, rotary: tuple[Tensor, Tensor] | None) -> str:
    source, asked = f"backend={backend!r}", backend
    if backend == "auto":
        asked = os.environ.get(VARIABLE) or "auto"
        source = f"{VARIABLE}={asked}"
    if asked not in ("auto", *BACKENDS):
        raise ValueError(f"{source} is unknown; use one of {('auto', *BACKENDS)}")
    if asked == "reference" or (asked == "auto" and not mixed.is_cuda):
        return "reference"
    problems = kernel_problems(mixed, weights, rotary)
    if problems and asked == "triton":
        raise ValueError(f"{source}: the fused kernels do not take this call; " + "; ".join(problems))
    if problems and not torch.compiler.is_compiling():  # a log line would break the graph
        _log_once("the CCA mix runs without fused kernels: " + "; ".join(problems))
    return "reference" if problems else "triton"


@cache
def _log_once(message: str) -> None:
    _logger.warning(message)


def _check(
    mixed: Tensor,
    weights: MixWeights,
    options: MixOptions,
    rotary: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
    boundary: Boundary | None,
) -> None:
    if mixed.dim() != 5 or mixed.shape[3] < 3:
        raise ValueError(f"mixed has shape {tuple(mixed.shape)}; it must be [S, B, G, R+2, D] with R >= 1")
    tokens, batch, groups, heads, dim = mixed.shape
    channels = groups * (heads - 1) * dim
    k0, k1 = weights.kernel_sizes
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "conv0_weight": (weights.conv0_weight, (channels, 1, k0)),
        "conv0_bias": (weights.conv0_bias, (channels,)),
        "conv1_weight": (weights.conv1_weight, (channels, dim, k1)),
        "conv1_bias": (weights.conv1_bias, (channels,)),
        "temperature": (weights.temperature, (groups,)),
    }
    segments = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    delay_from = options.value_delay_from
    if boundary is not None:
        delayed = 0 if delay_from is None else groups * dim - delay_from
        expected["boundary.latents"] = (
            boundary.latents,
            (segments, weights.boundary_rows, batch, groups, heads - 1, dim),
        )
        expected["boundary.value"] = (boundary.value, (segments, batch, delayed))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point()):
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "it must be one row of integers"
        )
    if delay_from is not None and not 0 <= delay_from <= groups * dim:
        raise ValueError(f"value_delay_from={delay_from} must lie between 0 and {groups * dim}")
    if options.query_heads is not None:
        first, count = options.query_heads
        if first < 0 or count < 1 or first + count > heads - 2:
            raise ValueError(
                f"query_heads={options.query_heads}: first and number must lie within the {heads - 2} query "
                "heads of a group"
            )
    if options.temperature_form not in ("linear", "exp"):
        raise ValueError(f"temperature_form={options.temperature_form!r} must be 'linear' or 'exp'")
    for conv in ("conv0", "conv1"):
        if getattr(weights, f"{conv}_weight") is None and getattr(weights, f"{conv}_bias") is not None:
            raise ValueError(f"{conv}_bias without {conv}_weight: a conv that is off has none; None works")
    if rotary is not None:
        if rotary[0].shape[-1] != rotary[1].shape[-1]:
            raise ValueError(
                f"rotary cos has width {rotary[0].shape[-1]} and sin {rotary[1].shape[-1]}; they must agree"
            )
        for name, table in zip(("cos", "sin"), rotary, strict=True):
            width = table.shape[-1] if table.dim() == 4 else 0
            fits = table.dim() == 4 and table.shape[0] == tokens and table.shape[1] in (1, batch)
            if not fits or table.shape[2] != 1 or width % 2 or not 0 < width <= dim:
                raise ValueError(
                    f"rotary {name} has shape {tuple(table.shape)}; it must be "
                    f"[{tokens}, 1 or {batch}, 1, width] with an even width of at most {dim}"
                )
