"""Both convs as one filter, and its gradient as those of the convs.

No nonlinearity stands between the convs, so that depthwise conv then conv within a head is one conv within a
head with K0 + K1 - 1 taps. Lags count back from the current token, which the last tap of a kernel has::

    filter[m] = sum over a + b = m of conv1[lag a] * conv0[lag b]      (input channels scaled)
    bias      = bias1 + (sum over a of conv1[lag a]) bias0

This holds at the start of a document too, because the padding stands before the first conv only.
Filters are stored [heads, taps, D in, D out]. A conv that is off is an identity of one tap.
"""

import triton
import triton.language as tl


@triton.jit
def _weight_block(
    conv1, channel, tap_in, tap_out, lag, alive, DIM: tl.constexpr, K1: tl.constexpr, CONV1: tl.constexpr
):
    """conv1[lag] as [in, out] in fp32."""
    if CONV1:
        out = (channel + tap_out).to(tl.int64)
        at = (out[None, :] * DIM + tap_in[:, None]) * K1 + (K1 - 1 - lag)
        return tl.load(conv1 + at, mask=alive, other=0.0).to(tl.float32)
    return tl.where((tap_in[:, None] == tap_out[None, :]) & alive, 1.0, 0.0)


@triton.jit
def _depthwise(conv0, channel, lag, alive, K0: tl.constexpr, CONV0: tl.constexpr):
    """conv0[lag] at channels, in fp32."""
    if CONV0:
        return tl.load(conv0 + channel.to(tl.int64) * K0 + (K0 - 1 - lag), mask=alive, other=0.0).to(
            tl.float32
        )
    return tl.where(alive, 1.0, 0.0) + tl.zeros(channel.shape, tl.float32)


@triton.jit
def _first_channel(head, FIRST: tl.constexpr, COUNT: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr):
    """First conv channel of the head that is number ``head`` among those in use."""
    group, place = head // (COUNT + 1), head % (COUNT + 1)
    return (group * (QUERIES + 1) + tl.where(place < COUNT, FIRST + place, QUERIES)) * DIM


@triton.jit
def compose_kernel(
    conv0, bias0, conv1, bias1, filters, biases,
    FIRST: tl.constexpr, COUNT: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, CONV0: tl.constexpr, CONV1: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One program makes one tap of one head's filter, the one after the last tap its bias."""
    TAPS: tl.constexpr = K0 + K1 - 1
    head, tap = tl.program_id(0) // (TAPS + 1), tl.program_id(0) % (TAPS + 1)
    channel = _first_channel(head, FIRST, COUNT, QUERIES, DIM)
    out = tl.arange(0, DIM)
    bias = tl.zeros((DIM,), tl.float32)
    for start in tl.range(0, DIM, BLOCK_IN):
        taken = start + tl.arange(0, BLOCK_IN)
        if tap < TAPS:
            total = tl.zeros((BLOCK_IN, DIM), tl.float32)
            for lag0 in tl.static_range(K0):
                lag1 = tap - lag0
                valid = (lag1 >= 0) & (lag1 < K1)
                weight = _weight_block(conv1, channel, taken, out, lag1, valid, DIM, K1, CONV1)
                total += weight * _depthwise(conv0, channel + taken, lag0, valid, K0, CONV0)[:, None]
            at = ((head * TAPS + tap) * DIM + taken[:, None]) * DIM + out[None, :]
            tl.store(filters + at, total.to(filters.dtype.element_ty))
        elif BIAS0:
            inner = tl.load(bias0 + channel + taken).to(tl.float32)
            for lag1 in tl.static_range(K1):
                weight = _weight_block(conv1, channel, taken, out, lag1, True, DIM, K1, CONV1)
                bias += tl.sum(weight * inner[:, None], 0)
    if tap == TAPS:
        if BIAS1:
            bias += tl.load(bias1 + channel + out).to(tl.float32)
        tl.store(biases + head * DIM + out, bias)


@triton.jit
def decompose_kernel(
    d_filters, d_biases, conv0, bias0, conv1, d_conv0, d_bias0, d_conv1, d_bias1,
    FIRST: tl.constexpr, COUNT: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, CONV0: tl.constexpr, CONV1: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Gradients of the convs at BLOCK_IN input channels of one head, all in fp32 until stored."""
    TAPS: tl.constexpr = K0 + K1 - 1
    BLOCKS: tl.constexpr = DIM // BLOCK_IN
    head, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    channel = _first_channel(head, FIRST, COUNT, QUERIES, DIM)
    taken, out = block * BLOCK_IN + tl.arange(0, BLOCK_IN), tl.arange(0, DIM)
    from_filter = d_filters + (head * TAPS * DIM + taken[:, None]) * DIM + out[None, :]
    d_bias = tl.load(d_biases + head * DIM + out)
    if CONV1:
        for lag1 in tl.static_range(K1):
            total = tl.zeros((BLOCK_IN, DIM), tl.float32)
            if BIAS0:
                total += tl.load(bias0 + channel + taken).to(tl.float32)[:, None] * d_bias[None, :]
            for lag0 in tl.static_range(K0):
                scale = _depthwise(conv0, channel + taken, lag0, True, K0, CONV0)
                total += tl.load(from_filter + (lag0 + lag1) * DIM * DIM) * scale[:, None]
            at = ((channel + out).to(tl.int64)[None, :] * DIM + taken[:, None]) * K1 + (K1 - 1 - lag1)
            tl.store(d_conv1 + at, total.to(d_conv1.dtype.element_ty))
    if CONV0:
        for lag0 in tl.static_range(K0):
            total = tl.zeros((BLOCK_IN,), tl.float32)
            for lag1 in tl.static_range(K1):
                weight = _weight_block(conv1, channel, taken, out, lag1, True, DIM, K1, CONV1)
                total += tl.sum(tl.load(from_filter + (lag0 + lag1) * DIM * DIM) * weight, 1)
            at = (channel + taken).to(tl.int64) * K0 + (K0 - 1 - lag0)
            tl.store(d_conv0 + at, total.to(d_conv0.dtype.element_ty))
    if BIAS0:
        total = tl.zeros((BLOCK_IN,), tl.float32)
        for lag1 in tl.static_range(K1):
            weight = _weight_block(conv1, channel, taken, out, lag1, True, DIM, K1, CONV1)
            total += tl.sum(weight * d_bias[None, :], 1)
        tl.store(d_bias0 + channel + taken, total.to(d_bias0.dtype.element_ty))
    if BIAS1:
        own = tl.load(d_biases + head * DIM + taken)
        tl.store(d_bias1 + channel + taken, own.to(d_bias1.dtype.element_ty))
