"""When the mix is right: the bound on its error, and random inputs to check it on.

Not the kernels alone: anything that takes and returns the same as :func:`cca_kernels.cca_mix_reference`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cca_kernels.reference import Boundary, MixOptions, MixWeights
from cca_kernels.triton.launch import Inputs, Settings

BOUNDS = {torch.bfloat16: (2.5e-3, 5e-3), torch.float16: (4e-4, 8e-4), torch.float32: (1e-5, 1e-5)}
"""Relative error against fp64 that is allowed in outputs and in gradients."""

Mix = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""What takes and returns the same as :func:`cca_kernels.cca_mix_reference`."""
Results = dict[str, Tensor]
"""q, k, v, and "gradient of NAME" for every input that has one."""
Gradients = tuple[Tensor, Tensor, Tensor]
"""Of q, k and v."""


def random_inputs(
    tokens: int,
    groups: int,
    queries: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> Inputs:
    """One sequence as the released models have it: K0 = K1 = 2, biases, RoPE on half of the channels.

    The process's own random numbers are left alone.
    """
    generator = torch.Generator(device).manual_seed(seed)
    channels = groups * (queries + 1) * dim

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale + mean).to(dtype)

    angles = torch.randn(tokens, 1, 1, dim // 4, generator=generator, device=device).repeat(1, 1, 1, 2)
    return Inputs(
        mixed=draw(tokens, 1, groups, queries + 2, dim),
        conv0=draw(channels, 1, 2),
        bias0=draw(channels, scale=0.1),
        conv1=draw(channels, dim, 2, scale=(2 * dim) ** -0.5),
        bias1=draw(channels, scale=0.1),
        temperature=draw(groups, scale=0.1, mean=1.0),
        cos=angles.cos(),
        sin=angles.sin(),
        cu_seqlens=None,
        before=None,
        value_before=None,
    )


def random_gradients(inputs: Inputs, settings: Settings) -> Gradients:
    """Of q, k and v."""
    mixed = inputs.mixed
    generator = torch.Generator(mixed.device).manual_seed(1)
    tokens, batch, groups, _, dim = mixed.shape

    def draw(heads: int) -> Tensor:
        drawn = torch.randn(tokens, batch, heads, dim, generator=generator, device=mixed.device)
        return drawn.to(mixed.dtype)

    return draw(groups * settings.query_count), draw(groups), draw(groups)


def arguments(inputs: Inputs, settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a ``Mix`` that does what the operator does with these."""
    x = inputs
    queries, values = x.mixed.shape[3] - 2, x.mixed.shape[2] * x.mixed.shape[4]
    own = (settings.first_query, settings.query_count)
    options = MixOptions(
        qk_mean=settings.qk_mean,
        value_delay_from=None if settings.value_delay_from == values else settings.value_delay_from,
        temperature_form="exp" if settings.exponential else "linear",
        rotary_interleaved=settings.interleaved,
        query_heads=None if own == (0, queries) else own,
        output_order=settings.order,  # type: ignore[arg-type]
    )
    weights = MixWeights(x.conv0, x.bias0, x.conv1, x.bias1, x.temperature)
    optional = {
        "rotary": None if x.cos is None or x.sin is None else (x.cos, x.sin),
        "cu_seqlens": x.cu_seqlens,
        "boundary": None
        if x.before is None or x.value_before is None
        else Boundary(x.before, x.value_before),
    }
    return (x.mixed, weights, options), optional


def results_of(
    mix: Mix, inputs: Inputs, settings: Settings, gradients: Gradients, dtype: torch.dtype
) -> Results:
    """Run a mix and its backward pass, with all inputs in another dtype (cos and sin stay as they are)."""
    names = inputs.differentiable
    leaves = {name: getattr(inputs, name).detach().to(dtype).requires_grad_() for name in names}
    positional, optional = arguments(inputs._replace(**leaves), settings)
    outputs = mix(*positional, **optional)
    found = torch.autograd.grad(outputs, list(leaves.values()), [g.to(dtype) for g in gradients])
    results = dict(zip("qkv", (y.detach() for y in outputs), strict=True))
    return results | {f"gradient of {name}": g for name, g in zip(names, found, strict=True)}


def relative_errors(exact: Results, other: Results) -> dict[str, float]:
    """|other - exact| / |exact| of each tensor in fp64; infinite where something is not finite."""
    errors = {}
    for name, reference in exact.items():
        difference = (other[name].double() - reference.double()).norm().item()
        error = difference / (reference.double().norm().item() or 1.0)
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def allowed_error(name: str, dtype: torch.dtype) -> float:
    """The bound for one tensor of ``Results``."""
    return BOUNDS[dtype][name.startswith("gradient")]
