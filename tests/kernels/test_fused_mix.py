"""The fused kernels against the definition in fp64, on a GPU or in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from support.closeness import relative_error
from support.mix_cases import Case, gradients

from cca_kernels import cca_mix
from cca_kernels.triton.accuracy import allowed_error
from cca_megatron.training.device import select_device

DEVICE = select_device()
ROWS = 32  # of a tile in fp32
CASES = {
    "as released": Case(),
    "one group": Case(groups=1, queries=3, width=16),
    "no groups": Case(groups=3, queries=1, width=4),
    "head dim 64": Case(dim=64, width=32, batch=1),
    "head dim 128": Case(tokens=33, dim=128, width=64, batch=1, documents=(0, 1, 20, 33)),
    "head dim 256": Case(tokens=5, dim=256, width=256, batch=1, groups=1),
    "no RoPE": Case(width=None),
    "RoPE of full width": Case(width=16, rotary_batch=2),
    "RoPE of odd fraction": Case(width=6),
    "RoPE, neighbours": Case(width=16, interleaved=True),
    "RoPE, neighbours, half": Case(width=8, interleaved=True, rotary_batch=2),
    "RoPE, neighbours, odd fraction": Case(width=10, interleaved=True),
    "RoPE that scales": Case(rotary_scale=1.3),
    "RoPE that scales, odd fraction": Case(width=12, rotary_scale=0.7),
    "exponential": Case(form="exp"),
    "no mean": Case(mean=False),
    "no shift": Case(shift=False),
    "no bias": Case(bias=False),
    "no first conv": Case(convs=(False, True)),
    "no second conv": Case(convs=(True, False), kernel_sizes=(4, 1)),
    "no convs": Case(convs=(False, False)),
    "kernel sizes 1, 1": Case(kernel_sizes=(1, 1), boundary=True),
    "kernel sizes 1, 4": Case(kernel_sizes=(1, 4)),
    "kernel sizes 3, 2": Case(kernel_sizes=(3, 2), documents=(0, 2, 5, 6, 37)),
    "kernel sizes 4, 4": Case(kernel_sizes=(4, 4), documents=(0, 3, 3, 30), boundary=True),
    "documents": Case(documents=(0, 1, 3, 3, 20, 37)),
    "documents and padding": Case(documents=(0, 17, 33)),
    "documents that end beyond the tokens": Case(documents=(0, 20, 60)),
    "documents that end beyond the tokens, boundary": Case(documents=(0, 36, 38), boundary=True),
    "documents beyond the tokens, boundary": Case(documents=(0, 37, 50), boundary=True),
    "padding alone": Case(documents=(0,)),
    "many documents": Case(tokens=70, batch=1, documents=tuple(range(71))),
    "boundary": Case(boundary=True),
    "boundary, documents": Case(documents=(0, 2, 2, 5, 36), boundary=True),
    "boundary, no shift": Case(documents=(0, 9), boundary=True, shift=False),
    "boundary, one tap": Case(kernel_sizes=(1, 1), documents=(0, 4, 8), boundary=True),
    "some queries, first": Case(queries=4, query_heads=(0, 2)),
    "some queries, last": Case(queries=4, query_heads=(3, 1), documents=(0, 7, 30), boundary=True),
    "some queries, no mean": Case(queries=3, query_heads=(1, 1), mean=False),
    "bshd": Case(order="bshd"),
    "bhsd": Case(order="bhsd", documents=(0, 7, 30)),
    "no tokens": Case(tokens=0),
    "no tokens, documents": Case(tokens=0, documents=(0, 0), boundary=True),
    "no samples": Case(batch=0),
    **{f"{n} tokens": Case(tokens=n, batch=1) for n in (1, 2, 3, ROWS - 1, ROWS, ROWS + 1)},
}


QUICK = {
    *("as released", "head dim 128", "RoPE of odd fraction", "RoPE, neighbours, half", "RoPE that scales"),
    *("exponential", "no convs", "kernel sizes 4, 4", "documents and padding", "boundary, documents"),
    *(
        "documents that end beyond the tokens, boundary",
        "some queries, last",
        "bhsd",
        "no tokens, documents",
        f"{ROWS + 1} tokens",
    ),
}


def quick(cases, chosen):
    """All cases; those not chosen run in make test-all only."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.long) for case in cases]


def check(case, bound=1e-5, dtype=torch.float32):
    errors = case.errors(dtype, DEVICE, "triton")
    assert max(errors.values()) <= bound, {n: f"{e:.1e}" for n, e in errors.items() if e > bound}


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_fp32_is_exact(name):
    check(CASES[name])


