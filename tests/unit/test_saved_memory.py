"""What an attention layer keeps for its backward pass, counted by hooks on saved tensors."""

import torch
from megatron.core.transformer.spec_utils import build_module
from support.megatron import Layout, parallel, tiny_config

from cca_megatron.config import preset
from cca_megatron.specs import cca_layer_spec

TOKENS = 64


def kept_bytes(module, angles):
    """Bytes per token kept by one call, each storage once, parameters and angles not counted."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(TOKENS, 1, 2048, dtype=torch.bfloat16, device="cuda").requires_grad_()
    module(hidden, None, rotary_pos_emb=angles)  # makes the tables that all layers share
    shared = [*module.parameters(), *(x for (tables, _) in angles.cca_rotary_tables.values() for x in tables)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(hidden, None, rotary_pos_emb=angles)
    for tensor in shared:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert hidden.untyped_storage().data_ptr() in storages
    return sum(storages.values()) / TOKENS


def test_fused_zaya1_keeps_far_less_than_eager(monkeypatch):
    """At most 12,500 bytes per token and layer: input, latents, q, k, v, output, norms, log-sum-exp."""
    settings, cca = preset("zaya1_8b", hidden_size=2048, head_dim=128)
    with parallel(Layout()):
        config = tiny_config(hidden_size=2048, params_dtype=torch.bfloat16, bf16=True, **settings)
        spec = cca_layer_spec(config, cca).submodules.self_attention
        module = build_module(spec, config=config, layer_number=1).to(torch.bfloat16).cuda()
        angles = torch.randn(TOKENS, 1, 1, 64, device="cuda")
        kept = {}
        for backend in ("triton", "reference"):
            monkeypatch.setenv("CCA_KERNELS", backend)
            kept[backend] = kept_bytes(module, angles)
    print(f"bytes per token and layer: {kept}")
    assert 12_000 < kept["triton"] <= 12_500
    assert kept["reference"] > 1.6 * kept["triton"]
