"""The layer gives the same through the fused kernels, whatever the layout and the packing."""

import pytest
import torch
from support.closeness import assert_close
from support.comparison import Model, reference, run
from support.megatron import Layout

import cca_kernels.triton.operator as operator
from cca_megatron import CCAConfig

HEADS = {"kv_channels": 16}  # the smallest that the kernels take
STREAM = CCAConfig(packed_zigzag="stream")
CASES = {
    "tensor and sequence": (Layout(tp=2, sp=True), Model(HEADS)),
    "beyond the groups": (Layout(tp=2), Model(HEADS | {"num_query_groups": 1})),
    "context": (Layout(cp=2), Model(HEADS)),
    "context, stream of documents": (Layout(cp=2), Model(HEADS, STREAM, documents=(1, 2, 3, 7, 19))),
    "context, documents one by one": (Layout(cp=2), Model(HEADS, documents=(4, 8, 4))),
    "recomputed, one tap more": (
        Layout(cp=2),
        Model(HEADS, CCAConfig(conv_kernel_sizes=(3, 2), recompute_mix=True)),
    ),
}
FOUR = {
    "tensor beyond the groups, context": (
        Layout(tp=2, cp=2),
        Model(HEADS | {"num_query_groups": 1}, STREAM, documents=(1, 2, 3, 7, 19)),
    ),
}
QUICK = ["context, stream of documents", "beyond the groups"]


@pytest.mark.parametrize(
    "name",
    [
        *(n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CASES),
        *(pytest.param(n, marks=[pytest.mark.ranks(4), pytest.mark.long]) for n in FOUR),
    ],
)
def test_fused_kernels_compute_what_one_rank_does_in_fp64(name, monkeypatch):
    layout, model = (CASES | FOUR)[name]
    weights, exact = reference(model)
    calls = []
    fused = operator.fused_mix
    monkeypatch.setattr(operator, "fused_mix", lambda *a, **k: calls.append(0) or fused(*a, **k))
    monkeypatch.setenv("CCA_KERNELS", "triton")
    got = run(model, layout, torch.float32, f"{weights}/weights")
    assert calls
    assert_close("logits", exact.logits, got.logits, 1e-5)
    for gradient, expected in exact.gradients.items():
        assert_close(f"gradient of {gradient}", expected, got.gradients[gradient], 5e-5)
