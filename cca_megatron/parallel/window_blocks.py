"""Attention of a run of queries to a run of keys within a sliding window, forward and backward.

For blocks that the window cuts; the others are those of :mod:`attention_blocks`, with which these merge.
Plain PyTorch: a window's width of queries at a time, which see twice as many keys at most; fewer where
their logits would take more memory than the queries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cca_megatron.parallel.attention_blocks import rows_at_a_time


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, offset: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q to those of k and v that are at most ``window`` tokens before.

    Args:
        q: [B, query heads, Sq, D].
        k, v: [B, KV heads, Sk, D].
        offset: by how many tokens the first query comes after the first key.
        window: tokens to the left that a query sees, beside its own.
        scale: factor of the logits.

    Returns:
        The output [B, query heads, Sq, D], zero where a query sees none of these keys, and the log-sum-exp of
        the logits [B, query heads, Sq], there minus infinity; in at least fp32.
    """
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full(q.shape[:-1], -torch.inf)
    for rows, columns, hidden in _slices(q, k.shape[2], offset, window):
        logits = _logits(q, k, rows, columns, hidden, scale)
        norm = logits.logsumexp(-1, keepdim=True)
        probabilities = (logits - norm.masked_fill(norm == -torch.inf, 0)).exp()
        out[:, :, rows] = (probabilities @ v[:, :, None, columns]).flatten(1, 2)
        lse[:, :, rows] = norm[..., 0].flatten(1, 2)
    return out.to(dtype), lse


def attend_window_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offset: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients of q, k and v.

    Args:
        gradient, out, lse: of the merged attention over all blocks; the others as in :func:`attend_window`.
    """
    dtype, groups = q.dtype, k.shape[1]
    gradient, q, k, v, out = (x.to(lse.dtype) for x in (gradient, q, k, v, out))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns, hidden in _slices(q, k.shape[2], offset, window):
        g, o, x, norm = (t[:, :, rows].unflatten(1, (groups, -1)) for t in (gradient, out, q, lse[..., None]))
        probabilities = (_logits(q, k, rows, columns, hidden, scale) - norm).exp()
        dv[:, :, columns] += (probabilities.transpose(-1, -2) @ g).sum(2)
        from_value = g @ v[:, :, None, columns].transpose(-1, -2)
        dlogits = probabilities * (from_value - (g * o).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = (dlogits @ k[:, :, None, columns]).flatten(1, 2)
        dk[:, :, columns] += (dlogits.transpose(-1, -2) @ x).sum(2)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _slices(q: Tensor, keys: int, offset: int, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries to take at a time, the keys that any of them sees, and which pairs do not see each other."""
    queries, step = q.shape[2], min(max(window, 16), rows_at_a_time(q, 2 * window))
    for start in range(0, queries, step):
        end = min(start + step, queries)
        first, last = max(0, start + offset - window), min(keys, end + offset)
        if first < last:
            at = torch.arange(start + offset, end + offset, device=q.device)[:, None]
            key = torch.arange(first, last, device=q.device)
            yield slice(start, end), slice(first, last), (key > at) | (key < at - window)


def _logits(q: Tensor, k: Tensor, rows: slice, columns: slice, hidden: Tensor, scale: float) -> Tensor:
    """[B, groups, heads / groups, rows, columns]."""
    grouped = q[:, :, rows].unflatten(1, (k.shape[1], -1))
    logits = grouped @ k[:, :, None, columns].transpose(-1, -2) * scale
    return logits.masked_fill_(hidden, -torch.inf)
