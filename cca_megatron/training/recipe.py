"""A training run described in one YAML file, and the Megatron command line that it stands for."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cca_megatron.config import (
    PRESET_HEAD_DIM,
    PRESET_HIDDEN_SIZE,
    CCAConfig,
    preset,
    unknown_name,
)
from cca_megatron.data.tokenizer import megatron_arguments
from cca_megatron.zaya.settings import ZayaSettings

SECTIONS = ("extends", "model", "cca", "zaya", "megatron", "data", "output", "launch")
_DEFAULT_SAVE_INTERVAL = 1000


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key that stands twice in one mapping."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    repeated = [key for key in keys if keys.count(key) > 1]
    if repeated:
        raise yaml.YAMLError(f"{repeated[0]} is set twice, line {node.start_mark.line + 1} and after")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class RecipeError(Exception):
    """A recipe that cannot run; the message names the setting and what would work."""


@dataclass(frozen=True)
class DataSection:
    """What to train on."""

    inputs: list[str] = field(default_factory=list)
    """Text to make the dataset from, if it is not there yet."""
    prefix: str | None = None
    """The dataset: PREFIX.bin and PREFIX.idx."""
    tokenizer: str = "bytes"
    text_key: str = "text"


@dataclass(frozen=True)
class LaunchSection:
    """How many processes, and where."""

    nodes: int = 1
    gpus_per_node: int = 1
    """Processes per node, one per GPU; on a machine without GPUs, processes on its CPU."""
    max_restarts: int = 50
    """On a cluster: how often a job starts its processes again, for whatever reason."""
    max_stalls: int = 3
    """On a cluster: how many starts in a row may end without a new checkpoint."""
    hang_minutes: float = 30.0
    """On a cluster: how long a rank may make no step, save or evaluate before it is taken to hang."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every name in it exists, except those of Megatron's own arguments."""

    path: Path
    cca: CCAConfig
    arguments: dict[str, Any]
    """Megatron's arguments by option name, as the model and megatron sections and the preset give them."""
    data: DataSection
    launch: LaunchSection
    output: Path | None
    zaya: ZayaSettings | None = None
    """ZAYA1's parts; None where the recipe has no such section."""
    overrides: tuple[str, ...] = ()
    """What the user set on the command line."""

    @property
    def checkpoints(self) -> Path | None:
        """Where checkpoints are saved, and resumed from."""
        return self.output and self.output / "checkpoints"

    @property
    def tensorboard(self) -> Path | None:
        """Where TensorBoard logs are written."""
        return self.output and self.output / "tensorboard"

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.launch.nodes * self.launch.gpus_per_node

    def all_arguments(self) -> dict[str, Any]:
        """Megatron's arguments with those that follow from data and output; explicit ones win."""
        implied: dict[str, Any] = {}
        if self.data.prefix is not None:
            implied = megatron_arguments(self.data.tokenizer)
            if not self.arguments.get("mock-data"):
                implied["data-path"] = self.data.prefix
        if self.output is not None:
            implied |= {
                "save": str(self.checkpoints),
                "load": str(self.checkpoints),
                "save-interval": _DEFAULT_SAVE_INTERVAL,
                "exit-signal-handler": True,
                "override-opt-param-scheduler": True,  # going on with more iterations is no mistake
                "tensorboard-dir": str(self.tensorboard),
                "log-throughput": True,
                "log-timers-to-tensorboard": True,  # step time and throughput
            }
        if self.arguments.get("num-query-groups") is not None:
            implied["group-query-attention"] = True
        return implied | self.arguments


def load_recipe(path: str | Path, overrides: list[str]) -> Recipe:
    """Read a recipe and apply ``section.key=value`` overrides (``output=value`` for the output).

    Relative paths in it are relative to the current directory.

    Raises:
        RecipeError: the file is missing or malformed, or a name in it is unknown.
    """
    path = Path(path)
    return dataclasses.replace(_parse(path, resolve(path, overrides)), overrides=tuple(overrides))


def resolve(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The sections of a recipe with those that it extends and the overrides in them, as YAML has them.

    Raises:
        RecipeError: the file is missing or malformed, or an override is.
    """
    content = _read(path)
    for override in overrides:
        _apply(content, override)
    return content


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a recipe, on top of those of the recipes that it extends, of which a later one wins."""
    try:
        content = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path.resolve()}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping with the sections {', '.join(SECTIONS)}")
    extends = content.pop("extends", None)
    bases = extends if isinstance(extends, list) else [] if extends is None else [extends]
    chain = (*extended_by, path.resolve())
    merged: dict[str, Any] = {}
    for base in bases:
        if not isinstance(base, str) or (path.parent / base).resolve() in chain:
            raise RecipeError(
                f"{path}: extends={extends!r}: must be another recipe's path, relative to this one, or a list"
            )
        _put_on_top(merged, _read(path.parent / base, chain))
    _put_on_top(merged, content)
    return merged


def _put_on_top(below: dict[str, Any], content: dict[str, Any]) -> None:
    for section, settings in content.items():
        if isinstance(settings, dict) and isinstance(below.get(section), dict):
            for key, value in settings.items():
                _set(below[section], key, value)
        else:
            below[section] = settings


