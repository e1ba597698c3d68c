"""The mix and core attention over all ranks of the world, against one process in fp64."""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cca_kernels import MixOptions, MixWeights, cca_mix
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.context_attention import context_attention
from cca_megatron.parallel.head_exchange import attend_by_heads
from cca_megatron.parallel.layout import ContextLayout

pytestmark = pytest.mark.every_world

BATCH, GROUPS, QUERIES, DIM = 2, 3, 2, 4


def layouts(size):
    """By name: with documents of 0, 1, 2, 3 and more tokens, shorter than the kernels, and padding."""
    ends = np.array
    return {
        "batch": ContextLayout.zigzag(8 * size, size),
        "chunks of one token": ContextLayout.zigzag(2 * size, size),
        "stream": ContextLayout.zigzag(12 * size, size, ends([0, 1, 1, 3, 6, 9, 12 * size - 3])),
        "stream, mostly padding": ContextLayout.zigzag(8 * size, size, ends([0, 3])),
        "documents": ContextLayout.zigzag_documents(
            20 * size, size, ends([0, 2 * size, 2 * size, 8 * size, 18 * size])
        ),
        "contiguous": ContextLayout.contiguous(6 * size, size, ends([0, 1, size + 1, 5 * size])),
        "one document": ContextLayout.zigzag_documents(
            12 * size, size, ends([0, 4 * size, 12 * size])
        ).undivided(),
    }


NAMES = list(layouts(1))


def shard_of(layout) -> tuple[ContextShard, Tensor]:
    shard = ContextShard(layout, dist.group.WORLD, torch.device("cuda", torch.cuda.current_device()))
    return shard, torch.from_numpy(layout.token_indices(dist.get_rank())).cuda()


def draw(*shape, seed) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).cuda()


@st.composite
def drawn(draw) -> ContextLayout:
    """Documents of any lengths, in any layout, for all ranks of the world."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    kind = draw(st.sampled_from(["zigzag", "zigzag_documents", "contiguous"]))
    unit = 2 * size if kind == "zigzag_documents" else 1
    ends = np.cumsum([0, *draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))]) * unit
    tokens = int(ends[-1]) + draw(st.integers(0, 4 * size))
    return getattr(ContextLayout, kind)(-(-tokens // (2 * size)) * 2 * size, size, ends)


def compare(function_of_all, function_of_mine, inputs, weights, upstream, mine):
    """Outputs and gradients of the inputs at this rank's tokens, the weights' summed over ranks."""
    inputs, weights = ([x.requires_grad_() for x in xs] for xs in (inputs, weights))
    expected = function_of_all(inputs, weights)
    gradients = torch.autograd.grad(expected, [*inputs, *weights], upstream)
    local = [x.detach()[mine].requires_grad_() for x in inputs]
    got = function_of_mine(local, weights)
    local_gradients = torch.autograd.grad(got, [*local, *weights], [u[mine] for u in upstream])
    for gradient in local_gradients[len(inputs) :]:
        dist.all_reduce(gradient)
    found = [
        *zip([*expected, *gradients[: len(inputs)]], [*got, *local_gradients[: len(inputs)]], strict=True),
        *zip(gradients[len(inputs) :], local_gradients[len(inputs) :], strict=True),
    ]
    cut = len(expected) + len(inputs)
    # Relative to the whole: some parts, as the query gradient of a first token, are zero but for rounding.
    errors = [
        ((a[mine] if number < cut else a) - b).norm() / (a.norm() or 1) for number, (a, b) in enumerate(found)
    ]
    wrong = [(number, error.item()) for number, error in enumerate(errors) if error > 1e-12]
    # Hypothesis goes on after a failure, so all ranks must fail together.
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    assert not any(everywhere), f"by rank: {everywhere}"


def check_mix(layout, kernels):
    shard, mine = shard_of(layout)
    tokens, channels = shard.layout.tokens, GROUPS * (QUERIES + 1) * DIM
    shapes = [(channels, 1, kernels[0]), (channels,), (channels, DIM, kernels[1]), (channels,), (GROUPS,)]
    weights = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    rotary = draw(2, tokens, 1, 1, 2, seed=7).unbind(0)
    options = MixOptions(value_delay_from=GROUPS * DIM // 2)
    cu_seqlens = torch.from_numpy(shard.layout.cu_seqlens).cuda()

    def of_all(inputs, weights):
        return cca_mix(*inputs, MixWeights(*weights), options, rotary=rotary, cu_seqlens=cu_seqlens)

    def of_mine(inputs, weights):
        return shard.mix(*inputs, MixWeights(*weights), options, tuple(x[mine] for x in rotary))

    upstream = [draw(tokens, BATCH, GROUPS * n, DIM, seed=8 + i) for i, n in enumerate((QUERIES, 1, 1))]
    mixed = draw(tokens, BATCH, GROUPS, QUERIES + 2, DIM, seed=6)
    compare(of_all, of_mine, [mixed], weights, upstream, mine)


@pytest.mark.parametrize("kernels", [(2, 2), (1, 1), (4, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_mix(name, kernels):
    check_mix(layouts(dist.get_world_size())[name], kernels)


@settings(max_examples=40, phases=[Phase.generate])
@given(drawn(), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_mix_of_any_documents(layout, kernels):
    check_mix(layout, kernels)


def attend_documents(q, k, v, ends):
    """[S, B, heads, D]: attention of each document for itself, zeros for padding."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    parts = [
        F.scaled_dot_product_attention(*(x[:, :, a:b] for x in (q, k, v)), is_causal=True, enable_gqa=True)
        for a, b in pairwise(ends)
        if b > a
    ]
    return torch.cat([*parts, torch.zeros_like(q[:, :, ends[-1] :])], 2).permute(2, 0, 1, 3)


def check_core_attention(layout, comm_type):
    shard, mine = shard_of(layout)
    tokens, ends = shard.layout.tokens, shard.layout.cu_seqlens.tolist()
    heads = 24  # a multiple of the three KV heads and of two, four or eight ranks together

    def of_all(inputs, _):
        return [attend_documents(*inputs, ends)]

    def of_mine(inputs, _):
        if comm_type == "a2a":
            return [attend_by_heads(*inputs, shard, lambda q, k, v: attend_documents(q, k, v, ends))]
        q, k, v = (x.permute(1, 2, 0, 3) for x in inputs)
        return [context_attention(q, k, v, shard, comm_type, DIM**-0.5).permute(2, 0, 1, 3)]

    inputs = [draw(tokens, BATCH, n, DIM, seed=n + i) for i, n in enumerate((heads, GROUPS, GROUPS))]
    compare(of_all, of_mine, inputs, [], [draw(tokens, BATCH, heads, DIM, seed=5)], mine)


COMM_TYPES = ["p2p", "all_gather", "a2a"]


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_core_attention(name, comm_type):
    check_core_attention(layouts(dist.get_world_size())[name], comm_type)


@settings(max_examples=40, phases=[Phase.generate])
@given(drawn(), st.sampled_from(COMM_TYPES))
def test_core_attention_of_any_documents(layout, comm_type):
    check_core_attention(layout, comm_type)
