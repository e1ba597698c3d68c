"""Random inputs of the mix, and how two implementations of it are compared."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cca_kernels import Boundary, MixOptions, MixWeights, cca_mix, cca_mix_reference
from support.closeness import assert_close, relative_error

DOUBLE = torch.float64


def random_weights(groups, queries, dim, k0=2, k1=2, *, conv0=True, conv1=True, bias=True, dtype=DOUBLE):
    channels = groups * (queries + 1) * dim

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return MixWeights(
        draw(channels, 1, k0) if conv0 else None,
        draw(channels) if conv0 and bias else None,
        draw(channels, dim, k1) if conv1 else None,
        draw(channels) if conv1 and bias else None,
        draw(groups),
    )


def random_mixed(tokens, groups, queries, dim, batch=2, dtype=DOUBLE):
    return torch.randn(tokens, batch, groups, queries + 2, dim, dtype=dtype, requires_grad=True)


def random_rotary(tokens, width, batch=1):
    angles = torch.randn(tokens, batch, 1, width // 2, dtype=DOUBLE)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def gradients(function, mixed, weights, options, **inputs):
    """Outputs, and the gradients of a random scalar of them with respect to every input."""
    outputs = function(mixed, weights, options, **inputs)
    boundary = inputs.get("boundary")
    leaves = {"mixed": mixed, **{n: w for n, w in weights._asdict().items() if w is not None}}
    if boundary is not None:
        leaves |= {f"boundary.{n}": x for n, x in boundary._asdict().items()}
    generator = torch.Generator().manual_seed(7)
    # Coefficients that every dtype holds exactly, so that runs in different ones can be compared.
    draws = [torch.randn(x.shape, dtype=DOUBLE, generator=generator).bfloat16() for x in outputs]
    scalar = sum((x * draw.to(x)).sum() for x, draw in zip(outputs, draws, strict=True))
    grads = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    return outputs, dict(zip(leaves, grads, strict=True))


def assert_same(ours, theirs, bound=1e-12):
    """Outputs and gradients of two implementations agree."""
    for name, a, b in zip("qkv", theirs[0], ours[0], strict=True):
        assert_close(name, a, b, bound)
    for name, grad in theirs[1].items():
        if grad is None or not grad.any():
            assert ours[1][name] is None or not ours[1][name].any(), f"gradient of {name} is not zero"
        else:
            assert_close(f"gradient of {name}", grad, ours[1][name], bound)


def random_boundary(segments, weights, groups, queries, dim, delayed, batch=1):
    shape = (segments, weights.boundary_rows, batch, groups, queries + 1, dim)
    latents = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    return Boundary(latents, torch.randn(segments, batch, delayed, dtype=DOUBLE, requires_grad=True))


@dataclass(frozen=True)
class Case:
    """One call of the mix. ``documents`` are cu_seqlens; the rest is as in ``cca_mix``."""

    tokens: int = 37
    batch: int = 2
    groups: int = 2
    queries: int = 2
    dim: int = 16
    kernel_sizes: tuple[int, int] = (2, 2)
    convs: tuple[bool, bool] = (True, True)
    bias: bool = True
    mean: bool = True
    shift: bool = True
    form: str = "linear"
    temperature: float | None = None
    width: int | None = 8
    rotary_batch: int = 1
    rotary_scale: float = 1.0
    interleaved: bool = False
    documents: tuple[int, ...] | None = None
    boundary: bool = False
    query_heads: tuple[int, int] | None = None
    order: str = "sbhd"

    def arguments(self, dtype: torch.dtype = DOUBLE, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """mixed, weights, options and the keyword arguments; in every dtype values that bf16 holds."""
        torch.manual_seed(seed)
        conv0, conv1 = self.convs
        mixed = random_mixed(self.tokens, self.groups, self.queries, self.dim, self.batch)
        weights = random_weights(
            self.groups, self.queries, self.dim, *self.kernel_sizes, conv0=conv0, conv1=conv1, bias=self.bias
        )
        if weights.conv1_weight is not None:  # as large as a trained one, so that it does not drown the mean
            weights = weights._replace(conv1_weight=weights.conv1_weight / self.dim**0.5)
        if self.temperature is not None:
            weights = weights._replace(temperature=torch.full_like(weights.temperature, self.temperature))
        first_delayed = self.groups * self.dim // 2
        delayed = self.groups * self.dim - first_delayed if self.shift else 0
        segments = 1 if self.documents is None else len(self.documents) - 1
        boundary = None
        if self.boundary:
            shape = self.groups, self.queries, self.dim
            boundary = random_boundary(segments, weights, *shape, delayed, self.batch)

        def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            return tensor.detach().bfloat16().to(device, dtype).requires_grad_()

        rotary = None
        if self.width is not None:
            rotary = random_rotary(self.tokens, self.width, self.rotary_batch)
            if self.interleaved:
                rotary = tuple(x[..., : self.width // 2].repeat_interleave(2, -1) for x in rotary)
            wide = torch.promote_types(dtype, torch.float32)
            rotary = tuple((self.rotary_scale * x).float().to(device, wide) for x in rotary)
        options = MixOptions(
            qk_mean=self.mean,
            value_delay_from=first_delayed if self.shift else None,
            temperature_form=self.form,
            rotary_interleaved=self.interleaved,
            query_heads=self.query_heads,
            output_order=self.order,
        )
        inputs = {
            "rotary": rotary,
            "cu_seqlens": None if self.documents is None else torch.tensor(self.documents, device=device),
            "boundary": None if boundary is None else Boundary(*map(cast, boundary)),
        }
        return cast(mixed), MixWeights(*map(cast, weights)), options, inputs

    def errors(self, dtype: torch.dtype, device: str, backend: str, seed: int = 0) -> dict[str, float]:
        """Relative errors of q, k, v and every gradient against the reference in fp64."""
        *exact_arguments, exact_inputs = self.arguments(device=device, seed=seed)
        *arguments, inputs = self.arguments(dtype, device, seed)
        exact, exact_gradients = gradients(cca_mix_reference, *exact_arguments, **exact_inputs)
        got, got_gradients = gradients(partial(cca_mix, backend=backend), *arguments, **inputs)
        pairs = dict(zip("qkv", zip(exact, got, strict=True), strict=True))
        for name, gradient in exact_gradients.items():
            other = got_gradients[name]
            if gradient is not None and gradient.numel():
                pairs[f"gradient of {name}"] = (
                    gradient,
                    torch.zeros_like(gradient) if other is None else other,
                )
            elif other is not None:
                assert not other.any(), f"gradient of {name} is not zero"
        for name, (a, b) in pairs.items():
            assert a.shape == b.shape, f"{name}: {tuple(b.shape)} for {tuple(a.shape)}"
            assert b.isfinite().all(), f"{name}: not finite"
        return {name: relative_error(a, b) for name, (a, b) in pairs.items()}
