"""CCASelfAttention computes what transformers' ZAYA attention computes, gradients included."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from support.closeness import assert_close, relative_error
from support.megatron import Layout, parallel, tiny_config

from cca_megatron.config import CCAConfig
from cca_megatron.specs import cca_layer_spec

zaya = pytest.importorskip("support.zaya", reason="transformers >= 5.23 is not installed")

HIDDEN, DIM, TOKENS, BATCH = 48, 8, 11, 2


def run_both(heads, groups, kernel_sizes=(2, 2), dtype=torch.float64):
    """Outputs and gradients (of inputs and all parameters) of both implementations."""
    torch.manual_seed(groups)
    theirs = zaya.zaya_attention(HIDDEN, heads, groups, DIM, kernel_sizes)
    x = torch.randn(TOKENS, BATCH, HIDDEN, dtype=torch.float64)
    upstream = torch.randn_like(x)
    angles = torch.randn(TOKENS, DIM // 4, dtype=torch.float64).repeat(1, 2)

    x_theirs = x.clone().requires_grad_()
    tables = (angles.cos()[None], angles.sin()[None])
    out, _ = theirs(x_theirs.transpose(0, 1), {}, position_embeddings=tables)
    out = out.transpose(0, 1)
    out.backward(upstream)
    named = dict(theirs.named_parameters())
    weights = zaya.megatron_order({n: p.data for n, p in named.items()}, groups, DIM)
    expected = zaya.megatron_order({n: p.grad for n, p in named.items()}, groups, DIM)
    expected |= {"output": out.detach(), "input": x_theirs.grad}

    with parallel(Layout()):
        config = tiny_config(
            hidden_size=HIDDEN,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=DIM,
            params_dtype=dtype,
        )
        spec = cca_layer_spec(config, CCAConfig(conv_kernel_sizes=kernel_sizes))
        ours = build_module(spec.submodules.self_attention, config=config, layer_number=1).to(dtype)
        parameters = dict(ours.named_parameters())
        assert parameters.keys() == weights.keys()
        for name, parameter in parameters.items():
            parameter.data.copy_(weights[name])
        x_ours = x.to(dtype).cuda().requires_grad_()
        out, bias = ours(x_ours, None, rotary_pos_emb=angles[:, None, None].cuda())
        out.backward(upstream.to(out))
        assert bias is None
    got = {name: parameter.grad for name, parameter in parameters.items()}
    return expected, got | {"output": out.detach(), "input": x_ours.grad}


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel_sizes", [(2, 2), (3, 1)])
def test_equals_transformers_in_fp64(groups, kernel_sizes):
    expected, got = run_both(heads=2 * groups, groups=groups, kernel_sizes=kernel_sizes)
    for name, tensor in expected.items():
        assert tensor.any(), f"{name} is zero: nothing is compared"
        assert_close(name, tensor, got[name].cpu(), 1e-12)


def test_bf16_error_is_rounding():
    expected, got = run_both(heads=4, groups=2, dtype=torch.bfloat16)
    errors = {name: relative_error(expected[name], got[name].cpu()) for name in expected}
    print("bf16 against transformers in fp64: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    assert max(errors.values()) < 5e-2
