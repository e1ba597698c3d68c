"""The CCA mix: everything between the latent projection and core attention.

Depends on torch (and, for fused backends, triton) alone; knows nothing of Megatron.
"""

from cca_kernels.mix import available_backends, cca_mix
from cca_kernels.reference import Boundary, MixOptions, MixWeights, cca_mix_reference

__all__ = [
    "Boundary",
    "MixOptions",
    "MixWeights",
    "available_backends",
    "cca_mix",
    "cca_mix_reference",
]
