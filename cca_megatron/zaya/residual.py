"""Residual sums with a scale and a shift per channel for both terms."""

from collections.abc import Callable

import torch
from torch import Tensor

from cca_megatron._compat import MegatronModule, TransformerConfig, jit_fuser


def channel_parameter(config: TransformerConfig, size: int, value: float) -> torch.nn.Parameter:
    """One number per channel, whole on every tensor-parallel rank.

    Under sequence parallelism a rank sees its own tokens only, and Megatron sums the gradients.
    """
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class ResidualScaling(MegatronModule):
    """``(x + hidden_states_bias) * hidden_states_scale + (residual + residual_bias) * residual_scale``.

    In the place of Megatron's bias-dropout-add; all four parameters are [hidden]. The first product is in the
    dtype of the weights and the sum in that of the residual stream, as in ``transformers``.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        for term in ("hidden_states", "residual"):
            for name, value in (("scale", 1.0), ("bias", 0.0)):
                parameter = channel_parameter(config, config.hidden_size, value)
                self.register_parameter(f"{term}_{name}", parameter)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The function of ``((x, bias or None), residual, dropout)`` that Megatron's layer then calls."""

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_with_bias
            if bias is not None:
                x = x + bias
            if dropout:
                x = torch.nn.functional.dropout(x, dropout, training)
            x = x.to(self.hidden_states_scale.dtype)
            scale = _fused_scale if fused else _scale
            return scale(
                x,
                residual,
                self.hidden_states_scale,
                self.hidden_states_bias,
                self.residual_scale,
                self.residual_bias,
            )

        return add


def _scale(
    x: Tensor, residual: Tensor, x_scale: Tensor, x_bias: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    return (x + x_bias) * x_scale + (residual + bias) * scale


_fused_scale = jit_fuser(_scale)
