"""The definition of the mix: equal to the paper's steps done one by one, in every variant."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.closeness import assert_close, relative_error
from support.mix_cases import (
    assert_same,
    gradients,
    random_boundary,
    random_mixed,
    random_rotary,
    random_weights,
)
from support.naive_cca import naive_mix

import cca_kernels.reference as reference
from cca_kernels import Boundary, MixOptions, MixWeights, cca_mix, cca_mix_reference

DOUBLE = torch.float64


def compare(mixed, weights, options, bound=1e-12, **inputs):
    ours = gradients(cca_mix_reference, mixed, weights, options, **inputs)
    assert_same(ours, gradients(naive_mix, mixed, weights, options, **inputs), bound)


@pytest.mark.parametrize("kernel_sizes", [(1, 1), (1, 3), (2, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize(("groups", "queries"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_equals_the_paper_step_by_step(groups, queries, kernel_sizes):
    torch.manual_seed(0)
    mixed, weights = random_mixed(6, groups, queries, 4), random_weights(groups, queries, 4, *kernel_sizes)
    options = MixOptions(value_delay_from=groups * 2)
    compare(mixed, weights, options, rotary=random_rotary(6, 2, batch=2))


@pytest.mark.parametrize("form", ["linear", "exp"])
@pytest.mark.parametrize("convs", [(True, True), (True, False), (False, True), (False, False)])
def test_switches_equal_the_paper_without_that_part(convs, form):
    torch.manual_seed(1)
    conv0, conv1 = convs
    for bias, mean, shift in [(True, True, True), (False, True, False), (True, False, True)]:
        weights = random_weights(2, 2, 4, 3, 2, conv0=conv0, conv1=conv1, bias=bias)
        options = MixOptions(qk_mean=mean, value_delay_from=4 if shift else None, temperature_form=form)
        compare(random_mixed(5, 2, 2, 4), weights, options, rotary=random_rotary(5, 4))


@pytest.mark.parametrize("width", [None, 2, 4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_the_first_channels_after_the_norm(width, interleaved):
    torch.manual_seed(2)
    rotary = None if width is None else random_rotary(4, width)
    if rotary is not None and interleaved:
        rotary = tuple(x[..., : width // 2].repeat_interleave(2, -1) for x in rotary)
    options = MixOptions(value_delay_from=8, rotary_interleaved=interleaved)
    compare(random_mixed(4, 2, 1, 8), random_weights(2, 1, 8), options, rotary=rotary)


DOCUMENTS = [
    [0, 7],
    [0, 1, 2, 3, 7],
    [0, 0, 3, 3, 5, 7, 7],  # empty documents
    [0, 2, 5],  # two tokens of padding
    [0, 0],  # padding only
]


@pytest.mark.parametrize("ends", DOCUMENTS)
@pytest.mark.parametrize("kernel_sizes", [(2, 2), (4, 3)])
def test_documents_are_independent(ends, kernel_sizes):
    torch.manual_seed(3)
    weights = random_weights(2, 2, 4, *kernel_sizes)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    compare(
        random_mixed(7, 2, 2, 4, batch=1),
        weights,
        MixOptions(value_delay_from=4),
        rotary=random_rotary(7, 4),
        cu_seqlens=cu_seqlens,
    )


@pytest.mark.parametrize("ends", [None, [0, 4, 7], [0, 1, 1, 6]])
@pytest.mark.parametrize("kernel_sizes", [(2, 2), (3, 3), (1, 1)])
def test_boundary_rows_continue_a_segment(ends, kernel_sizes):
    torch.manual_seed(4)
    weights = random_weights(2, 2, 4, *kernel_sizes)
    segments = 1 if ends is None else len(ends) - 1
    compare(
        random_mixed(7, 2, 2, 4, batch=1),
        weights,
        MixOptions(value_delay_from=5),
        cu_seqlens=None if ends is None else torch.tensor(ends),
        boundary=random_boundary(segments, weights, 2, 2, 4, delayed=3),
    )


def test_chunks_with_boundaries_equal_the_whole():
    """Cutting a sequence and handing on the last rows changes neither outputs nor gradients."""
    torch.manual_seed(5)
    weights, options = random_weights(2, 2, 4, 2, 3), MixOptions(value_delay_from=4)
    mixed = random_mixed(9, 2, 2, 4)
    rows = weights.boundary_rows

    def in_chunks(mixed, weights, options):
        pieces, cuts = [], [0, 4, 9]
        for start, end in pairwise(cuts):
            boundary = None
            if start:
                before = mixed[start - rows : start, :, :, :-1]
                boundary = Boundary(before[None], mixed[start - 1, :, :, -1].flatten(1)[None, :, 4:])
            pieces.append(cca_mix(mixed[start:end], weights, options, boundary=boundary))
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    whole = gradients(cca_mix_reference, mixed, weights, options)
    assert_same(gradients(in_chunks, mixed, weights, options), whole, bound=1e-13)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_some_query_heads_are_those_of_all(first):
    """The mean of the key still takes all query heads; what the others' convs do is not computed."""
    groups, queries, dim, count = 2, 4, 4, 2
    weights, mixed = random_weights(groups, queries, dim), random_mixed(9, groups, queries, dim)
    boundary = random_boundary(2, weights, groups, queries, dim, dim, batch=2)
    inputs = {"cu_seqlens": torch.tensor([0, 4, 8]), "boundary": boundary}
    options = MixOptions(value_delay_from=dim)
    q, k, v = cca_mix(mixed, weights, options, **inputs)
    part = cca_mix(mixed, weights, replace(options, query_heads=(first, count)), **inputs)
    expected = q.unflatten(2, (groups, queries))[:, :, :, first : first + count].flatten(2, 3)
    for name, a, b in zip("qkv", (expected, k, v), part, strict=True):
        assert_close(name, a, b, 1e-13)


