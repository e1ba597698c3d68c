"""From latents to queries and keys, and the shifted values."""

import triton
import triton.language as tl

from cca_kernels.triton.blocks import (
    dot,
    latents_before,
    rotary_partner,
    row_place,
    row_segment,
    temperature_of,
)

SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def convolve(
    latents, filters, biases, before, token, sample, segment, since, group, head,
    stride_token, stride_sample, batch,
    TAPS: tl.constexpr, QUERIES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    GROUPS: tl.constexpr, DIM: tl.constexpr, KEY: tl.constexpr, BOUNDARY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The composed conv of one head, [rows, D] in fp32: a matrix product over taps and input channels.

    ``latents`` points to the head's channels. Taps that reach before the segment read ``before`` or nothing.
    """
    CHUNKS: tl.constexpr = DIM // BLOCK_K
    inner, out = tl.arange(0, BLOCK_K), tl.arange(0, DIM)
    place = QUERIES if KEY else FIRST + head
    first_before = (group * (QUERIES + 1) + place) * DIM
    filter_of_head = filters + (group * (COUNT + 1) + head) * TAPS * DIM * DIM
    z = tl.zeros((BLOCK_ROWS, DIM), tl.float32)
    for step in tl.range(0, TAPS * CHUNKS, num_stages=STAGES):
        tap, start = step // CHUNKS, (step % CHUNKS) * BLOCK_K
        at = (token - tap) * stride_token + sample * stride_sample
        x = tl.load(latents + at[:, None] + (start + inner)[None, :], mask=(since >= tap)[:, None], other=0.0)
        if BOUNDARY:
            x += latents_before(
                before, segment, sample, since, tap, first_before + start + inner, batch,
                TAPS - 1, GROUPS * (QUERIES + 1) * DIM,
            )  # fmt: skip
        weight = tl.load(filter_of_head + (step * BLOCK_K + inner)[:, None] * DIM + out[None, :])
        z = dot(x, weight, z)
    return z + tl.load(biases + (group * (COUNT + 1) + head) * DIM + out)[None, :]


@triton.jit
def _halves(x):
    """[rows, n] to two of [rows, n / 2]."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def mix_kernel(
    mixed, filters, biases, temperature, cos, sin, segments, before, value_before,
    out, inverse_norms, value_out,
    tokens, batch, delay_from,
    mixed_token, mixed_sample, mixed_group, mixed_head,
    out_token, out_sample, out_head,
    value_token, value_sample, value_head,
    cos_token, cos_sample, sin_token, sin_sample,
    QUERIES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr,
    DIM: tl.constexpr, TAPS: tl.constexpr, MEAN: tl.constexpr, EXPONENTIAL: tl.constexpr,
    WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, PACKED: tl.constexpr, BOUNDARY: tl.constexpr,
    KEY: tl.constexpr, RECOVER_BELOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head: conv, query-key mean, norm, temperature, RoPE.

    With ``KEY`` a program makes the key of its group and the shifted value. ``RECOVER_BELOW`` > 0 is for the
    backward pass: keys are made as if tau were 1, of the groups only whose tau is smaller than that.
    """
    HEADS: tl.constexpr = 1 if KEY else COUNT
    unit, tile = tl.program_id(0) % (GROUPS * HEADS), tl.program_id(0) // (GROUPS * HEADS)
    # In 64 bits: with heads outermost in memory, a head is as large as all tokens.
    group, head = (unit // HEADS).to(tl.int64), COUNT if KEY else (unit % HEADS).to(tl.int64)
    tau = 1.0
    if KEY:
        tau = temperature_of(temperature, group, EXPONENTIAL)
        if RECOVER_BELOW > 0:
            if tl.abs(tau) >= RECOVER_BELOW:
                return
            tau = 1.0

    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    alive = row < tokens * batch
    token, sample, since, _ = row_place(row, alive, segments, tokens, batch, PACKED)
    segment = row_segment(token, alive, segments, tokens, PACKED) if BOUNDARY else token
    real = since >= 0
    channel = tl.arange(0, DIM)
    at = token * mixed_token + sample * mixed_sample
    group_latents = mixed + group * mixed_group
    key_place = tl.full((), QUERIES, tl.int64)
    place = key_place if KEY else FIRST + head
    z = convolve(
        group_latents + place * mixed_head, filters, biases, before, token, sample, segment, since,
        group, head, mixed_token, mixed_sample, batch,
        TAPS, QUERIES, FIRST, COUNT, GROUPS, DIM, KEY, BOUNDARY, BLOCK_ROWS, BLOCK_K, STAGES,
    )  # fmt: skip

    if MEAN:
        latents = group_latents + at[:, None] + channel[None, :]
        z += 0.5 * tl.load(latents + key_place * mixed_head, mask=real[:, None], other=0.0).to(tl.float32)
        if KEY:
            query = tl.zeros((), tl.int64)
            for _ in tl.range(0, QUERIES, num_stages=1):
                x = tl.load(latents + query, mask=real[:, None], other=0.0)
                z += x.to(tl.float32) * (0.5 / QUERIES)
                query += mixed_head
        else:
            z += 0.5 * tl.load(latents + place * mixed_head, mask=real[:, None], other=0.0).to(tl.float32)

    # Below the smallest normal number squares have underflowed: such a row counts as zero.
    square = tl.sum(z * z, 1)
    is_zero = (square <= SMALLEST_NORMAL) | ~real
    inverse = tl.where(is_zero, 0.0, 1.0 / tl.sqrt(tl.where(is_zero, 1.0, square)))
    if RECOVER_BELOW == 0:
        norms = inverse_norms + (row.to(tl.int64) * GROUPS + group) * (COUNT + 1) + head
        tl.store(norms, inverse, mask=alive)
    z *= (inverse * (tau * DIM**0.5))[:, None]

    place_out = group if KEY else group * COUNT + head
    to = out + (token * out_token + sample * out_sample + place_out * out_head)[:, None]
    if WIDTH > 0:
        cos_row = cos + (token * cos_token + sample * cos_sample)[:, None]
        sin_row = sin + (token * sin_token + sample * sin_sample)[:, None]
    if WIDTH == DIM or WIDTH * 2 == DIM:  # halves of the accumulator, so that few of them live at a time
        turned = z
        if WIDTH < DIM:
            turned, passed = _halves(z)
            rest = WIDTH + tl.arange(0, DIM // 2)
            tl.store(to + rest[None, :], passed.to(out.dtype.element_ty), mask=alive[:, None])
        first, second = tl.arange(0, WIDTH // 2), WIDTH // 2 + tl.arange(0, WIDTH // 2)
        if INTERLEAVED:
            first, second = 2 * tl.arange(0, WIDTH // 2), 2 * tl.arange(0, WIDTH // 2) + 1
            a, b = tl.split(tl.reshape(turned, (BLOCK_ROWS, WIDTH // 2, 2)))
        else:
            a, b = _halves(turned)
        mask = real[:, None]
        x = a * tl.load(cos_row + first[None, :], mask=mask, other=1.0)
        x -= b * tl.load(sin_row + first[None, :], mask=mask, other=0.0)
        tl.store(to + first[None, :], x.to(out.dtype.element_ty), mask=alive[:, None])
        x = b * tl.load(cos_row + second[None, :], mask=mask, other=1.0)
        x += a * tl.load(sin_row + second[None, :], mask=mask, other=0.0)
        tl.store(to + second[None, :], x.to(out.dtype.element_ty), mask=alive[:, None])
    else:
        if WIDTH > 0:
            partner, sign = rotary_partner(channel, WIDTH, INTERLEAVED)
            other = tl.gather(z, tl.broadcast_to(partner[None, :], (BLOCK_ROWS, DIM)), 1)
            mask = real[:, None] & (channel < WIDTH)[None, :]
            z *= tl.load(cos_row + channel[None, :], mask=mask, other=1.0)
            z += other * sign[None, :] * tl.load(sin_row + channel[None, :], mask=mask, other=0.0)
        tl.store(to + channel[None, :], z.to(out.dtype.element_ty), mask=alive[:, None])

    if KEY and RECOVER_BELOW == 0:
        values = group_latents + (key_place + 1) * mixed_head + at[:, None] + channel[None, :]
        flat = (group * DIM).to(tl.int32) + channel
        delayed = flat >= delay_from
        value = tl.load(values, mask=real[:, None] & ~delayed[None, :], other=0.0)
        value += tl.load(values - mixed_token, mask=(since >= 1)[:, None] & delayed[None, :], other=0.0)
        if BOUNDARY:
            line = (segment * batch + sample) * (GROUPS * DIM - delay_from)
            mask = (since == 0)[:, None] & delayed[None, :]
            value += tl.load(
                value_before + line[:, None] + (flat - delay_from)[None, :], mask=mask, other=0.0
            )
        where = token * value_token + sample * value_sample + group * value_head
        tl.store(value_out + where[:, None] + channel[None, :], value, mask=alive[:, None])
