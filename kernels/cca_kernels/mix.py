"""The public op: checks its inputs and hands them to a backend."""

from collections.abc import Callable

from torch import Tensor

from cca_kernels.reference import Boundary, MixOptions, MixWeights, cca_mix_reference

_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {"reference": cca_mix_reference}


def available_backends() -> tuple[str, ...]:
    """Names that ``cca_mix(..., backend=...)`` accepts here, besides ``"auto"``."""
    return tuple(_BACKENDS)


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
    them. ``backend="auto"`` takes the fastest one that serves the device.

    Raises:
        ValueError: a shape or an option does not fit; the message names it and what would.
    """
    _check(mixed, weights, options, rotary, cu_seqlens, boundary)
    name = "reference" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is not available; use one of {('auto', *_BACKENDS)}")
    return _BACKENDS[name](mixed, weights, options, rotary=rotary, cu_seqlens=cu_seqlens, boundary=boundary)


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
    if rotary is not None:
        for name, table in zip(("cos", "sin"), rotary, strict=True):
            width = table.shape[-1] if table.dim() == 4 else 0
            fits = table.dim() == 4 and table.shape[0] == tokens and table.shape[1] in (1, batch)
            if not fits or table.shape[2] != 1 or width % 2 or not 0 < width <= dim:
                raise ValueError(
                    f"rotary {name} has shape {tuple(table.shape)}; it must be "
                    f"[{tokens}, 1 or {batch}, 1, width] with an even width of at most {dim}"
                )
