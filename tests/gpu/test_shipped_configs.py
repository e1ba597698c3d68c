"""Every shipped config of this GPU's architecture, compiled and run, against the definition in fp64."""

from dataclasses import replace

import pytest
import torch
from support.mix_cases import Case, gradients

from cca_kernels import cca_mix
from cca_kernels.triton.accuracy import BOUNDS, allowed_error
from cca_kernels.triton.configs import DIMS
from cca_megatron.training.device import select_device

pytestmark = pytest.mark.skipif(select_device() != "cuda", reason="needs a GPU")
PLAIN = Case(tokens=1999, batch=1, queries=4)
PACKED = replace(PLAIN, documents=(0, 1, 700, 703, 1900), boundary=True)


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rounding(dtype, dim, case):
    """Within fixed bounds, and never above what plain PyTorch has in the same dtype."""
    case = replace(case, dim=dim, width=dim // 2)
    fused, eager = (case.errors(dtype, "cuda", backend) for backend in ("triton", "reference"))
    for tensor, error in fused.items():
        bound = allowed_error(tensor, dtype)
        if tensor == "gradient of temperature":  # sums of rounded keys over all tokens, in which much cancels
            assert error <= 4 * bound, f"{tensor}: {error:.1e}"
            continue
        limit = min(bound, 1.05 * eager[tensor] + bound / 20)
        assert error <= limit, f"{tensor}: {error:.1e}, allowed {limit:.1e}"


def test_a_cuda_graph_replays_it():
    """Nothing waits for the host, so forward and backward can be captured."""
    mixed, weights, options, inputs = replace(PACKED, dim=64, width=32).arguments(torch.bfloat16, "cuda")

    def run():
        outputs, grads = gradients(cca_mix, mixed, weights, options, **inputs, backend="triton")
        return [*outputs, *grads.values()]

    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        q, k, v = cca_mix(mixed, weights, options, **inputs, backend="triton")
        given = [torch.ones_like(x) for x in (q, k, v)]
        (eager,) = torch.autograd.grad((q, k, v), mixed, given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = cca_mix(mixed, weights, options, **inputs, backend="triton")
        (gradient,) = torch.autograd.grad(outputs, mixed, given)
    graph.replay()
    for a, b in zip(expected, outputs, strict=False):
        assert torch.equal(a, b)
    assert torch.equal(gradient, eager)


@pytest.mark.parametrize("order", ["sbhd", "bhsd"])
def test_more_tokens_than_32_bits_can_address(order):
    """The last token's latents, and in bhsd the last head, lie further apart than int32 counts."""
    case = Case(tokens=64, batch=1, queries=3, dim=128, width=None, order=order)
    mixed, weights, options, _ = case.arguments(torch.bfloat16, "cuda")
    tokens = 3 * 2**20
    assert min(tokens * 1280, tokens * 6 * 128) > 2**31
    long = torch.zeros(tokens, *mixed.shape[1:], dtype=mixed.dtype, device="cuda")
    long[-64:] = mixed.detach()
    rows = weights.boundary_rows  # these see what comes before

    def run(x):
        x.requires_grad_()
        outputs = cca_mix(x, weights, options, backend="triton")
        given = [torch.zeros_like(y) for y in outputs]
        for gradient in given:
            gradient[-32:] = 1
        (gradient,) = torch.autograd.grad(outputs, x, given)
        return [y[-64 + rows :] for y in (*outputs, gradient)]

    for a, b in zip(run(long), run(mixed.detach()), strict=True):
        assert torch.equal(a, b)
