"""ZAYA1 below fp64, with its residual stream in fp32: against transformers, and between layouts."""

import pytest
import torch
from support.closeness import assert_close
from support.comparison import reference, run
from support.megatron import Layout

zaya = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")

LAYOUTS = [Layout(tp=2, sp=True), Layout(ep=2), Layout(pp=2), Layout(cp=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_transformers_in_fp32(layout):
    # The gradient of a temperature is one sum in which most cancels; of everything else 1e-5 holds.
    zaya.ZayaPair().compare(layout, torch.float32, 2e-5)


def test_a_pipeline_in_bf16_rounds_where_one_rank_does():
    """The router state travels in the fp32 of the residual stream and comes out the bf16 that it was."""
    model = zaya.ZayaPair()
    weights, _ = reference(model)
    one, two = (
        run(model, layout, torch.bfloat16, f"{weights}/weights") for layout in (Layout(), Layout(pp=2))
    )
    assert torch.equal(one.logits, two.logits)
    for name, gradient in one.gradients.items():
        assert_close(f"gradient of {name}", gradient, two.gradients[name], 1e-2)
