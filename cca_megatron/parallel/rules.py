"""What core attention asks of the settings, above all under context parallelism.

Nothing here needs Megatron or a GPU.
"""

import math
from collections.abc import Callable
from typing import Any


def exchanged_kv_heads(query_heads: int, kv_heads: int, ranks: int) -> int | None:
    """KV heads after the copying with which ``a2a`` gives every rank equally many.

    With more ranks than KV heads, several ranks hold a copy of the same head.

    Returns:
        A multiple of both ``kv_heads`` and ``ranks``, or None if the query heads cannot follow.
    """
    copies = math.lcm(kv_heads, ranks)
    return None if query_heads % copies else copies


def core_attention_problems(config: Any, packed_zigzag: str) -> list[str]:
    """What keeps core attention from running with these settings: one message per problem.

    Args:
        config: a TransformerConfig, or anything with its attribute names.
        packed_zigzag: see :class:`cca_megatron.CCAConfig`.
    """
    is_local = getattr(config, "transformer_impl", "local") == "local"
    crosses_ranks = packed_zigzag == "stream" and getattr(config, "context_parallel_size", 1) > 1
    if is_local or crosses_ranks:
        return local_attention_problems(config)
    return _context_problems(config, _te_problems)


def local_attention_problems(config: Any) -> list[str]:
    """The same for the project's own core attention, whatever the rest of the layer is built on."""
    problems = [
        f"{name}=True: the local core attention records no logits; {name}=False works, or "
        "transformer_impl='transformer_engine'"
        for name in ("qk_clip", "log_max_attention_logit")
        if getattr(config, name, False)
    ]
    softmax_type = getattr(config, "softmax_type", "vanilla")
    if softmax_type != "vanilla":
        problems.append(
            f"softmax_type={softmax_type!r}: the local core attention has 'vanilla' only; "
            "transformer_impl='transformer_engine' has the others"
        )
    return problems + _context_problems(config, _local_problems)


def _context_problems(config: Any, of_backend: Callable[[Any, str], list[str]]) -> list[str]:
    size = getattr(config, "context_parallel_size", 1)
    if size == 1:
        return []
    problems = []
    if getattr(config, "hybrid_context_parallel", False):
        problems.append(
            "hybrid_context_parallel=True: the convs need to know which ranks hold a sequence; "
            "hybrid_context_parallel=False works"
        )
    chosen = getattr(config, "cp_comm_type", None) or "p2p"
    for comm_type in sorted(set(chosen)) if isinstance(chosen, list) else [chosen]:
        problems += of_backend(config, comm_type)
    return problems


def _heads_per_rank(config: Any) -> tuple[int, int]:
    tp = config.tensor_model_parallel_size
    groups = config.num_query_groups or config.num_attention_heads
    return config.num_attention_heads // tp, max(groups // tp, 1)


def _local_problems(config: Any, comm_type: str) -> list[str]:
    size = config.context_parallel_size
    problems = []
    if comm_type not in ("p2p", "all_gather", "a2a"):
        problems.append(
            f"cp_comm_type={comm_type!r}: the local core attention has 'p2p', 'all_gather' and 'a2a'; "
            "'p2p' works"
        )
    query_heads, kv_heads = _heads_per_rank(config)
    if comm_type == "a2a" and exchanged_kv_heads(query_heads, kv_heads, size) is None:
        problems.append(
            f"cp_comm_type='a2a' with {query_heads} query heads on each tensor-parallel rank: they must be "
            f"a multiple of context_parallel_size={size} and of the {kv_heads} KV heads together, "
            f"{math.lcm(kv_heads, size)}; cp_comm_type='p2p' works"
        )
    if getattr(config, "attention_dropout", 0.0):
        problems.append(
            f"attention_dropout={config.attention_dropout} with context_parallel_size={size}: the local "
            "core attention has no dropout there; attention_dropout=0 works"
        )
    return problems


def _te_problems(config: Any, comm_type: str) -> list[str]:
    _, kv_heads = _heads_per_rank(config)
    size = config.context_parallel_size
    problems = []
    if comm_type == "a2a" and kv_heads % size:
        problems.append(
            f"cp_comm_type='a2a' with {kv_heads} KV heads on each tensor-parallel rank: Transformer Engine "
            f"needs a multiple of context_parallel_size={size}; cp_comm_type='p2p' works"
        )
    if _has_window(config) and comm_type in ("p2p", "a2a+p2p"):
        problems.append(
            f"window_size={config.window_size} with cp_comm_type={comm_type!r}: Transformer Engine has no "
            "sliding windows around a ring; cp_comm_type='all_gather' works"
        )
    return problems


def _has_window(config: Any) -> bool:
    window = getattr(config, "window_size", None)
    return window is not None and window[0] >= 0
