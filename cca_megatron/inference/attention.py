"""CCA attention on a cache: what the layer does with an inference context."""

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from cca_kernels import MixWeights, cca_mix
from cca_megatron.inference.cache import LayerCache, step_of
from cca_megatron.rotary import rotary_tables

if TYPE_CHECKING:
    from cca_megatron.attention import CCASelfAttention


def check_context(attention: "CCASelfAttention", context: Any, packed_seq_params: Any) -> None:
    """Raise NotImplementedError unless the layer can generate with this context."""
    config = attention.config
    problems = [
        message
        for broken, message in (
            (not context.is_static_batching(), "dynamic batching; StaticInferenceContext works"),
            (context.batch_size_offset != 0, "batch_size_offset; a batch at once works"),
            (packed_seq_params is not None, "packed documents; a batch of prompts works"),
            (config.context_parallel_size > 1, "context parallelism; context_parallel_size=1 works"),
            (config.sequence_parallel, "sequence parallelism; sequence_parallel=False works"),
            (getattr(config, "flash_decode", False), "flash_decode; flash_decode=False works"),
        )
        if broken
    ]
    if problems:
        raise NotImplementedError("CCA generates with no " + ", no ".join(problems))


def cached_attention(
    attention: "CCASelfAttention", mixed: Tensor, context: Any, angles: Tensor | None
) -> Tensor:
    """Mix and attention of new tokens, given all that came before.

    Args:
        attention: the layer.
        mixed: [S, B, G, R+2, D], its projection of the new tokens.
        context: Megatron's static inference context; its ``sequence_len_offset`` counts the earlier tokens.
        angles: RoPE's table, [positions, 1, 1, width].

    Returns:
        [S, B, query heads * D]
    """
    step = step_of(context, mixed.shape[0], mixed.device)
    if step.left_padding is not None:
        # Convs and value shift find zeros before a prompt, as before any document.
        mixed = mixed.masked_fill((step.positions < 0)[..., None, None, None], 0)
    rotary = None
    if angles is not None:
        scale, interleaved = attention._yarn_concentration_factor, attention.config.rotary_interleaved
        rotary = rotary_tables(
            angles, scale, step, lambda: step.positions, attention.rotary_base, interleaved
        )
    weights = MixWeights._make(getattr(attention, name) for name in MixWeights._fields)
    options = attention._mix_options
    cache = LayerCache(context, attention.layer_number)
    query, key, value = cca_mix(mixed, weights, options, rotary=rotary, boundary=cache.boundary())
    cache.remember(mixed, weights.boundary_rows, options.value_delay_from)
    keys, values = cache.append(key, value)

    end, window = keys.shape[0], attention.window
    first = 0 if window is None else max(0, step.start - window)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, keys[first:], values[first:]))
    sees_all_before = window is None or window >= end - 1
    is_causal = step.start == 0 and q.shape[2] > 1 and sees_all_before and step.left_padding is None
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if is_causal else step.visible(window, first, end),
        is_causal=is_causal,
        scale=attention.config.softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.permute(2, 0, 1, 3).flatten(2)
