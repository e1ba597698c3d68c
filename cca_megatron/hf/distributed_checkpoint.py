"""Megatron's distributed checkpoints, written and read one whole tensor at a time, without a model.

The format is PyTorch's (``torch.distributed.checkpoint``) with Megatron's ``metadata.json`` beside it and the
arguments of the run as one object in it. Any parallel layout loads what is written here.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from cca_megatron._compat import CheckpointingConfig, ShardedObject, save_config
from cca_megatron.hf.tensors import Shape

_COMMON = ShardedObject("common_state", None, (1,), (0,)).unique_key


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    make: Callable[[str], Tensor],
    common: dict[str, Any],
    objects: list[str],
) -> None:
    """Write a distributed checkpoint; one tensor is in memory at a time, in a file of its own.

    Args:
        directory: an empty folder.
        tensors: shape and dtype of each, by its key.
        make: the tensor of a key, on the CPU.
        common: what Megatron keeps beside the tensors: ``args``, ``iteration``...
        objects: keys of further objects, all None: states of quantised modules, which a model asks for.
    """
    state: dict[str, Any] = {
        key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in tensors.items()
    }
    state |= {key: [None] for key in objects}
    state[_COMMON] = [common]
    writer = FileSystemWriter(directory, single_file_per_rank=False, per_thread_copy_ahead=0)
    dcp.save(state, storage_writer=writer, planner=_LazyPlanner(make), no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors that are shapes only, and makes each when it is written."""

    def __init__(self, make: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._make(write_item.index.fqn)


class DistributedCheckpoint(Mapping[str, Tensor]):
    """The tensors of a model in a distributed checkpoint by their keys; each is read when it is looked up.

    Args:
        directory: of one iteration, with its ``.metadata``.
    """

    def __init__(self, directory: Path):
        self._reader = _OnceReader(directory)
        entries = self._reader.read_metadata().state_dict_metadata
        self._tensors = {
            key: entry
            for key, entry in entries.items()
            # Of several optimizers each has a prefix of its own.
            if isinstance(entry, TensorStorageMetadata) and "optimizer." not in key
        }

    def shape(self, key: str) -> Shape:
        """Of a whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor."""
        return self._tensors[key].properties.dtype

    def __getitem__(self, key: str) -> Tensor:
        tensor = torch.empty(self.shape(key), dtype=self.dtype(key))
        dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _OnceReader(FileSystemReader):
    """Reads the index of a checkpoint once."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index
