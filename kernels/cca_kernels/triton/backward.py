"""Gradients of the mix: of the conv outputs, of the latents and values, of the composed filters."""

import triton
import triton.language as tl

from cca_kernels.triton.blocks import (
    dot,
    latents_before,
    rotary_entries,
    rotary_partner,
    row_place,
    row_segment,
    temperature_of,
)


@triton.jit
def conv_output_gradient_kernel(
    d_out, out, recovered, inverse_norms, temperature, cos, sin, segments, d_conv, d_tau,
    tokens, batch,
    d_out_token, d_out_sample, d_out_head,
    out_token, out_sample, out_head, recovered_row, recovered_group,
    cos_token, cos_sample, sin_token, sin_sample,
    COUNT: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, EXPONENTIAL: tl.constexpr,
    WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, PACKED: tl.constexpr, KEY: tl.constexpr,
    RECOVER_BELOW: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Back through RoPE, temperature and norm, from the outputs that attention keeps anyway.

    With u the unit row, M the turn by RoPE and s = sqrt(D) tau, the output is o = s M u, and::

        d_conv = (M^T g - (g . o) / s^2 * M^-1 o) * s / norm        d_tau = sum of (g . o) / tau

    M may scale (YaRN), so its inverse is not its transpose. Where tau is so small that o has lost u, keys are
    read from ``recovered``, where ``mix_kernel`` has put them as if tau were 1.
    """
    HEADS: tl.constexpr = 1 if KEY else COUNT
    unit, tile = tl.program_id(0) % (GROUPS * HEADS), tl.program_id(0) // (GROUPS * HEADS)
    group, head = (unit // HEADS).to(tl.int64), COUNT if KEY else (unit % HEADS).to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    alive = row < tokens * batch
    token, sample, since, _ = row_place(row, alive, segments, tokens, batch, PACKED)
    real = since >= 0
    channel = tl.arange(0, DIM)
    partner, sign = rotary_partner(channel, WIDTH, INTERLEAVED)

    head_out = group if KEY else group * COUNT + head
    from_gradient = (token * d_out_token + sample * d_out_sample + head_out * d_out_head)[:, None]
    from_out = (token * out_token + sample * out_sample + head_out * out_head)[:, None]
    unit_row = row.to(tl.int64) * GROUPS * (COUNT + 1) + group * (COUNT + 1) + head
    scale = DIM**0.5 + 0.0
    scale_out = scale
    if KEY:
        tau = temperature_of(temperature, group, EXPONENTIAL)
        scale *= tau
        if tl.abs(tau) < RECOVER_BELOW:
            out = recovered
            from_out = (row.to(tl.int64) * recovered_row + group * recovered_group)[:, None]
        else:
            scale_out = scale

    mask = real[:, None]
    g = tl.load(d_out + from_gradient + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    o = tl.load(out + from_out + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    product = tl.sum(g * o, 1) / scale_out
    if WIDTH > 0:
        at = token * cos_token + sample * cos_sample
        cos_own = rotary_entries(cos, at, channel, real, 1.0, WIDTH)
        cos_other = rotary_entries(cos, at, partner, real, 1.0, WIDTH)
        at = token * sin_token + sample * sin_sample
        sin_own = rotary_entries(sin, at, channel, real, 0.0, WIDTH) * sign[None, :]
        sin_other = -rotary_entries(sin, at, partner, real, 0.0, WIDTH) * sign[None, :]
        g_other = tl.load(d_out + from_gradient + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        o_other = tl.load(out + from_out + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        determinant = cos_own * cos_other - sin_own * sin_other
        g = cos_own * g + sin_other * g_other
        o = (cos_other * o - sin_own * o_other) / tl.where(determinant == 0, 1.0, determinant)
    norms = tl.load(inverse_norms + unit_row, mask=alive, other=0.0)
    d = (g - o * (product / scale_out)[:, None]) * (norms * scale)[:, None]
    tl.store(
        d_conv + (unit_row * DIM)[:, None] + channel[None, :],
        d.to(d_conv.dtype.element_ty),
        mask=alive[:, None],
    )
    if KEY:
        total = tl.sum(product, 0) * DIM**0.5
        if EXPONENTIAL:
            total *= tau
        tl.store(d_tau + tile * GROUPS + group, total)


@triton.jit
def latent_gradient_kernel(
    d_conv, filters, segments, cu_seqlens, d_value, d_latents,
    tokens, batch, rows, delay_from,
    d_value_token, d_value_sample, d_value_head,
    QUERIES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr,
    DIM: tl.constexpr, TAPS: tl.constexpr, MEAN: tl.constexpr, PACKED: tl.constexpr,
    KEY: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Back through the conv and the mean: a matrix product over the taps, written where it belongs.

    Rows are those of the latents, d_latents [S, B, G, R+2, D], and with ``KEY`` a program writes the gradient
    of the value too. With ``BEFORE`` rows are the boundary rows, d_latents [N, P, B, G, R+1, D].
    """
    HEADS: tl.constexpr = 1 if KEY else QUERIES
    OUT_HEADS: tl.constexpr = QUERIES + 1 if BEFORE else QUERIES + 2
    CHUNKS: tl.constexpr = DIM // BLOCK_K
    unit, tile = tl.program_id(0) % (GROUPS * HEADS), tl.program_id(0) // (GROUPS * HEADS)
    group, place = (unit // HEADS).to(tl.int64), QUERIES if KEY else (unit % HEADS).to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    alive = row < rows
    if BEFORE:
        # A row that lies ``back`` tokens before a segment is read by the taps from ``back`` on.
        sample = (row % batch).to(tl.int64)
        segment, line = row // (batch * (TAPS - 1)), row // batch % (TAPS - 1)
        back = TAPS - 1 - line
        start, end = tl.zeros_like(row), tl.zeros_like(row) + tokens
        if PACKED:
            start = tl.load(cu_seqlens + segment, mask=alive, other=0).to(tl.int32)
            end = tl.minimum(tl.load(cu_seqlens + segment + 1, mask=alive, other=0), tokens).to(tl.int32)
        token = (start - back).to(tl.int64)
        until = tl.where(alive, end - 1 - start + back, -1)
    else:
        token, sample, _, until = row_place(row, alive, segments, tokens, batch, PACKED)
        back = tl.zeros_like(row)
    real = until >= 0
    channel, inner = tl.arange(0, DIM), tl.arange(0, BLOCK_K)

    d_conv += group * (COUNT + 1) * DIM
    at = (token * batch + sample) * (GROUPS * (COUNT + 1) * DIM)
    number = COUNT if KEY else place - FIRST
    steps = TAPS * CHUNKS
    if not KEY and COUNT < QUERIES:  # queries of other ranks take part in the mean only
        steps = tl.where((number >= 0) & (number < COUNT), steps, 0)
    filter_of_head = filters + (group * (COUNT + 1) + number) * TAPS * DIM * DIM
    d = tl.zeros((BLOCK_ROWS, DIM), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        tap, start_out = step // CHUNKS, (step % CHUNKS) * BLOCK_K
        later = ((token + tap) * batch + sample) * (GROUPS * (COUNT + 1) * DIM)
        mask = (until >= tap) & (back <= tap)
        read = later[:, None] + (number * DIM + start_out + inner)[None, :]
        g = tl.load(d_conv + read, mask=mask[:, None], other=0.0)
        weight = tl.load(filter_of_head + (tap * DIM + channel[:, None]) * DIM + (start_out + inner)[None, :])
        d = dot(g, tl.trans(weight), d)
    if MEAN and not BEFORE:
        gradients = d_conv + at[:, None] + channel[None, :]
        of_key = tl.load(gradients + COUNT * DIM, mask=real[:, None], other=0.0).to(tl.float32)
        if KEY:
            d += 0.5 * of_key
            for query in tl.range(0, COUNT, num_stages=1):
                d += 0.5 * tl.load(gradients + query * DIM, mask=real[:, None], other=0.0).to(tl.float32)
        else:
            own = real & (number >= 0) & (number < COUNT)
            d += of_key * (0.5 / QUERIES)
            d += 0.5 * tl.load(gradients + number * DIM, mask=own[:, None], other=0.0).to(tl.float32)
    where = (row.to(tl.int64) * GROUPS + group) * (OUT_HEADS * DIM)
    to = d_latents + where[:, None] + channel[None, :]
    tl.store(to + place * DIM, d.to(d_latents.dtype.element_ty), mask=alive[:, None])

    if KEY and not BEFORE:
        # A delayed channel was read by the token after it.
        delayed = ((group * DIM).to(tl.int32) + channel) >= delay_from
        from_value = token * d_value_token + sample * d_value_sample + group * d_value_head
        from_value = d_value + from_value[:, None] + channel[None, :]
        value = tl.load(from_value, mask=real[:, None] & ~delayed[None, :], other=0.0)
        value += tl.load(from_value + d_value_token, mask=(until >= 1)[:, None] & delayed[None, :], other=0.0)
        tl.store(to + (QUERIES + 1) * DIM, value.to(d_latents.dtype.element_ty), mask=alive[:, None])


@triton.jit
def filter_gradient_kernel(
    mixed, d_conv, before, segments, d_filters, d_biases,
    tokens, batch, rows_per_split,
    mixed_token, mixed_sample, mixed_group, mixed_head,
    QUERIES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr,
    DIM: tl.constexpr, TAPS: tl.constexpr, PACKED: tl.constexpr, BOUNDARY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of the filter gradient of one tap and head, over one part of the rows: [splits, ...] in fp32.

    The parts are added later in a fixed order, so that repeats are equal bit by bit.
    """
    BLOCKS_IN: tl.constexpr = DIM // BLOCK_IN
    BLOCKS: tl.constexpr = BLOCKS_IN * (DIM // BLOCK_OUT)
    HEADS: tl.constexpr = GROUPS * (COUNT + 1)
    pid = tl.program_id(0)
    block, tap = pid % BLOCKS, pid // BLOCKS % TAPS
    unit, split = pid // (BLOCKS * TAPS) % HEADS, pid // (BLOCKS * TAPS * HEADS)
    group, head = (unit // (COUNT + 1)).to(tl.int64), unit % (COUNT + 1)
    place = tl.where(head < COUNT, FIRST + head, QUERIES).to(tl.int64)
    taken = block % BLOCKS_IN * BLOCK_IN + tl.arange(0, BLOCK_IN)
    out = block // BLOCKS_IN * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    latents = mixed + group * mixed_group + place * mixed_head
    first_before = (group * (QUERIES + 1) + place) * DIM

    d_filter = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    d_bias = tl.zeros((BLOCK_OUT,), tl.float32)
    begin = split.to(tl.int64) * rows_per_split
    for start in tl.range(
        begin, tl.minimum(begin + rows_per_split, tokens * batch), BLOCK_ROWS, num_stages=STAGES
    ):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int32)
        alive = row < tokens * batch
        token, sample, since, _ = row_place(row, alive, segments, tokens, batch, PACKED)
        at = (token - tap) * mixed_token + sample * mixed_sample
        x = tl.load(latents + at[:, None] + taken[None, :], mask=(since >= tap)[:, None], other=0.0)
        if BOUNDARY:
            segment = row_segment(token, alive, segments, tokens, PACKED)
            x += latents_before(
                before, segment, sample, since, tap, first_before + taken, batch,
                TAPS - 1, GROUPS * (QUERIES + 1) * DIM,
            )  # fmt: skip
        of_row = (row.to(tl.int64) * HEADS + unit) * DIM
        g = tl.load(d_conv + of_row[:, None] + out[None, :], mask=alive[:, None], other=0.0)
        d_filter = dot(tl.trans(x), g, d_filter)
        d_bias += tl.sum(g.to(tl.float32), 0)
    unit_split = split * HEADS + unit
    to = d_filters + ((unit_split * TAPS + tap).to(tl.int64) * DIM + taken[:, None]) * DIM + out[None, :]
    tl.store(to, d_filter)
    if tap == 0 and block % BLOCKS_IN == 0:
        tl.store(d_biases + unit_split * DIM + out, d_bias)
