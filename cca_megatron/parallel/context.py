"""One rank's view of a sequence that is cut over context-parallel ranks, and the CCA mix on it."""

from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cca_kernels import MixOptions, MixWeights, cca_mix
from cca_megatron._compat import PackedSeqParams
from cca_megatron.config import PackedZigzag
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

    def blocks(self, source: int) -> list[Block]:
        """What this rank's queries attend to among the keys of rank ``source``."""
        if source not in self._blocks:
            self._blocks[source] = self.layout.blocks(self.rank, source)
        return self._blocks[source]

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


@lru_cache(maxsize=8)
def _batch_shard(tokens: int, group: dist.ProcessGroup, device: torch.device) -> ContextShard:
    return ContextShard(ContextLayout.zigzag(tokens, group.size()), group, device)


def context_shard(
    tokens: int,
    group: dist.ProcessGroup,
    device: torch.device,
    packed_seq_params: PackedSeqParams | None = None,
    packed_zigzag: PackedZigzag = "document",
) -> ContextShard | None:
    """This rank's view of the current micro-batch; None where one rank holds all of it.

    For packed documents it is computed once per micro-batch and kept on ``packed_seq_params``, which
    every layer gets. Computing it reads cu_seqlens on the host (:func:`host_document_starts`): a caller
    who wants no layer to wait for the device calls this while the batch is prepared.

    Args:
        tokens: tokens of this rank, padding included.
        group: the context-parallel group; ``packed_seq_params.cp_group`` goes before it.
        device: where the tokens are.
        packed_seq_params: documents in ``thd`` format, or None for a plain batch in zigzag.
        packed_zigzag: how packed documents are cut: one by one, or the stream as a whole.

    Raises:
        ValueError: the stream or a document cannot be cut evenly; the message says what would work.
    """
    if packed_seq_params is None:
        return _batch_shard(tokens * group.size(), group, device) if group.size() > 1 else None
    shard: ContextShard | None = getattr(packed_seq_params, "cca_context_shard", None)
    if packed_seq_params.cp_group is not None:
        group = packed_seq_params.cp_group
    elif packed_seq_params.local_cp_size == 1:
        return None
    if shard is None and group.size() > 1:
        cut = ContextLayout.zigzag if packed_zigzag == "stream" else ContextLayout.zigzag_documents
        ends = host_document_starts(packed_seq_params)
        shard = ContextShard(cut(tokens * group.size(), group.size(), ends), group, device)
        set_context_shard(packed_seq_params, shard)
    return shard


def set_context_shard(packed_seq_params: PackedSeqParams, shard: ContextShard) -> None:
    """Say explicitly how this micro-batch is cut, in place of what :func:`context_shard` would derive."""
    packed_seq_params.cca_context_shard = shard


def document_starts(packed_seq_params: PackedSeqParams) -> Tensor:
    """cu_seqlens in the layout of the token stream (padded, where documents are padded).

    Raises:
        ValueError: the documents are not in ``thd`` format.
    """
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format={packed_seq_params.qkv_format!r}: packed documents come in "
            "'thd' format"
        )
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def host_document_starts(packed_seq_params: PackedSeqParams) -> Integers:
    """:func:`document_starts` on the host: read once per micro-batch and kept on ``packed_seq_params``.

    Reading waits for the device, so a caller who wants no layer to wait calls this with the batch.

    Raises:
        ValueError: the documents are not in ``thd`` format, or longer than ``max_seqlen_q`` says, after
            which Megatron sizes its table of RoPE angles.
    """
    starts: Integers | None = getattr(packed_seq_params, "cca_document_starts", None)
    if starts is None:
        starts = document_starts(packed_seq_params).cpu().numpy().astype(np.int64)
        packed_seq_params.cca_document_starts = starts
        unpadded = np.diff(packed_seq_params.cu_seqlens_q.cpu().numpy())
        longest, stated = int(unpadded.max(initial=0)), packed_seq_params.max_seqlen_q
        if stated is not None and longest > stated:
            raise ValueError(
                f"packed_seq_params.max_seqlen_q={stated}: the longest document has {longest} tokens; "
                f"max_seqlen_q={longest} works"
            )
    return starts
