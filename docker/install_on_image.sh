#!/usr/bin/env bash
# Install the plugin and what its tests need into the Python of an image that has PyTorch already.
#
# pip would satisfy a dependency with a PyTorch or Triton of its own, over the image's. So what is compiled against
# PyTorch is given to pip as it is (a constraint, which makes pip refuse), and compared afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."

compiled='^(torch|torchvision|triton|pytorch[-_]triton|transformer[-_]engine.*|apex|flash[-_]attn|numpy)=='
installed() {
    python -m pip list --format=freeze --disable-pip-version-check | grep -Ei "$compiled" | sort
}

# NVIDIA's images pin all packages of their own build here, setuptools too, older than ours may need.
unset PIP_CONSTRAINT

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
installed >"$scratch/before"
# Of our own pins those that are not part of the image.
grep -E '^(megatron-core|transformers)==' constraints.txt >"$scratch/pins"
python -m pip install --no-cache-dir --disable-pip-version-check \
    --constraint "$scratch/before" --constraint "$scratch/pins" --editable '.[test,mpi]'
installed >"$scratch/after"
diff "$scratch/before" "$scratch/after" || {
    echo "error: pip replaced what the image had compiled; see the lines above (< before, > after)" >&2
    exit 1
}
