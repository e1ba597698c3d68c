"""Compressed Convolutional Attention (CCA, CCGQA; arXiv 2510.04476) for Megatron-Core.

``CCASelfAttention`` is imported on first use: it needs megatron-core, ``CCAConfig`` does not.
"""

from typing import TYPE_CHECKING

from cca_megatron.config import CCAConfig

if TYPE_CHECKING:
    from cca_megatron.attention import CCASelfAttention

__all__ = ["CCAConfig", "CCASelfAttention"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "CCASelfAttention":
        from cca_megatron.attention import CCASelfAttention

        return CCASelfAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
