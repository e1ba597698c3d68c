"""Core attention gets what Megatron's own would give it, in the layouts that Transformer Engine knows.

Transformer Engine does not run on a CPU, so a recorder stands in its place.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from support.megatron import HIDDEN, MOE, Layout, parallel, tiny_config

from cca_megatron.local_backend import LocalNorm
from cca_megatron.specs import cca_layer_spec

TOKENS, BATCH = 16, 2


class Recorder(torch.nn.Module):
    """Keeps what it is built with and called with."""

    def __init__(self, **arguments):
        super().__init__()
        self.built = arguments

    def forward(self, query, key, value, *positional, **named):
        self.shapes = [(tuple(x.shape), x.dtype) for x in (query, key, value)]
        self.called = positional, named
        return query.flatten(-2)


def plain(config):
    """The settings that are no functions."""
    return {name: value for name, value in vars(config).items() if not callable(value)}


def recorded(spec, config, batch, packed):
    """A layer of this spec whose core attention is a recorder, called once."""
    attention = spec.submodules.self_attention
    linears = replace(attention.submodules, core_attention=Recorder)
    attention = replace(attention, submodules=linears)
    submodules = replace(
        spec.submodules,
        self_attention=attention,
        input_layernorm=LocalNorm,
        pre_mlp_layernorm=LocalNorm,
    )
    layer = build_module(replace(spec, submodules=submodules), config=config, layer_number=1)
    size = config.context_parallel_size
    shard = TOKENS // size // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    angles = torch.zeros(TOKENS if packed else TOKENS // size, 1, 1, 4).cuda()
    x = torch.zeros(shard, batch, HIDDEN).cuda()
    layer.cuda()(x, None, rotary_pos_emb=angles, packed_seq_params=packed)
    return layer.self_attention.core_attention


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a", ["a2a"]], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "documents"])
@pytest.mark.parametrize(
    ("layout", "groups"),
    [(Layout(cp=2), 2), (Layout(tp=2), 2), (Layout(tp=2, sp=True), 2), (Layout(tp=2), 1)],
    ids=str,
)
def test_same_arguments_as_for_megatrons_attention(layout, groups, packed, comm_type):
    packing, batch = None, BATCH
    if packed:
        ends = torch.tensor(np.cumsum([0, 4, 12]), dtype=torch.int32).cuda()
        packing, batch = PackedSeqParams("thd", ends, ends, ends, ends, max_seqlen_q=12, max_seqlen_kv=12), 1
    with parallel(layout):
        config = tiny_config(
            layout, num_layers=1, params_dtype=torch.float32, cp_comm_type=comm_type, num_query_groups=groups
        )
        config.apply_rope_fusion = False
        stock = ModuleSpec(module=TransformerLayer, submodules=get_gpt_layer_local_submodules())
        theirs, ours = (recorded(spec, config, batch, packing) for spec in (stock, cca_layer_spec(config)))
        assert ours.built.keys() == theirs.built.keys()
        for name, value in theirs.built.items():
            if name == "config":  # with more ranks than groups it is a copy that says so
                assert plain(ours.built[name]) == plain(value)
            elif name != "pg_collection":
                assert ours.built[name] == value, name
        assert ours.built["pg_collection"].cp is parallel_state.get_context_parallel_group()
        assert theirs.built["pg_collection"].cp is ours.built["pg_collection"].cp
        if layout.cp > 1:
            assert theirs.built["cp_comm_type"] == (comm_type if isinstance(comm_type, str) else "a2a")
        assert ours.shapes == theirs.shapes
        assert ours.called == theirs.called
        assert ours.called[1]["packed_seq_params"] is packing


def test_megatrons_choice_of_core_attention_stays():
    """Only where documents cross ranks does ours take its place, whatever the backend."""
    from cca_megatron import CCAConfig, specs
    from cca_megatron.parallel.core_attention import LocalCoreAttention

    submodules = get_gpt_layer_local_submodules(num_experts=MOE["num_moe_experts"])
    attention = submodules.self_attention
    submodules = replace(
        submodules,
        self_attention=replace(attention, submodules=replace(attention.submodules, core_attention=Recorder)),
    )
    kept, replaced = (
        specs._replace_attention(submodules, CCAConfig(packed_zigzag=zigzag)).self_attention.submodules
        for zigzag in ("document", "stream")
    )
    assert kept.core_attention is Recorder
    assert replaced.core_attention.func is LocalCoreAttention
