"""A SLURM cluster of two nodes on this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.cluster import MINI_SLURM, PROGRAM, Cluster, Run, environment


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes under SLURM's own daemons."""
    if shutil.which("slurmctld") is None:
        subprocess.run([MINI_SLURM, "install"], capture_output=True)
    if shutil.which("slurmctld") is None:
        pytest.skip("SLURM is not installed, and apt-get cannot install slurm-wlm and munge here")
    # Paths of sockets are short, so not in pytest's folder.
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True).stdout.strip())
    cluster = Cluster(folder)
    try:
        cluster.control("up")
        yield cluster
    finally:
        cluster.control("down")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def curve(tmp_path_factory) -> dict[int, set[float]]:
    """The losses of the recipe on one machine, uninterrupted, for as long as any run here trains."""
    run = Run(tmp_path_factory.mktemp("one"), **{"train-iters": 300})
    settings = ["launch.nodes=1", "launch.gpus_per_node=2"]
    done = subprocess.run(
        [PROGRAM, "train", run.recipe, *settings], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return run.losses()
