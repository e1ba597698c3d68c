"""Attention under context parallelism by exchanging tokens for heads (``a2a``).

Each rank gives away most heads of its own tokens and gets all tokens of its own heads, attends as if
there were no context parallelism, and gives the result back.
"""

from collections.abc import Callable

from torch import Tensor

from cca_megatron._compat import tensor_parallel
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.rules import exchanged_kv_heads


def attend_by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shard: ContextShard,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Run ``attend`` on all tokens and some heads.

    Args:
        query: [S, B, query heads, D], this rank's tokens.
        key, value: [S, B, KV heads, D].
        shard: which tokens these are.
        attend: attention of q, k, v, each [CP * S, B, heads, D] in stream order.

    Returns:
        [S, B, query heads, D].
    """
    kv_heads = exchanged_kv_heads(query.shape[2], key.shape[2], shard.layout.size)
    assert kv_heads is not None  # checked when the module was built
    copies = kv_heads // key.shape[2]
    key, value = (x.repeat_interleave(copies, 2) if copies > 1 else x for x in (key, value))
    out = attend(*(_tokens_for_heads(x, shard) for x in (query, key, value)))
    return _heads_for_tokens(out, shard)


def _tokens_for_heads(x: Tensor, shard: ContextShard) -> Tensor:
    """[S, B, heads, D] -> [CP * S, B, heads / CP, D] in stream order."""
    by_rank = x.unflatten(2, (shard.layout.size, -1)).movedim(2, 0)
    gathered = tensor_parallel.all_to_all(shard.group, by_rank.flatten(0, 1))
    return gathered.index_select(0, shard.stream_order)


def _heads_for_tokens(x: Tensor, shard: ContextShard) -> Tensor:
    """[CP * S, B, heads / CP, D] in stream order -> [S, B, heads, D]."""
    by_rank = x.index_select(0, shard.stream_indices).contiguous()
    gathered = tensor_parallel.all_to_all(shard.group, by_rank)
    return gathered.unflatten(0, (shard.layout.size, -1)).movedim(0, 2).flatten(2, 3)
