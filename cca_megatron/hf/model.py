"""A GPT model from the settings of :func:`cca_megatron.hf.config_from_hf`, on the current process groups."""

from collections.abc import Mapping
from typing import Any

import torch

from cca_megatron._compat import GPTModel, TransformerConfig, parallel_state
from cca_megatron.config import CCAConfig
from cca_megatron.hf.config import zaya_settings
from cca_megatron.vocabulary import remember_vocabulary
from cca_megatron.zaya.embedding import hold_padding_embedding
from cca_megatron.zaya.specs import zaya_decoder_block_spec

_RENAMED = {"num_experts": "num_moe_experts"}
_OF_THE_MODEL = {
    "group_query_attention",
    "swiglu",
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "max_position_embeddings",
    "vocab_size",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
}
"""Settings that are no fields of a TransformerConfig."""


def zaya_model(
    settings: Mapping[str, Any], cca: CCAConfig, vp_stage: int | None = None, **transformer: Any
) -> GPTModel:
    """One pipeline stage of the model, with fresh weights.

    Megatron's process groups must be there; ``transformer`` says their sizes and the rest::

        settings, cca = config_from_hf(ZayaConfig.from_pretrained("Zyphra/ZAYA1-8B"))
        model = zaya_model(settings, cca, tensor_model_parallel_size=2, sequence_parallel=True,
                           transformer_impl="local", params_dtype=torch.bfloat16)

    Args:
        settings: as :func:`config_from_hf` gives them.
        cca: the CCA settings.
        vp_stage: virtual pipeline stage; None without interleaving.
        transformer: fields of Megatron's TransformerConfig that add to the settings or replace them.
    """
    fields = {
        _RENAMED.get(name, name): value
        for name, value in settings.items()
        if name not in _OF_THE_MODEL and name != "zaya" and not name.startswith("zaya_")
    }
    fields |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    if "window_size" in settings:
        fields["cp_comm_type"] = "all_gather"  # where Transformer Engine has windows, too
    config = TransformerConfig(**(fields | transformer))
    at = {"ignore_virtual": False, "vp_stage": vp_stage}
    unit = config.tensor_model_parallel_size
    zaya = zaya_settings(settings)
    model = GPTModel(
        config,
        zaya_decoder_block_spec(config, vp_stage, cca=cca, zaya=zaya),
        vocab_size=-(-settings["vocab_size"] // unit) * unit,
        max_sequence_length=settings["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(**at),
        post_process=parallel_state.is_pipeline_last_stage(**at),
        share_embeddings_and_output_weights=not settings["untie_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_percent=settings["rotary_percent"],
        rotary_base=settings["rotary_base"],
        vp_stage=vp_stage,
    )
    hold_padding_embedding(model, zaya.padding_token)
    remember_vocabulary(model, settings["vocab_size"])
    # As Megatron's Float16Module does; what must stay fp32 stays.
    return model.to(config.params_dtype).cuda()
