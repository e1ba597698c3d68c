"""One rank's view of a sequence that is cut over context-parallel ranks, and the CCA mix on it."""

from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cca_kernels import MixOptions, MixWeights, cca_mix
from cca_megatron.parallel.halo import HaloExchange, HaloPlan, plan_halo
from cca_megatron.parallel.layout import Block, ContextLayout, Integers


class ContextShard:
    """The tokens of one rank. What is derived from the layout is computed once, on first use.

    Args:
        layout: how the stream lies on the ranks.
        group: the context-parallel group.
        device: where the tokens are.
    """

    def __init__(self, layout: ContextLayout, group: dist.ProcessGroup, device: torch.device):
        self.layout, self.group, self.device = layout, group, device
        self.rank = group.rank()
        self._halo_plans: dict[int, HaloPlan] = {}
        self._blocks: dict[int, list[Block]] = {}

    @cached_property
    def undivided(self) -> "ContextShard":
        """The same tokens as one document, for convs that mix across documents."""
        return ContextShard(self.layout.undivided(), self.group, self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[pieces + 1], where each piece starts among the tokens of this rank."""
        return self._on_device(np.cumsum([0, *self.layout.of_rank(self.rank).length]))

    @cached_property
    def positions(self) -> Tensor:
        """[S], the position of each token in its document; 0 for padding."""
        positions = np.zeros(self.layout.tokens // self.layout.size, np.int64)
        pieces = self.layout.of_rank(self.rank)
        for position, length, offset in zip(pieces.position, pieces.length, pieces.offset, strict=True):
            positions[offset : offset + length] = position + np.arange(length)
        return self._on_device(positions)

    @cached_property
    def own_tokens(self) -> Tensor:
        """[S], where in the stream each token of this rank comes from: ``stream[own_tokens]`` is its cut."""
        return self._on_device(self.layout.token_indices(self.rank))

    @cached_property
    def stream_indices(self) -> Tensor:
        """[CP * S], where in the stream each token comes from, all ranks' tokens one after another."""
        ranks = range(self.layout.size)
        return self._on_device(np.concatenate([self.layout.token_indices(r) for r in ranks]))

    @cached_property
    def stream_order(self) -> Tensor:
        """[CP * S], the inverse of :attr:`stream_indices`: it puts all ranks' tokens in stream order."""
        return torch.argsort(self.stream_indices)

    def blocks(self, source: int, window: int | None = None) -> list[Block]:
        """What this rank's queries attend to among the keys of rank ``source``, within a window if any."""
        if source not in self._blocks:
            self._blocks[source] = self.layout.blocks(self.rank, source)
        blocks = self._blocks[source]
        return blocks if window is None else [block for block in blocks if block.nearest <= window]

    def mix(
        self,
        mixed: Tensor,
        weights: MixWeights,
        options: MixOptions,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`cca_kernels.cca_mix` of this rank's tokens, as if it held the whole sequence.

        Arguments and results are those of ``cca_mix``. The few tokens that depend on other ranks are
        mixed a second time once their rows have come, so that nothing else waits for the network.
        """
        rows = max(weights.boundary_rows, options.value_delay_from is not None)
        if not rows:
            return cca_mix(mixed, weights, options, rotary=rotary, cu_seqlens=self.cu_seqlens)
        plan = self._halo_plan(rows)
        exchange = HaloExchange(mixed, plan, weights.boundary_rows, options.value_delay_from, self.group)
        everything = cca_mix(mixed, weights, options, rotary=rotary, cu_seqlens=self.cu_seqlens)
        if rotary is not None:
            cos, sin = (x.index_select(0, plan.edge_tokens) for x in rotary)
            rotary = cos, sin
        edges = cca_mix(
            mixed.index_select(0, plan.edge_tokens),
            weights,
            options,
            rotary=rotary,
            cu_seqlens=plan.edge_cu_seqlens,
            boundary=exchange.boundary(),
        )
        q, k, v = (x.index_copy(0, plan.edge_tokens, y) for x, y in zip(everything, edges, strict=True))
        return q, k, v

    def _halo_plan(self, rows: int) -> HaloPlan:
        if rows not in self._halo_plans:
            self._halo_plans[rows] = plan_halo(self.layout, self.rank, rows, self.device)
        return self._halo_plans[rows]

    def _on_device(self, values: Integers) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device, non_blocking=True)
