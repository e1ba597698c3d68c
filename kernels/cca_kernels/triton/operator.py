"""``fused_mix``: the kernels as a PyTorch operator.

Two operators are registered, ``cca_kernels::mix`` and ``cca_kernels::mix_backward``, each with a fake, so
that ``torch.compile``, CUDA graphs, activation checkpointing and fake tensors see them as one step each.
Kept for the backward pass are the inputs, one norm per row and head, and q and k, which attention keeps too.
"""

from typing import Any

import torch
from torch import Tensor

from cca_kernels.reference import Boundary, MixOptions, MixWeights
from cca_kernels.triton.launch import Inputs, Launch, Settings, empty_heads


def fused_mix(
    mixed: Tensor,
    weights: MixWeights,
    options: MixOptions,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    boundary: Boundary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cca_kernels.cca_mix_reference` in fused kernels; arguments and results are the same.

    All sums are in fp32 and in a fixed order: repeats are equal bit by bit. cos and sin of a pair of channels
    must be those of a turn, scaled or not: the backward pass inverts them.
    """
    groups, dim = mixed.shape[2], mixed.shape[-1]
    first, count = options.query_heads or (0, mixed.shape[3] - 2)
    delay_from = groups * dim if options.value_delay_from is None else options.value_delay_from
    q, k, v, _ = torch.ops.cca_kernels.mix(
        mixed if mixed.stride(-1) == 1 else mixed.contiguous(),
        *(weight if weight is None else weight.contiguous() for weight in weights),
        *((None, None) if rotary is None else map(_table, rotary)),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        *((None, None) if boundary is None else (rows.contiguous() for rows in boundary)),
        options.qk_mean,
        delay_from,
        options.temperature_form == "exp",
        options.rotary_interleaved,
        first,
        count,
        options.output_order,
    )
    return q, k, v


def _table(table: Tensor) -> Tensor:
    table = table.float()
    return table if table.stride(-1) == 1 else table.contiguous()


# The fields of Inputs and of Settings.
_ARGUMENTS = (
    "Tensor mixed, Tensor? conv0, Tensor? bias0, Tensor? conv1, Tensor? bias1, Tensor temperature, "
    "Tensor? cos, Tensor? sin, Tensor? cu_seqlens, Tensor? before, Tensor? value_before, "
    "bool qk_mean, SymInt value_delay_from, bool exponential, bool interleaved, SymInt first_query, "
    "SymInt query_count, str order"
)


def _split(arguments: tuple[Any, ...]) -> tuple[Inputs, Settings]:
    count = len(Inputs._fields)
    return Inputs(*arguments[:count]), Settings(*arguments[count:])


@torch.library.custom_op(
    "cca_kernels::mix", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _mix(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return Launch(*_split(arguments)).forward()


@_mix.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (mixed, *_), settings = _split(arguments)
    tokens, batch, groups = mixed.shape[:3]
    q = empty_heads(mixed, groups * settings.query_count, settings.order)
    k, v = (empty_heads(mixed, groups, settings.order) for _ in "kv")
    norms = mixed.new_empty(tokens * batch, groups * (settings.query_count + 1), dtype=torch.float32)
    return q, k, v, norms


@torch.library.custom_op(
    "cca_kernels::mix_backward",
    mutates_args=(),
    schema="(Tensor d_q, Tensor d_k, Tensor d_v, Tensor q, Tensor k, Tensor norms, "
    f"{_ARGUMENTS}) -> Tensor[]",
)
def _mix_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, q: Tensor, k: Tensor, norms: Tensor, *arguments: Any
) -> list[Tensor]:
    gradients = Launch(*_split(arguments)).backward(d_q, d_k, d_v, q, k, norms)
    return [gradient for gradient in gradients if gradient is not None]


@_mix_backward.register_fake
def _(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, q: Tensor, k: Tensor, norms: Tensor, *arguments: Any
) -> list[Tensor]:
    inputs, _ = _split(arguments)
    return [
        torch.empty_like(getattr(inputs, name), memory_format=torch.contiguous_format)
        for name in inputs.differentiable
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings = _split(inputs)
    q, k, v, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.set_materialize_grads(False)
    ctx.like_v = v.shape
    ctx.save_for_backward(q, k, norms, *tensors)


def _backward(
    ctx: Any, d_q: Tensor | None, d_k: Tensor | None, d_v: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, norms, *tensors = ctx.saved_tensors
    outputs = (q, k, q.new_empty(()).expand(ctx.like_v))
    given = [
        out.new_zeros(out.shape) if g is None else g for out, g in zip(outputs, (d_q, d_k, d_v), strict=True)
    ]
    gradients = torch.ops.cca_kernels.mix_backward(*given, q, k, norms, *tensors, *ctx.settings)
    found = dict(zip(Inputs(*tensors).differentiable, gradients, strict=True))
    return (*(found.get(name) for name in Inputs._fields), *(None for _ in ctx.settings))


_mix.register_autograd(_backward, setup_context=_setup_context)
