"""The definition of the CCA mix in plain PyTorch (arXiv 2510.04476, section 3).

Every faster path is tested against this file, gradients included. It is differentiable, works in
any floating dtype and for any kernel sizes, and does not synchronise with the host.

Shape letters, used throughout the project::

    S  tokens held locally          G  key/value groups (= KV heads)   K0, K1  taps of the two convs
    B  batch                        R  query heads per group           P       boundary rows, (K0-1)+(K1-1)
    D  head dim                     C  conv channels, G*(R+1)*D        N       segments

A *segment* is a run of tokens that continue each other: a whole sequence, a packed document, or the
part of one that lies in a context-parallel chunk. What precedes a segment is given by its boundary
rows; all-zero boundary rows mean that the segment starts a document.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MixWeights(NamedTuple):
    """Parameters of the mix. A conv whose weight is None is off: it passes its input through.

    Conv channels are group-interleaved: for each group its R query heads, then its key head.
    The last tap of a kernel multiplies the current token.
    """

    conv0_weight: Tensor | None
    """[C, 1, K0], depthwise."""
    conv0_bias: Tensor | None
    """[C]"""
    conv1_weight: Tensor | None
    """[C, D, K1], one dense D x D block per head and tap."""
    conv1_bias: Tensor | None
    """[C]"""
    temperature: Tensor
    """[G]"""

    @property
    def kernel_sizes(self) -> tuple[int, int]:
        """(K0, K1); a conv that is off counts as one tap."""
        k0, k1 = (
            1 if weight is None else weight.shape[-1] for weight in (self.conv0_weight, self.conv1_weight)
        )
        return k0, k1

    @property
    def boundary_rows(self) -> int:
        """P, the number of earlier tokens that a conv output depends on."""
        return sum(self.kernel_sizes) - 2


class Boundary(NamedTuple):
    """What the mix needs from the tokens before each segment."""

    latents: Tensor
    """[N, P, B, G, R+1, D], the raw (pre-conv) query and key latents, oldest row first."""
    value: Tensor
    """[N, B, G*D - value_delay_from], the last projected value, delayed channels only."""


@dataclass(frozen=True)
class MixOptions:
    """The parts of the mix that are not tensors."""

    qk_mean: bool = True
    """Add the mean of the pre-conv query and key latents to the conv outputs."""
    value_delay_from: int | None = None
    """First of the flat G*D value channels that is taken from the previous token; None: no shift.

    Over all groups this is half of the channels; a tensor-parallel rank passes its own share.
    """
    temperature_form: Literal["linear", "exp"] = "linear"
    """tau = temperature, or tau = exp(temperature)."""
    rotary_interleaved: bool = False
    """Pair neighbouring channels in RoPE instead of the two halves."""
    query_heads: tuple[int, int] | None = None
    """First and number of the R query heads per group to return; None: all.

    For a tensor-parallel rank that shares a group: it needs all latents for the mean of the key.
    """
    output_order: Literal["sbhd", "bshd", "bhsd"] = "sbhd"
    """How q, k and v lie in memory; their shape is [S, B, heads, D] in any case."""


def cca_mix_reference(
    mixed: Tensor,
    weights: MixWeights,
    options: MixOptions,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    boundary: Boundary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn projected latents into the queries, keys and values of core attention.

    Args:
        mixed: [S, B, G, R+2, D], the output of ``linear_qkv``: per group R query latents, the key
            latent, the value.
        weights: convs and temperature.
        options: switches.
        rotary: cos and sin, each broadcastable to [S, B, 1, rotary width], or None for no RoPE.
            The first ``rotary width`` channels of a head are rotated, the others pass.
        cu_seqlens: [N+1] integers, where each segment starts, the first at 0, and the end of the last,
            at most S. Segments may be empty. Tokens after the last end are padding: their outputs are
            exactly zero. None means one segment.
        boundary: rows before each segment; None means that every segment starts a document.

    Returns:
        q [S, B, G*R, D], k [S, B, G, D] and v [S, B, G, D] in the dtype of ``mixed``. With
        ``query_heads``, R is the number of these.

    The convs run in the dtype of ``mixed``; mean, norm, temperature and RoPE in at least fp32, with one
    rounding at the end. A zero row of q or k stays zero and passes no gradient. In fp32 on a GPU set
    ``torch.backends.cudnn.allow_tf32 = False`` to make the convs exact.
    """
    tokens, batch, groups, heads, dim = mixed.shape
    first, count = options.query_heads or (0, heads - 2)
    wide = torch.promote_types(mixed.dtype, torch.float32)
    latents, value = mixed[..., :-1, :], mixed[..., -1, :]

    own = latents, weights, boundary
    if count < heads - 2:
        own = _select_heads(first, count, *own)
    qk = _convolve(*own, cu_seqlens).to(wide)
    if options.qk_mean:
        query_latents, key_latent = latents[..., :-1, :].to(wide), latents[..., -1:, :].to(wide)
        query_mean = (query_latents + key_latent) / 2
        key_mean = query_mean.mean(-2, keepdim=True)
        qk = qk + torch.cat([query_mean[..., first : first + count, :], key_mean], -2)

    tau = weights.temperature.to(wide)
    if options.temperature_form == "exp":
        tau = tau.exp()
    q = _unit_rows(qk[..., :-1, :]) * dim**0.5
    k = _unit_rows(qk[..., -1, :]) * (dim**0.5 * tau[:, None])
    q = q.reshape(tokens, batch, groups * count, dim)
    if rotary is not None:
        q, k = (_rotate(x, *rotary, options.rotary_interleaved) for x in (q, k))
    q, k = q.to(mixed.dtype), k.to(mixed.dtype)

    v = _shift_value(value, options.value_delay_from, cu_seqlens, boundary)
    if cu_seqlens is not None:
        is_padding = torch.arange(tokens, device=mixed.device) >= cu_seqlens[-1]
        q, k, v = (x.masked_fill(is_padding[:, None, None, None], 0) for x in (q, k, v))
    q, k, v = (_lay_out(x, options.output_order) for x in (q, k, v))
    return q, k, v


