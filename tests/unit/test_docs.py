"""What the documentation shows is what the code prints."""

import re
from pathlib import Path

import pytest

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
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
