"""CCA attention on a cache: what a layer does with an inference context."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cca_kernels import MixOptions, MixWeights, cca_mix
from cca_megatron._compat import TransformerConfig
from cca_megatron.generation_cache import LayerCache, Step


def check_context(config: TransformerConfig, context: Any, packed_seq_params: Any) -> None:
    """Raise NotImplementedError unless CCA can generate with this context."""
    problems = [
        message
        for broken, message in (
            (not context.is_static_batching(), "dynamic batching; StaticInferenceContext works"),
            (packed_seq_params is not None, "packed documents; a batch of prompts works"),
            (config.context_parallel_size > 1, "context parallelism; context_parallel_size=1 works"),
            (config.sequence_parallel, "sequence parallelism; sequence_parallel=False works"),
            (getattr(config, "flash_decode", False), "flash_decode; flash_decode=False works"),
        )
        if broken
    ]
    if context.is_static_batching() and context.batch_size_offset:
        problems.append("batch_size_offset; a batch at once works")
    if problems:
        raise NotImplementedError("CCA generates with no " + ", no ".join(problems))


def cached_attention(
    mixed: Tensor,
    weights: MixWeights,
    options: MixOptions,
    rotary: tuple[Tensor, Tensor] | None,
    step: Step,
    cache: LayerCache,
    window: int | None,
    softmax_scale: float | None,
) -> Tensor:
    """Mix and attention of new tokens, given all that came before.

    Args:
        mixed: [S, B, G, R+2, D], the projection of the new tokens.
        weights, options: of the mix.
        rotary: cos and sin at the new tokens.
        step: which tokens these are.
        cache: of the layer; the new tokens are added.
        window: tokens to the left that a token sees; None: all.
        softmax_scale: None means 1 / sqrt(D).

    Returns:
        [S, B, query heads * D]
    """
    if step.left_padding is not None:
        # Convs and value shift find zeros before a prompt, as before any document.
        mixed = mixed.masked_fill((step.positions < 0)[..., None, None, None], 0)
    query, key, value = cca_mix(mixed, weights, options, rotary=rotary, boundary=cache.boundary())
    cache.remember(mixed, weights.boundary_rows, options.value_delay_from)
    keys, values = cache.append(key, value)

    end = keys.shape[0]
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
        scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.permute(2, 0, 1, 3).flatten(2)
