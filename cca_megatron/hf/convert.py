"""ZAYA1 checkpoints from safetensors to Megatron and back, without a model and one tensor at a time."""

import datetime
import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from cca_megatron._compat import ShardedObject
from cca_megatron.config import CCAConfig
from cca_megatron.hf.config import ConversionError, config_from_hf, config_to_hf
from cca_megatron.hf.distributed_checkpoint import DistributedCheckpoint, write_checkpoint
from cca_megatron.hf.first_release import (
    MergedRelease,
    config_of_release,
    is_first_release,
    old_shapes,
)
from cca_megatron.hf.safetensors_folder import CONFIG, SafetensorsFolder, read_config, write_shards
from cca_megatron.hf.state_dict import VOCABULARY, check_names, check_shapes
from cca_megatron.hf.tensors import (
    Shape,
    Sizes,
    TensorMap,
    balancing_states,
    extra_states,
    tensor_maps,
)

MANIFEST, MODEL, TOKENIZER, RELEASE = "conversion.json", "model.yaml", "tokenizer", "release"
SOURCE_CONFIG = "source_config.json"
_TRACKER = "latest_checkpointed_iteration.txt"
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
                    "chat_template.*", "generation_config.json")  # fmt: skip
_SHARD_BYTES = 2_000_000_000

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those that there are."""


def _no_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, as its manifest says."""

    source: str
    direction: Literal["hf-to-megatron", "megatron-to-hf"]
    style: str
    """Names of the source."""
    tensors: int
    parameters: int
    bytes: int
    verified: bool


@dataclass(frozen=True)
class _Release:
    """A checkpoint of ``transformers``, whichever names its files have."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    style: str

    @classmethod
    def open(cls, folder: Path) -> "_Release":
        """Check all names and shapes of the files; no tensor is read."""
        files, config = SafetensorsFolder(folder), read_config(folder / CONFIG)
        if not is_first_release(files):
            config = {"model_type": "zaya", **config}
            config_from_hf(config)  # refuses what is not ZAYA
            check_names(files.shapes, tensor_maps(Sizes.of_config(config)))
            return cls(config, files, "transformers")
        config = config_of_release(config, files.shapes)
        sizes = Sizes.of_config(config)
        check_shapes(files.shapes, old_shapes(sizes), tied=sizes.tied)
        return cls(config, MergedRelease(files, sizes), "first release")

    @property
    def sizes(self) -> Sizes:
        return Sizes.of_config(self.config)


def hf_to_megatron(
    source: Path,
    target: Path,
    arguments: Callable[[dict[str, Any], CCAConfig, torch.dtype, Path | None], Namespace],
    verify: bool = False,
    progress: Progress = _no_progress,
) -> Conversion:
    """Convert a folder of ``transformers`` to a checkpoint that Megatron loads in any parallel layout.

    Args:
        source: with ``config.json`` and safetensors, of either release.
        target: a new folder. It gets the checkpoint, a recipe's model sections (``model.yaml``), the
            tokenizer's files if there are any, and a manifest; and appears when all is complete.
        arguments: makes Megatron's arguments of a run with these settings, which checkpoints carry.
        verify: read every tensor back and compare.
        progress: called as bytes are done.

    Raises:
        ConversionError: something is unknown, missing, misshapen or cannot be converted; nothing is written.
    """
    release = _Release.open(source)
    settings, cca = config_from_hf(release.config)
    maps = {m.megatron: m for m in tensor_maps(release.sizes)}
    dtypes = _dtypes(release, maps)
    states = balancing_states(release.sizes)
    tensors = {key: (m.shape, dtypes[key]) for key, m in maps.items()}
    counter = _Counter(tensors, 1 + verify, progress)

    def make(key: str) -> Tensor:
        if key in states:
            return torch.zeros(states[key], dtype=torch.float32)
        tensor = maps[key].join([release.tensors[name] for name in maps[key].hf])
        counter.add(tensor)
        return tensor

    with _new_folder(target) as folder:
        tokenizer = _copy_tokenizer(source, folder)
        final = None if tokenizer is None else target.resolve() / TOKENIZER
        dtype = dtypes["embedding.word_embeddings.weight"]
        checkpoint = folder / RELEASE
        checkpoint.mkdir()
        common = {
            "args": arguments(settings, cca, dtype, final),
            "iteration": 0,
            "checkpoint_version": 3.0,
        }
        objects = [
            ShardedObject(key, None, (parts,), (part,)).unique_key
            for key, part, parts in extra_states(release.sizes)
        ]
        everything = tensors | {key: (shape, torch.float32) for key, shape in states.items()}
        write_checkpoint(checkpoint, everything, make, common, objects)
        (folder / _TRACKER).write_text(RELEASE)
        # Which tokens are special, for the way back.
        shutil.copy2(source / CONFIG, folder / SOURCE_CONFIG)
        if tokenizer is not None:
            shutil.copy2(source / CONFIG, tokenizer)
        (folder / MODEL).write_text(_recipe(settings, cca, final))
        if verify:
            written = DistributedCheckpoint(checkpoint)
            _compare((key, make(key), written[key]) for key in maps)
        return _manifest(folder, source, "hf-to-megatron", release.style, tensors, verify)


def megatron_to_hf(
    source: Path,
    target: Path,
    settings: Mapping[str, Any],
    cca: CCAConfig,
    verify: bool = False,
    progress: Progress = _no_progress,
) -> Conversion:
    """Convert a distributed checkpoint of Megatron, saved in any layout, to a folder of ``transformers``.

    Args:
        source: the folder of one iteration.
        target: a new folder, which appears when all is complete.
        settings: the arguments of the run that saved it, by name.
        cca: its CCA settings.
        verify: read every tensor back and compare.
        progress: called as bytes are done.

    Raises:
        ConversionError: ``transformers``' ZAYA cannot hold the model, or the checkpoint is not of one;
            nothing is written.
    """
    config = config_to_hf(settings, cca)
    sizes = Sizes.of_config(config)
    checkpoint = DistributedCheckpoint(source)
    maps = tensor_maps(sizes)
    check_shapes(_unpadded_shapes(checkpoint, sizes), {m.megatron: m.shape for m in maps}, tied=False)
    tensors = {m.megatron: (m.shape, checkpoint.dtype(m.megatron)) for m in maps}
    counter = _Counter(tensors, 1 + verify, progress)

    def parts(tensor_map: TensorMap) -> Iterator[tuple[str, Tensor]]:
        whole = checkpoint[tensor_map.megatron][: tensor_map.shape[0]]  # without what pads a vocabulary
        counter.add(whole)
        yield from zip(tensor_map.hf, tensor_map.split(whole), strict=True)

    dtype = tensors["embedding.word_embeddings.weight"][1]
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    with _new_folder(target) as folder:
        write_shards(folder, (part for m in maps for part in parts(m)), _SHARD_BYTES)
        tokenizer = _tokenizer_of(source, settings)
        if tokenizer is not None:
            _copy_files(tokenizer, folder)
        for file in (source.parent / SOURCE_CONFIG, *([tokenizer / CONFIG] if tokenizer else [])):
            config |= {k: v for k, v in _special_tokens(file).items() if config.get(k) is None}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if verify:
            written = SafetensorsFolder(folder)
            _compare((name, part, written[name]) for m in maps for name, part in parts(m))
        return _manifest(folder, source, "megatron-to-hf", "megatron", tensors, verify)


class _Counter:
    """Tells the progress in bytes."""

    def __init__(self, tensors: Mapping[str, tuple[Shape, torch.dtype]], passes: int, progress: Progress):
        self._total, self._done, self._progress = passes * _bytes(tensors), 0, progress
        progress(0, self._total)

    def add(self, tensor: Tensor) -> None:
        self._done += tensor.numel() * tensor.element_size()
        self._progress(self._done, self._total)


def _bytes(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values())


def _dtypes(release: _Release, maps: Mapping[str, TensorMap]) -> dict[str, torch.dtype]:
    """Of Megatron's tensors; reads one tensor of each map, which is memory-mapped or small."""
    return {key: release.tensors[next(iter(m.hf))].dtype for key, m in maps.items()}


