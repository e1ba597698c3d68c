"""Attention layers to run: megatron-core's MHA, GQA and MLA, and CCA, on one core attention."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from cca_megatron.local_backend import LocalNorm
from cca_megatron.parallel.core_attention import LocalCoreAttention
from cca_megatron.plan.attention import Attention, CompressedAttention, HeadAttention, LatentAttention
from cca_megatron.specs import cca_layer_spec


class PaddedCoreAttention(LocalCoreAttention):
    """Core attention with values narrower than queries and keys, as MLA has them.

    PyTorch's flash kernels want one width (the alternative makes an S x S tensor), so values are padded.
    """

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, /, **kwargs: Any
    ) -> Tensor:
        width, padded = value.shape[-1], query.shape[-1]
        value = F.pad(value, (0, padded - width))
        out = super().forward(query, key, value, attention_mask, **kwargs)
        return out.unflatten(-1, (-1, padded))[..., :width].flatten(-2)


def build(
    attention: Attention, dtype: torch.dtype, ranks: int = 1, comm_type: str | None = None
) -> nn.Module:
    """The layer with random weights, without biases, on Megatron's current process groups.

    Args:
        attention: its sizes; MLA without compressed queries.
        dtype: of its parameters.
        ranks: context-parallel ranks.
        comm_type: how they exchange keys and values.
    """
    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": attention.hidden_size,
        "num_attention_heads": attention.query_heads,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "params_dtype": dtype,
        "context_parallel_size": ranks,
        "cp_comm_type": comm_type,
    }
    config: TransformerConfig
    if isinstance(attention, LatentAttention):
        config = MLATransformerConfig(
            **settings,
            q_lora_rank=None,
            kv_lora_rank=attention.kv_rank,
            qk_head_dim=attention.head_dim,
            qk_pos_emb_head_dim=attention.rotary_dim,
            v_head_dim=attention.head_dim,
            rope_type="rope",
        )
        spec = get_gpt_layer_local_spec(multi_latent_attention=True).submodules.self_attention
        spec.submodules.core_attention = PaddedCoreAttention
    else:
        assert isinstance(attention, HeadAttention)
        config = TransformerConfig(
            **settings, num_query_groups=attention.kv_heads, kv_channels=attention.head_dim
        )
        if isinstance(attention, CompressedAttention):
            spec = cca_layer_spec(config).submodules.self_attention
        else:
            spec = get_gpt_layer_local_spec().submodules.self_attention
            spec.submodules.core_attention = LocalCoreAttention
    module = build_module(
        spec,
        config=config,
        layer_number=1,
        cp_comm_type=comm_type,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if isinstance(attention, LatentAttention):  # Megatron's local spec leaves the norm of the latent out
        module.kv_layernorm = LocalNorm(config, attention.kv_rank, config.layernorm_epsilon)
    return module.to(dtype).cuda()


def rotary_angles(attention: Attention, tokens: int) -> Tensor | None:
    """RoPE angles [S, 1, 1, D/2] in fp32, for half of each head; None for MLA, which makes its own."""
    if isinstance(attention, LatentAttention):
        return None
    assert isinstance(attention, HeadAttention)
    frequencies = 1e4 ** -torch.linspace(0, 1, attention.head_dim // 4)
    return torch.outer(torch.arange(tokens).float(), frequencies).repeat(1, 2)[:, None, None].cuda()


class _Given(nn.Module):
    """In place of a projection: its result, whatever comes in."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self._result = result

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self._result, None


class _Through(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def remove_projections(module: Any, x: Tensor) -> None:
    """Leave of a layer what lies between its linears, on the latents of x [S, B, E]."""
    with torch.no_grad():
        latents, _ = module.linear_qkv(x)
    module.linear_qkv, module.linear_proj = _Given(latents.requires_grad_()), _Through()
