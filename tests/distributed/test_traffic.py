"""The planner's bytes for each parallel axis are those that a layer sends."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from support.megatron import HIDDEN, Layout, parallel, tiny_config

from cca_megatron import CCAConfig
from cca_megatron.bench.sent_bytes import SentBytes
from cca_megatron.plan.traffic import AttentionShape, traffic
from cca_megatron.specs import cca_layer_spec

TOKENS = 64


def sent(layout, kernels=(2, 2), **settings) -> float:
    """Bytes that one attention layer sends forward and backward, on the rank that sends most."""
    with parallel(layout):
        config = tiny_config(layout, num_layers=1, **settings)
        spec = cca_layer_spec(config, CCAConfig(conv_kernel_sizes=kernels)).submodules.self_attention
        attention = (
            build_module(
                spec,
                config=config,
                layer_number=1,
                cp_comm_type=config.cp_comm_type,
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
            .cuda()
            .double()
        )
        here = TOKENS // layout.cp
        x = torch.randn(here // (layout.tp if layout.sp else 1), 1, HIDDEN, dtype=torch.float64).cuda()
        with SentBytes() as counted:
            out, _ = attention(x.requires_grad_(), None, rotary_pos_emb=torch.zeros(here, 1, 1, 4).cuda())
            out.sum().backward()
    most = torch.tensor(counted.total).cuda()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


# name: (layout, settings, rows of the plan)
AXES = {
    "tensor": (Layout(tp=2), {}, ["tensor"]),
    "sequence": (Layout(tp=2, sp=True), {}, ["tensor with sequence"]),
    "shared groups": (
        Layout(tp=2),
        {"num_query_groups": 1},
        ["tensor", "tensor beyond the KV heads", "gradients of shared convs"],
    ),
    "ring": (Layout(cp=2), {"cp_comm_type": "p2p"}, ["context", "context, p2p"]),
    "all-gather": (Layout(cp=2), {"cp_comm_type": "all_gather"}, ["context", "context, all_gather"]),
    "all-to-all": (Layout(cp=2), {"cp_comm_type": "a2a"}, ["context", "context, a2a"]),
    "copied heads": (
        Layout(cp=2),
        {"num_query_groups": 1, "cp_comm_type": "a2a"},
        ["context", "context, a2a"],
    ),
    "four ranks": (Layout(cp=4), {"cp_comm_type": "p2p"}, ["context", "context, p2p"]),
    "two axes": (
        Layout(tp=2, cp=2),
        {"cp_comm_type": "all_gather"},
        ["tensor", "context", "context, all_gather"],
    ),
}


@pytest.mark.parametrize("kernels", [(2, 2), (1, 1), (3, 4)], ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.ranks(4 if n in ("four ranks", "two axes") else 2)) for n in AXES],
)
def test_planned_bytes_are_sent(name, kernels):
    layout, settings, rows = AXES[name]
    groups = settings.get("num_query_groups", 2)
    shape = AttentionShape(HIDDEN, 4, groups, 8, kernels, element_bytes=8)
    plan = {row.name.partition(":")[0]: row for row in traffic(shape, layout.tp, layout.cp)}
    # Of two ranks each sends the rows before one chunk; the chunks in the middle are on one rank.
    times = {"token": TOKENS // layout.cp, "chunk": min(layout.cp - 1, 2), "micro-batch": 1}
    planned = sum(times[plan[row].unit] * (plan[row].forward + plan[row].backward) for row in rows)
    assert sent(layout, kernels, **settings) == planned
