"""Megatron's own attention where CCA would be, to compare with: MHA, GQA and MLA, all else being equal.

Which of them it is follows from Megatron's settings: ``num_query_groups`` and ``multi_latent_attention``.
"""

from dataclasses import replace
from typing import Any

from cca_megatron._compat import (
    MLASelfAttention,
    ModuleSpec,
    TransformerBlockSubmodules,
    get_gpt_decoder_block_spec,
)
from cca_megatron.local_backend import LocalNorm
from cca_megatron.parallel.core_attention import LocalCoreAttention
from cca_megatron.specs import transformer_config


def baseline_decoder_block_spec(
    config: Any, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage with Megatron's attention, and the final norm.

    Layers, norms and core attention are those of :func:`cca_megatron.specs.cca_decoder_block_spec`.

    Args:
        config: a TransformerConfig, or Megatron's GPTModelConfig around one.
        vp_stage: virtual pipeline stage; None without interleaving.
        pp_rank: pipeline rank; None takes the current one.
    """
    config = transformer_config(config)
    use_te = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config, use_te, config.normalization, vp_stage=vp_stage, pp_rank=pp_rank
    )
    if use_te:
        return block
    return TransformerBlockSubmodules(
        layer_specs=[_localized(layer) for layer in block.layer_specs], layer_norm=LocalNorm
    )


def _localized(layer: ModuleSpec) -> ModuleSpec:
    attention = layer.submodules.self_attention
    core = _LatentCoreAttention if attention.module is MLASelfAttention else LocalCoreAttention
    linears = replace(attention.submodules, core_attention=core)
    parts = replace(
        layer.submodules,
        input_layernorm=LocalNorm,
        self_attention=replace(attention, submodules=linears),
        pre_mlp_layernorm=LocalNorm,
    )
    return replace(layer, submodules=parts)


class _LatentCoreAttention(LocalCoreAttention):
    """The same for MLA, which says how wide keys and values are; their tensors say so too."""

    def __init__(
        self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **settings: Any
    ):
        super().__init__(*args, **settings)
