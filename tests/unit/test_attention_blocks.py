"""Blocks of attention, flash and plain, merge to attention over all keys, gradients included."""

import pytest
import torch
from support.closeness import assert_close
from torch.nn import functional as F

from cca_megatron.parallel.attention_blocks import (
    Merged,
    attend_block,
    attend_block_backward,
    attend_block_backward_plain,
    attend_block_plain,
)
from cca_megatron.parallel.window_blocks import attend_window, attend_window_backward

KINDS = {
    "flash": (attend_block, attend_block_backward),
    "plain": (attend_block_plain, attend_block_backward_plain),
}
# More rows than the plain version takes at a time; the queries are the last 300 of 700 tokens.
QUERIES, KEYS, SCALE = 300, 700, 0.3


@pytest.mark.parametrize("window", [0, 5, 40, 299, 500, 699])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)], ids=str)
def test_windowed_blocks_merge_to_the_whole(window, dtype, bound):
    """The first block may lie outside of the window of some queries, or of all."""
    generator = torch.Generator().manual_seed(1)

    def draw(heads, tokens):
        values = torch.randn(2, heads, tokens, 8, dtype=torch.float64, generator=generator)
        return values.to(dtype).double().cuda().requires_grad_()

    q, k, v, upstream = draw(4, QUERIES), draw(2, KEYS), draw(2, KEYS), draw(4, QUERIES).detach()
    row, column = torch.arange(KEYS - QUERIES, KEYS).cuda()[:, None], torch.arange(KEYS).cuda()
    seen = (column <= row) & (column >= row - window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE, enable_gqa=True)
    gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    q, k, v, upstream = (x.detach().to(dtype) for x in (q, k, v, upstream))
    merged = Merged(q)
    blocks = [(slice(0, 150), 400), (slice(150, 400), 250), (slice(400, 700), 0)]
    for keys, offset in blocks:
        merged.add(slice(None), *attend_window(q, k[:, :, keys], v[:, :, keys], offset, window, SCALE))
    assert_close("output", expected.detach(), merged.out, bound)
    out, got = merged.out.to(dtype), [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    for keys, offset in blocks:
        here = q, k[:, :, keys], v[:, :, keys], out, merged.lse
        part = attend_window_backward(upstream, *here, offset, window, SCALE)
        for total, where, gradient in zip(got, (slice(None), keys, keys), part, strict=True):
            total[:, :, where] += gradient
    for name, reference, gradient in zip("qkv", gradients, got, strict=True):
        if window or name == "v":  # alone with itself a token's weight is 1, whatever q and k
            assert_close(f"gradient of {name}", reference, gradient, bound)


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [("flash", torch.float64, 1e-12), ("plain", torch.float64, 1e-12), ("flash", torch.bfloat16, 1e-2)],
    ids=str,
)
def test_blocks_merge_to_the_whole(kind, dtype, bound):
    forward, backward = KINDS[kind]
    generator = torch.Generator().manual_seed(1)

    def draw(heads, tokens):
        shape = (2, heads, tokens, 8)
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        return values.to(dtype).double().cuda().requires_grad_()

    q, k, v, upstream = draw(4, QUERIES), draw(2, KEYS), draw(2, KEYS), draw(4, QUERIES).detach()
    row = torch.arange(KEYS - QUERIES, KEYS).cuda()[:, None]
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.arange(KEYS).cuda() <= row, scale=SCALE, enable_gqa=True
    )
    gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    blocks = [(slice(0, 150), False), (slice(150, 400), False), (slice(400, 700), True)]
    q, k, v, upstream = (x.detach().to(dtype) for x in (q, k, v, upstream))
    merged = Merged(q)
    for keys, causal in blocks:
        merged.add(slice(None), *forward(q, k[:, :, keys], v[:, :, keys], causal, SCALE))
    assert_close("output", expected.detach(), merged.out, bound)

    out = merged.out.to(dtype)
    got = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    for keys, causal in blocks:
        part = backward(upstream, q, k[:, :, keys], v[:, :, keys], out, merged.lse, causal, SCALE)
        for total, where, gradient in zip(got, (slice(None), keys, keys), part, strict=True):
            total[:, :, where] += gradient
    for name, reference, gradient in zip("qkv", gradients, got, strict=True):
        assert_close(f"gradient of {name}", reference, gradient, bound)
