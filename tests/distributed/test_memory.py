"""Core attention under context parallelism: memory falls with the ranks, and nothing is quadratic."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from cca_megatron.bench.live_bytes import LiveBytes
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.context_attention import context_attention
from cca_megatron.parallel.layout import ContextLayout

QUERIES, GROUPS, DIM = 4, 1, 16  # ZAYA1's ratio of heads
LIMITS = {"p2p": 0.5, "all_gather": 0.6}


def counted(tokens, comm_type, dtype, window=None) -> LiveBytes:
    """q, k, v, output, what is saved, buffers and all gradients, forward and backward.

    ``comm_type`` None is all of it on one rank.
    """
    size = 1 if comm_type is None else dist.get_world_size()
    shard = ContextShard(ContextLayout.zigzag(tokens, size), dist.group.WORLD, torch.device("cuda"))
    with LiveBytes() as live:
        q, k, v = (
            torch.randn(1, heads, tokens // size, DIM, dtype=dtype).cuda().requires_grad_()
            for heads in (QUERIES, GROUPS, GROUPS)
        )
        if comm_type is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = context_attention(q, k, v, shard, comm_type, DIM**-0.5, window)
        out.backward(torch.ones_like(out))
    return live


@pytest.mark.ranks(4)
@pytest.mark.parametrize("comm_type", LIMITS)
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        (4096, torch.bfloat16),
        pytest.param(32768, torch.bfloat16, marks=pytest.mark.long),
        pytest.param(32768, torch.float32, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_rank_of_four_holds_half_of_one_or_less(comm_type, tokens, dtype, record_property):
    if dtype == torch.float32 and torch.cuda.get_device_name() != "cpu":
        pytest.skip("on a GPU attention in fp32 is plain, and holds slices of logits")
    of_one, of_four = counted(tokens, None, dtype), counted(tokens, comm_type, dtype)
    share = of_four.peak / of_one.peak
    record_property("share", share)
    assert share <= LIMITS[comm_type]


@pytest.mark.parametrize("comm_type", LIMITS)
@pytest.mark.parametrize("window", [None, 20, 700], ids=str)
def test_memory_is_linear_in_the_sequence(comm_type, window):
    short, long = (counted(tokens, comm_type, torch.bfloat16, window) for tokens in (1024, 4096))
    assert long.peak <= 4 * short.peak
    # No tensor has more rows or columns than heads, channels, fp32 and the ranks' keys explain.
    assert long.largest <= 4096 * QUERIES * DIM * 4
