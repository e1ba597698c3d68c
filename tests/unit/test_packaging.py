"""What pip installs is what is in the checkout."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_installed():
    found = {
        ".".join(init.parent.relative_to(ROOT).parts) for init in ROOT.glob("cca_megatron/**/__init__.py")
    }
    kernels = ROOT / "kernels"
    found |= {
        ".".join(init.parent.relative_to(kernels).parts) for init in kernels.glob("cca_*/**/__init__.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def test_the_scripts_of_jobs_are_installed():
    files = {file for names in SETUPTOOLS["data-files"].values() for file in names}
    assert all((ROOT / file).is_file() for file in files)
    scripts = {str(f.relative_to(ROOT)) for folder in ("slurm", "launch") for f in (ROOT / folder).iterdir()}
    assert scripts == files
