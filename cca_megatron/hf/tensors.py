"""Which tensors of a ZAYA checkpoint in ``transformers`` are which in Megatron, and in what order.

On Megatron's side a name is the key in a distributed checkpoint and a tensor is the whole one, so that
nothing here depends on how a model is cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What gives the tensors of a model their number and shapes."""

    layers: int
    hidden: int
    query_heads: int
    groups: int
    head_dim: int
    kernel_sizes: tuple[int, int]
    experts: int
    expert_hidden: int
    router_hidden: int
    vocab: int
    tied: bool

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> "Sizes":
        """From the names and values of a ``config.json``."""
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            query_heads=config["num_attention_heads"],
            groups=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            kernel_sizes=(config.get("cca_time0", 2), config.get("cca_time1", 2)),
            experts=config["num_experts"],
            expert_hidden=config["moe_intermediate_size"],
            router_hidden=config["router_hidden_size"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", True),
        )


@dataclass(frozen=True)
class TensorMap:
    """One tensor of Megatron, and the one or more of ``transformers`` that hold the same numbers."""

    megatron: str
    hf: Mapping[str, Shape]
    """Their names and shapes."""
    join: Callable[[Sequence[Tensor]], Tensor]
    """Megatron's from those of ``transformers``."""
    split: Callable[[Tensor], list[Tensor]]
    """The inverse."""

    @property
    def shape(self) -> Shape:
        """Of Megatron's tensor."""
        parts = [torch.empty(shape, device="meta") for shape in self.hf.values()]
        return tuple(self.join(parts).shape)


