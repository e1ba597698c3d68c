# make quickstart   set up and train a small model (six minutes on two cores)
# make test         set up and run the tests (about half an hour on two cores)
# make test-all     the same with the long matrices
# make gpu-test     on a machine with GPUs: the quick tests on them, over NCCL where there are two or more
# make gpu-bench    on a machine with a GPU: measure the kernels, make plots and the README's table (8 minutes)
# make bridge-test  ZAYA in Megatron-Bridge, in an environment of its own (.venv-bridge, 5 GB)
# make lint         checks of format, types, shell scripts and Dockerfiles
# PYTHON=/path/to/python3.12 chooses the interpreter.

SHELL := bash
.DEFAULT_GOAL := help
BIN := .venv/bin
# Ranks share the machine, so each runs one thread.
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone

.PHONY: help setup setup-dev quickstart test test-all gpu-test gpu-bench bridge-test lint clean

help:  ## Show the targets.
	@sed -n 's/^# \(make\|PYTHON\)/\1/p' Makefile

setup:
	@scripts/bootstrap.sh

setup-dev:
	@scripts/bootstrap.sh dev

quickstart: setup
	$(BIN)/cca-megatron train configs/recipes/quickstart.yaml

test: lint
	$(BIN)/python -m pytest tests --ignore tests/distributed -m "not long"
	$(TORCHRUN) --nproc-per-node 2 -m pytest tests/distributed -m "not long"
	$(TORCHRUN) --nproc-per-node 4 -m pytest tests/distributed -m "not long and (ranks or every_world)"

test-all: lint
	$(BIN)/python -m pytest tests --ignore tests/distributed
	$(TORCHRUN) --nproc-per-node 2 -m pytest tests/distributed
	$(TORCHRUN) --nproc-per-node 4 -m pytest tests/distributed -m "ranks or every_world"
	$(TORCHRUN) --nproc-per-node 8 -m pytest tests/distributed -k eight_ranks

gpu-test: setup-dev
	@nvidia-smi -L >/dev/null 2>&1 || { echo "error: nvidia-smi finds no GPU; make test runs without one" >&2; exit 1; }
	CCA_DEVICE=cuda $(BIN)/python -m pytest tests/gpu tests/kernels tests/unit -m "not long" --ignore tests/kernels/test_ahead_of_time.py
	! command -v compute-sanitizer >/dev/null || CCA_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest tests/gpu/test_shipped_configs.py -k "rounding and bfloat16 and 64"
	gpus=$$(nvidia-smi -L | wc -l); [ $$gpus -lt 2 ] || CCA_DEVICE=cuda $(TORCHRUN) --nproc-per-node $$gpus -m pytest tests/distributed

gpu-bench: setup-dev
	@nvidia-smi -L >/dev/null 2>&1 || { echo "error: nvidia-smi finds no GPU; there is nothing to measure" >&2; exit 1; }
	$(BIN)/cca-megatron bench mix --quick --minutes 3
	$(BIN)/cca-megatron bench block --quick --minutes 3.5
	$(BIN)/cca-megatron bench report

# Bridge's own pins exclude the transformers that knows ZAYA, so it comes without them.
bridge-test: setup-dev
	[ -x .venv-bridge/bin/pytest ] || { $(BIN)/python -m venv .venv-bridge && .venv-bridge/bin/pip install -q -c constraints.txt -e '.[hf]' omegaconf einops pytest hypothesis && .venv-bridge/bin/pip install -q --no-deps megatron-bridge==0.6.2; }
	OMP_NUM_THREADS=1 .venv-bridge/bin/python -m torch.distributed.run --standalone --nproc-per-node 4 -m pytest tests/distributed/test_bridge.py

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/shellcheck -x -P . $(wildcard launch/*.sh launch/*.env slurm/* docker/*.sh scripts/*.sh tests/launch/*.sh) .ci/run

clean:
	rm -rf .venv .venv-bridge .mypy_cache .pytest_cache .ruff_cache build *.egg-info
