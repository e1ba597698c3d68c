"""These tests run under torchrun: ``torchrun --nproc-per-node 2 -m pytest tests/distributed``.

Every rank runs every test; a test takes what it needs of the world and is skipped where it is too small.
"""

import datetime
import os

import pytest
import torch.distributed as dist
from support.comparison import forget_references
from support.megatron import microbatches, start_distributed


def pytest_configure(config):
    """One running report is enough: other ranks speak up only for their own failures."""
    if os.environ.get("RANK", "0") != "0":
        config.option.verbose = -2
        config.option.no_header = True
        config.option.reportchars = ""


def pytest_report_teststatus(report):
    if os.environ.get("RANK", "0") != "0" and not report.failed:
        return "", "", ""
    return None


def pytest_collection_modifyitems(items):
    """Skip what this world is too small for: ``ranks(n)`` says what a test or a parameter needs, else 2."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for item in items:
        marks = [mark.args[0] for mark in item.iter_markers("ranks")]
        needed = max(marks, default=2)
        if world < needed or world % needed:
            item.add_marker(pytest.mark.skip(reason=f"needs a multiple of {needed} processes"))


@pytest.fixture(scope="session", autouse=True)
def world():
    """The default process group, for the whole session."""
    start_distributed()
    yield dist.get_world_size()
    forget_references()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_microbatch(world):
    with microbatches():
        yield
    if dist.get_backend() == "gloo":  # a rank that failed alone is named, instead of waited for
        dist.monitored_barrier(timeout=datetime.timedelta(seconds=60))
