"""RoPE tables are made once for all layers, and never kept where they would be wrong later."""

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from support.closeness import assert_close
from support.megatron import Layout, parallel

from cca_megatron.rotary import rotary_tables

ANGLES = torch.randn(7, 1, 1, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def angles():
    return ANGLES.clone()


def positions():
    return torch.tensor([0, 1, 2, 0, 1, 9])  # the last is padding, beyond the table


def test_layers_share_them(angles):
    cos, sin = rotary_tables(angles, 2.0)
    assert_close("cos", ANGLES.cos() * 2, cos, 1e-6)
    assert_close("sin", ANGLES.sin() * 2, sin, 1e-6)
    assert all(a is b for a, b in zip(rotary_tables(angles, 2.0), (cos, sin), strict=True))
    assert rotary_tables(angles, 1.0)[0] is not cos


def test_packed_documents_have_their_own(angles):
    one, other = PackedSeqParams(qkv_format="thd"), PackedSeqParams(qkv_format="thd")
    cos, _ = rotary_tables(angles, 1.0, one, positions)
    assert_close("cos", ANGLES[[0, 1, 2, 0, 1, 6]].cos(), cos, 1e-6)
    assert rotary_tables(angles, 1.0, one, positions)[0] is cos
    assert rotary_tables(angles, 1.0, other, positions)[0] is not cos
    local = ANGLES * 3  # as layers with another base have
    assert_close("cos", local[[0, 1, 2, 0, 1, 6]].cos(), rotary_tables(local, 1.0, one, positions)[0], 1e-6)


def test_what_a_cuda_graph_makes_stays_in_it(angles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured, _ = rotary_tables(angles, 1.0)
    monkeypatch.undo()
    assert rotary_tables(angles, 1.0)[0] is not captured


def test_inference_mode_leaves_nothing_to_training(angles):
    with torch.inference_mode():
        rotary_tables(angles, 1.0)
    assert not rotary_tables(angles, 1.0)[0].is_inference()


@pytest.mark.parametrize("interleaved", [False, True])
def test_another_base_is_the_table_of_that_base(interleaved):
    """Window layers may have one of their own, and Megatron makes one table for all layers."""
    with parallel(Layout()):
        settings = {"kv_channels": 16, "rotary_percent": 0.5, "rotary_interleaved": interleaved}
        table, other = (
            RotaryEmbedding(**settings, rotary_base=base, use_cpu_initialization=True)(20)
            for base in (5_000_000, 300)
        )
    cos, sin = rotary_tables(table, 1.0, base=300.0, interleaved=interleaved)
    assert_close("cos", other.cos(), cos, 1e-6)
    assert_close("sin", other.sin(), sin, 1e-6)
    assert rotary_tables(table, 1.0)[0] is not cos
    assert rotary_tables(table, 1.0, base=300.0, interleaved=interleaved)[0] is cos
