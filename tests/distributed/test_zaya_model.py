"""ZAYA1 in every layout computes what transformers computes on one device: logits and every gradient."""

import pytest
import torch
import torch.distributed as dist
from support.closeness import assert_close
from support.comparison import compare
from support.megatron import Layout, parallel

zaya = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")

from cca_megatron.hf import export_hf_state_dict, load_hf_state_dict  # noqa: E402

BOUND = 1e-10
TWO = [
    Layout(tp=2, sp=True),
    Layout(ep=2),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(tp=2, sp=True, ep=2),
    Layout(tp=2, sp=True, etp=2),
]
FOUR = [
    Layout(tp=2, sp=True, pp=2),
    Layout(tp=2, sp=True, cp=2),
    Layout(cp=2, ep=2, pp=2),
    Layout(ep=4),
    Layout(pp=4),
    Layout(tp=2, sp=True, ep=2, etp=2),
]
LAYOUTS = [*TWO, *(pytest.param(layout, marks=pytest.mark.ranks(4)) for layout in FOUR)]


@pytest.fixture(autouse=True, scope="module")
def exact_transformers():
    with zaya.without_float32_casts():
        yield


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_transformers(layout):
    zaya.ZayaPair().compare(layout, torch.float64, BOUND)


@pytest.mark.parametrize(
    "layout", [Layout(cp=2), Layout(tp=2, sp=True), Layout(pp=2), Layout(ep=2)], ids=str
)
def test_equals_transformers_with_packed_documents(layout):
    zaya.ZayaPair(documents=(8, 12, 4)).compare(layout, torch.float64, BOUND)


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2, sp=True)], ids=str)
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"]},
    ],
    ids=["uniform", "block", "selective"],
)
def test_recomputation_hands_the_router_state_on(layout, recompute):
    zaya.ZayaPair(recompute).compare(layout, torch.float64, BOUND)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_tokens_skip_with_every_dispatcher(dispatcher):
    pair = zaya.ZayaPair({"moe_token_dispatcher_type": dispatcher})
    pair.compare(Layout(tp=2, sp=True, ep=2), torch.float64, BOUND)


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(ep=2), Layout(pp=2)], ids=str)
def test_the_first_releases_skip_is_counted_once(layout):
    """A skipped token adds its own normalised input, which every tensor-parallel rank has in full."""
    compare(layout, zaya.ZayaPair(skip_output="input"))
