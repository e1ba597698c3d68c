"""Layer specs with ZAYA's parts, for GPT models.

``zaya_decoder_block_spec`` is to ZAYA1 what ``cca_megatron.specs.cca_decoder_block_spec`` is to CCA::

    pretrain_gpt.py ... --spec cca_megatron.zaya.specs zaya_decoder_block_spec --fp32-residual-connection
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

# First, for it says what is missing where Megatron would swallow an ImportError.
from cca_megatron.specs import cca_decoder_block_spec, is_moe, transformer_config  # isort: skip

from cca_megatron._compat import (
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_transformer_layer_offset,
)
from cca_megatron.config import CCAConfig
from cca_megatron.zaya.balancing import balance_at_every_step
from cca_megatron.zaya.layer import ZayaLayer
from cca_megatron.zaya.moe_layer import ZayaMoELayer
from cca_megatron.zaya.pipeline import widen_pipeline
from cca_megatron.zaya.residual import ResidualScaling
from cca_megatron.zaya.router import ZayaRouter
from cca_megatron.zaya.settings import ZayaSettings, check_zaya


def zaya_decoder_block_spec(
    config: Any,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    cca: CCAConfig | None = None,
    zaya: ZayaSettings | None = None,
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage with CCA and ZAYA's parts, and the final norm.

    Sets what these parts need on the configuration: layers that differ in checkpoints, the shape of what
    pipeline stages send, and the update of the balancing biases.

    Args:
        config: a TransformerConfig, or Megatron's GPTModelConfig around one.
        vp_stage: virtual pipeline stage; None without interleaving.
        pp_rank: pipeline rank; None takes the current one.
        cca: the CCA settings; None means ``CCAConfig()``.
        zaya: the settings of ZAYA's parts; None means ``ZayaSettings()``.

    Raises:
        ValueError: the settings do not fit together.
        RuntimeError: the configuration wants Transformer Engine and it is not installed.
    """
    config = transformer_config(config)
    zaya = zaya or ZayaSettings()
    check_zaya(config, zaya)
    block = cca_decoder_block_spec(config, vp_stage, pp_rank, cca)
    _prepare(config, zaya)
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    first = _moe_layers(config).index(True) if zaya.has_mlp_router else None
    layers = [
        _with_zaya(layer, config, zaya, averages=first is not None and number > first)
        for number, layer in enumerate(block.layer_specs, offset)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_in_params_dtype(block.layer_norm))


def _prepare(config: TransformerConfig, zaya: ZayaSettings) -> None:
    # Some layers have parameters that others lack.
    config.hetereogenous_dist_checkpoint = True
    if zaya.carries_state and config.pipeline_model_parallel_size > 1:
        widen_pipeline(config, zaya.router_hidden_size)
    if zaya.has_mlp_router:
        balance_at_every_step(config)


def _moe_layers(config: TransformerConfig) -> list[bool]:
    """For every layer of the model, whether it is a mixture of experts; Megatron's rule."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [number % frequency == 0 for number in range(config.num_layers)]
    return [bool(one) for one in frequency]


def _with_zaya(
    layer: ModuleSpec, config: TransformerConfig, zaya: ZayaSettings, averages: bool
) -> ModuleSpec:
    submodules = layer.submodules
    submodules = replace(
        submodules,
        input_layernorm=_in_params_dtype(submodules.input_layernorm),
        pre_mlp_layernorm=_in_params_dtype(submodules.pre_mlp_layernorm),
    )
    if zaya.residual_scaling:
        scaling = ModuleSpec(module=ResidualScaling, params={"config": config})
        submodules = replace(submodules, self_attn_bda=scaling, mlp_bda=scaling)
    if zaya.has_mlp_router and is_moe(submodules):
        router = partial(ZayaRouter, zaya=zaya, averages=averages and zaya.depth_averaging)
        moe = submodules.mlp.keywords["submodules"]
        mlp = partial(ZayaMoELayer, submodules=replace(moe, router=router), zaya=zaya)
        submodules = replace(submodules, mlp=mlp)
    return replace(layer, module=ZayaLayer, submodules=submodules, params={**layer.params, "zaya": zaya})


def _in_params_dtype(builder: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """The same norm, or identity before a linear with a norm in it, on inputs cast to the weights' dtype.

    The residual stream may be wider than the layers, and Transformer Engine asks for one dtype.
    """

    def build(config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
        norm = builder(config=config, hidden_size=hidden_size, eps=eps)

        def cast(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].to(config.params_dtype), *inputs[1:])

        norm.register_forward_pre_hook(cast)
        return norm

    return build
