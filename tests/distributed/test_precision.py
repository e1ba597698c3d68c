"""Layouts in fp32 and bf16: as close to fp64 as one rank in the same dtype."""

import pytest
import torch
from support.comparison import Model, compare_rounding
from support.megatron import Layout

from cca_megatron import CCAConfig

STREAM = {"cca": CCAConfig(packed_zigzag="stream"), "documents": (1, 2, 3, 7, 19)}
CASES = {
    "tensor parallel": (Layout(tp=2), Model()),
    "sequence parallel": (Layout(tp=2, sp=True), Model()),
    "one group": (Layout(tp=2), Model({"num_query_groups": 1})),
    "ring": (Layout(cp=2), Model()),
    "all-gather": (Layout(cp=2), Model({"cp_comm_type": "all_gather"})),
    "all-to-all": (Layout(cp=2), Model({"cp_comm_type": "a2a"})),
    "ring, stream": (Layout(cp=2), Model(**STREAM)),
    "pipeline": (Layout(pp=2), Model()),
}
FOUR = {
    "tensor, ring": (Layout(tp=2, cp=2), Model()),
    "sequence, all-gather, stream": (
        Layout(tp=2, cp=2, sp=True),
        Model({"cp_comm_type": "all_gather"}, **STREAM),
    ),
    "ring of four": (Layout(cp=4), Model()),
    "documents one by one": (Layout(cp=4), Model({"cp_comm_type": "a2a"}, documents=(16, 8, 32))),
    "beyond the groups": (Layout(tp=4, sp=True), Model()),
}
QUICK = ["sequence parallel", "one group", "ring, stream"]


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0)], ids=str)
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CASES]
)
def test_rounding(name, dtype, floor):
    """Logits and every gradient: no more than twice the error of one rank."""
    compare_rounding(*CASES[name], dtype, floor)


@pytest.mark.long
@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", FOUR)
def test_rounding_over_four_ranks(name):
    compare_rounding(*FOUR[name], torch.bfloat16, floor=0.0)
