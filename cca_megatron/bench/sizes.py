"""Attention layers that are alike in one respect: in width, in parameters, or in what generation caches."""

from collections.abc import Callable
from typing import Literal, get_args

from cca_megatron.plan.attention import Attention, CompressedAttention, HeadAttention, LatentAttention

Matching = Literal["width", "parameters", "kv-cache"]
METHODS = ("MHA", "GQA", "MLA", "CCA", "CCGQA")
BASELINE = "MHA"
_GQA_GROUP = 4
"""Query heads per KV head of GQA, as in Llama 3 8B, and of CCGQA, as in ZAYA1."""
_COMPRESSION = 4
"""Of all heads in CCA-4x (arXiv 2510.04476); CCGQA-2x8x compresses queries by 2 and keys by 8."""


def matched(matching: Matching, hidden: int, dim: int) -> dict[str, Attention]:
    """One layer of each of ``METHODS``.

    * ``width``: those that the paper compares (arXiv 2510.04476): heads of MHA, GQA and MLA fill the hidden
      size, CCA is CCA-4x and CCGQA is CCGQA-2x8x.
    * ``parameters``: as many heads as bring a layer nearest to the parameters of CCGQA-2x8x.
    * ``kv-cache``: what CCGQA-2x8x caches for a token. GQA and MLA keep heads that fill the hidden size.

    MLA has the proportions of DeepSeek-V2-Lite (arXiv 2405.04434): a latent of 4 head widths for keys and
    values but for ``kv-cache``, half a head for positions, queries without compression.

    Args:
        matching: in which respect.
        hidden: the hidden size.
        dim: channels of a head.

    Raises:
        ValueError: the matching is unknown, or the sizes give CCGQA-2x8x no whole KV head.
    """
    if matching not in get_args(Matching):
        raise ValueError(
            f"matched={matching}: unknown; {', '.join(get_args(Matching))} are known, parameters works"
        )
    heads, rest = divmod(hidden, dim)
    if rest or heads % 8:
        raise ValueError(
            f"hidden-size={hidden}, head-dim={dim}: CCGQA-2x8x has an eighth of the heads as KV heads; "
            f"hidden-size={8 * dim * max(1, round(heads / 8))} works"
        )
    ours = CompressedAttention(hidden, heads // 2, heads // 8, dim)
    if matching == "width":
        return {
            "MHA": HeadAttention(hidden, heads, heads, dim),
            "GQA": HeadAttention(hidden, heads, heads // _GQA_GROUP, dim),
            "MLA": _mla(hidden, heads, dim, 4 * dim),
            "CCA": CompressedAttention(hidden, heads // _COMPRESSION, heads // _COMPRESSION, dim),
            "CCGQA": ours,
        }
    if matching == "parameters":
        goal = parameters(ours)
        return {
            "MHA": _nearest(goal, lambda n: HeadAttention(hidden, n, n, dim)),
            "GQA": _nearest(goal, lambda n: HeadAttention(hidden, _GQA_GROUP * n, n, dim)),
            "MLA": _nearest(goal, lambda n: _mla(hidden, n, dim, 4 * dim)),
            "CCA": _nearest(goal, lambda n: CompressedAttention(hidden, n, n, dim)),
            "CCGQA": ours,
        }
    kept = ours.kv_heads
    return {
        "MHA": HeadAttention(hidden, kept, kept, dim),
        "GQA": HeadAttention(hidden, heads, kept, dim),
        "MLA": _mla(hidden, heads, dim, ours.cache_elements() - dim // 2),
        "CCA": CompressedAttention(hidden, kept, kept, dim),
        "CCGQA": ours,
    }


def parameters(attention: Attention) -> int:
    """Of the layer in all."""
    return sum(part.count for part in attention.parts())


def heads_of(attention: Attention) -> str:
    """Query and KV heads, or query heads and the rank of MLA's latent."""
    if isinstance(attention, LatentAttention):
        return f"{attention.query_heads} / rank {attention.kv_rank}"
    assert isinstance(attention, HeadAttention)
    return f"{attention.query_heads} / {attention.kv_heads}"


def _mla(hidden: int, heads: int, dim: int, rank: int) -> LatentAttention:
    return LatentAttention(hidden, heads, rank, None, dim, dim // 2)


def _nearest(goal: int, of_heads: Callable[[int], Attention]) -> Attention:
    """The layer with the number of parameters nearest to the goal; they grow with the heads."""
    n = 1
    while parameters(of_heads(n + 1)) <= goal:
        n += 1
    return min(of_heads(n), of_heads(n + 1), key=lambda layer: abs(parameters(layer) - goal))
