#!/usr/bin/env bash
# Train in the processes that an MPI launcher starts:
#   mpirun -np 2 launch/mpirun.sh configs/recipes/quickstart.yaml [SECTION.KEY=VALUE ...]
#   launch/mpirun.sh --help     for MPICH, srun and several hosts, and how to stop
# PYTHON=/path/to/python chooses the interpreter; by default .venv's, else python3 of the PATH.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
if command -v nvidia-smi >/dev/null; then
    # shellcheck source=launch/h100.env
    source "$root/launch/h100.env"
fi
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
exec "$python" -m cca_megatron.cluster.mpi "$@"
