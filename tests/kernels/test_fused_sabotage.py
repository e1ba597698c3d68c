"""Tests of the tests: each of these mistakes in a kernel is noticed by the comparison with the definition."""

import importlib.util
from pathlib import Path

import pytest
import torch
from support.mix_cases import Case

import cca_kernels
from cca_kernels.triton import launch
from cca_megatron.training.device import select_device

FOLDER = Path(cca_kernels.__file__).parent / "triton"
CASE = Case(tokens=33, batch=1, documents=(0, 2, 3, 20, 31), boundary=True)

# name: (file, kernel, what stands there, what a mistake would make of it)
MISTAKES = {
    "a tap dropped": (
        "forward",
        "mix_kernel",
        "for step in tl.range(0, TAPS * CHUNKS,",
        "for step in tl.range(0, (TAPS - 1) * CHUNKS,",
    ),
    "a tap dropped, backward": (
        "backward",
        "latent_gradient_kernel",
        "steps = TAPS * CHUNKS",
        "steps = (TAPS - 1) * CHUNKS",
    ),
    "documents leak": (
        "forward",
        "mix_kernel",
        "mask=(since >= tap)[:, None]",
        "mask=(token >= tap)[:, None]",
    ),
    "documents leak, backward": (
        "backward",
        "latent_gradient_kernel",
        "mask = (until >= tap) & (back <= tap)",
        "mask = (token + tap < tokens) & (back <= tap)",
    ),
    "documents leak, filters": (
        "backward",
        "filter_gradient_kernel",
        "mask=(since >= tap)[:, None]",
        "mask=(token >= tap)[:, None]",
    ),
    "bias missing at the start of a document": (
        "forward",
        "mix_kernel",
        "DIM + out)[None, :]",
        "DIM + out)[None, :] * tl.where(since >= 1, 1.0, 0.0)[:, None]",
    ),
    "bias of the first conv missing": (
        "compose",
        "compose_kernel",
        "elif BIAS0:",
        "elif BIAS0 and BIAS1 and K1 > 9:",
    ),
    "group sum missing": (
        "backward",
        "latent_gradient_kernel",
        "for query in tl.range(0, COUNT, num_stages=1):",
        "for query in tl.range(0, COUNT - 1, num_stages=1):",
    ),
    "mean of the key without the last query": (
        "forward",
        "mix_kernel",
        "for _ in tl.range(0, QUERIES, num_stages=1):",
        "for _ in tl.range(0, QUERIES - 1, num_stages=1):",
    ),
    "boundary rows of another document": (
        "forward",
        "mix_kernel",
        "before, segment, sample, since, tap,",
        "before, segment * 0, sample, since, tap,",
    ),
    "value of the next token": ("forward", "mix_kernel", "values - mixed_token", "values"),
    "value gradient from the same token": (
        "backward",
        "latent_gradient_kernel",
        "from_value + d_value_token",
        "from_value",
    ),
    "temperature gradient without its scale": (
        "backward",
        "conv_output_gradient_kernel",
        "tl.sum(product, 0) * DIM**0.5",
        "tl.sum(product, 0)",
    ),
    "norm taken as constant": (
        "backward",
        "conv_output_gradient_kernel",
        "d = (g - o *",
        "d = (g - 0.0 * o *",
    ),
    "RoPE backward turns forward": (
        "backward",
        "conv_output_gradient_kernel",
        "g = cos_own * g + sin_other",
        "g = cos_own * g - sin_other",
    ),
    "first conv's gradient of the wrong tap": (
        "compose",
        "decompose_kernel",
        "K0 + (K0 - 1 - lag0)\n            tl.store(d_conv0",
        "K0 + lag0\n            tl.store(d_conv0",
    ),
    "second conv's gradient without the first bias": (
        "compose",
        "decompose_kernel",
        "total += tl.load(bias0 + channel + taken)",
        "total += 0.0 * tl.load(bias0 + channel + taken)",
    ),
}


def noticed():
    try:
        errors = CASE.errors(torch.float32, select_device(), "triton")
    except AssertionError:  # a result is not finite
        return True
    return max(errors.values()) > 1e-4


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_is_noticed(mistake, monkeypatch, tmp_path):
    file, kernel, right, wrong = MISTAKES[mistake]
    source = (FOLDER / f"{file}.py").read_text()
    assert right in source, "the kernel has changed: write this mistake anew"
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(launch, kernel, getattr(broken, kernel))
    assert noticed()


def test_nothing_is_noticed_without_a_mistake():
    assert not noticed()
