"""transformers' ZAYA attention with random weights, and its tensors in Megatron's order."""

import torch
from torch import Tensor
from transformers import ZayaConfig
from transformers.models.zaya.modeling_zaya import ZayaAttention


def zaya_attention(hidden: int, heads: int, groups: int, dim: int, kernel_sizes=(2, 2)) -> ZayaAttention:
    """An attention layer of ZAYA in fp64; every parameter is random, temperatures included."""
    config = ZayaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=dim,
        num_hidden_layers=1,
        cca_time0=kernel_sizes[0],
        cca_time1=kernel_sizes[1],
    )
    config._attn_implementation = "sdpa"  # eager has its softmax in fp32
    attention = ZayaAttention(config, layer_idx=0).double().train()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.4)
        attention.qk_norm.temp.add_(1)
    return attention


def megatron_order(tensors: dict[str, Tensor], groups: int, dim: int) -> dict[str, Tensor]:
    """Weights or gradients of a ZAYA attention under the names and in the order of CCASelfAttention.

    ZAYA stores all query heads, then all key heads; Megatron stores group by group.
    """
    projection = {name: tensors[f"qkv_proj.{name}_proj.weight"] for name in ("q", "k")}
    value = torch.cat([tensors[f"qkv_proj.v_proj_{part}.weight"] for part in ("current", "delayed")])
    q, k, v = (x.view(groups, -1, dim, x.shape[1]) for x in (*projection.values(), value))
    out = {
        "linear_qkv.weight": torch.cat([q, k, v], 1).flatten(0, 2),
        "linear_proj.weight": tensors["o_proj.weight"],
        "temperature": tensors["qk_norm.temp"],
    }
    for ours, theirs in (("conv0", "depthwise"), ("conv1", "grouped")):
        for kind in ("weight", "bias"):
            x = tensors[f"qkv_proj.conv_qk_{theirs}.{kind}"]
            queries, keys = x[: -groups * dim], x[-groups * dim :]
            parts = (y.view(groups, -1, dim, *x.shape[1:]) for y in (queries, keys))
            out[f"{ours}_{kind}"] = torch.cat(list(parts), 1).flatten(0, 2)
    return out
