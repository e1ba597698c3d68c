"""What the documentation shows is what the code prints."""

import re
from pathlib import Path

import pytest
import torch

from cca_megatron.plan.traffic import comparison

ROOT = Path(__file__).parents[2]
PARALLELISM = (ROOT / "docs/parallelism.md").read_text()
TABLES = re.findall(
    r"<!-- python -m cca_megatron.plan.traffic --tp (\d+) --cp (\d+) -->\n((?:\|.*\n)+)", PARALLELISM
)


@pytest.mark.parametrize(("tp", "cp", "table"), TABLES, ids=[f"tp{tp}-cp{cp}" for tp, cp, _ in TABLES])
def test_traffic_tables(tp, cp, table):
    assert table.strip() == comparison("zaya1_8b", 2048, 128, int(tp), int(cp))


def test_there_are_tables():
    assert len(TABLES) == PARALLELISM.count("<!-- python") == 2


def test_links_lead_somewhere():
    own = [ROOT / "README.md", ROOT / "kernels/cca_kernels/README.md", *(ROOT / "docs").glob("*.md")]
    for document in own:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_example_of_the_kernels_runs():
    text = (ROOT / "kernels/cca_kernels/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code.replace("= 4096,", "= 64,"), names)
    assert names["q"].shape == (64, 1, 8, 128)
    gradients = [names["mixed"].grad, *(weight.grad for weight in names["weights"])]
    assert all(torch.isfinite(g).all() and g.any() for g in gradients)