def test_no_tokens_at_all():
    weights, mixed = random_weights(2, 2, 4), random_mixed(0, 2, 2, 4)
    starts = torch.zeros(1, dtype=torch.int64)
    boundary = random_boundary(0, weights, 2, 2, 4, 4, batch=2)
    q, k, v = cca_mix(mixed, weights, MixOptions(value_delay_from=4), cu_seqlens=starts, boundary=boundary)
    assert (q.shape, k.shape, v.shape) == ((0, 2, 4, 4), (0, 2, 2, 4), (0, 2, 2, 4))


def test_gradcheck():
    torch.manual_seed(6)
    weights, cu_seqlens = random_weights(1, 2, 2, 2, 2), torch.tensor([0, 1, 4])
    boundary = random_boundary(2, weights, 1, 2, 2, delayed=1)

    def run(mixed, *tensors):
        return cca_mix_reference(
            mixed,
            MixWeights(*tensors[:5]),
            MixOptions(value_delay_from=1, temperature_form="exp"),
            cu_seqlens=cu_seqlens,
            boundary=Boundary(*tensors[5:]),
        )

    assert torch.autograd.gradcheck(run, (random_mixed(4, 1, 2, 2, 1), *weights, *boundary))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_stay_zero_and_pass_no_gradient(dtype):
    """Without bias, a token of zeros at a document start gives zero rows in q, k and v."""
    torch.manual_seed(8)
    weights = random_weights(2, 2, 4, bias=False, dtype=dtype)
    mixed = random_mixed(3, 2, 2, 4, dtype=dtype).detach()
    mixed[0] = 0
    mixed.requires_grad_()
    (q, k, v), grads = gradients(cca_mix_reference, mixed, weights, MixOptions(value_delay_from=4))
    assert not any(x[0].any() for x in (q, k, v))
    assert all(x.isfinite().all() for x in (q, k, v, *grads.values()))
    alone = mixed[:1].detach().requires_grad_()
    (q, k, _), grads = gradients(cca_mix_reference, alone, weights, MixOptions())
    assert not grads["mixed"][..., :-1, :].any()


@pytest.mark.parametrize("scale", [1e-6, 1e-12])
def test_small_rows_are_exact(scale):
    """The norm takes the scale out whatever it is: no epsilon shrinks a small row."""
    torch.manual_seed(9)
    weights = random_weights(2, 2, 4, bias=False, dtype=torch.float32)
    mixed = random_mixed(4, 2, 2, 4, dtype=torch.float32)
    plain = cca_mix_reference(mixed, weights, MixOptions())
    small = cca_mix_reference(mixed * scale, weights, MixOptions())
    for name, a, b in zip("qk", plain[:2], small[:2], strict=True):
        assert_close(name, a, b, 1e-5)


