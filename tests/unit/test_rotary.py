"""RoPE tables are made once for all layers, and never kept where they would be wrong later."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from support.closeness import assert_close

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
