"""Context parallelism, alone and with every other axis: whole models against one rank, in fp64."""

import dataclasses

import pytest
from support.comparison import Model, compare
from support.megatron import MOE, Layout

from cca_megatron import CCAConfig
from cca_megatron.doctor import missing_build_tools

STREAM = (1, 2, 3, 0, 7, 19)
"""Documents that end anywhere: of one token, shorter than the kernels, empty, across ranks."""
ODD_GROUPS = {"num_attention_heads": 12, "num_query_groups": 3}


def model(packed, settings=None, kernels=(3, 2)):
    zigzag = "document" if packed == "documents" else "stream"
    documents = {"batch": None, "documents": (16, 8, 0, 32), "stream": STREAM}[packed]
    cca = CCAConfig(conv_kernel_sizes=kernels, packed_zigzag=zigzag)
    return Model(settings or {}, cca, documents, padding=16 if documents else 0)


PACKED = ["batch", "documents", "stream"]
COMM_TYPES = ["p2p", "all_gather", "a2a"]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_two_ranks(comm_type, packed):
    compare(Layout(cp=2), model(packed, {"cp_comm_type": comm_type}))


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_a_cut_of_ones_own(comm_type):
    """One chunk per rank in order, handed to the layer with its positions."""
    cca = CCAConfig(conv_kernel_sizes=(3, 2), packed_zigzag="stream")
    compare(Layout(cp=2), Model({"cp_comm_type": comm_type}, cca, STREAM, padding=2, contiguous=True))


@pytest.mark.parametrize("packed", ["documents", "stream"])
def test_convs_that_mix_across_documents(packed):
    made = model(packed)
    cca = dataclasses.replace(made.cca, reset_at_document_start=False)
    compare(Layout(cp=2), dataclasses.replace(made, cca=cca))


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize("packed", ["batch", "stream"])
def test_sliding_windows(packed, comm_type, window):
    compare(Layout(cp=2), model(packed, {"window_size": (window, 0), "cp_comm_type": comm_type}))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_sliding_windows_over_four_ranks(comm_type):
    """Chunks shorter than the window, and ranks without a key in it."""
    compare(Layout(cp=4), model("batch", {"window_size": (3, 0), "cp_comm_type": comm_type}))


RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mix": {},
}


@pytest.mark.skipif(bool(missing_build_tools()), reason="Megatron compiles a helper for it")
@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputation(kind, comm_type):
    """Exchanges run again in the backward pass, in the same order on every rank."""
    made = model("stream", RECOMPUTE[kind] | {"cp_comm_type": comm_type})
    cca = dataclasses.replace(made.cca, recompute_mix=kind == "mix")
    compare(Layout(cp=2), dataclasses.replace(made, cca=cca))


@pytest.mark.long
@pytest.mark.parametrize("kernels", [(1, 1), (1, 2), (4, 1), (2, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("packed", PACKED)
def test_kernel_sizes(kernels, packed):
    """Up to six rows before a chunk of eight or fewer."""
    compare(Layout(cp=2), model(packed, kernels=kernels))


def four(layout, **settings):
    name = "-".join([str(layout), *(f"{value}" for value in settings.values() if isinstance(value, str))])
    groups = settings.get("num_query_groups")
    return pytest.param(layout, settings, id=f"{name}-{groups} groups" if groups else name)


FOUR = [
    *(four(Layout(cp=4), cp_comm_type=comm_type) for comm_type in COMM_TYPES),
    *(four(Layout(cp=4), cp_comm_type=comm_type, **ODD_GROUPS) for comm_type in COMM_TYPES),
    four(Layout(tp=2, cp=2)),
    four(Layout(tp=2, cp=2, sp=True), cp_comm_type="all_gather"),
    four(Layout(tp=2, cp=2), num_query_groups=1, cp_comm_type="a2a"),
    four(Layout(tp=2, cp=2, sp=True), num_query_groups=1),
    four(Layout(tp=4)),
    four(Layout(tp=4, sp=True), num_query_groups=1),
    four(Layout(pp=2, cp=2)),
    four(Layout(pp=2, vpp=2, cp=2), num_layers=4, cp_comm_type="all_gather"),
    four(Layout(pp=2, tp=2, sp=True)),
    four(Layout(pp=2, vpp=2, tp=2, sp=True), num_layers=4, num_query_groups=1),
    four(Layout(cp=2, ep=2), **MOE),
    four(Layout(cp=2, ep=4), **MOE, moe_token_dispatcher_type="alltoall"),
    four(Layout(tp=2, cp=2, sp=True, ep=2), **MOE),
    four(Layout(tp=2, cp=2, sp=True, etp=2), **MOE, cp_comm_type="a2a"),
    four(Layout(pp=2, cp=2, ep=2), **(MOE | {"num_layers": 4, "moe_layer_freq": 2})),
]
QUICK = FOUR[6:8] + FOUR[9:10] + FOUR[12:13]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("packed", ["batch", "stream"])
@pytest.mark.parametrize(("layout", "settings"), QUICK)
def test_four_ranks(layout, settings, packed):
    compare(layout, model(packed, settings))


@pytest.mark.long
@pytest.mark.ranks(4)
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(("layout", "settings"), FOUR)
def test_four_ranks_whole_matrix(layout, settings, packed):
    compare(layout, model(packed, settings))


EIGHT_HEADS = {"num_attention_heads": 8, "num_query_groups": 2}


@pytest.mark.long
@pytest.mark.ranks(8)
@pytest.mark.parametrize("packed", ["batch", "stream"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=8),
        Layout(tp=8, sp=True),
        Layout(tp=4, cp=2, sp=True),
        Layout(tp=2, cp=2, pp=2),
        Layout(cp=8),
    ],
    ids=str,
)
def test_eight_ranks(layout, packed):
    """ZAYA1's two KV heads on a node of eight."""
    compare(layout, model(packed, EIGHT_HEADS))