def test_temperature_zero_keeps_its_gradient():
    torch.manual_seed(10)
    weights = random_weights(2, 2, 4)._replace(temperature=torch.zeros(2, dtype=DOUBLE, requires_grad=True))
    mixed, options = random_mixed(5, 2, 2, 4), MixOptions(value_delay_from=4)
    ours = gradients(cca_mix_reference, mixed, weights, options)
    assert not ours[0][1].any()
    assert ours[1]["temperature"].abs().min() > 0
    assert_same(ours, gradients(naive_mix, mixed, weights, options))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_near_fp64(dtype, bound):
    torch.manual_seed(11)
    weights, mixed = random_weights(2, 4, 32), random_mixed(16, 2, 4, 32)
    options = MixOptions(value_delay_from=32)
    exact = cca_mix_reference(mixed, weights, options)
    low = cca_mix_reference(mixed.to(dtype), MixWeights(*(w.to(dtype) for w in weights)), options)
    errors = {n: relative_error(a, b) for n, a, b in zip("qkv", exact, low, strict=True)}
    print(f"{dtype}: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    assert max(errors.values()) < bound


# Tests of the tests: each way to be wrong that public implementations show must be noticed.


def pad_each_conv_by_itself(latents, weights, cu_seqlens, boundary):
    channels, dim = weights.conv0_weight.shape[0], latents.shape[-1]
    x = latents.flatten(2).permute(1, 2, 0)
    for weight, bias, groups in (
        (weights.conv0_weight, weights.conv0_bias, channels),
        (weights.conv1_weight, weights.conv1_bias, channels // dim),
    ):
        x = torch.nn.functional.pad(x, (weight.shape[-1] - 1, 0))
        x = torch.nn.functional.conv1d(x, weight, bias, groups=groups)
    return x.permute(2, 0, 1).view(latents.shape)


def forget_documents(x, count, rows, cu_seqlens, right=reference._insert_rows):
    return right(x, count, None, None)


def forget_boundary(x, count, rows, cu_seqlens, right=reference._insert_rows):
    return right(x, count, None, cu_seqlens)


SABOTAGE = {
    "each conv padded by itself": ("_convolve", pad_each_conv_by_itself),
    "documents leak": ("_insert_rows", forget_documents),
    "boundary rows ignored": ("_insert_rows", forget_boundary),
    "value not shifted": ("_shift_value", lambda value, *rest: value),
    "no norm": ("_unit_rows", lambda x: x),
    "no rope": ("_rotate", lambda x, *rest: x),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_broken_mix_is_noticed(name, monkeypatch):
    torch.manual_seed(12)
    weights, documents = random_weights(2, 2, 4), name != "each conv padded by itself"
    inputs = {"rotary": random_rotary(5, 4)}
    if documents:
        inputs["cu_seqlens"] = torch.tensor([0, 2, 5])
        inputs["boundary"] = random_boundary(2, weights, 2, 2, 4, delayed=4)
    mixed, options = random_mixed(5, 2, 2, 4, batch=1), MixOptions(value_delay_from=4)
    compare(mixed, weights, options, **inputs)
    monkeypatch.setattr(reference, *SABOTAGE[name])
    with pytest.raises((AssertionError, RuntimeError)):
        compare(mixed, weights, options, **inputs)


@pytest.mark.parametrize("wrong", [{"qk_mean": False}, {"value_delay_from": 3}, {"temperature_form": "exp"}])
def test_a_wrong_option_is_noticed(wrong):
    torch.manual_seed(13)
    mixed, weights, options = (
        random_mixed(5, 2, 2, 4),
        random_weights(2, 2, 4),
        MixOptions(value_delay_from=4),
    )
    right = gradients(naive_mix, mixed, weights, options)
    with pytest.raises(AssertionError):
        assert_same(gradients(cca_mix_reference, mixed, weights, replace(options, **wrong)), right)
