"""Megatron-Bridge (NVIDIA-NeMo) knows ZAYA once this module is imported.

    import cca_megatron.hf.bridge
    bridge = AutoBridge.from_hf_pretrained("Zyphra/ZAYA1-8B")
    provider = bridge.to_megatron_provider()

docs/zaya.md says which versions go together.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    FusedExpertMapping,
    FusedGatedExpertMapping,
    MegatronParamMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from torch import Tensor, nn

from cca_megatron._compat import GPTModel
from cca_megatron.config import CCAConfig
from cca_megatron.hf.config import config_from_hf, config_to_hf, zaya_settings
from cca_megatron.zaya.settings import ZayaSettings
from cca_megatron.zaya.specs import zaya_decoder_block_spec

# run_config.yaml names the provider and its spec function by path; Bridge loads only allowed packages.
register_allowed_target_prefix("cca_megatron.")

_PROVIDER_NAMES = {"num_experts": "num_moe_experts", "max_position_embeddings": "seq_length"}
"""Where a provider has another name for a setting."""
_IMPLIED = {"group_query_attention", "swiglu", "untie_embeddings_and_output_weights", "padded_vocab_size"}


def zaya_block_spec(config: "ZayaModelProvider", vp_stage: int | None = None) -> Any:
    """The decoder layers of a pipeline stage."""
    return zaya_decoder_block_spec(config, vp_stage, cca=config.cca, zaya=config.zaya)


@dataclass
class ZayaModelProvider(GPTModelProvider):
    """Bridge's GPT provider with the settings of CCA and of ZAYA's parts; the spec gets it as its config."""

    transformer_layer_spec: Callable[..., Any] = zaya_block_spec
    cca: CCAConfig = field(default_factory=CCAConfig)
    zaya: ZayaSettings = field(default_factory=ZayaSettings)


class _GroupMapping(MegatronParamMapping[Any]):
    """One row or more for each KV group, cut by group over TP; ranks beyond the groups hold copies."""

    copies_over_tp = True

    def __init__(self, megatron_param: str, hf_param: Any):
        super().__init__(megatron_param, hf_param)
        self._tp_mapping = ColumnParallelMapping(megatron_param, megatron_param)

    def join(self, weights: Any, groups: int, dim: int) -> Tensor:
        """The tensor or tensors of ``transformers`` as [groups, rows of a group, ...]."""
        return weights.unflatten(0, (groups, -1))

    def split(self, rows: Tensor, dim: int) -> dict[str, Tensor]:
        """The inverse of :meth:`join`, by the names of ``transformers``."""
        return {self.hf_param: rows.flatten(0, 1)}

    def hf_to_megatron(self, hf_weights: Any, megatron_module: nn.Module) -> Tensor:
        config, rows = self._get_config(megatron_module), None
        if self.tp_rank == 0:
            rows = self.join(hf_weights, config.num_query_groups, config.kv_channels)
            rows = rows.repeat_interleave(self._copies(config.num_query_groups), 0).flatten(0, 1)
        return self._tp_mapping.hf_to_megatron(rows, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: nn.Module | None
    ) -> dict[str, Tensor]:
        sizes = None
        if megatron_module is not None:
            config = self._get_config(megatron_module)
            sizes = config.num_query_groups, config.kv_channels
        groups, dim = self.broadcast_obj_from_pp_rank(sizes, "groups")
        gathered = self._tp_mapping.megatron_to_hf(megatron_weights, megatron_module)
        copies = self._copies(groups)
        return {
            name: tensor
            for rows in gathered.values()
            for name, tensor in self.split(rows.unflatten(0, (groups * copies, -1))[::copies], dim).items()
        }

    def _copies(self, groups: int) -> int:
        return max(1, self.tp_size // groups) if self.copies_over_tp else 1


class _ConvMapping(_GroupMapping):
    """Conv channels: [all queries | all keys] against [queries, key] of each group."""

    def join(self, weights: Tensor, groups: int, dim: int) -> Tensor:
        parts = weights[: -groups * dim], weights[-groups * dim :]
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1)

    def split(self, rows: Tensor, dim: int) -> dict[str, Tensor]:
        return {self.hf_param: torch.cat([rows[:, :-dim].flatten(0, 1), rows[:, -dim:].flatten(0, 1)])}


class _ProjectionMapping(_GroupMapping):
    """``linear_qkv`` against q, k and the two halves of the values; Megatron cuts through groups."""

    copies_over_tp = False

    def join(self, weights: dict[str, Tensor], groups: int, dim: int) -> Tensor:
        parts = weights["q"], weights["k"], torch.cat([weights["current"], weights["delayed"]])
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1)

    def split(self, rows: Tensor, dim: int) -> dict[str, Tensor]:
        sizes = [rows.shape[1] - 2 * dim, dim, dim]
        query, key, value = (part.flatten(0, 1) for part in rows.split(sizes, 1))
        current, delayed = value.chunk(2)
        parts = {"q": query, "k": key, "current": current, "delayed": delayed}
        return {self.hf_param[name]: part for name, part in parts.items()}


class _FreshMapping(ReplicatedMapping):
    """State that ``transformers`` has not: starts at zero, and is not exported."""

    def hf_to_megatron(self, hf_weights: Any, megatron_module: nn.Module) -> Tensor:
        name = self.megatron_param.rpartition(".")[-1]
        return torch.zeros_like(getattr(megatron_module, name))

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: nn.Module | None
    ) -> dict[str, Tensor]:
        return {}


_OURS, _THEIRS = "decoder.layers.*.", "model.layers.*."
_AUTO = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    _OURS + "self_attention.linear_qkv.layer_norm_weight": _THEIRS + "input_layernorm.weight",
    _OURS + "self_attention.linear_proj.weight": _THEIRS + "self_attn.o_proj.weight",
    _OURS + "pre_mlp_layernorm.weight": _THEIRS + "post_attention_layernorm.weight",
}
_ROUTER = {
    **{name: name for name in ("router_states_scale", "balancing_biases")},
    **{f"down_proj.{kind}": f"down_proj.{kind}" for kind in ("weight", "bias")},
    **{f"{fc}.{kind}": f"router_mlp.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")},
    "norm_weight": "router_mlp.norm.weight",
    "out_proj.weight": "router_mlp.out_proj.weight",
}
_REPLICATED = {
    **{f"decoder.layers.0.input_{k}": f"model.input_hidden_states_{k}" for k in ("scale", "bias")},
    **{f"{_OURS}mlp.router.{ours}": f"{_THEIRS}mlp.gate.{theirs}" for ours, theirs in _ROUTER.items()},
    **{
        f"{_OURS}{ours}_bda.{term}_{kind}": f"{_THEIRS}post_{theirs}_residual_scale.{term}_{kind}"
        for ours, theirs in (("self_attn", "attention"), ("mlp", "mlp"))
        for term in ("hidden_states", "residual")
        for kind in ("scale", "bias")
    },
}


@MegatronModelBridge.register_bridge(  # by name: transformers that Bridge's own pin allows lacks the class
    source="ZayaForCausalLM", target=GPTModel, provider=ZayaModelProvider, model_type="zaya"
)
class ZayaBridge(MegatronModelBridge):
    """``AutoBridge`` finds it once this module is imported."""

    def provider_bridge(self, hf_pretrained: Any) -> ZayaModelProvider:
        """The provider of a model with this configuration."""
        provider = super().provider_bridge(hf_pretrained)
        settings, cca = config_from_hf(hf_pretrained.config)
        for name, value in settings.items():
            if name not in _IMPLIED and not name.startswith("zaya"):
                setattr(provider, _PROVIDER_NAMES.get(name, name), value)
        provider.gated_linear_unit = True
        provider.activation_func = nn.functional.silu
        provider.share_embeddings_and_output_weights = not settings["untie_embeddings_and_output_weights"]
        provider.moe_token_dispatcher_type = "alltoall"
        provider.cca, provider.zaya = cca, zaya_settings(settings)
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: ZayaModelProvider) -> dict[str, Any]:
        """The configuration in ``transformers`` of a Megatron model."""
        renamed = {ours: getattr(provider, name) for ours, name in _PROVIDER_NAMES.items()}
        zaya = {f"zaya_{name}": value for name, value in vars(provider.zaya).items()}
        tied = {"untie_embeddings_and_output_weights": not provider.share_embeddings_and_output_weights}
        swiglu = {"swiglu": provider.gated_linear_unit}
        settings = {**vars(provider), **renamed, **zaya, **tied, **swiglu, "zaya": True}
        return config_to_hf(settings, provider.cca)

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Every weight by Megatron's name."""
        attention, qkv = _OURS + "self_attention.", _THEIRS + "self_attn.qkv_proj."
        parts = {"q": "q_proj", "k": "k_proj", "current": "v_proj_current", "delayed": "v_proj_delayed"}
        projections = {part: f"{qkv}{name}.weight" for part, name in parts.items()}
        mappings: list[MegatronParamMapping[Any]] = [
            *(AutoMapping(*pair) for pair in _AUTO.items()),
            *(ReplicatedMapping(*pair) for pair in _REPLICATED.items()),
            _ProjectionMapping(attention + "linear_qkv.weight", projections),
            _GroupMapping(attention + "temperature", _THEIRS + "self_attn.qk_norm.temp"),
        ]
        mappings += [
            _ConvMapping(f"{attention}{conv}_{kind}", f"{qkv}conv_qk_{name}.{kind}")
            for conv, name in (("conv0", "depthwise"), ("conv1", "grouped"))
            for kind in ("weight", "bias")
        ]
        mappings += [
            _FreshMapping(f"{_OURS}mlp.router.balancing_{name}", f"{_THEIRS}mlp.gate.balancing_biases")
            for name in ("exp_avg", "exp_avg_sq", "step")
        ]
        for grouped in ("linear_{}.weight*", "local_experts.*.linear_{}.weight"):
            experts, stacked = _OURS + "mlp.experts." + grouped, _THEIRS + "mlp.experts."
            mappings.append(FusedGatedExpertMapping(experts.format("fc1"), stacked + "gate_up_proj"))
            mappings.append(FusedExpertMapping(experts.format("fc2"), stacked + "down_proj"))
        return MegatronMappingRegistry(*mappings)
