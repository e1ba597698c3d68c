"""The local norm: equal to the definition, and ready for sequence parallelism."""

import pytest
import torch
from support.closeness import assert_close
from support.megatron import tiny_config

from cca_megatron.local_backend import LocalNorm

X = torch.randn(5, 2, 32, dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_equals_the_definition(kind, zero_centered):
    config = tiny_config(normalization=kind, layernorm_zero_centered_gamma=zero_centered)
    norm = LocalNorm(config, hidden_size=32, eps=1e-3).double()
    assert_close("initially", _definition(kind, X, 1, 0), norm(X), 1e-12)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    gain = norm.weight + (1 if zero_centered else 0)
    bias = 0 if norm.bias is None else norm.bias
    assert_close("after training", _definition(kind, X, gain, bias), norm(X), 1e-12)


def _definition(kind, x, gain, bias):
    if kind == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * gain + bias


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_are_marked_for_sequence_parallelism(sequence_parallel):
    config = tiny_config(normalization="LayerNorm")
    config.sequence_parallel = sequence_parallel
    assert all(p.sequence_parallel is sequence_parallel for p in LocalNorm(config, 32).parameters())


def test_an_fp32_residual_enters_in_the_dtype_of_the_layer():
    norm = LocalNorm(tiny_config(), 32).bfloat16()
    assert norm(X.float()).dtype == torch.bfloat16


def test_other_norms_are_refused():
    with pytest.raises(ValueError, match="'RMSNorm' and 'LayerNorm'"):
        LocalNorm(tiny_config(normalization="L2Norm"), 32)
