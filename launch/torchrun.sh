#!/usr/bin/env bash
# Train on this machine, or on several without SLURM or MPI:
#   launch/torchrun.sh configs/recipes/quickstart.yaml [SECTION.KEY=VALUE ...]
#   HOSTS="hostA hostB" launch/torchrun.sh RECIPE       the same command on each host
#   launch/torchrun.sh --help                           for the other way to name hosts, and how to stop
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
exec "$python" -m cca_megatron.cluster.by_hand "$@"