def _apply(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not section or (dot and not key) or (not dot and section != "output"):
        raise RecipeError(
            f"override {override!r} must be section.key=value (megatron.train-iters=100) or output=PATH"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {override!r}: the value is not valid YAML; text with special characters needs quotes "
            f"of its own: '{name}=\"{text}\"'"
        ) from error
    if not dot:
        content["output"] = value
        return
    target = content.get(section)
    if target is None:
        target = content[section] = {}
    if not isinstance(target, dict):
        raise RecipeError(f"override {override!r}: {section} is not a section")
    _set(target, key, value)


def _set(section: dict[Any, Any], key: Any, value: Any) -> None:
    """Set a value, whichever way the key was spelled before."""
    for spelling in (str(key).replace("_", "-"), str(key).replace("-", "_")):
        section.pop(spelling, None)
    section[key] = value


def _parse(path: Path, content: dict[str, Any]) -> Recipe:
    for name in content:
        if name not in SECTIONS:
            raise RecipeError(unknown_name("section", str(name), list(SECTIONS)))
    model, megatron = _section(content, "model"), _section(content, "megatron")
    cca_settings = {k.replace("-", "_"): v for k, v in _section(content, "cca").items()}
    arguments = _megatron_settings(model, megatron)
    if "packed_zigzag" in cca_settings:
        raise RecipeError("cca.packed_zigzag: follows from how the data is packed here; leave it out")
    try:
        cca = CCAConfig.from_mapping(cca_settings)
        zaya = _zaya_settings(content)
        heads = _preset_heads(model, arguments)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    output = content.get("output")
    if output is not None and not isinstance(output, str):
        raise RecipeError(f"output={output!r}: must be a folder")
    return Recipe(
        path=path,
        cca=cca,
        arguments=heads | arguments,
        data=_dataclass_section(DataSection, "data", content),
        launch=_dataclass_section(LaunchSection, "launch", content),
        output=None if output is None else Path(output),
        zaya=zaya,
    )


def _zaya_settings(content: dict[str, Any]) -> ZayaSettings | None:
    """Of the section ``zaya``, which may be empty, or ``true``; None where there is none, or ``false``."""
    section = content.get("zaya")
    if section is None or section is False:
        return None
    content = {"zaya": {} if section is True else section}
    return ZayaSettings.from_mapping({k.replace("-", "_"): v for k, v in _section(content, "zaya").items()})


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name) or {}
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise RecipeError(f"{name}: must be a mapping of settings to values")
    return section


def _megatron_settings(model: dict[str, Any], megatron: dict[str, Any]) -> dict[str, Any]:
    """Both sections under option names, which must not say the same thing twice."""
    arguments: dict[str, Any] = {}
    for section in (model, megatron):
        for key, value in section.items():
            option = key.replace("_", "-")
            if option == "preset" and section is model:
                continue
            if option.startswith("cca-"):
                setting = option.removeprefix("cca-").replace("-", "_")
                raise RecipeError(f"{option}: is a CCA setting; set cca.{setting}")
            if option == "zaya" or option.startswith("zaya-"):
                raise RecipeError(f"{option}: is a setting of the section zaya")
            if option in arguments:
                raise RecipeError(f"{option} is set twice; keep it in one of model and megatron")
            arguments[option] = value
    return arguments


def _preset_heads(model: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    name = model.get("preset")
    if name is None:
        return {}
    hidden_size = arguments.get("hidden-size", PRESET_HIDDEN_SIZE)
    head_dim = arguments.get("kv-channels", PRESET_HEAD_DIM)
    for option, value in (("hidden-size", hidden_size), ("kv-channels", head_dim)):
        if type(value) is not int:
            raise RecipeError(f"{option}={value!r}: must be a whole number")
    heads, _ = preset(str(name), hidden_size, head_dim)
    settings = {key.replace("_", "-"): value for key, value in heads.items()}
    return {"hidden-size": hidden_size, **settings}


def _dataclass_section(kind: type[Any], name: str, content: Mapping[str, Any]) -> Any:
    section = {key.replace("-", "_"): value for key, value in _section(content, name).items()}
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in list(section.items()):
        if key not in fields:
            raise RecipeError(unknown_name(f"{name} setting", key, list(fields)))
        if value is None:  # as if it were not there
            del section[key]
        elif key == "inputs":
            section[key] = [value] if isinstance(value, str) else value
            if not isinstance(section[key], list) or not all(isinstance(item, str) for item in section[key]):
                raise RecipeError(f"data.inputs={value!r}: must be a path or a list of paths")
        elif fields[key].type is int and (type(value) is not int or value < 1):
            raise RecipeError(f"{name}.{key}={value!r}: must be a whole number of at least 1")
        elif fields[key].type is float:
            if type(value) not in (int, float) or not value > 0:
                raise RecipeError(f"{name}.{key}={value!r}: must be a number above 0")
        elif fields[key].type is not int and not isinstance(value, str):
            raise RecipeError(f"{name}.{key}={value!r}: must be text")
    return kind(**section)
