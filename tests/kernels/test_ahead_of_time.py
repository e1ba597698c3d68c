"""Every shipped config compiles without a GPU, and what comes out is what was meant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from cca_kernels.triton.ahead_of_time import Compiled

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


def compile_all(*arguments):
    """In a process of its own: the kernels here are interpreted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-m", "cca_kernels.triton.ahead_of_time", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [
        "--arch 90 --dim 128 --dtype bfloat16",
        pytest.param("--arch 80", marks=pytest.mark.long),
        pytest.param("--arch 90", marks=pytest.mark.long),
        pytest.param("--arch 100", marks=pytest.mark.long),
    ],
)
def test_nothing_spills_and_products_use_tensor_cores(arguments):
    run = compile_all(*arguments.split())
    assert run.returncode == 0, run.stderr
    assert "mix key" in run.stdout


@pytest.mark.long
def test_the_documents_have_the_table():
    text = DOCS.read_text()
    if f"triton {triton.__version__}" not in text:
        pytest.skip(f"the table is not of triton {triton.__version__}")
    command = "python -m cca_kernels.triton.ahead_of_time --dtype bfloat16"
    (table,) = re.findall(rf"<!-- {command} -->\n((?:\|.*\n)+)", text)
    assert table == compile_all("--dtype", "bfloat16").stdout


def compiled(**changes):
    facts = {"kernel": "mix_kernel", "variant": "key", "arch": 90, "dtype": "bfloat16", "dim": 128}
    facts |= {"registers": 94, "shared": 73728, "spills": 0, "tensor_core": 24, "wgmma": 24}
    return Compiled(**(facts | changes))


def test_the_gates_hold_back_what_they_should():
    assert not compiled().problems()
    assert compiled(spills=2).problems() == ["2 spilled accesses"]
    assert compiled(arch=80, shared=200 * 1024).problems() == ["204800 bytes of shared memory"]
    assert not compiled(shared=200 * 1024).problems()
    assert compiled(narrow=1).problems() == ["1 strides multiplied in 32 bits"]
    assert compiled(wgmma=0).problems() == [
        "no tensor-core instruction"
    ]  # HMMA alone is not enough on Hopper
    assert not compiled(arch=80, wgmma=0).problems()
    assert not compiled(dtype="float32", wgmma=0, tensor_core=0).problems()
