"""The first release of ZAYA1: layers alternate between attention and experts, and an expert is a tensor.

Presented here under the names of ``transformers``, where two layers are one and experts are stacked.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cca_megatron.hf.config import ConversionError
from cca_megatron.hf.tensors import Shape, Sizes, tensor_maps

_ATTENTION = {
    "qkv_proj.q_proj.": "qkv.linear_q.",
    "qkv_proj.k_proj.": "qkv.linear_k.",
    "qkv_proj.v_proj_current.": "qkv.val_proj1.",
    "qkv_proj.v_proj_delayed.": "qkv.val_proj2.",
    "qkv_proj.conv_qk_depthwise.": "qkv.conv_qk.0.",
    "qkv_proj.conv_qk_grouped.": "qkv.conv_qk.1.",
    "qk_norm.temp": "qkv.temp",
}
_ROUTER = {
    "router_mlp.norm.": "rmsnorm_eda.",
    "router_mlp.fc1.": "router_mlp.0.",
    "router_mlp.fc2.": "router_mlp.2.",
    "router_mlp.out_proj.": "router_mlp.4.",
}
_EXPERTS = {"gate_up_proj": "linear_fc1.weight", "down_proj": "linear_fc2.weight"}


def is_first_release(names: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the names of the first release."""
    return any(".self_attn.qkv." in name for name in names)


def old_names(name: str, sizes: Sizes) -> list[str]:
    """What a tensor of ``transformers`` is called in the first release; several for stacked experts."""
    if name.startswith("model.input_hidden_states_"):
        return [name.replace("model.input_", "model.layers.0.res_scale.")]
    if name == "model.norm.weight":
        return ["model.final_norm.weight"]
    if not name.startswith("model.layers."):
        return [name]
    number, part = name.removeprefix("model.layers.").split(".", 1)
    attention, experts, after = (2 * int(number) + offset for offset in range(3))
    if part == "input_layernorm.weight":
        return [f"model.layers.{attention}.input_norm.weight"]
    if part == "post_attention_layernorm.weight":
        return [f"model.layers.{experts}.input_norm.weight"]
    part, _, rest = part.partition(".")
    if part == "self_attn":
        return [f"model.layers.{attention}.self_attn.{_renamed(rest, _ATTENTION)}"]
    if part == "post_attention_residual_scale":
        return [f"model.layers.{experts}.res_scale.{rest}"]
    if part == "post_mlp_residual_scale":
        is_last = int(number) == sizes.layers - 1
        return [f"model.res_scale.{rest}" if is_last else f"model.layers.{after}.res_scale.{rest}"]
    block = f"model.layers.{experts}.zaya_block."
    if rest.startswith("gate."):
        return [f"{block}router.{_renamed(rest.removeprefix('gate.'), _ROUTER)}"]
    tensor = _EXPERTS[rest.removeprefix("experts.")]
    return [f"{block}experts.local_experts.{expert}.{tensor}" for expert in range(sizes.experts)]


class MergedRelease(Mapping[str, Tensor]):
    """The tensors of a first release under the names of ``transformers``, made when they are looked up.

    Args:
        tensors: of the first release, by its names.
        sizes: of the model.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sizes: Sizes):
        self._tensors = tensors
        self._sources = {name: old_names(name, sizes) for m in tensor_maps(sizes) for name in m.hf}

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._tensors[source] for source in self._sources[name]]
        return parts[0] if ".experts." not in name else torch.stack(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def old_shapes(sizes: Sizes) -> dict[str, Shape]:
    """Names and shapes of the whole first release of a model."""
    shapes = {name: shape for m in tensor_maps(sizes) for name, shape in m.hf.items()}
    return {
        old: shape[1:] if ".local_experts." in old else shape
        for name, shape in shapes.items()
        for old in old_names(name, sizes)
    }


def config_of_release(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The configuration as ``transformers`` has it.

    The first release counts its layers and heads in ways of its own, so the sizes come from the tensors.

    Args:
        config: its ``config.json``.
        shapes: of its tensors, by name.

    Raises:
        ConversionError: a tensor that tells a size is missing, or the configuration has sliding windows.
    """
    if config.get("swa_layers"):
        raise ConversionError(
            f"swa_layers={config['swa_layers']}: sliding windows of the first release are not known; "
            "transformers' own format, with layer_types, works"
        )

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ConversionError(f"{name}: is missing")
        return shapes[name]

    first, second = "model.layers.0.self_attn.qkv.", "model.layers.1.zaya_block."
    (groups,) = shape(first + "temp")
    head_dim = shape(first + "linear_k.weight")[0] // groups
    vocab, hidden = shape("model.embed_tokens.weight")
    layers = sum(name.endswith(".self_attn.qkv.temp") for name in shapes)
    experts = sum(name.startswith(second + "experts.") and "fc1" in name for name in shapes)
    theta = config.get("rope_theta") or config.get("rotary_base") or 5_000_000.0
    rotary = config.get("partial_rotary_factor") or config.get("rope_pct") or 0.5
    same = ("max_position_embeddings", "tie_word_embeddings", "attention_dropout", "pad_token_id",
            "bos_token_id", "eos_token_id", "attention_bias", "lm_head_bias")  # fmt: skip
    return {
        **{name: config[name] for name in same if config.get(name) is not None},
        "model_type": "zaya",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "num_attention_heads": shape(first + "linear_q.weight")[0] // head_dim,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "num_experts": experts,
        "moe_intermediate_size": shape(second + "experts.local_experts.0.linear_fc2.weight")[1],
        "router_hidden_size": shape(second + "router.down_proj.weight")[0],
        "rms_norm_eps": config.get("rms_norm_eps") or config.get("norm_epsilon", 1e-5),
        "rope_parameters": {
            "hybrid": {"rope_type": "default", "rope_theta": float(theta), "partial_rotary_factor": rotary}
        },
        "cca_time0": shape(first + "conv_qk.0.weight")[-1],
        "cca_time1": shape(first + "conv_qk.1.weight")[-1],
    }


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, old in table.items():
        if name.startswith(theirs):
            return old + name.removeprefix(theirs)
    return name
