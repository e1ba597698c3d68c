"""The doctor finds what is there, and fails only for what keeps training from working."""

import os
import subprocess
import sys
from pathlib import Path

from cca_megatron.doctor import examine

ROOT = Path(__file__).parents[2]


def doctor(path: str | None = None):
    """Run the command, with a folder of fake packages first on the path."""
    environment = os.environ | {"COLUMNS": "200"}
    if path is not None:
        environment["PYTHONPATH"] = path
    command = [sys.executable, "-m", "cca_megatron.cli", "doctor"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_everything_is_named():
    names = {finding.name for finding in examine()}
    expected = "python torch NCCL triton megatron-core transformer-engine apex mpi4py flash-attn".split()
    assert {*expected, "transformers", "compiler"} <= names
    assert any(name.startswith("GPU") for name in names)
    for finding in examine():
        assert finding.detail
        assert finding.status != "problem"


def test_absent_packages_are_no_failure():
    run = doctor()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "training can work here" in run.stdout


def test_the_namesake_of_apex_and_a_broken_transformer_engine_are_failures(tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('no driver')")
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text("")
    run = doctor(str(tmp_path))
    assert run.returncode == 1
    assert "not NVIDIA's Apex but its namesake" in run.stdout
    assert "cannot be imported: RuntimeError: no driver" in run.stdout
    assert "training cannot work until this is solved" in run.stderr


def test_transformers_can_be_imported_from_the_repository_root():
    """It probes for a package called kernels, and the root has a folder of that name."""
    program = (
        "import transformers, importlib.util\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "from transformers.models.zaya.modeling_zaya import ZayaForCausalLM\n"
        "assert not is_kernels_available()\n"
        "import cca_kernels; print(cca_kernels.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "cca_kernels"
