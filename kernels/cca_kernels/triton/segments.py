"""Where each token lies in its segment."""

import triton
import triton.language as tl


@triton.jit
def segments_kernel(cu_seqlens, out, tokens, count, BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr):
    """Fill [3, S] int32: tokens since the start of the segment, tokens until its end, its number.

    Padding after the last segment gets -1, -1, 0. ``SEARCH_STEPS`` halvings find a segment among ``count``.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = token < tokens
    # The last segment that starts at or before the token; empty ones before it are passed over.
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + count
    for _ in tl.static_range(SEARCH_STEPS):
        middle = (low + high) // 2
        reached = tl.load(cu_seqlens + middle, mask=alive & (middle > low), other=0) <= token
        searching = middle > low
        low = tl.where(searching & reached, middle, low)
        high = tl.where(searching & ~reached, middle, high)
    start = tl.load(cu_seqlens + low, mask=alive, other=0).to(tl.int32)
    end = tl.minimum(tl.load(cu_seqlens + low + 1, mask=alive, other=0), tokens).to(tl.int32)
    inside = alive & (token >= start) & (token < end)
    tl.store(out + token, tl.where(inside, token - start, -1), mask=alive)
    tl.store(out + tokens + token, tl.where(inside, end - 1 - token, -1), mask=alive)
    tl.store(out + 2 * tokens + token, tl.where(inside, low, 0), mask=alive)
