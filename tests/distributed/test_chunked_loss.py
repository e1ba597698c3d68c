"""The loss in chunks computes what Megatron's loss does, in every layout that cuts what it works on."""

import pytest
import torch
from support.chunked_loss import assert_same, computed, in_double, largest_chunk
from support.megatron import Layout

from cca_megatron.training import loss as loss_module

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
def test_a_chunk_has_as_many_tokens_as_asked_for_over_all_ranks(layout):
    assert largest_chunk(layout, 12) == 12


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


def test_a_hidden_gradient_that_is_not_summed_is_noticed():
    def prepare(model):
        model.output_layer.allreduce_dgrad, model.output_layer.disable_grad_reduce = False, True

    with pytest.raises(AssertionError, match="gradient of .* relative error"):
        assert_same(computed(Layout(tp=2), None), computed(Layout(tp=2), 12, prepare=prepare), 1e-6)


def test_labels_of_another_rank_are_noticed(monkeypatch):
    """A chunk holds the same positions of both halves of a sequence."""
    right = loss_module._Head.losses
    monkeypatch.setattr(
        loss_module._Head,
        "losses",
        lambda self, hidden, weight, labels: right(self, hidden, weight, labels.flip(1)),
    )
    layout = Layout(tp=2, sp=True)
    with pytest.raises(AssertionError, match="losses: relative error"):
        assert_same(computed(layout, None), computed(layout, 12), 1e-6)