def tensor_maps(sizes: Sizes) -> list[TensorMap]:
    """Every tensor of a model, in the order of ``transformers``."""
    hidden = sizes.hidden
    maps = [
        _same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (sizes.vocab, hidden)),
        _same("decoder.layers.0.input_scale", "model.input_hidden_states_scale", (hidden,)),
        _same("decoder.layers.0.input_bias", "model.input_hidden_states_bias", (hidden,)),
    ]
    for layer in range(sizes.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        maps += [*_attention(sizes, ours, theirs), *_residual(sizes, ours, theirs)]
        maps += _moe(sizes, ours + "mlp.", theirs + "mlp.", averages=layer > 0)
    maps.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not sizes.tied:
        maps.append(_same("output_layer.weight", "lm_head.weight", (sizes.vocab, hidden)))
    return maps


def _same(megatron: str, hf: str, shape: Shape) -> TensorMap:
    return TensorMap(megatron, {hf: shape}, lambda parts: parts[0], lambda whole: [whole])


def _attention(sizes: Sizes, ours: str, theirs: str) -> list[TensorMap]:
    hidden, groups, dim = sizes.hidden, sizes.groups, sizes.head_dim
    queries, keys = sizes.query_heads * dim, groups * dim
    repeats = sizes.query_heads // groups
    qkv, conv = theirs + "self_attn.qkv_proj.", (queries + keys,)
    k0, k1 = sizes.kernel_sizes

    def join_qkv(parts: Sequence[Tensor]) -> Tensor:
        query, key, *values = parts
        return _interleave([query, key, torch.cat(values)], groups, dim)

    def split_qkv(whole: Tensor) -> list[Tensor]:
        query, key, value = _deinterleave(whole, groups, dim, [repeats, 1, 1])
        return [query, key, *value.chunk(2)]

    def join_conv(parts: Sequence[Tensor]) -> Tensor:
        return _interleave(list(parts[0].split([queries, keys])), groups, dim)

    def split_conv(whole: Tensor) -> list[Tensor]:
        return [torch.cat(_deinterleave(whole, groups, dim, [repeats, 1]))]

    attention = ours + "self_attention."
    projections = {
        f"{qkv}q_proj.weight": (queries, hidden),
        f"{qkv}k_proj.weight": (keys, hidden),
        f"{qkv}v_proj_current.weight": (keys // 2, hidden),
        f"{qkv}v_proj_delayed.weight": (keys // 2, hidden),
    }
    convs = (
        ("conv0_weight", "conv_qk_depthwise.weight", (*conv, 1, k0)),
        ("conv0_bias", "conv_qk_depthwise.bias", conv),
        ("conv1_weight", "conv_qk_grouped.weight", (*conv, dim, k1)),
        ("conv1_bias", "conv_qk_grouped.bias", conv),
    )
    return [
        _same(attention + "linear_qkv.layer_norm_weight", theirs + "input_layernorm.weight", (hidden,)),
        TensorMap(attention + "linear_qkv.weight", projections, join_qkv, split_qkv),
        *(
            TensorMap(attention + name, {qkv + other: shape}, join_conv, split_conv)
            for name, other, shape in convs
        ),
        _same(attention + "temperature", theirs + "self_attn.qk_norm.temp", (groups,)),
        _same(attention + "linear_proj.weight", theirs + "self_attn.o_proj.weight", (hidden, queries)),
    ]


def _interleave(parts: list[Tensor], groups: int, dim: int) -> Tensor:
    """Rows of all query heads, all key heads..., to those of each group one after another."""
    by_group = [part.unflatten(0, (groups, -1, dim)) for part in parts]
    return torch.cat(by_group, 1).flatten(0, 2)


def _deinterleave(whole: Tensor, groups: int, dim: int, counts: list[int]) -> list[Tensor]:
    """The inverse, for parts of so many heads in each group."""
    by_group = whole.unflatten(0, (groups, sum(counts), dim))
    return [part.flatten(0, 2) for part in by_group.split(counts, 1)]


def _residual(sizes: Sizes, ours: str, theirs: str) -> list[TensorMap]:
    return [
        _same(f"{ours}{add}.{name}", f"{theirs}{scaling}.{name}", (sizes.hidden,))
        for add, scaling in (
            ("self_attn_bda", "post_attention_residual_scale"),
            ("mlp_bda", "post_mlp_residual_scale"),
        )
        for name in ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")
    ] + [
        _same(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", (sizes.hidden,))
    ]


def _moe(sizes: Sizes, ours: str, theirs: str, averages: bool) -> list[TensorMap]:
    hidden, width, classes = sizes.hidden, sizes.router_hidden, sizes.experts + 1
    names: list[tuple[str, str, Shape]] = [
        ("down_proj.weight", "down_proj.weight", (width, hidden)),
        ("down_proj.bias", "down_proj.bias", (width,)),
        ("norm_weight", "router_mlp.norm.weight", (width,)),
        *(
            (f"{fc}.{kind}", f"router_mlp.{fc}.{kind}", shape)
            for fc in ("fc1", "fc2")
            for kind, shape in (("weight", (width, width)), ("bias", (width,)))
        ),
        ("out_proj.weight", "router_mlp.out_proj.weight", (classes, width)),
        ("balancing_biases", "balancing_biases", (classes,)),
    ]
    if averages:
        names.append(("router_states_scale", "router_states_scale", (width,)))
    experts, inner = sizes.experts, sizes.expert_hidden
    return [
        *(_same(f"{ours}router.{name}", f"{theirs}gate.{other}", shape) for name, other, shape in names),
        _same(
            ours + "experts.experts.linear_fc1.weight",
            theirs + "experts.gate_up_proj",
            (experts, 2 * inner, hidden),
        ),
        _same(
            ours + "experts.experts.linear_fc2.weight", theirs + "experts.down_proj", (experts, hidden, inner)
        ),
    ]


def extra_states(sizes: Sizes) -> list[tuple[str, int, int]]:
    """Keys of modules that Transformer Engine may quantise, whose (empty) state a model loads.

    Returns:
        (key, index of the part, number of parts), the experts' being one for each.
    """
    whole, experts, count = ["decoder.final_layernorm"], [], sizes.experts
    for layer in range(sizes.layers):
        prefix = f"decoder.layers.{layer}."
        whole += [
            f"{prefix}self_attention.{name}" for name in ("linear_qkv", "core_attention", "linear_proj")
        ]
        whole.append(prefix + "pre_mlp_layernorm")
        experts += [f"{prefix}mlp.experts.experts.{name}" for name in ("linear_fc1", "linear_fc2")]
    return [
        *((f"{name}._extra_state", 0, 1) for name in whole),
        *((f"{name}._extra_state", expert, count) for name in experts for expert in range(count)),
    ]


def balancing_states(sizes: Sizes) -> dict[str, Shape]:
    """Keys and shapes of the optimizer state of the balancing biases, which ``transformers`` lacks; fp32."""
    return {
        f"decoder.layers.{layer}.mlp.router.balancing_{name}": shape
        for layer in range(sizes.layers)
        for name, shape in (("exp_avg", (sizes.experts,)), ("exp_avg_sq", (sizes.experts,)), ("step", ()))
    }
