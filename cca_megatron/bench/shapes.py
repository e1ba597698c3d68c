"""The models whose mix and attention block are measured."""

from dataclasses import dataclass

import torch

from cca_kernels.triton.accuracy import random_inputs
from cca_kernels.triton.launch import Inputs, Settings

QUICK_TOKENS = (16384, 4096)
ALL_TOKENS = (16384, 4096, 8192, 32768, 65536, 131072)
"""The length that the goals are set for comes first, where time is limited."""


@dataclass(frozen=True)
class MixShape:
    """Latent heads of one layer, with value shift, half-width RoPE and K0 = K1 = 2."""

    name: str
    hidden: int
    query_heads: int
    key_heads: int
    dim: int = 128

    @property
    def queries(self) -> int:
        """Query heads per key head."""
        return self.query_heads // self.key_heads

    @property
    def settings(self) -> Settings:
        """What the operator gets beside tensors."""
        delay_from = self.key_heads * self.dim // 2
        return Settings(True, delay_from, False, False, 0, self.queries, "sbhd")

    def inputs(self, tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Random data for one sequence."""
        return random_inputs(tokens, self.key_heads, self.queries, self.dim, dtype, device, seed)


ZAYA1 = MixShape("ZAYA1", 2048, 8, 2)
CCA_4X = MixShape("CCA-4x", 2048, 4, 4)
SEVEN_B = MixShape("7B", 4096, 16, 4)
SHAPES = (ZAYA1, CCA_4X, SEVEN_B)
QUICK_SHAPES = (ZAYA1, CCA_4X)
"""Of one width, so that the blocks they are compared with are measured once."""
