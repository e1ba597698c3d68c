"""Causal attention of one sequence whose tokens lie on several ranks.

Queries stay where they are. Keys and values come from the other ranks: all at once (``all_gather``) or
around a ring, one rank's at a time (``p2p``). Both are one autograd function over the same blocks, keep
only this rank's q, k, v and output for the backward pass, and fetch the others again there.
With zigzag chunks every rank has the same work at every step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cca_megatron.parallel.attention_blocks import Merged, attend_block, attend_block_backward
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.window_blocks import attend_window, attend_window_backward


class Exchange:
    """One tensor on its way to the rank ``step`` places ahead, and one from as far behind on its way here."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup, step: int = 1):
        rank, size = group.rank(), group.size()
        self._sent, self._received = tensor.contiguous(), torch.empty_like(tensor.contiguous())
        peers = [dist.get_global_rank(group, (rank + way * step) % size) for way in (1, -1)]
        operations = [
            # As bytes, because gloo moves no bfloat16.
            dist.P2POp(operation, data.view(torch.uint8), peer, group)
            for operation, data, peer in zip(
                (dist.isend, dist.irecv), (self._sent, self._received), peers, strict=True
            )
        ]
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        """What came; once only, as the buffers are let go of."""
        for work in self._works:
            work.wait()
        received = self._received
        del self._sent, self._received
        return received


class _Transport(ABC):
    """How keys and values come from the other ranks, and their gradients go back."""

    def __init__(self, kv: Tensor, group: dist.ProcessGroup):
        self.group, self.kv = group, kv

    @abstractmethod
    def sources(self) -> Iterator[tuple[int, Tensor]]:
        """(rank, its keys and values), this rank's own first, then the one before it, and so on."""

    @abstractmethod
    def gradient(self, parts: Iterator[Tensor]) -> Tensor:
        """Sum over all ranks of what they find for this rank's keys and values, in a fixed order.

        Args:
            parts: this rank's finding for each of :meth:`sources`, in that order.
        """


class _Ring(_Transport):
    """Keys and values of one other rank at a time, the next fetched meanwhile."""

    def sources(self) -> Iterator[tuple[int, Tensor]]:
        rank, size = self.group.rank(), self.group.size()
        kv = self.kv
        for step in range(size):
            exchange = Exchange(kv, self.group) if step < size - 1 else None
            yield (rank - step) % size, kv
            if exchange is not None:
                kv = exchange.wait()

    def gradient(self, parts: Iterator[Tensor]) -> Tensor:
        # The sum travels behind the keys and values that it belongs to, while the next part is found.
        exchange: Exchange | None = None
        for part in parts:
            exchange = Exchange(part if exchange is None else part.add_(exchange.wait()), self.group)
        assert exchange is not None
        return exchange.wait()


class _AllGather(_Transport):
    """Keys and values of all ranks in one collective, under way while this rank's own are used."""

    def sources(self) -> Iterator[tuple[int, Tensor]]:
        rank, size = self.group.rank(), self.group.size()
        kv = self.kv.contiguous()
        gathered = kv.new_empty(size, *kv.shape)
        work = dist.all_gather_into_tensor(
            gathered.flatten(0, 1).view(torch.uint8), kv.view(torch.uint8), group=self.group, async_op=True
        )
        yield rank, kv
        work.wait()
        for step in range(1, size):
            yield (rank - step) % size, gathered[(rank - step) % size]

    def gradient(self, parts: Iterator[Tensor]) -> Tensor:
        # Each part goes straight to its owner while the next is found: a reduce-scatter in a fixed order,
        # and with two parts in memory instead of all.
        total = next(parts)
        exchange: Exchange | None = None
        for step, part in enumerate(parts, start=1):
            if exchange is not None:
                total += exchange.wait()
            exchange = Exchange(part, self.group, -step)
        return total if exchange is None else total.add_(exchange.wait())


_TRANSPORTS: dict[str, type[_Transport]] = {
    "p2p": _Ring,
    "all_gather": _AllGather,
}


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: ContextShard,
        transport: str,
        scale: float,
        window: int | None,
    ) -> Tensor:
        kv = torch.stack([k, v])
        merged = Merged(q)
        for source, (keys, values) in _TRANSPORTS[transport](kv, shard.group).sources():
            for block in shard.blocks(source, window):
                rows, columns = block.queries, block.keys
                here = q[:, :, rows], keys[:, :, columns], values[:, :, columns]
                if window is not None and block.is_cut_by(window):
                    part = attend_window(*here, block.offset, window, scale)
                else:
                    part = attend_block(*here, block.causal, scale)
                merged.add(rows, *part)
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, merged.lse)
        ctx.settings = shard, transport, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        q, k, v, out, lse = ctx.saved_tensors
        shard, transport, scale, window = ctx.settings
        kv = torch.stack([k, v])
        exchange = _TRANSPORTS[transport](kv, shard.group)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide)

        def findings() -> Iterator[Tensor]:
            for source, (keys, values) in exchange.sources():
                dkv = torch.zeros_like(kv, dtype=wide)
                for block in shard.blocks(source, window):
                    rows, columns = block.queries, block.keys
                    g, x, o, norm = (t[:, :, rows] for t in (gradient, q, out, lse))
                    k, v = (t[:, :, columns] for t in (keys, values))
                    if window is not None and block.is_cut_by(window):
                        parts = attend_window_backward(g, x, k, v, o, norm, block.offset, window, scale)
                    else:
                        parts = attend_block_backward(g, x, k, v, o, norm, block.causal, scale)
                    dq[:, :, rows] += parts[0]
                    for total, part in zip(dkv, parts[1:], strict=True):
                        total[:, :, columns] += part
                yield dkv

        dk, dv = exchange.gradient(findings()).to(kv.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None, None


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: ContextShard,
    transport: str,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each document, over all ranks of a context-parallel group.

    Args:
        q: [B, query heads, S, D], this rank's tokens.
        k, v: [B, KV heads, S, D].
        shard: which tokens these are.
        transport: ``p2p`` or ``all_gather``.
        scale: factor of the logits.
        window: tokens to the left that a token sees; None: all.

    Returns:
        [B, query heads, S, D]; zero for padding.
    """
    out: Tensor = _ContextAttention.apply(q, k, v, shard, transport, scale, window)
    return out
