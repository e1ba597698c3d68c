"""Core attention for the local backend, on ``scaled_dot_product_attention``.

Megatron's own ``DotProductAttention`` materialises an S x S score matrix, and takes neither packed
documents nor context parallelism. Where Transformer Engine is installed, its module is used instead.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from cca_megatron._compat import (
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerConfig,
    is_layer_window_attention,
    tensor_parallel,
)
from cca_megatron.config import PackedZigzag
from cca_megatron.parallel.context_attention import context_attention
from cca_megatron.parallel.head_exchange import attend_by_heads
from cca_megatron.parallel.layout import check_documents
from cca_megatron.parallel.packed import context_shard, host_document_starts
from cca_megatron.parallel.rules import local_attention_problems


class LocalCoreAttention(MegatronModule):
    """Causal attention with grouped queries, sliding windows and packed documents.

    Never holds an S x S tensor, except that PyTorch itself does on a CPU with attention dropout.
    A window of w tokens to the left costs one [w, 2w] mask, whatever the sequence length.

    Raises:
        ValueError: the configuration asks for an attention that this module does not have.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        packed_zigzag: PackedZigzag = "document",
    ):
        super().__init__(config=config)
        problems = local_attention_problems(config)
        if problems:
            raise ValueError("; ".join(problems))
        self.packed_zigzag = packed_zigzag
        if attention_type != "self" or attn_mask_type != AttnMaskType.causal:
            raise ValueError(
                f"attention_type={attention_type!r} with attn_mask_type={attn_mask_type}: the local "
                "core attention is causal self-attention; 'self' with AttnMaskType.causal works"
            )
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        left = config.window_size[0] if has_window and config.window_size else -1
        self.window: int | None = None if left < 0 else left
        self.cp_group = None if pg_collection is None else getattr(pg_collection, "cp", None)
        # Megatron leaves it None where nothing is asked for; Transformer Engine takes that for p2p.
        self.cp_comm_type = cp_comm_type or "p2p"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each document.

        Args:
            query: [S, B, query heads, D], or [S, query heads, D] when packed.
            key, value: the same with key/value heads.
            attention_mask: ignored, as Transformer Engine ignores it for causal attention.
            attn_mask_type: must be causal, or None for the module's own.
            attention_bias: must be None.
            packed_seq_params: where documents start, in ``thd`` format.

        Returns:
            [S, B, query heads * D], or [S, query heads * D] when packed.
        """
        if attn_mask_type not in (None, AttnMaskType.causal) or attention_bias is not None:
            raise ValueError(
                f"attn_mask_type={attn_mask_type} with an attention bias "
                f"{'given' if attention_bias is not None else 'absent'}: the local core attention is "
                "causal and has no bias"
            )
        if packed_seq_params is not None:
            query, key, value = (x[:, None] for x in (query, key, value))
        shard = None
        if self.cp_group is not None:
            shard = context_shard(
                query.shape[0], self.cp_group, query.device, packed_seq_params, self.packed_zigzag
            )
        if shard is None:
            ends = None
            if packed_seq_params is not None:
                starts = host_document_starts(packed_seq_params)
                check_documents(starts, query.shape[0])
                ends = starts.tolist()
            out = self._attend_whole(query, key, value, ends)
        elif self.cp_comm_type == "a2a":
            attend = partial(self._attend_whole, ends=shard.layout.cu_seqlens.tolist())
            out = attend_by_heads(query, key, value, shard, attend)
        else:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
            out = context_attention(q, k, v, shard, self.cp_comm_type, scale, self.window)
            out = out.permute(2, 0, 1, 3)
        out = out.flatten(2)
        return out if packed_seq_params is None else out.squeeze(1)

    def _attend_whole(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int] | None) -> Tensor:
        """[S, B, heads, D] -> the same; all tokens are here, ``ends`` are the documents'."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self._attend(q, k, v) if ends is None else self._attend_documents(q, k, v, ends)
        return out.permute(2, 0, 1, 3)

    def _attend_documents(self, q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Tensor:
        """[B, heads, S, D] -> the same; padding after the last document comes out as zero."""
        documents = [
            self._attend(*(x[:, :, start:end] for x in (q, k, v)))
            for start, end in pairwise(ends)
            if end > start
        ]
        padding = q.new_zeros(*q.shape[:2], q.shape[2] - ends[-1], v.shape[-1])
        return torch.cat([*documents, padding], 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of one document, [B, heads, S, D], q aligned with k."""
        length = q.shape[2]
        if self.window is None or self.window >= length - 1:
            return self._sdpa(q, k, v, is_causal=True)
        block = max(self.window, 1)
        rows = []
        for start in range(0, length, block):
            end, first = min(start + block, length), max(0, start - self.window)
            row = torch.arange(start, end, device=q.device)[:, None]
            column = torch.arange(first, end, device=q.device)
            mask = (column <= row) & (column >= row - self.window)
            keys = slice(first, end)
            rows.append(self._sdpa(q[:, :, start:end], k[:, :, keys], v[:, :, keys], mask=mask))
        return torch.cat(rows, 2)

    def _sdpa(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )

        # Ranks hold different heads, so they must draw different dropout.
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return attend()
        return attend()
