"""A small dataset and a small model, trained by the real entry in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cca_megatron.data.prepare import prepare

MODEL = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --swiglu --disable-bias-linear
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --kv-channels 8
    --normalization RMSNorm --position-embedding-type rope --seq-length 32 --max-position-embeddings 32
    --hidden-dropout 0 --attention-dropout 0
    --lr 1e-2 --lr-decay-iters 100 --seed 5 --num-workers 0 --eval-iters 1 --eval-interval 1000
    --log-interval 1 --tensorboard-log-interval 1
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 2 --split 90,10,0
""".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of small texts."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(f"{number} bottles of water on the wall\n" * 20)
    return folder


@pytest.fixture(scope="session")
def dataset(corpus, tmp_path_factory) -> str:
    """Prefix of a byte-level dataset of the corpus."""
    prefix = str(tmp_path_factory.mktemp("data") / "corpus")
    prepare([str(corpus)], prefix, "bytes", workers=1)
    return prefix


def environment() -> dict[str, str]:
    """A clean environment for torchrun: nothing of an outer launcher."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "CCA_")
    outer += ("CUDA_DEVICE_MAX_CONNECTIONS", "TRITON_")  # set by tests of this process
    kept = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    # Megatron's --deterministic-mode asks for the last.
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "NCCL_ALGO": "Ring"}


def pretrain(processes: int, *arguments: str, model: list[str] = MODEL) -> str:
    """Train by torchrun; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "--module", "cca_megatron.training.pretrain"]
    run = subprocess.run(
        [*command, *model, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    return run.stdout


class CommonStart:
    """A checkpoint of a model, from which every layout can start, and the curve of one process from there.

    Random initial values would depend on the layout.
    """

    def __init__(self, folder: Path, model: list[str]):
        self._model = model
        save = ["--train-iters", "1", "--save", f"{folder}/save", "--save-interval", "1", "--no-save-optim"]
        pretrain(1, *save, *_padding([]), model=model)
        self._load = ["--load", f"{folder}/save", "--finetune", "--no-load-optim", "--no-load-rng"]
        self.curve, self.validation = self.train(1, [], folder / "one")

    def train(
        self, processes: int, arguments: list[str], folder: Path
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Training and validation losses of a run in this layout."""
        log = ["--tensorboard-dir", str(folder / "log")]
        pretrain(processes, *self._load, *arguments, *_padding(arguments), *log, model=self._model)
        return losses(folder / "log"), losses(folder / "log", "lm loss validation")


def _padding(arguments: list[str]) -> list[str]:
    """Megatron pads the vocabulary to a multiple of this times TP: the same model needs the same product."""
    option = "--tensor-model-parallel-size"
    size = int(arguments[arguments.index(option) + 1]) if option in arguments else 1
    return ["--make-vocab-size-divisible-by", str(4 // size)]


def losses(tensorboard: Path, tag: str = "lm loss") -> dict[int, float]:
    """Training loss by iteration, as logged; empty if there is none."""
    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return {}
    # Megatron validates once more at the end, under the same step, and may exit before that is written.
    return {event.step: event.value for event in reversed(events.Scalars(tag))}
