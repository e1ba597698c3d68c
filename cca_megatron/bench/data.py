"""How fast text becomes a dataset, and how fast Megatron's loader reads it."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cca_megatron.bench.results import Event, Measured
from cca_megatron.data.prepare import dataset_files, prepare
from cca_megatron.training.recipe import Recipe, RecipeError


def measure_data(
    recipe: Recipe, batches: int, rounds: int, started: Callable[[str], None] = lambda case: None
) -> Iterator[Event]:
    """Prepare the recipe's inputs anew with one process and with one per core, then read what came of it.

    Rows of the part "prepare" have their speed over that of one process, rows of the part "read" over that of
    a plain read of the same file; all by wall clock.

    Args:
        recipe: its section data, its sequence length and its micro-batch size.
        batches: that are read in a round.
        rounds: how often each is timed; the median counts.
        started: called with the name of each case as it begins.

    Raises:
        RecipeError: the recipe has no inputs.
        DataError: they cannot be prepared.
    """
    data = recipe.data
    if not data.inputs:
        raise RecipeError(f"{recipe.path}: data.inputs is not set; data.inputs=[python-stdlib] works")
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "dataset"
        counts = list(dict.fromkeys((1, len(os.sched_getaffinity(0)))))
        seconds: dict[int, list[float]] = {workers: [] for workers in counts}
        for number, workers in itertools.product(range(rounds), counts):
            started(f"prepare with {workers} processes, round {number + 1}")
            begin = time.perf_counter()
            manifest = prepare(
                data.inputs,
                prefix,
                data.tokenizer,
                text_key=data.text_key,
                workers=workers,
                overwrite=True,
            )
            seconds[workers].append(time.perf_counter() - begin)
        for workers, taken in seconds.items():
            median = statistics.median(taken)
            yield Measured(
                {"part": "prepare", "workers": workers, "tokens": manifest.tokens, "seconds": median}
                | {"tokens_per_second": manifest.tokens / median}
                | {"ratio": statistics.median(seconds[1]) / median}
            )
        started("loader")
        yield from _read(recipe, prefix, batches, rounds)


def _read(recipe: Recipe, prefix: Path, batches: int, rounds: int) -> Iterator[Event]:
    length = int(recipe.arguments["seq-length"])
    samples = int(recipe.arguments.get("micro-batch-size", 1))
    tokens = batches * samples * length
    dataset = _dataset(recipe, prefix, length, batches * samples)
    kinds: dict[str, Callable[[], Any]] = {
        "plain read": lambda: _plain_read(prefix, tokens),
        "loader": lambda: _load(dataset, samples, batches),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _, (kind, run) in itertools.product(range(rounds), kinds.items()):
        begin = time.perf_counter()
        run()
        seconds[kind].append(time.perf_counter() - begin)
    base = statistics.median(seconds["plain read"])
    for kind, taken in seconds.items():
        median = statistics.median(taken)
        yield Measured(
            {"part": "read", "kind": kind, "tokens": tokens, "sequence": length, "micro_batch": samples}
            | {"seconds": median, "tokens_per_second": tokens / median, "ratio": base / median}
        )


def _dataset(recipe: Recipe, prefix: Path, length: int, samples: int) -> Any:
    """Megatron's training dataset of the prepared text, as the training loop builds it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from cca_megatron.data.tokenizer import load_encoder

    encoder = load_encoder(recipe.data.tokenizer)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.with_name("cache")),
        tokenizer=SimpleNamespace(
            eod=encoder.end_of_document, vocab_size=encoder.vocab_size, unique_identifiers={}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def _load(dataset: Any, samples: int, batches: int) -> None:
    """In this process, as with ``num-workers: 0``."""
    from torch.utils.data import DataLoader, Subset

    for _ in DataLoader(Subset(dataset, range(samples * batches)), batch_size=samples):
        pass


def _plain_read(prefix: Path, tokens: int) -> int:
    """Sum as many numbers from the start of the file, over and over if it is short."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = IndexedDataset(str(prefix))
    numbers = np.memmap(dataset_files(prefix)[0], dtype=found.index.dtype, mode="r")
    total, left = 0, tokens
    while left > 0:
        part = numbers[:left]
        total += int(np.sum(part, dtype=np.int64))
        left -= len(part)
    return total
