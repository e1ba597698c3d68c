"""The loss in chunks computes what Megatron's loss does, in every layout that cuts what it works on."""

import pytest
import torch
from support.chunked_loss import assert_same, computed, in_double
from support.megatron import Layout

LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(cp=2),
    Layout(),  # data parallel
    pytest.param(Layout(tp=2, sp=True, cp=2), marks=pytest.mark.ranks(4)),
    pytest.param(Layout(tp=2, pp=2), marks=pytest.mark.ranks(4)),
]


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_and_gradients_are_those_of_all_tokens_at_once(layout, tied):
    assert_same(computed(layout, None, tied=tied), computed(layout, 12, tied=tied), 1e-6)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True)], ids=str)
def test_exact_in_double(layout):
    def prepare(model):
        model.compute_language_model_loss = in_double

    settings = {"dtype": torch.float64, "prepare": prepare}
    assert_same(computed(layout, None, **settings), computed(layout, 12, **settings), 1e-12)


def test_gradients_that_are_reduced_while_others_are_made():
    """Megatron then waits for each parameter's hook, once."""
    ddp = {"overlap_grad_reduce": True, "use_distributed_optimizer": True, "bucket_size": 1000}
    assert_same(computed(Layout(), None, ddp=ddp), computed(Layout(), 12, ddp=ddp), 1e-6)
