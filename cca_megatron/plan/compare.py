"""The same model with another attention in every layer."""

from dataclasses import replace
from typing import Literal, get_args

from cca_megatron.plan.attention import Attention, HeadAttention, LatentAttention
from cca_megatron.plan.layers import Model
from cca_megatron.training.recipe import RecipeError

Kind = Literal["mha", "gqa", "mla"]
_GQA_GROUP = 4
"""Query heads per KV head, as in Llama 3 8B."""
_WIDE = 4096
"""From this hidden size on MLA compresses queries too: DeepSeek-V2-Lite (2,048) does not, V2 (5,120) does."""


def with_attention(model: Model, kind: Kind) -> Model:
    """The model with heads that fill its hidden size, of the width that it has; nothing else changes.

    ``mla`` has the proportions of DeepSeek-V2 (arXiv 2405.04434): latents of 4 head widths for keys and
    values, 12 for queries, and half a head for positions.

    Raises:
        RecipeError: the kind is unknown, or heads do not fill the hidden size.
    """
    if kind not in get_args(Kind):
        raise RecipeError(f"compare={kind}: unknown; {', '.join(get_args(Kind))} are known")
    ours = model.layers[0].attention
    if not isinstance(ours, HeadAttention):
        raise RecipeError(f"compare={kind} with multi_latent_attention=true: compare from CCA, MHA or GQA")
    hidden, dim = ours.hidden_size, ours.head_dim
    heads = hidden // dim
    if heads * dim != hidden:
        raise RecipeError(
            f"compare={kind} with hidden_size={hidden}: heads of kv_channels={dim} do not fill it; "
            f"model.hidden-size={max(1, heads) * dim} works"
        )
    attention: Attention
    if kind == "mla":
        queries = 12 * dim if hidden >= _WIDE else None
        attention = LatentAttention(hidden, heads, 4 * dim, queries, dim, dim // 2)
    else:
        groups = heads if kind == "mha" else max(1, heads // _GQA_GROUP)
        attention = HeadAttention(hidden, heads, groups, dim, ours.bias)
    return replace(model, layers=tuple(replace(layer, attention=attention) for layer in model.layers))
