"""Attention of a run of queries to a run of keys, with what it takes to merge several such results.

Softmax attention over a union of keys is a weighted mean of the attentions over its parts, weighted by
their log-sum-exp; and its backward pass falls apart into the same parts once the merged output and
log-sum-exp are known. PyTorch's flash kernels return and take the log-sum-exp; where there is none
(on a GPU: fp32, fp64, and head sizes that are not multiples of 8 up to 256) a plain version works through
the queries in slices.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten


def attend_block(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q to k and v.

    Args:
        q: [B, query heads, Sq, D].
        k, v: [B, KV heads, Sk, D].
        causal: mask keys after the query; then Sq = Sk.
        scale: factor of the logits.

    Returns:
        The output [B, query heads, Sq, D] and the log-sum-exp of the logits [B, query heads, Sq], in at
        least fp32.
    """
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if _has_flash_kernel(q):
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return attend_block_plain(q, k, v, causal, scale)


def attend_block_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients of q, k and v.

    Args:
        gradient, out, lse: of the merged attention over all blocks; shapes as in :func:`attend_block`.
    """
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    if _has_flash_kernel(q):
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
            0.0, causal, no_dropout, no_dropout, scale=scale,
        )  # fmt: skip
    return attend_block_backward_plain(gradient, q, k, v, out, lse, causal, scale)


def attend_block_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`attend_block` in plain PyTorch."""
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
    for rows in _slices(q, k):
        logits = _logits(q, k, rows, causal, scale)
        lse[:, :, rows] = logits.logsumexp(-1).flatten(1, 2)
        probabilities = logits.softmax(-1)
        out[:, :, rows] = (probabilities @ v[:, :, None]).flatten(1, 2)
    return out.to(dtype), lse


def attend_block_backward_plain(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attend_block_backward` in plain PyTorch."""
    dtype = q.dtype
    gradient, q, k, v, out = (x.to(lse.dtype) for x in (gradient, q, k, v, out))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = k.shape[1]
    for rows in _slices(q, k):
        g, o, x, norm = (_grouped(t[:, :, rows], groups) for t in (gradient, out, q, lse[..., None]))
        probabilities = (_logits(q, k, rows, causal, scale) - norm).exp()
        dv += (probabilities.transpose(-1, -2) @ g).sum(2)
        from_value = g @ v[:, :, None].transpose(-1, -2)
        dlogits = probabilities * (from_value - (g * o).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = (dlogits @ k[:, :, None]).flatten(1, 2)
        dk += (dlogits.transpose(-1, -2) @ x).sum(2)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _has_flash_kernel(q: Tensor) -> bool:
    dim = q.shape[-1]
    return q.dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0 and dim <= 256


def rows_at_a_time(q: Tensor, keys: int) -> int:
    """Queries of q [B, heads, Sq, D] whose logits for so many keys are about as large as q itself."""
    return max(16, q.shape[2] * q.shape[3] // max(keys, 1))


def _slices(q: Tensor, k: Tensor) -> list[slice]:
    rows = rows_at_a_time(q, k.shape[2])
    return [slice(start, start + rows) for start in range(0, q.shape[2], rows)]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, heads, S, D] -> [B, groups, heads / groups, S, D]."""
    return x.unflatten(1, (groups, -1))


def _logits(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """[B, groups, heads / groups, rows, Sk]."""
    logits = _grouped(q[:, :, rows], k.shape[1]) @ k[:, :, None].transpose(-1, -2) * scale
    if causal:
        row = torch.arange(q.shape[2], device=q.device)[rows, None]
        logits.masked_fill_(torch.arange(k.shape[2], device=k.device) > row, -torch.inf)
    return logits


class Merged:
    """The running result of attention over blocks of keys."""

    def __init__(self, q: Tensor):
        """Nothing attended to yet, for queries [B, heads, S, D]."""
        wide = torch.promote_types(q.dtype, torch.float32)
        self.out = torch.zeros_like(q, dtype=wide)
        self.lse = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Take in the attention of the queries in ``rows`` to one more block of keys."""
        before, into = self.lse[:, :, rows], self.out[:, :, rows]
        after = torch.logaddexp(before, lse)
        # Under a window a query may see none of the keys so far.
        norm = after.masked_fill(after == -torch.inf, 0)
        into.mul_((before - norm).exp_()[..., None])
        into.add_(out * (lse - norm).exp_()[..., None])
        before.copy_(after)
