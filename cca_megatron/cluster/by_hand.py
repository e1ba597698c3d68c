"""Training on machines without a scheduler, as ``launch/torchrun.sh`` does: each runs the same command."""

import os
import socket
from collections.abc import Mapping

import typer

from cca_megatron.terminal import OverridesArgument, RecipeArgument, console, fail
from cca_megatron.training.command import Rendezvous

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_PORT = 29500
_PATIENCE = 3600
"""Seconds for which a node waits for the others: node 0 may have to prepare the data."""


def nodes_from(environment: Mapping[str, str], host_names: set[str]) -> tuple[int, Rendezvous | None]:
    """How many nodes train, and where they meet; one node meets nobody.

    Args:
        environment: ``HOSTS``, or ``NNODES``, ``NODE_RANK`` and ``MASTER``; none of them for one node.
        host_names: by which ``HOSTS`` may name this machine.

    Raises:
        ValueError: they do not fit together.
    """
    hosts = environment.get("HOSTS", "").replace(",", " ").split()
    if hosts:
        ranks = [rank for rank, host in enumerate(hosts) if host in host_names]
        if len(ranks) != 1:
            raise ValueError(
                f"HOSTS={' '.join(hosts)}: must have this machine once, as {' or '.join(sorted(host_names))}"
            )
        nodes, node_rank, master = len(hosts), ranks[0], hosts[0]
    else:
        nodes = _number(environment, "NNODES", "1", 1)
        master = environment.get("MASTER", "")
        if nodes > 1 and not ("NODE_RANK" in environment and master):
            raise ValueError(
                f"NNODES={nodes}: NODE_RANK=0..{nodes - 1} and MASTER=HOST of node 0 must be set too"
            )
        node_rank = _number(environment, "NODE_RANK", "0", 0)
    if node_rank >= nodes:
        raise ValueError(f"NODE_RANK={node_rank}: must be below NNODES={nodes}; nodes count from 0")
    if nodes == 1:
        return 1, None
    host, _, port = master.partition(":")
    if not port:
        port = str(_PORT)
    if not port.isdecimal():
        raise ValueError(f"MASTER={master}: must be HOST or HOST:PORT; MASTER={host}:{_PORT} works")
    return nodes, Rendezvous(host, int(port), node_rank, _PATIENCE)


def _number(environment: Mapping[str, str], name: str, default: str, least: int) -> int:
    text = environment.get(name, default)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
) -> None:
    """Train on this machine, or on several without SLURM or MPI, with torchrun on each.

    One machine: `launch/torchrun.sh RECIPE`

    Several: the same command on each, with all their names, from the same folder of a shared file system:
    `HOSTS="hostA hostB" launch/torchrun.sh RECIPE`

    or with their number, the own rank and node 0's address:
    `NNODES=2 NODE_RANK=0 MASTER=hostA:29500 launch/torchrun.sh RECIPE`

    With ssh: `for h in hostA hostB; do ssh $h "cd $PWD && HOSTS='hostA hostB' launch/torchrun.sh RECIPE" &
    done; wait`

    `launch.nodes` is the number of hosts. Node 0 prepares the data; the others wait for it, an hour at
    most. The last node prints the losses. Ctrl-C or SIGTERM on one node saves a checkpoint and stops all; the
    same commands go on from there.
    """
    from cca_megatron.cluster.ownership import JobError, refuse_owned_folder
    from cca_megatron.data.sources import DataError
    from cca_megatron.training import session
    from cca_megatron.training.launch import TrainingError
    from cca_megatron.training.recipe import RecipeError

    name = socket.gethostname()
    try:
        nodes, rendezvous = nodes_from(os.environ, {name, name.partition(".")[0], socket.getfqdn()})
        settings = list(overrides or [])
        if rendezvous is not None:
            settings.append(f"launch.nodes={nodes}")
            console.print(
                f"node {rendezvous.node_rank} of {nodes}; they meet at {rendezvous.host}:{rendezvous.port}"
            )
        command, device = session.prepare_command(recipe, settings)
        session.check_machine(command.recipe, device, nodes)
        refuse_owned_folder(command.recipe.output)
        if not session.train(command, device, console, rendezvous):
            raise typer.Exit(130)
    except (RecipeError, DataError, JobError, TrainingError, ValueError, OSError) as error:
        fail(error)


# The guard matters: preparing data spawns processes, which import this module again.
if __name__ == "__main__":
    app()
