"""Which nodes there are to check, and which of them this is."""

import os
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Allocation:
    """The nodes of one check. The first of them judges."""

    node: str
    """This one."""
    nodes: tuple[str, ...]
    address: str
    """By which other nodes reach this one."""
    folder: Path
    """Of this check alone, on the shared file system."""

    @property
    def judges(self) -> bool:
        """Whether this node collects what all found out."""
        return self.node == self.nodes[0]


def find(environment: Mapping[str, str], output: Path) -> Allocation | None:
    """The nodes that srun or torchrun started us on, else this machine alone.

    Args:
        environment: variables of SLURM or torchrun.
        output: folder for the folders of checks.

    Returns:
        None if another process on this node does the work.
    """
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        if environment["SLURM_LOCALID"] != "0":
            return None
        nodes = environment.get("CCA_NODES", "").split()  # in a container there is no scontrol
        if not nodes:
            hosts = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
            nodes = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()
        node = environment["SLURMD_NODENAME"]
        folder = output / f"job-{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
        return Allocation(node, tuple(nodes), node, folder)
    if "TORCHELASTIC_RUN_ID" in environment:
        return _of_torchrun(environment, output)
    name = socket.gethostname()
    return Allocation(name, (name,), "127.0.0.1", output / _now())


def _of_torchrun(environment: Mapping[str, str], output: Path) -> Allocation | None:
    """All agree on the names of nodes and on the folder, as torchrun has no list and no number of its own."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    everybody: list[tuple[int, str, str]] = [(0, "", "")] * dist.get_world_size()
    dist.all_gather_object(
        everybody, (int(environment["GROUP_RANK"]), socket.gethostname(), str(output.resolve() / _now()))
    )
    dist.barrier()
    dist.destroy_process_group()
    if environment["LOCAL_RANK"] != "0":
        return None
    hosts = {group: host for group, host, _ in everybody}
    names = list(hosts.values())
    nodes = tuple(
        host if names.count(host) == 1 else f"{host}-{group}" for group, host in sorted(hosts.items())
    )
    group = int(environment["GROUP_RANK"])
    return Allocation(nodes[group], nodes, hosts[group], Path(everybody[0][2]))


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
