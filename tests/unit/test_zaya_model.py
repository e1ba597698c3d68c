"""ZAYA1 in Megatron computes what transformers computes: logits and every gradient."""

import pytest
import torch
from support.megatron import Layout, microbatches, start_distributed

zaya = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")


@pytest.fixture(autouse=True)
def one_microbatch():
    start_distributed()
    with microbatches():
        yield


def test_equals_transformers_in_fp32():
    zaya.ZayaPair().compare(Layout(), torch.float32, 1e-5)


def test_equals_transformers_in_fp64_as_shipped():
    pair = zaya.ZayaPair({"fp32_residual_connection": True})
    pair.compare(Layout(), torch.float64, 1e-6)


def test_equals_transformers_in_fp64_without_its_casts():
    with zaya.without_float32_casts():
        zaya.ZayaPair().compare(Layout(), torch.float64, 1e-10)
