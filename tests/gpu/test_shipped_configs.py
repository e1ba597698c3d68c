"""Every shipped config of this GPU's architecture, compiled and run, against the definition in fp64."""

from dataclasses import replace

import pytest
import torch
from support.mix_cases import Case, gradients

from cca_kernels import cca_mix
from cca_kernels.triton.configs import DIMS
from cca_megatron.training.device import select_device

pytestmark = pytest.mark.skipif(select_device() != "cuda", reason="needs a GPU")
# (outputs, gradients), and never above what plain PyTorch has in the same dtype.
BOUNDS = {torch.bfloat16: (2.5e-3, 5e-3), torch.float16: (4e-4, 8e-4), torch.float32: (1e-5, 1e-5)}
PLAIN = Case(tokens=1999, batch=1, queries=4)
PACKED = replace(PLAIN, documents=(0, 1, 700, 703, 1900), boundary=True)


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rounding(dtype, dim, case):
    case = replace(case, dim=dim, width=dim // 2)
    fused, eager = (case.errors(dtype, "cuda", backend) for backend in ("triton", "reference"))
    for tensor, error in fused.items():
        bound = BOUNDS[dtype]["gradient" in tensor]
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


def test_more_tokens_than_32_bits_can_address():
    """1.7 million tokens of 1,280 channels lie further apart than int32 counts."""
    tokens = 2**31 // 1280 + 1000
    case = Case(tokens=64, batch=1, groups=2, queries=3, dim=128, width=None)
    mixed, weights, options, _ = case.arguments(torch.bfloat16, "cuda")
    long = torch.zeros(tokens, *mixed.shape[1:], dtype=mixed.dtype, device="cuda")
    long[-64:] = mixed.detach()
    with torch.no_grad():
        outputs = cca_mix(long, weights, options, backend="triton")
        expected = cca_mix(mixed, weights, options, backend="triton")
    rows = weights.boundary_rows  # these see what comes before
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a[-64 + rows :], b[rows:])
