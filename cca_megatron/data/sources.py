"""Where text comes from: files, folders and line-oriented formats, as units that workers can share."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

STDLIB = "python-stdlib"
"""An input name: the source of Python's standard library, real text that every machine has."""

_JSONL_UNIT = 16 << 20
_NOT_IN_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

SkipReason = Literal["binary", "empty", "not UTF-8", "not JSON", "no text field"]


class DataError(Exception):
    """Input that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Unit:
    """A piece of input that one worker reads: a whole file, or a part of a line-oriented one."""

    path: Path
    kind: Literal["file", "jsonl", "parquet"]
    size: int
    """Bytes, for the progress bar."""
    start: int = 0
    """jsonl: first byte; parquet: row group."""


@dataclass(frozen=True)
class Skipped:
    """A document that was left out, and why."""

    where: str
    reason: SkipReason


def find_units(inputs: list[str]) -> list[Unit]:
    """Units of all inputs, in a fixed order: inputs as given, folders sorted by path.

    Args:
        inputs: files, folders (read recursively, hidden files left out), or ``python-stdlib``.
            ``.jsonl`` and ``.parquet`` hold a document per line or row, every other file is one.

    Raises:
        DataError: an input does not exist.
    """
    units: list[Unit] = []
    for name in inputs:
        path = Path(name)
        if name == STDLIB:
            files = _stdlib_files()
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
        elif path.is_file():
            files = [path]
        else:
            raise DataError(
                f"input {name!r} does not exist (looked for {path.resolve()}); give a file, a folder, "
                f"or {STDLIB!r}"
            )
        for file in files:
            units += _units_of(file)
    return units


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not _NOT_IN_STDLIB.intersection(p.relative_to(root).parts))


def _units_of(path: Path) -> list[Unit]:
    size = path.stat().st_size
    if path.suffix == ".jsonl":
        starts = range(0, size, _JSONL_UNIT) if size else [0]
        return [Unit(path, "jsonl", min(_JSONL_UNIT, size - start), start) for start in starts]
    if path.suffix == ".parquet":
        groups = _parquet(path).num_row_groups
        return [Unit(path, "parquet", size // max(groups, 1), group) for group in range(groups)]
    return [Unit(path, "file", size)]


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow. Run: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def read_documents(unit: Unit, text_key: str) -> Iterator[str | Skipped]:
    """The documents of a unit, in order, and what was left out."""
    if unit.kind == "parquet":
        yield from _parquet_documents(unit, text_key)
    elif unit.kind == "jsonl":
        for number, line in _lines(unit):
            yield _json_document(line, f"{unit.path} at byte {number}", text_key)
    else:
        yield _decode(unit.path.read_bytes(), str(unit.path))


def _decode(raw: bytes, where: str) -> str | Skipped:
    if not raw.strip():
        return Skipped(where, "empty")
    if b"\0" in raw:
        return Skipped(where, "binary")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return Skipped(where, "not UTF-8")


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Lines that begin inside the unit, with the byte where each begins."""
    with open(unit.path, "rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the end of a line that belongs to the unit before
        position = file.tell()
        while position < unit.start + unit.size:
            line = file.readline()
            if line.strip():
                yield position, line
            position += len(line)


def _json_document(line: bytes, where: str, text_key: str) -> str | Skipped:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Skipped(where, "not UTF-8")
    except json.JSONDecodeError:
        return Skipped(where, "not JSON")
    return _text_of(record, where, text_key)


def _text_of(record: Any, where: str, text_key: str) -> str | Skipped:
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Skipped(where, "no text field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        return Skipped(where, "not UTF-8")
    return text if text.strip() else Skipped(where, "empty")


def _parquet_documents(unit: Unit, text_key: str) -> Iterator[str | Skipped]:
    file = _parquet(unit.path)
    if text_key not in file.schema_arrow.names:
        raise DataError(
            f"{unit.path} has no column {text_key!r}; its columns are "
            f"{', '.join(file.schema_arrow.names)} (--text-key chooses one)"
        )
    rows = file.read_row_group(unit.start, columns=[text_key]).column(0).to_pylist()
    for number, text in enumerate(rows):
        where = f"{unit.path} row {number} of group {unit.start}"
        yield _text_of({text_key: text}, where, text_key)