def _unpadded_shapes(checkpoint: DistributedCheckpoint, sizes: Sizes) -> dict[str, Shape]:
    """Of the weights, with as many tokens as the model knows where the vocabulary is padded to more."""
    shapes = {key: checkpoint.shape(key) for key in checkpoint.keys() - balancing_states(sizes)}
    for key in VOCABULARY & shapes.keys():
        rows, *rest = shapes[key]
        shapes[key] = (min(rows, sizes.vocab), *rest)
    return shapes


def _compare(triples: Any) -> None:
    wrong = [name for name, expected, got in triples if not torch.equal(expected, got)]
    if wrong:
        raise ConversionError(f"what was written differs from its source: {', '.join(wrong[:20])}")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, which becomes it when the block ends well and else is deleted."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target.resolve()} is there already; choose another folder, or delete it")
    parent = target.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.incomplete-", dir=parent))
    folder.chmod(0o777 & ~_umask())
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if target.exists():
        target.rmdir()
    folder.rename(target.resolve())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy_tokenizer(source: Path, folder: Path) -> Path | None:
    if not any(source.glob("tokenizer*")):
        return None
    tokenizer = folder / TOKENIZER
    tokenizer.mkdir()
    _copy_files(source, tokenizer)
    return tokenizer


def _tokenizer_of(source: Path, settings: Mapping[str, Any]) -> Path | None:
    """The folder of a tokenizer: beside a converted checkpoint, or the one that the run was trained with."""
    named = settings.get("tokenizer_model")
    places = [source.parent / TOKENIZER, *([Path(named)] if named else [])]
    return next((place for place in places if place.is_dir()), None)


def _special_tokens(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return {k: v for k, v in read_config(file).items() if k.endswith("_token_id")}


def _copy_files(source: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, folder)


def _recipe(settings: Mapping[str, Any], cca: CCAConfig, tokenizer: Path | None) -> str:
    """The model as sections of a recipe, which another one can extend."""
    zaya = {n.removeprefix("zaya_"): value for n, value in settings.items() if n.startswith("zaya_")}
    model = {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if not name.startswith("zaya")
    }
    defaults = asdict(CCAConfig())
    changed = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(cca).items()
        if value != defaults[name] and name != "packed_zigzag"
    }
    sections: dict[str, Any] = {"model": model, "cca": changed, "zaya": zaya}
    if tokenizer is not None:
        sections["data"] = {"tokenizer": f"hf:{tokenizer}"}
    head = "# Written by cca-megatron convert. A recipe takes it in with:  extends: model.yaml\n"
    return head + yaml.safe_dump(sections, sort_keys=False)


def _manifest(
    folder: Path,
    source: Path,
    direction: Literal["hf-to-megatron", "megatron-to-hf"],
    style: str,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    verified: bool,
) -> Conversion:
    conversion = Conversion(
        source=str(source.resolve()),
        direction=direction,
        style=style,
        tensors=len(tensors),
        parameters=sum(torch.Size(shape).numel() for shape, _ in tensors.values()),
        bytes=_bytes(tensors),
        verified=verified,
    )
    versions = {name: version(name) for name in ("cca-megatron", "megatron-core", "torch", "safetensors")}
    content = {
        **asdict(conversion),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "dtypes": sorted({str(dtype).removeprefix("torch.") for _, dtype in tensors.values()}),
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    return conversion
