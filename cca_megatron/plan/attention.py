"""Parameters, FLOPs, kept bytes and cache of one attention layer: CCA, MHA and GQA, MLA.

FLOPs are those of a forward pass, 2 per multiply-add. Those of core attention are given for one pair of a
query and a key, so that the caller decides how many pairs a causal mask or a window leaves.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from cca_megatron.plan.parts import Part
from cca_megatron.plan.traffic import AttentionShape

PROJECTIONS, MIX = "attention projections", "attention mix"
_LOG_SUM_EXP = 4
"""Bytes per token and head that flash attention keeps beside its output."""


class Attention(ABC):
    """One attention layer, projections included."""

    hidden_size: int
    query_heads: int

    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Its parameters."""

    @abstractmethod
    def pair_flops(self) -> int:
        """Forward FLOPs of core attention for one query and one key, over all heads."""

    @abstractmethod
    def kept(self, tensor: int, element: int) -> dict[str, float]:
        """Bytes per token that one of ``tensor`` ranks keeps for the backward pass, by Megatron's names.

        The layer's input, as normalised, is the caller's to count. The mix of CCA is the fused kernels', core
        attention flash attention.

        Args:
            tensor: tensor-parallel ranks.
            element: bytes of a number, 2 for bf16.
        """

    @abstractmethod
    def cache_elements(self) -> int:
        """Numbers per token that generation caches."""

    @abstractmethod
    def traffic_shape(self, element: int) -> AttentionShape:
        """The same layer as :func:`cca_megatron.plan.traffic.traffic` takes it."""

    def flops(self) -> dict[str, int]:
        """Forward FLOPs per token of everything but core attention, by part."""
        return {PROJECTIONS: 2 * sum(part.count for part in self.parts() if part.name == PROJECTIONS)}


@dataclass(frozen=True)
class HeadAttention(Attention):
    """Multi-head (as many KV heads as query heads) and grouped-query attention."""

    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    """Of the projections."""

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all key heads."""
        return self.kv_heads * self.head_dim

    def parts(self) -> tuple[Part, ...]:
        width = 2 * self.query_width + 2 * self.key_width
        projections = Part(PROJECTIONS, self.hidden_size * width)
        if not self.bias:
            return (projections,)
        return (
            projections,
            Part("biases", self.query_width + 2 * self.key_width),
            Part("biases", self.hidden_size, "whole"),
        )

    def pair_flops(self) -> int:
        return 4 * self.query_width

    def kept(self, tensor: int, element: int) -> dict[str, float]:
        query, key = self.query_width / tensor, self.key_width / min(tensor, self.kv_heads)
        return {
            "core_attn": (query + 2 * key) * element,
            "attn_proj": query * element,
            "log_sum_exp": self.query_heads / tensor * _LOG_SUM_EXP,
        }

    def cache_elements(self) -> int:
        return 2 * self.key_width

    def traffic_shape(self, element: int) -> AttentionShape:
        return AttentionShape(
            self.hidden_size, self.query_heads, self.kv_heads, self.head_dim, None, element_bytes=element
        )


@dataclass(frozen=True)
class CompressedAttention(HeadAttention):
    """CCA and CCGQA: the same over latent heads, with the mix between projections and core attention."""

    conv_kernel_sizes: tuple[int, int] = (2, 2)
    conv0: bool = True
    conv1: bool = True
    conv_bias: bool = True
    recompute_mix: bool = False

    @property
    def channels(self) -> int:
        """That the convs run over: queries and keys."""
        return self.query_width + self.key_width

    def _conv_weights(self) -> int:
        """Each is used once per token."""
        k0, k1 = self.conv_kernel_sizes
        return self.channels * (self.conv0 * k0 + self.conv1 * self.head_dim * k1)

    def parts(self) -> tuple[Part, ...]:
        biases = self.channels * self.conv_bias * (self.conv0 + self.conv1)
        mix = self._conv_weights() + biases + self.kv_heads  # a temperature for each
        return (*super().parts(), Part(MIX, mix, "group", groups=self.kv_heads))

    def flops(self) -> dict[str, int]:
        return super().flops() | {MIX: 2 * self._conv_weights()}

    def kept(self, tensor: int, element: int) -> dict[str, float]:
        kept = super().kept(tensor, element)
        groups = min(tensor, self.kv_heads)
        # Ranks that share a group hold all of its latents.
        latents = (self.query_width + 2 * self.key_width) / groups * element
        norms = (self.query_heads / tensor + self.kv_heads / groups) * 4
        if self.recompute_mix:
            return kept | {"core_attn": 0.0, "mix": latents}
        return kept | {"mix": latents + norms}

    def traffic_shape(self, element: int) -> AttentionShape:
        sizes = (
            self.conv_kernel_sizes[0] if self.conv0 else 1,
            self.conv_kernel_sizes[1] if self.conv1 else 1,
        )
        return AttentionShape(
            self.hidden_size, self.query_heads, self.kv_heads, self.head_dim, sizes, element_bytes=element
        )


@dataclass(frozen=True)
class LatentAttention(Attention):
    """Multi-head latent attention (MLA, arXiv 2405.04434), as megatron-core 0.19 builds it."""

    hidden_size: int
    query_heads: int
    kv_rank: int
    query_rank: int | None
    """None: queries are not compressed."""
    head_dim: int = 128
    """Of queries and keys without positions, and of values."""
    rotary_dim: int = 64
    """Of the part of queries and keys with positions; the keys' is one for all heads."""

    @property
    def _query_dim(self) -> int:
        return self.head_dim + self.rotary_dim

    def parts(self) -> tuple[Part, ...]:
        name, heads = PROJECTIONS, self.query_heads
        query_in = self.query_rank or self.hidden_size
        up = query_in * heads * self._query_dim + self.kv_rank * heads * 2 * self.head_dim
        down = self.hidden_size * (self.kv_rank + self.rotary_dim + (self.query_rank or 0))
        norms = self.kv_rank + (self.query_rank or 0)
        return (
            Part(name, up + heads * self.head_dim * self.hidden_size),
            Part(name, down, "whole"),
            Part("norms", norms, "whole"),
        )

    def pair_flops(self) -> int:
        return 2 * self.query_heads * (self._query_dim + self.head_dim)

    def kept(self, tensor: int, element: int) -> dict[str, float]:
        heads = self.query_heads / tensor
        # Compressed latents before and after their norm; up-projected keys and values, of which the keys are
        # copied to stand beside the rotary part, and the values are kept in place.
        latents = 2 * (self.kv_rank + (self.query_rank or 0)) + self.rotary_dim
        core = heads * (2 * self._query_dim + 2 * self.head_dim)
        return {
            "mix": latents * element,
            "core_attn": core * element,
            "attn_proj": heads * self.head_dim * element,
            "log_sum_exp": heads * _LOG_SUM_EXP,
        }

    def cache_elements(self) -> int:
        return self.kv_rank + self.rotary_dim

    def traffic_shape(self, element: int) -> AttentionShape:
        # Keys are wider than values; what matters is their sum.
        mean_dim = (self._query_dim + self.head_dim) // 2
        return AttentionShape(
            self.hidden_size, self.query_heads, self.query_heads, mean_dim, None, element_bytes=element
        )
