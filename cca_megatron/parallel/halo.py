"""The boundary exchange: rows that convs and value shift need from pieces on other ranks.

One differentiable all-to-all per layer, forward and backward, in which almost every pair of ranks
exchanges nothing: a rank sends its last rows to the ranks that hold what follows. It is started before
the tokens that need no other rank are mixed, and waited for after; in the backward pass likewise.

So that work can lie between start and wait, the exchange is two autograd nodes that share a ``_Pending``.
``_Start`` returns a buffer that is not filled yet, ``_Wait`` fills it. Backward, ``_Wait`` starts sending the
gradients back and hands on a tensor of which only the shape counts, and ``_Start`` waits for the gradients
and returns them; autograd runs whatever lies between in the meantime.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cca_kernels import Boundary
from cca_megatron.parallel.layout import ContextLayout, Integers


@dataclass(frozen=True)
class HaloPlan:
    """What one rank sends and receives, and which of its tokens wait for it. Tensors are on the device.

    An *edge* is the beginning of a piece whose document began earlier: the tokens whose result depends
    on rows from another piece.
    """

    send: Tensor
    """Indices of the tokens to send, ordered by receiver."""
    send_counts: list[int]
    receive_counts: list[int]
    slots: Tensor
    """For each row received, its place in [edges * rows], rows before an edge from the oldest on."""
    edges: int
    rows: int
    """Rows before each edge."""
    edge_tokens: Tensor
    """Indices of all tokens of all edges."""
    edge_cu_seqlens: Tensor
    """[edges + 1], where each edge starts among ``edge_tokens``."""


def plan_halo(layout: ContextLayout, rank: int, rows: int, device: torch.device) -> HaloPlan:
    """Plan the exchange of ``rows`` rows before every piece that does not start a document.

    A piece shorter than ``rows`` is no exception: the older rows then come from the piece before it,
    on whichever rank it lies.
    """
    pieces = layout.pieces
    is_edge = pieces.position > 0
    edge = np.flatnonzero(is_edge)
    back = np.arange(rows, 0, -1)  # oldest row first
    exists = pieces.position[edge, None] >= back
    source_token = pieces.start[edge, None] - back
    source = np.searchsorted(pieces.start, source_token, side="right") - 1
    local = pieces.offset[source] + source_token - pieces.start[source]
    sender = np.where(exists, pieces.owner[source], -1)
    receiver = np.broadcast_to(pieces.owner[edge, None], sender.shape)
    # The same order on both sides: requests are sorted by stream position within each pair of ranks.
    sent, received = (np.flatnonzero(side == rank) for side in (sender, np.where(exists, receiver, -1)))
    sent = sent[np.argsort(receiver.ravel()[sent], kind="stable")]
    received = received[np.argsort(sender.ravel()[received], kind="stable")]

    own_edges = np.flatnonzero(pieces.owner[edge] == rank)
    row_in_own = np.full(len(edge), -1)
    row_in_own[own_edges] = np.arange(len(own_edges))
    slots = row_in_own[received // rows] * rows + received % rows if rows else received
    mine = pieces.select(edge[own_edges])
    lengths = np.minimum(mine.length, rows)
    runs = [offset + np.arange(n) for offset, n in zip(mine.offset, lengths, strict=True)]

    def indices(values: Integers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(device, non_blocking=True)

    return HaloPlan(
        send=indices(local.ravel()[sent]),
        send_counts=np.bincount(receiver.ravel()[sent], minlength=layout.size).tolist(),
        receive_counts=np.bincount(sender.ravel()[received], minlength=layout.size).tolist(),
        slots=indices(slots),
        edges=len(own_edges),
        rows=rows,
        edge_tokens=indices(np.concatenate([np.empty(0, np.int64), *runs])),
        edge_cu_seqlens=indices(np.cumsum([0, *lengths])),
    )


class _Pending:
    """What one exchange has under way; the backward pass reuses it in the other direction."""

    def __init__(self, plan: HaloPlan, group: dist.ProcessGroup):
        self.plan, self.group = plan, group
        self.buffer: Tensor | None = None
        self.work: dist.Work | None = None
        self.sent: Tensor | None = None

    def start(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows = rows.contiguous()
        self.buffer = rows.new_empty(sum(receive), *rows.shape[1:])
        # As bytes, because gloo moves no bfloat16.
        into, out = (x.flatten(1).view(torch.uint8) for x in (self.buffer, rows))
        self.work = dist.all_to_all_single(into, out, receive, send, group=self.group, async_op=True)
        self.sent = rows  # kept alive until the exchange is over
        return self.buffer

    def wait(self) -> Tensor:
        assert self.work is not None
        assert self.buffer is not None
        self.work.wait()
        buffer = self.buffer
        self.work = self.buffer = self.sent = None
        return buffer


class _Start(torch.autograd.Function):
    """Start sending rows; the result is filled once ``_Wait`` has run."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pending: _Pending) -> Tensor:
        ctx.pending = pending
        return pending.start(rows, pending.plan.send_counts, pending.plan.receive_counts)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.pending.wait(), None


class _Wait(torch.autograd.Function):
    """Wait for the rows; backward starts sending their gradients back, which ``_Start`` waits for."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, pending: _Pending) -> Tensor:
        ctx.pending = pending
        pending.wait()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        plan = ctx.pending.plan
        ctx.pending.start(gradient, plan.receive_counts, plan.send_counts)
        return gradient, None  # only the shape is used: the rows themselves are under way


class HaloExchange:
    """One exchange of one layer: started on construction, finished by :meth:`boundary`.

    Args:
        mixed: [S, B, G, R+2, D], the latents of this rank's tokens.
        plan: see :func:`plan_halo`.
        conv_rows: rows of query and key latents that the convs need.
        delay_from: see :class:`cca_kernels.MixOptions`.
        group: the context-parallel group.
    """

    def __init__(
        self,
        mixed: Tensor,
        plan: HaloPlan,
        conv_rows: int,
        delay_from: int | None,
        group: dist.ProcessGroup,
    ):
        self._plan = plan
        self._conv_rows = conv_rows
        tail = mixed.index_select(0, plan.send)
        latents, value = tail[..., :-1, :], tail[..., -1, :].flatten(2)
        self._latent_shape = latents.shape[1:]
        delayed = value[..., value.shape[-1] if delay_from is None else delay_from :]
        payload = torch.cat([latents.flatten(2), delayed] if conv_rows else [delayed], -1)
        self._pending = _Pending(plan, group)
        self._received = _Start.apply(payload, self._pending)

    def boundary(self) -> Boundary:
        """The rows before every edge of this rank; those before the start of a document are zero."""
        plan = self._plan
        received = _Wait.apply(self._received, self._pending)
        rows = received.new_zeros(plan.edges * plan.rows, *received.shape[1:])
        rows = rows.index_copy(0, plan.slots, received).unflatten(0, (plan.edges, plan.rows))
        batch, *head_shape = self._latent_shape
        channels = head_shape[0] * head_shape[1] * head_shape[2] if self._conv_rows else 0
        latents = rows[:, : self._conv_rows, :, :channels]  # all rows, or none where the convs need none
        shape = (plan.edges, self._conv_rows, batch, *head_shape)
        return Boundary(latents.reshape(shape), rows[:, -1, :, channels:])
