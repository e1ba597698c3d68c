"""Tile sizes: one table for all architectures, never keyed on the number of tokens.

A shape class is the architecture, the width of an element and the head dim. What is not in the table takes
the safe default, whose tiles fit the smallest shared memory. ``cca-megatron bench mix --tune`` measures
candidates on a GPU and prints entries for the table. None of those here has been measured on one yet: they
compile without spilling registers (``python -m cca_kernels.triton.ahead_of_time``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """What one program does, and with how many warps."""

    rows: int
    inner: int
    """Channels per step of the inner product; for the filter gradient, output channels of a program."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """The tiles of each kernel."""

    mix: Tile
    conv_output_gradient: Tile
    latent_gradient: Tile
    filter_gradient: Tile
    filter_gradient_programs: int
    """Programs that the filter gradient aims at; it splits the rows until there are as many."""


def _half(arch: int, dim: int, stages: int, programs: int) -> Config:
    """bf16 and fp16: products on tensor cores."""
    inner = min(dim, 64)
    mix = Tile(64, inner, 8, stages)
    if dim == 256:  # the rows of two warpgroups need more registers than there are
        mix = Tile(64, inner, 16, stages) if arch == 90 else Tile(32, inner, 8, min(stages, 2))
    return Config(
        mix=mix,
        conv_output_gradient=Tile(16, 0, 4, 1) if dim <= 128 else Tile(8, 0, 8, 1),
        latent_gradient=Tile(64, inner, 4 if dim <= 128 else 8, stages),
        filter_gradient=Tile(64, min(dim, 128), 4 if arch == 100 and dim > 64 else 8, stages),
        filter_gradient_programs=programs,
    )


def _single(dim: int, programs: int) -> Config:
    """fp32: exact products, without tensor cores."""
    return Config(
        mix=Tile(32, 16, 4 if dim == 64 else 8, 1),
        conv_output_gradient=Tile(16, 0, 4, 1) if dim <= 128 else Tile(8, 0, 8, 1),
        latent_gradient=Tile(32, 16, 8, 1),
        filter_gradient=Tile(16, min(dim, 64), 4, 1),
        filter_gradient_programs=programs,
    )


ARCHES = {80: (2, 108), 90: (3, 132), 100: (3, 148)}
"""Stages of software pipelining, and multiprocessors, by compute capability."""
DIMS = (64, 128, 256)
TABLE: dict[tuple[int, int, int], Config] = {}
for _arch, (_stages, _processors) in ARCHES.items():
    for _dim in DIMS:
        TABLE[_arch, 2, _dim] = _half(_arch, _dim, _stages, 2 * _processors)
        TABLE[_arch, 4, _dim] = _single(_dim, 2 * _processors)


def safe_config(dtype: torch.dtype, dim: int) -> Config:
    """A config that compiles and runs on every architecture."""
    return _half(80, dim, 1, 108) if dtype.itemsize == 2 else _single(dim, 108)


def config_for(mixed: Tensor) -> Config:
    """Tiles for these latents [..., D] on the device where they are."""
    dim = mixed.shape[-1]
    arch = 10 * torch.cuda.get_device_capability(mixed.device)[0] if mixed.is_cuda else None
    return TABLE.get((arch or 0, mixed.dtype.itemsize, dim)) or safe_config(mixed.dtype, dim)
