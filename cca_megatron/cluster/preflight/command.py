"""``cca-megatron preflight``: check the nodes of an allocation."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cca_megatron.terminal import console, fail


def preflight(
    output: Annotated[
        Path, typer.Option(help="A folder that all nodes see; each check makes its own folder in it.")
    ] = Path("runs/preflight"),
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs that each node must have; by default those of the best.")
    ] = None,
    slow_below: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="A node is slow below this part of the median; by default 0.8 to 0.9 on GPUs."
        ),
    ] = None,
    free_gib: Annotated[
        float, typer.Option(min=0, help="Space that must be free in the shared folder, for checkpoints.")
    ] = 20.0,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for each part; a node that takes longer is bad.")
    ] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Check the nodes of an allocation before a job runs on them.

    GPU count, ECC errors, clocks under load and processes of others; equal versions; matrix products and
    copies on each GPU; all-reduce, all-to-all and point-to-point inside each node, between neighbours and
    over all nodes; the shared disk, free space, clocks. Without GPUs the same on the CPU over gloo.

    On this machine: `cca-megatron preflight`

    With SLURM: `sbatch --nodes=8 --gpus-per-node=8 slurm/preflight.sbatch`, or in an allocation
    `srun --ntasks-per-node=1 cca-megatron preflight`

    With torchrun, one process on each host: `torchrun --nnodes=2 --nproc-per-node=1
    --rdzv-backend=c10d --rdzv-endpoint=hostA:29500 -m cca_megatron.cli preflight`

    Ends with status 1 if something is wrong, and then prints the nodes to avoid as `sbatch --exclude` takes
    them.
    """
    from cca_megatron.cluster.preflight.allocation import find
    from cca_megatron.cluster.preflight.check import check
    from cca_megatron.cluster.preflight.measures import FREE_GIB, Limits
    from cca_megatron.cluster.preflight.show import show

    limits = Limits(gpus_per_node, slow_below, FREE_GIB | {"output": free_gib})
    try:
        allocation = find(os.environ, output)
        if allocation is None:
            return
        with console.status("checking") as status:
            verdict = check(
                allocation, limits, timeout, lambda text, done, of: status.update(f"{text}: {done} of {of}")
            )
    except (OSError, subprocess.CalledProcessError) as error:
        fail(error)
    if verdict is None:
        return
    if as_json:
        print(json.dumps(asdict(verdict), indent=1))
    else:
        show(verdict, allocation.folder / "report.json")
    if verdict.findings:
        raise typer.Exit(1)
