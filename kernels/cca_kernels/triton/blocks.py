"""What the kernels share: addressing of rows, documents, boundary rows, RoPE.

A *row* is one token of one sample; rows run over samples first, so row = token * batch + sample. A *head* is
one conv head of a group: ``head < COUNT`` is a query, ``head == COUNT`` the key.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, accumulator):
    """``accumulator + a @ b``; products of fp32 are exact to fp32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def row_place(row, alive, segments, tokens, batch, PACKED: tl.constexpr):
    """Token, sample, and distances to the start and the end of the segment; both are -1 for padding."""
    token, sample = row // batch, row % batch
    if PACKED:
        since = tl.load(segments + token, mask=alive, other=-1)
        until = tl.load(segments + tokens + token, mask=alive, other=-1)
    else:
        since = tl.where(alive, token, -1)
        until = tl.where(alive, tokens - 1 - token, -1)
    return token.to(tl.int64), sample.to(tl.int64), since, until


@triton.jit
def row_segment(token, alive, segments, tokens, PACKED: tl.constexpr):
    """Number of the segment that a token belongs to."""
    if PACKED:
        return tl.load(segments + 2 * tokens + token, mask=alive, other=0).to(tl.int64)
    return tl.zeros_like(token)


@triton.jit
def latents_before(
    before, segment, sample, since, tap, channel, batch, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows ``tap`` tokens back that lie before the segment: [rows, channels] of [N, ROWS, B, WIDTH]."""
    line = (segment * ROWS + ROWS - tap + since) * batch + sample
    outside = (since >= 0) & (since < tap)
    return tl.load(before + line[:, None] * WIDTH + channel[None, :], mask=outside[:, None], other=0.0)


@triton.jit
def rotary_partner(channel, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that each is turned with, and the sign that the partner's sine has."""
    if INTERLEAVED:
        partner = channel ^ 1
        is_first = channel % 2 == 0
    else:
        is_first = channel < WIDTH // 2
        partner = tl.where(is_first, channel + WIDTH // 2, channel - WIDTH // 2)
    turned = channel < WIDTH
    return tl.where(turned, partner, channel), tl.where(is_first, -1.0, 1.0)


@triton.jit
def rotary_entries(table, offset, channel, alive, beyond: tl.constexpr, WIDTH: tl.constexpr):
    """Entries of cos or sin at [rows, channels]; ``beyond`` the rotary width (cos 1, sin 0)."""
    mask = alive[:, None] & (channel < WIDTH)[None, :]
    return tl.load(table + offset[:, None] + channel[None, :], mask=mask, other=beyond)


@triton.jit
def temperature_of(temperature, group, EXPONENTIAL: tl.constexpr):
    """Tau of one group in fp32."""
    tau = tl.load(temperature + group).to(tl.float32)
    if EXPONENTIAL:
        tau = tl.exp(tau)
    return tau
