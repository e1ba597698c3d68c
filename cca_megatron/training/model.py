"""Building the model: Megatron's configuration and builder, with CCA or a baseline in every layer."""

import functools
from argparse import Namespace
from dataclasses import dataclass, field
from typing import ClassVar, override

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.base import ModelConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from cca_megatron._compat import ProcessGroupCollection
from cca_megatron.baseline import baseline_decoder_block_spec
from cca_megatron.config import CCAConfig
from cca_megatron.specs import cca_decoder_block_spec, cca_hybrid_stack_spec, cca_mtp_block_spec
from cca_megatron.training.arguments import cca_config_from_args, zaya_settings_from_args
from cca_megatron.training.expert_load import count_tokens
from cca_megatron.training.layer_log import finalize_and_log
from cca_megatron.zaya.embedding import hold_padding_embedding
from cca_megatron.zaya.settings import ZayaSettings
from cca_megatron.zaya.specs import zaya_decoder_block_spec


def model_config_from_args(args: Namespace) -> ModelConfig:
    """Megatron's model configuration, with the values of each layer in the log.

    A hybrid model if a layer pattern is given, else a GPT model.
    """
    config = _model_config(args)
    config.transformer.finalize_model_grads_func = finalize_and_log
    config.pre_wrap_hooks.append(count_tokens)
    return config


def _model_config(args: Namespace) -> ModelConfig:
    cca = cca_config_from_args(args)
    if args.hybrid_layer_pattern is not None:
        config = hybrid_config_from_args(args)
        use_te = config.transformer.transformer_impl == "transformer_engine"
        config.hybrid_stack_spec = cca_hybrid_stack_spec(use_te, cca)
        return config
    config = gpt_config_from_args(args, model_config_cls=CCAModelConfig)
    config.cca, config.zaya = cca, zaya_settings_from_args(args)
    if args.attention == "megatron":
        config.transformer_layer_spec = baseline_decoder_block_spec
    elif config.zaya is None:
        config.transformer_layer_spec = functools.partial(cca_decoder_block_spec, cca=cca, keeps_mtp=True)
    else:
        config.transformer_layer_spec = functools.partial(zaya_decoder_block_spec, cca=cca, zaya=config.zaya)
    return config


@dataclass(kw_only=True)
class CCAModelConfig(GPTModelConfig):
    """Megatron's GPT model configuration with the CCA settings, and those of ZAYA's parts, beside it."""

    builder: ClassVar[str] = "cca_megatron.training.model.CCAModelBuilder"
    cca: CCAConfig = field(default_factory=CCAConfig)
    zaya: ZayaSettings | None = None


class CCAModelBuilder(GPTModelBuilder):
    """Megatron's GPT builder, except that multi-token prediction keeps CCA, and for ZAYA's padding token.

    Megatron's own ``build_model`` gives the former ordinary attention and takes no spec for them.
    """

    @override
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One pipeline stage of the model."""
        config = self._model_config
        if config.mtp_num_layers is None:
            model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
            if config.zaya is not None:
                hold_padding_embedding(model, config.zaya.padding_token)
            return model
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(pg_collection.pp)
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size, config.make_vocab_size_divisible_by, config.tensor_model_parallel_size
            )
        return GPTModel(
            config=config.transformer,
            transformer_layer_spec=config.transformer_layer_spec(config, vp_stage=vp_stage),
            mtp_block_spec=cca_mtp_block_spec(config, vp_stage=vp_stage, cca=config.cca),
            vocab_size=vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