def _lay_out(x: Tensor, order: str) -> Tensor:
    """The same [S, B, heads, D], in memory in this order of axes."""
    axes = ["sbhd".index(axis) for axis in order]
    return x.permute(axes).contiguous().permute([order.index(axis) for axis in "sbhd"])


def _select_heads(
    first: int, count: int, latents: Tensor, weights: MixWeights, boundary: Boundary | None
) -> tuple[Tensor, MixWeights, Boundary | None]:
    """What belongs to ``count`` query heads of each group and to the key head."""
    groups, heads = latents.shape[2:4]

    def select(x: Tensor, dim: int) -> Tensor:
        return torch.cat([x.narrow(dim, first, count), x.narrow(dim, heads - 1, 1)], dim)

    def of_weight(weight: Tensor | None) -> Tensor | None:
        if weight is None:
            return None
        return select(weight.unflatten(0, (groups, heads, -1)), 1).flatten(0, 2)

    own = MixWeights._make([*map(of_weight, weights[:-1]), weights.temperature])
    if boundary is not None:
        boundary = Boundary(select(boundary.latents, 4), boundary.value)
    return select(latents, 3), own, boundary


def _convolve(
    latents: Tensor, weights: MixWeights, boundary: Boundary | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Both convs over [S, B, G, R+1, D], causal, padded once before the first (section 3.2)."""
    rows = weights.boundary_rows
    tokens, batch, *head_shape = latents.shape
    stream, position = _insert_rows(latents, rows, None if boundary is None else boundary.latents, cu_seqlens)
    if tokens == 0:  # a conv refuses to have no outputs
        stream = F.pad(stream, (0, 0) * (stream.dim() - 1) + (0, 1))
    x = stream.flatten(2).permute(1, 2, 0)  # [B, C, stream]
    if weights.conv0_weight is not None:
        x = F.conv1d(x, weights.conv0_weight, weights.conv0_bias, groups=x.shape[1])
    if weights.conv1_weight is not None:
        x = F.conv1d(x, weights.conv1_weight, weights.conv1_bias, groups=x.shape[1] // latents.shape[-1])
    # Outputs at inserted rows mix segments; they are computed and never read.
    return x.permute(2, 0, 1)[position - rows].view(tokens, batch, *head_shape)


def _shift_value(
    value: Tensor, delay_from: int | None, cu_seqlens: Tensor | None, boundary: Boundary | None
) -> Tensor:
    """Take channels from ``delay_from`` on from the previous token of the segment (section 3.3)."""
    if delay_from is None:
        return value.clone(memory_format=torch.contiguous_format)
    flat = value.flatten(2)  # [S, B, G*D]
    current, delayed = flat[..., :delay_from], flat[..., delay_from:]
    stream, position = _insert_rows(
        delayed, 1, None if boundary is None else boundary.value[:, None], cu_seqlens
    )
    return torch.cat([current, stream[position - 1]], -1).view(value.shape)


def _insert_rows(
    x: Tensor, count: int, rows: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Put ``count`` rows (zeros if ``rows`` is None) before every segment of x, along axis 0.

    Args:
        x: [S, ...].
        rows: [N, count, ...].
        cu_seqlens: [N+1], or None for N = 1.

    Returns:
        The longer stream, and where in it each of the S tokens went.
    """
    tokens = x.shape[0]
    if cu_seqlens is None:
        first = x.new_zeros(count, *x.shape[1:]) if rows is None else rows[0]
        return torch.cat([first, x]), torch.arange(count, count + tokens, device=x.device)
    segments = cu_seqlens.numel() - 1
    token = torch.arange(tokens, device=x.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    position = token + count * (segment + 1)
    # Padding after the last document counts as one more segment, so that it stays apart.
    stream = x.new_zeros(tokens + count * (segments + 1), *x.shape[1:])
    stream = stream.index_copy(0, position, x)
    if rows is not None:
        start = cu_seqlens[:-1, None] + count * torch.arange(segments, device=x.device)[:, None]
        where = (start + torch.arange(count, device=x.device)).flatten()
        stream = stream.index_copy(0, where, rows.flatten(0, 1))
    return stream, position


def _unit_rows(x: Tensor) -> Tensor:
    """x / |x| over the last axis; a zero row gives zero and a zero gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    # Below this the squares of the norm underflow, so the norm itself says nothing.
    is_zero = norm <= torch.finfo(x.dtype).tiny ** 0.5
    return x * (1 / norm.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE on the first cos.shape[-1] channels of [S, B, heads, D]."""
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    if interleaved:
        half = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    return torch.cat([turned * cos.to(x.dtype) + half * sin.to(x.dtype), passed], -1)
