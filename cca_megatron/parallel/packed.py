"""Packed documents as Megatron describes them, and how they lie on the context-parallel ranks.

What is derived from a ``PackedSeqParams`` is kept on it as an attribute: every layer of a micro-batch gets
the same object.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cca_megatron._compat import PackedSeqParams
from cca_megatron.config import PackedZigzag
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.layout import ContextLayout, Integers


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
    """:func:`document_starts` on the host: read once per micro-batch.

    Reading waits for the device, so a caller who wants no layer to wait calls this with the batch.

    Raises:
        ValueError: the documents are not in ``thd`` format, or longer than ``max_seqlen_q`` says, after
            which Megatron sizes its table of RoPE angles.
        RuntimeError: a CUDA graph is being captured, which cannot hold what depends on their values.
    """
    starts: Integers | None = getattr(packed_seq_params, "cca_document_starts", None)
    if starts is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "packed documents in a CUDA graph: where they start is read on the host; "
                "cuda_graph_impl='none' works"
            )
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
