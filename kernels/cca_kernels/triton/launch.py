"""Start the kernels: shapes, strides, scratch memory, grids."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cca_kernels.triton.backward import (
    conv_output_gradient_kernel,
    filter_gradient_kernel,
    latent_gradient_kernel,
)
from cca_kernels.triton.compose import compose_kernel, decompose_kernel
from cca_kernels.triton.configs import Config, config_for
from cca_kernels.triton.forward import mix_kernel
from cca_kernels.triton.segments import segments_kernel

# Below this tau a key has lost its direction to rounding: fp16 has few exponents, the others have many.
_LOST_BELOW = {torch.float16: 2.0**-6, torch.bfloat16: 2.0**-60, torch.float32: 2.0**-60}
TUNE_VARIABLE = "CCA_KERNELS_TUNE"
"""Set to 1, kernels run with tiles measured on this GPU: at first use, and from a file after that."""
_ROWS_PER_BLOCK = 1024
_CHANNELS_PER_BLOCK = 16


class Settings(NamedTuple):
    """What is not a tensor, as the operator gets it."""

    qk_mean: bool
    value_delay_from: int
    """G * D where nothing is delayed."""
    exponential: bool
    interleaved: bool
    first_query: int
    query_count: int
    """Of the R queries of a group, the first and the number that are made."""
    order: str


class Inputs(NamedTuple):
    """The tensors that the operator gets; see :func:`cca_kernels.cca_mix_reference`."""

    mixed: Tensor
    conv0: Tensor | None
    bias0: Tensor | None
    conv1: Tensor | None
    bias1: Tensor | None
    temperature: Tensor
    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor | None
    before: Tensor | None
    value_before: Tensor | None

    @property
    def differentiable(self) -> list[str]:
        """Names of the tensors that are there and have a gradient."""
        fixed = ("cos", "sin", "cu_seqlens")
        return [name for name, x in self._asdict().items() if x is not None and name not in fixed]


def empty_heads(like: Tensor, heads: int, order: str) -> Tensor:
    """An empty [S, B, heads, D] that lies in memory in this order, "sbhd", "bshd" or "bhsd"."""
    size = dict(zip("sbhd", (like.shape[0], like.shape[1], heads, like.shape[-1]), strict=True))
    return like.new_empty([size[axis] for axis in order]).permute([order.index(axis) for axis in "sbhd"])


@dataclass
class Launch:
    """One call of the mix: what its kernels have in common."""

    inputs: Inputs
    settings: Settings
    chosen: Config | None = None
    """Tiles to use in place of those of the table."""

    def __post_init__(self) -> None:
        x = self.inputs
        self.tokens, self.batch, self.groups, heads, self.dim = x.mixed.shape
        self.queries = heads - 2
        self.heads = self.groups * (self.settings.query_count + 1)
        self.k0, self.k1 = (1 if w is None else w.shape[-1] for w in (x.conv0, x.conv1))
        self.rows = self.tokens * self.batch
        self._heads = {
            "QUERIES": self.queries,
            "FIRST": self.settings.first_query,
            "COUNT": self.settings.query_count,
        }
        self._heads |= {"DIM": self.dim}
        self._grouped = self._heads | {"GROUPS": self.groups}
        self._convs = self._heads | {
            "K0": self.k0,
            "K1": self.k1,
            "CONV0": x.conv0 is not None,
            "CONV1": x.conv1 is not None,
            "BIAS0": x.bias0 is not None,
            "BIAS1": x.bias1 is not None,
        }
        self._packed = {"PACKED": x.cu_seqlens is not None}
        self._boundary = self._packed | {"BOUNDARY": x.before is not None}
        self._rotary = {
            "WIDTH": 0 if x.cos is None else x.cos.shape[-1],
            "INTERLEAVED": self.settings.interleaved,
            "EXPONENTIAL": self.settings.exponential,
        }

    @property
    def taps(self) -> int:
        return self.k0 + self.k1 - 1

    @cached_property
    def config(self) -> Config:
        if self.chosen is not None:
            return self.chosen
        mixed = self.inputs.mixed
        if mixed.is_cuda and os.environ.get(TUNE_VARIABLE) == "1":
            from cca_kernels.triton.tuning import tuned_config  # which launches kernels

            return tuned_config(self.inputs, self.settings)
        return config_for(mixed)

    @cached_property
    def segments(self) -> Tensor | None:
        """[3, S], see :func:`segments_kernel`."""
        starts = self.inputs.cu_seqlens
        if starts is None:
            return None
        out = starts.new_empty(3, self.tokens, dtype=torch.int32)
        count = starts.numel() - 1
        if count < 1:
            out.fill_(-1)
            out[2] = 0
            return out
        grid = triton.cdiv(self.tokens, _ROWS_PER_BLOCK)
        self._start(
            segments_kernel,
            grid,
            starts,
            out,
            self.tokens,
            count,
            BLOCK=_ROWS_PER_BLOCK,
            SEARCH_STEPS=count.bit_length(),
        )
        return out

    @cached_property
    def _composed(self) -> tuple[Tensor, Tensor]:
        x = self.inputs
        filters = x.mixed.new_empty(self.heads, self.taps, self.dim, self.dim)
        biases = x.mixed.new_empty(self.heads, self.dim, dtype=torch.float32)
        self._start(
            compose_kernel,
            self.heads * (self.taps + 1),
            x.conv0,
            x.bias0,
            x.conv1,
            x.bias1,
            filters,
            biases,
            **self._convs,
            BLOCK_IN=_CHANNELS_PER_BLOCK,
            num_warps=8,
        )
        return filters, biases

    def _mix(self, out: Tensor, norms: Tensor, value: Tensor, *, key: bool, recover_below: float) -> None:
        x, tile = self.inputs, self.config.mix
        filters, biases = self._composed
        units = self.groups * (1 if key else self.settings.query_count)
        self._start(
            mix_kernel, units * triton.cdiv(self.rows, tile.rows),
            x.mixed, filters, biases, x.temperature, x.cos, x.sin, self.segments, x.before, x.value_before,
            out, norms, value,
            self.tokens, self.batch, self.settings.value_delay_from,
            *x.mixed.stride()[:4], *out.stride()[:3], *value.stride()[:3], *_table_strides(x.cos),
            *_table_strides(x.sin),
            **self._grouped, **self._boundary, **self._rotary,
            TAPS=self.taps, MEAN=self.settings.qk_mean, KEY=key, RECOVER_BELOW=recover_below,
            BLOCK_ROWS=tile.rows, BLOCK_K=tile.inner, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip

    def _start(self, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        with torch.cuda.device_of(self.inputs.mixed):  # Triton starts kernels on the current device
            kernel[(programs,)](*args, **options)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the inverse norms [S * B, heads] in fp32."""
        mixed, order = self.inputs.mixed, self.settings.order
        q = empty_heads(mixed, self.groups * self.settings.query_count, order)
        k, v = (empty_heads(mixed, self.groups, order) for _ in "kv")
        norms = mixed.new_empty(self.rows, self.heads, dtype=torch.float32)
        if self.rows:
            self._mix(q, norms, v, key=False, recover_below=0)
            self._mix(k, norms, v, key=True, recover_below=0)
        return q, k, v, norms

    def backward(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, q: Tensor, k: Tensor, norms: Tensor
    ) -> list[Tensor | None]:
        """Gradients of the tensors of ``Inputs``, in their order; None for what has none."""
        x = self.inputs
        if not self.rows:
            names = x.differentiable
            return [torch.zeros_like(y) if name in names else None for name, y in x._asdict().items()]
        d_q, d_k, d_v = (g if g.stride(-1) == 1 else g.contiguous() for g in (d_q, d_k, d_v))
        d_mixed = torch.empty_like(x.mixed, memory_format=torch.contiguous_format)
        d_conv, d_temperature = self._conv_output_gradient(d_q, d_k, q, k, norms, scratch=d_mixed)
        self._latent_gradient(d_conv, d_v, d_mixed, before=False)
        d_before, d_value_before = None, None
        if x.before is not None and x.value_before is not None:
            d_before = torch.empty_like(x.before, memory_format=torch.contiguous_format)
            self._latent_gradient(d_conv, d_v, d_before, before=True)
            d_value_before = self._value_before_gradient(d_v)
        d_convs = self._conv_gradients(d_conv)
        return [d_mixed, *d_convs, d_temperature, None, None, None, d_before, d_value_before]

    def _conv_output_gradient(
        self, d_q: Tensor, d_k: Tensor, q: Tensor, k: Tensor, norms: Tensor, scratch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[S * B, heads, D], and the gradient of the temperature. Overwrites the keys of ``scratch``."""
        x, tile = self.inputs, self.config.conv_output_gradient
        lost_below = _LOST_BELOW[x.mixed.dtype]
        recovered = scratch[..., self.queries, :]
        self._mix(recovered, norms, d_k, key=True, recover_below=lost_below)
        d_conv = x.mixed.new_empty(self.rows, self.heads, self.dim)
        tiles = triton.cdiv(self.rows, tile.rows)
        d_tau = norms.new_empty(tiles, self.groups)
        for key, gradient, out in ((False, d_q, q), (True, d_k, k)):
            self._start(
                conv_output_gradient_kernel, tiles * out.shape[2],
                gradient, out, recovered, norms, x.temperature, x.cos, x.sin, self.segments, d_conv, d_tau,
                self.tokens, self.batch,
                *gradient.stride()[:3], *out.stride()[:3], *recovered.stride()[1:3],
                *_table_strides(x.cos), *_table_strides(x.sin),
                **self._only("COUNT", "GROUPS", "DIM"), **self._rotary, **self._packed,
                KEY=key, RECOVER_BELOW=lost_below, BLOCK_ROWS=tile.rows, num_warps=tile.warps,
            )  # fmt: skip
        return d_conv, d_tau.sum(0).to(x.temperature.dtype)

    def _latent_gradient(self, d_conv: Tensor, d_v: Tensor, out: Tensor, *, before: bool) -> None:
        """Fill the gradient of the latents and values, or of the latents before each segment."""
        x, tile = self.inputs, self.config.latent_gradient
        rows = out.numel() // (out.shape[-1] * out.shape[-2] * out.shape[-3])
        if not rows:
            return
        filters, _ = self._composed
        for key in (False, True):
            units = self.groups * (1 if key else self.queries)
            self._start(
                latent_gradient_kernel, units * triton.cdiv(rows, tile.rows),
                d_conv, filters, self.segments, x.cu_seqlens, d_v, out,
                self.tokens, self.batch, rows, self.settings.value_delay_from, *d_v.stride()[:3],
                **self._grouped, **self._packed,
                TAPS=self.taps, MEAN=self.settings.qk_mean, KEY=key, BEFORE=before,
                BLOCK_ROWS=tile.rows, BLOCK_K=tile.inner, STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip

    def _value_before_gradient(self, d_v: Tensor) -> Tensor:
        """The delayed values before a segment are read by its first token; an empty segment has none."""
        delayed = d_v.flatten(2)[..., self.settings.value_delay_from :]
        starts = self.inputs.cu_seqlens
        if starts is None:
            return delayed[:1].clone()
        starts = starts.clamp(max=self.tokens)  # what is said to lie beyond is not there
        is_empty = (starts[1:] == starts[:-1])[:, None, None]
        return delayed[starts[:-1].clamp(max=self.tokens - 1)].masked_fill(is_empty, 0)

    def _conv_gradients(self, d_conv: Tensor) -> list[Tensor | None]:
        """Of conv0, bias0, conv1, bias1."""
        x, tile = self.inputs, self.config.filter_gradient
        block_in = min(self.dim, 128 if x.mixed.dtype.itemsize == 2 else 64)
        blocks = (self.dim // block_in) * (self.dim // tile.inner)
        units = self.heads * self.taps * blocks
        most = triton.cdiv(self.rows, tile.rows)
        splits = max(1, min(most, self.config.filter_gradient_programs // units))
        d_filters = d_conv.new_empty(splits, self.heads, self.taps, self.dim, self.dim, dtype=torch.float32)
        d_biases = d_conv.new_empty(splits, self.heads, self.dim, dtype=torch.float32)
        self._start(
            filter_gradient_kernel, units * splits,
            x.mixed, d_conv, x.before, self.segments, d_filters, d_biases,
            self.tokens, self.batch, triton.cdiv(most, splits) * tile.rows, *x.mixed.stride()[:4],
            **self._grouped, **self._boundary,
            TAPS=self.taps, BLOCK_ROWS=tile.rows, BLOCK_IN=block_in, BLOCK_OUT=tile.inner, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip
        # Heads that other ranks make have no gradient here.
        make = torch.empty_like if self.settings.query_count == self.queries else torch.zeros_like
        convs = (x.conv0, x.bias0, x.conv1, x.bias1)
        gradients = [None if w is None else make(w, memory_format=torch.contiguous_format) for w in convs]
        self._start(
            decompose_kernel, self.heads * (self.dim // _CHANNELS_PER_BLOCK),
            d_filters.sum(0), d_biases.sum(0), x.conv0, x.bias0, x.conv1, *gradients,
            **self._convs, BLOCK_IN=_CHANNELS_PER_BLOCK,
        )  # fmt: skip
        return gradients

    def _only(self, *names: str) -> dict[str, int]:
        return {name: self._grouped[name] for name in names}


def _table_strides(table: Tensor | None) -> tuple[int, int]:
    """Elements from token to token and from sample to sample of [S, 1 or B, 1, width]."""
    if table is None:
        return 0, 0
    return table.stride(0), table.stride(1) if table.shape[1] > 1 else 0
