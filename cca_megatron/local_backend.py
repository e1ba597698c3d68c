"""Building blocks that need neither Transformer Engine nor Apex: a laptop's backend, and a reference.

Megatron's own torch norm refuses sequence parallelism and its core attention refuses packing; the ones
here do not. Everything else of the local backend is Megatron's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cca_megatron._compat import LocalSpecProvider, TransformerConfig
from cca_megatron.parallel.core_attention import LocalCoreAttention


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last axis, as ``config.normalization`` says.

    The input is cast to the dtype of the weight first, so that a residual stream kept in fp32
    (``fp32_residual_connection``) enters the layer in the layer's dtype. Under sequence parallelism the
    parameters are marked, and Megatron sums their gradients over the tensor-parallel ranks.

    Raises:
        ValueError: ``config.normalization`` is neither.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(
                f"normalization={config.normalization!r}: the local backend has 'RMSNorm' and 'LayerNorm'"
            )
        self.eps = eps
        # Weights stored around zero ("1p") are decayed towards the identity instead of towards nothing.
        self.weight_offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 1.0 - self.weight_offset))
        has_bias = config.normalization == "LayerNorm"
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if has_bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, /) -> Tensor:
        """[..., hidden_size] -> the same shape, in the dtype of the weight."""
        weight: Tensor = self.weight
        x = x.to(weight.dtype)
        if self.weight_offset:
            weight = weight + self.weight_offset
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class CCALocalSpecProvider(LocalSpecProvider):
    """Megatron's local backend with the norm and the core attention of this project."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type[LocalNorm]:
        """The norm; which of the two it is comes from the configuration."""
        return LocalNorm

    def core_attention(self) -> type[LocalCoreAttention]:
        """The core attention."""
        return LocalCoreAttention
