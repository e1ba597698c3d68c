"""The fused mix as a PyTorch operator, and when it is chosen."""

import pytest
import torch
from support.mix_cases import Case, gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import cca_kernels.mix
from cca_kernels import available_backends, cca_mix
from cca_megatron.training.device import select_device

DEVICE = select_device()
SMALL = {
    "documents": Case(tokens=9, documents=(0, 4, 8), boundary=True),
    "bare": Case(tokens=5, width=None, convs=(False, True), bias=False, order="bhsd"),
}


def operator_arguments(case, dtype=torch.float32):
    mixed, weights, options, inputs = case.arguments(dtype, DEVICE)
    groups, queries = case.groups, case.queries
    delay_from = groups * case.dim if options.value_delay_from is None else options.value_delay_from
    tensors = (mixed, *weights, *(inputs["rotary"] or (None, None)), inputs["cu_seqlens"])
    tensors += tuple(inputs["boundary"] or (None, None))
    return *tensors, options.qk_mean, delay_from, False, False, 0, queries, options.output_order


@pytest.mark.parametrize("name", SMALL)
def test_is_registered_as_pytorch_expects(name):
    import cca_kernels.triton.operator  # noqa: F401  registers it

    torch.library.opcheck(torch.ops.cca_kernels.mix.default, operator_arguments(SMALL[name]))


def test_compiles_into_a_whole_graph():
    mixed, weights, options, inputs = SMALL["documents"].arguments(torch.float32, DEVICE)

    def run(x, *tensors):
        q, k, v = cca_mix(2 * x, type(weights)(*tensors), options, **inputs, backend="triton")
        return q + 1, k, v

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        outputs = function(mixed, *weights)
        results.append((*outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), (mixed, *weights))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_can_be_recomputed():
    mixed, weights, options, inputs = SMALL["documents"].arguments(torch.float32, DEVICE)

    def mix(*tensors, **kwargs):
        return cca_mix(*tensors, **kwargs, backend="triton")

    def recomputed(*tensors, **kwargs):
        return checkpoint(mix, *tensors, **kwargs, use_reentrant=False)

    kept, again = (gradients(f, mixed, weights, options, **inputs) for f in (mix, recomputed))
    for a, b in zip((*kept[0], *kept[1].values()), (*again[0], *again[1].values()), strict=True):
        assert torch.equal(a, b)


def test_shapes_are_known_without_running():
    """As memory estimates need them: nothing is computed, and the shapes, dtypes and strides are right."""
    mixed, weights, options, inputs = SMALL["bare"].arguments(torch.float32, DEVICE)
    real = cca_mix(mixed, weights, options, **inputs, backend="triton")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = cca_mix(mode.from_tensor(mixed), weights, options, **inputs, backend="triton")
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.fixture
def forced(monkeypatch):
    def force(value):
        monkeypatch.setenv(cca_kernels.mix.VARIABLE, value)

    return force


def is_fused(outputs):
    return "mix" in type(outputs[0].grad_fn).__name__.lower()


def test_the_environment_chooses(forced):
    assert "triton" in available_backends()
    mixed, weights, options, inputs = SMALL["bare"].arguments(torch.float32, DEVICE)
    assert is_fused(cca_mix(mixed, weights, options, **inputs)) == (DEVICE == "cuda")
    for value, fused in (("triton", True), ("reference", False), ("auto", DEVICE == "cuda")):
        forced(value)
        assert is_fused(cca_mix(mixed, weights, options, **inputs)) == fused
    forced("cudnn")
    with pytest.raises(ValueError, match=r"CCA_KERNELS=cudnn is unknown; use one of \('auto', 'reference'"):
        cca_mix(mixed, weights, options, **inputs)


NOT_TAKEN = {
    "head dim 24: one of": (Case(dim=24, tokens=3), torch.float32),
    "dtype torch.float64: bfloat16, float16 and float32 work": (Case(tokens=3), torch.float64),
    r"conv kernel sizes \(5, 1\): up to 4": (Case(tokens=3, kernel_sizes=(5, 1)), torch.float32),
}


@pytest.mark.parametrize("message", NOT_TAKEN)
def test_what_the_kernels_do_not_take_is_an_error_only_if_forced(message, forced):
    case, dtype = NOT_TAKEN[message]
    mixed, weights, options, inputs = case.arguments(dtype, DEVICE)
    assert not is_fused(cca_mix(mixed, weights, options, **inputs))
    forced("triton")
    with pytest.raises(ValueError, match=f"CCA_KERNELS=triton: .*{message}"):
        cca_mix(mixed, weights, options, **inputs)


def test_falling_back_is_said_once(monkeypatch, caplog):
    """On a GPU a call that the kernels do not take runs the reference, with one line in the log."""
    cca_kernels.mix._log_once.cache_clear()
    mixed, weights, options, inputs = Case(dim=24, tokens=3).arguments(torch.float32, DEVICE)

    class OnGPU(torch.Tensor):
        is_cuda = True

    if DEVICE == "cpu":  # what dispatch sees; the reference runs where the data are
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        mixed = mixed.detach().as_subclass(OnGPU)
    for _ in range(3):
        cca_mix(mixed, weights, options, **inputs)
    lines = [r.getMessage() for r in caplog.records if r.name == "cca_kernels.mix"]
    assert lines == [
        "the CCA mix runs without fused kernels: head dim 24: one of (16, 32, 64, 128, 256) works"
    ]


def test_tables_that_need_a_gradient_are_for_the_reference(forced):
    mixed, weights, options, inputs = Case(tokens=3).arguments(torch.float32, DEVICE)
    inputs["rotary"] = tuple(table.requires_grad_() for table in inputs["rotary"])
    assert not is_fused(cca_mix(mixed, weights, options, **inputs))
    forced("triton")
    with pytest.raises(ValueError, match="rotary needs a gradient"):
        cca_mix(mixed, weights, options, **inputs)
