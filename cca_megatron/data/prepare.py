"""Text to Megatron's ``.bin/.idx``: in parallel, with a progress bar, and whole or not at all."""

import glob
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cca_megatron.data.sources import DataError, Skipped, Unit, find_units, read_documents
from cca_megatron.data.tokenizer import Encoder, load_encoder
from cca_megatron.data.workers import WorkerDiedError, map_in_order

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes there are."""


@dataclass(frozen=True)
class Manifest:
    """What a dataset was made from; written beside it as ``PREFIX.json``."""

    tokenizer: str
    inputs: list[str]
    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    text_key: str = "text"
    """Field of a JSON line, or column, that held the text."""


@dataclass(frozen=True)
class _Encoded:
    """What a worker makes of one unit."""

    tokens: np.ndarray
    lengths: list[int]
    """Tokens of each document, its end-of-document token included."""
    text_bytes: int
    skipped: list[Skipped]


def dataset_files(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The data, index and manifest of a dataset. It is there if and only if its index is."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """What the dataset was made from, or None if ``prepare`` did not make it."""
    *_, manifest = dataset_files(prefix)
    return Manifest(**json.loads(manifest.read_text())) if manifest.is_file() else None


def prepare(
    inputs: list[str],
    prefix: str | Path,
    tokenizer: str,
    *,
    text_key: str = "text",
    strict: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Tokenize the inputs and write the dataset ``PREFIX.bin`` and ``PREFIX.idx``.

    A document per file, or per line of ``.jsonl`` and row of ``.parquet``; an end-of-document token
    after each. Files appear under their names only when they are complete.

    Args:
        inputs: files, folders, or ``python-stdlib``.
        prefix: where to write; its folder is made.
        tokenizer: ``bytes``, ``hf:NAME_OR_PATH`` or ``sentencepiece:PATH``.
        text_key: field of a JSON line, or column, that holds the text.
        strict: raise on input that would otherwise be skipped and counted.
        overwrite: replace a dataset that is already there.
        workers: processes; None takes one per core.
        progress: called as work proceeds.

    Raises:
        DataError: nothing to read, input that does not exist or (strict) cannot be used, a tokenizer
            that cannot be loaded, or a dataset that is already there.
    """
    if not str(prefix) or str(prefix).endswith(("/", os.sep)):
        raise DataError(f"prefix {str(prefix)!r}: must end in a name, for PREFIX.bin; data/corpus works")
    data, index, manifest_file = dataset_files(prefix)
    if index.exists() and not overwrite:
        raise DataError(f"{index.resolve()} exists already; --overwrite replaces it")
    units = find_units(inputs)
    encoder = load_encoder(tokenizer)
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # takes seconds

    data.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_parts(data)
    part = data.with_name(_part_name(data) + str(os.getpid()))
    part_data, part_index, part_manifest = dataset_files(part)
    total, done = sum(unit.size for unit in units), 0
    documents = tokens = text_bytes = 0
    skipped: Counter[str] = Counter()
    encoded_units = _encode_all(units, tokenizer, encoder, text_key, workers)
    try:
        builder = IndexedDatasetBuilder(str(part_data), DType.optimal_dtype(encoder.vocab_size))
        for unit, encoded in encoded_units:
            if strict and encoded.skipped:
                first = encoded.skipped[0]
                raise DataError(f"{first.where} is {first.reason}; without --strict it is skipped")
            skipped.update(item.reason for item in encoded.skipped)
            _append(builder, encoded)
            documents += len(encoded.lengths)
            tokens += len(encoded.tokens)
            text_bytes += encoded.text_bytes
            done += unit.size
            progress(done, total)
        if not documents:
            raise DataError(f"no text in {', '.join(inputs)} ({dict(skipped) or 'no files'})")
        builder.finalize(str(part_index))
        manifest = Manifest(tokenizer, inputs, documents, tokens, text_bytes, dict(skipped), text_key)
        part_manifest.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        # The index goes away first and comes last: at no moment does it belong to other data.
        index.unlink(missing_ok=True)
        os.replace(part_data, data)
        os.replace(part_manifest, manifest_file)
        os.replace(part_index, index)
    finally:
        encoded_units.close()  # stops the workers
        for leftover in (part_data, part_index, part_manifest):
            leftover.unlink(missing_ok=True)
    return manifest


def _append(builder: Any, encoded: _Encoded) -> None:
    start = 0
    for length in encoded.lengths:
        builder.add_document(encoded.tokens[start : start + length], [length])
        start += length


def _encode_all(
    units: list[Unit], tokenizer: str, encoder: Encoder, text_key: str, workers: int | None
) -> Generator[tuple[Unit, _Encoded]]:
    """Units with their tokens, in order."""
    count = min(workers or os.cpu_count() or 1, max(len(units), 1))
    if count == 1:
        yield from ((unit, _encode(unit, encoder, text_key)) for unit in units)
        return
    try:
        yield from map_in_order(partial(_encoder_of_units, tokenizer, text_key), units, count)
    except WorkerDiedError as error:
        raise DataError(
            f"{error}, perhaps for lack of memory; fewer than {count} --workers may do"
        ) from error


def _encoder_of_units(tokenizer: str, text_key: str) -> Callable[[Unit], _Encoded]:
    encoder = load_encoder(tokenizer)
    return lambda unit: _encode(unit, encoder, text_key)


def _encode(unit: Unit, encoder: Encoder, text_key: str) -> _Encoded:
    pieces: list[np.ndarray] = []
    lengths, text_bytes, skipped = [], 0, []
    for document in read_documents(unit, text_key):
        if isinstance(document, Skipped):
            skipped.append(document)
            continue
        ids = encoder.encode(document)
        pieces += [ids, np.array([encoder.end_of_document])]
        lengths.append(len(ids) + 1)
        text_bytes += len(document.encode("utf-8"))
    tokens = np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, np.int32)
    return _Encoded(tokens, lengths, text_bytes, skipped)


def _part_name(data: Path) -> str:
    """What names of unfinished parts begin with. On a shared file system several hosts may be at work."""
    return f"{data.stem}.part-{socket.gethostname()}-"


def _remove_stale_parts(data: Path) -> None:
    """Delete what killed runs on this host have left: parts whose process is gone."""
    for leftover in data.parent.glob(glob.escape(_part_name(data)) + "*"):
        pid = leftover.name.removeprefix(_part_name(data)).partition(".")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            leftover.unlink(missing_ok=True)