@pytest.mark.parametrize("form", ["linear", "exp"])
@pytest.mark.parametrize("temperature", quick([0.0, 1e-37, -1e-20, 1e-3, -80.0], [0.0, -1e-20]))
def test_any_temperature(temperature, form):
    """The short formula divides by tau: where it is nearly zero keys say nothing, and must not be needed."""
    check(Case(temperature=temperature, form=form, documents=(0, 2, 30)))


# The interpreter cuts bf16 off where a GPU rounds.
CUT_OFF = 2.2 if DEVICE == "cpu" else 1


@pytest.mark.parametrize("temperature", quick([1.0, 0.0, 2.0**-8, 2.0**-5], [1.0, 2.0**-8]))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", quick(["boundary, documents", "kernel sizes 3, 2", "some queries, last"], ["boundary, documents"])
)
def test_half_precision_is_no_worse_than_eager(name, dtype, temperature):
    """Within fixed bounds and not above the reference's own error in that dtype, but for chance."""
    case = replace(CASES[name], temperature=temperature)
    fused, eager = (case.errors(dtype, DEVICE, backend) for backend in ("triton", "reference"))
    slack = CUT_OFF if dtype == torch.bfloat16 else 1
    for tensor, error in fused.items():
        bound = allowed_error(tensor, dtype) * slack
        if tensor == "gradient of temperature":  # sums of rounded keys over all tokens, in which much cancels
            assert error <= 4 * bound, f"{tensor}: {error:.1e}"
            continue
        limit = min(bound, 1.1 * eager[tensor] * slack + bound / 10)
        assert error <= limit, f"{tensor}: {error:.1e}, allowed {limit:.1e}"


def test_repeats_are_equal_bit_by_bit():
    case = Case(tokens=130, documents=(0, 40, 120), boundary=True)
    mixed, weights, options, inputs = case.arguments(torch.float32, DEVICE)

    def run():
        outputs, grads = gradients(cca_mix, mixed, weights, options, **inputs, backend="triton")
        return [*outputs, *grads.values()]

    first = run()
    for _ in range(100 if DEVICE == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.fixture
def poisoned_memory():
    """Memory that is not written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["documents and padding", "boundary, documents", "some queries, first"])
def test_everything_is_written(name, poisoned_memory):
    check(CASES[name])


def test_padding_is_exactly_zero():
    mixed, weights, options, inputs = Case(documents=(0, 17, 33)).arguments(torch.float32, DEVICE)
    outputs, grads = gradients(cca_mix, mixed, weights, options, **inputs, backend="triton")
    for x in (*outputs, grads["mixed"]):
        assert not x[33:].any()
        assert x[:33].any()


def test_latents_are_read_where_they_lie():
    """A slice of a wider projection, as tensor parallelism beyond the groups makes it."""
    mixed, weights, options, inputs = CASES["documents"].arguments(torch.float32, DEVICE)
    wide = torch.randn(37, 2, 3, 2 * 4 * 16, device=DEVICE)
    part = wide[:, :, 1].unflatten(-1, (2, 4, 16)).detach().copy_(mixed).requires_grad_()
    assert not part.is_contiguous()
    dense = gradients(cca_mix, mixed, weights, options, **inputs, backend="triton")
    strided = gradients(cca_mix, part, weights, options, **inputs, backend="triton")
    for a, b in zip((*dense[0], *dense[1].values()), (*strided[0], *strided[1].values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["expanded", "bhsd", "channels apart", "only values"])
def test_gradients_may_lie_anyhow(layout):
    mixed, weights, options, inputs = CASES["documents"].arguments(torch.float32, DEVICE)
    wide = mixed.detach().double().requires_grad_()

    def run(x, backend):
        leaves = [w.detach().to(x.dtype) for w in weights]
        outputs = cca_mix(x, type(weights)(*leaves), options, **inputs, backend=backend)
        torch.manual_seed(3)
        if layout == "only values":
            return torch.autograd.grad(outputs[2].square().sum(), x)[0]
        if layout == "expanded":
            given = [torch.randn((), device=DEVICE).to(x).expand_as(y) for y in outputs]
        elif layout == "bhsd":
            given = [torch.randn(y.permute(1, 2, 0, 3).shape).to(y).permute(2, 0, 1, 3) for y in outputs]
        else:
            given = [torch.randn(y.transpose(0, 3).shape).to(y).transpose(0, 3) for y in outputs]
        return torch.autograd.grad(outputs, x, given)[0]

    assert relative_error(run(wide, "reference"), run(mixed, "triton")) < 1e-5


@pytest.mark.parametrize("order", ["sbhd", "bshd", "bhsd"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_outputs_lie_in_memory_as_asked(order, backend):
    mixed, weights, options, inputs = Case(order=order).arguments(torch.float32, DEVICE)
    for x in cca_mix(mixed, weights, options, **inputs, backend=backend):
        assert x.permute(["sbhd".index(axis) for axis in order]).is_contiguous()
