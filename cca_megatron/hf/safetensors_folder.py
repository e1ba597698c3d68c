"""A folder of safetensors shards, read and written one tensor at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cca_megatron.hf.config import ConversionError
from cca_megatron.hf.tensors import Shape

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; each is read when it is looked up.

    Args:
        folder: with ``*.safetensors``, and an index if there are several.

    Raises:
        ConversionError: there are none, one that the index names is missing, or one is damaged.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ConversionError(f"{folder.resolve()}: is no folder")
        self._files = _files(folder)
        self.shapes: dict[str, Shape] = {}
        self._place: dict[str, Path] = {}
        for file in self._files:
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  not a mapping
                        self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                        self._place[name] = file
            except Exception as error:
                raise ConversionError(f"{file}: cannot be read: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._place[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def read_config(file: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{file}: must hold names and values")
    return config


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors, in the order in which they come, to shards of about this size, and their index.

    No more than one shard is in memory.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        if pending:
            save_file(pending, folder / _part(len(shards)), metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        length = tensor.numel() * tensor.element_size()
        if size and size + length > shard_bytes:
            write()
            size = 0
        # Of its own: a tensor that shares memory with another is refused.
        pending[name] = tensor.contiguous() if tensor._base is None else tensor.clone()
        size, total = size + length, total + length
    write()
    place: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / _part(number)).rename(folder / final)
        place |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _part(number: int) -> str:
    return f"part-{number:05}.safetensors"


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConversionError(f"{index}: is no index of safetensors: {error}") from error
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise ConversionError(
            f"{folder}: " + (f"lacks {', '.join(missing)}" if missing else "has no *.safetensors")
        )
    return files
