"""Tests of the tests: a layout that is deliberately broken is noticed."""

import dataclasses

import numpy as np
import pytest
from support.comparison import Model, compare, reference
from support.megatron import Layout

from cca_megatron import CCAConfig, attention, local_backend
from cca_megatron.parallel import context
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.halo import HaloExchange
from cca_megatron.parallel.layout import ContextLayout

PLAIN = Model()
PACKED = Model(cca=CCAConfig(packed_zigzag="stream"), documents=(1, 2, 3, 7, 11))
ONE_GROUP = Model({"num_query_groups": 1})


@pytest.fixture(autouse=True)
def right_references(world):
    """The expected values come from the code as it is."""
    for model in (PLAIN, PACKED, ONE_GROUP):
        reference(model)


def assert_noticed(layout, model, where=""):
    with pytest.raises(AssertionError, match=rf"{where}.*relative error"):
        compare(layout, model)


def test_a_missing_halo(monkeypatch):
    right = HaloExchange.boundary
    monkeypatch.setattr(
        HaloExchange, "boundary", lambda self: type(b := right(self))(b.latents * 0, b.value * 0)
    )
    assert_noticed(Layout(cp=2), PLAIN, "logits")


@pytest.mark.parametrize("part", ["latents", "value"])
def test_a_gradient_that_is_not_sent_back(monkeypatch, part):
    right = HaloExchange.boundary
    monkeypatch.setattr(
        HaloExchange,
        "boundary",
        lambda self: (b := right(self))._replace(**{part: getattr(b, part).detach()}),
    )
    assert_noticed(Layout(cp=2), PLAIN, "gradient")


def test_a_swapped_neighbour(monkeypatch):
    """The mistake that both chunks follow those of the rank before, as in a layout without zigzag."""
    right = context.plan_halo

    def plan(layout, *arguments):
        owner = np.arange(2 * layout.size) % layout.size
        return right(dataclasses.replace(layout, chunks=layout.chunks._replace(owner=owner)), *arguments)

    monkeypatch.setattr(context, "plan_halo", plan)
    assert_noticed(Layout(cp=2), PLAIN, "logits")


def test_no_reset_at_a_document_start(monkeypatch):
    right = ContextShard.mix
    monkeypatch.setattr(ContextShard, "mix", lambda self, *arguments: right(self.undivided, *arguments))
    compare(Layout(cp=2), PLAIN)  # one document: nothing is broken
    assert_noticed(Layout(cp=2), PACKED, "logits")


def test_positions_that_go_on_through_documents(monkeypatch):
    right = ContextShard.positions.func
    monkeypatch.setattr(ContextShard, "positions", property(lambda self: right(self.undivided)))
    assert_noticed(Layout(cp=2), PACKED, "logits")


def test_attention_across_documents(monkeypatch):
    right = ContextLayout.blocks
    monkeypatch.setattr(ContextLayout, "blocks", lambda self, *ranks: right(self.undivided(), *ranks))
    assert_noticed(Layout(cp=2), PACKED, "logits")


def test_a_group_gradient_that_is_not_summed(monkeypatch):
    monkeypatch.setattr(attention, "gradients_summed", lambda weights, share: weights)
    assert_noticed(Layout(tp=2), ONE_GROUP, "gradient of .*conv")


def test_a_rank_that_halves_its_own_values(monkeypatch):
    """The mistake of building the module from local head counts: another model."""
    right = attention.CCASelfAttention._build_mix

    def halve_own(self):
        right(self)
        half = self.num_query_groups_per_partition * self.hidden_size_per_attention_head // 2
        self._mix_options = dataclasses.replace(self._mix_options, value_delay_from=half)

    monkeypatch.setattr(attention.CCASelfAttention, "_build_mix", halve_own)
    assert_noticed(Layout(tp=2), PLAIN, "logits")


def test_a_forgotten_sequence_parallel_mark(monkeypatch):
    """Without the mark each rank keeps the norm's gradient of its own tokens."""
    right = local_backend.LocalNorm.__init__

    def unmarked(self, *args, **kwargs):
        right(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.sequence_parallel = False

    monkeypatch.setattr(local_backend.LocalNorm, "__init__", unmarked)
    assert_noticed(Layout(tp=2, sp=True), PLAIN, "gradient of .*norm")
