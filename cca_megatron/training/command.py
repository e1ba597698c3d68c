"""From a recipe to the command line of our entry, checked before anything starts."""

import argparse
import contextlib
import importlib.util
import io
import os
import shlex
import shutil
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from cca_megatron.config import CCAConfig, own_problems, unknown_name
from cca_megatron.data.prepare import dataset_files
from cca_megatron.training.device import Device, choose_connections
from cca_megatron.training.recipe import Recipe, RecipeError
from cca_megatron.zaya.settings import ZayaSettings

MODULE = "cca_megatron.training.pretrain"
_FP32_RESIDUAL = "--fp32-residual-connection"


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of a run meet, and which of them this is."""

    host: str
    """Of node 0, as all nodes reach it."""
    port: int
    node_rank: int
    patience: int
    """Seconds that a node waits for the others."""

    def options(self, nodes: int) -> list[str]:
        """Of torchrun."""
        return [
            f"--nnodes={nodes}",
            f"--node-rank={self.node_rank}",
            f"--master-addr={self.host}",
            f"--master-port={self.port}",
            f"--rdzv-conf=timeout={self.patience}",
        ]


@dataclass(frozen=True)
class Command:
    """A checked run: what torchrun starts, and the arguments as Megatron will see them."""

    recipe: Recipe
    argv: list[str]
    """Arguments of the entry."""
    args: Namespace
    """The same, parsed and completed by Megatron."""

    def torchrun(self, rendezvous: Rendezvous | None = None) -> list[str]:
        """The process to start on this machine; without a rendezvous it is the only one."""
        where = ["--standalone"] if rendezvous is None else rendezvous.options(self.recipe.launch.nodes)
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *where,
            f"--nproc-per-node={self.recipe.launch.gpus_per_node}",
            "--module",
            MODULE,
            *self.argv,
        ]

    def text(self) -> str:
        """The equivalent command to type, one option a line; what must come first stands before it."""
        launch, data = self.recipe.launch, self.recipe.data
        head = [program("torchrun"), f"--nproc-per-node={launch.gpus_per_node}"]
        if launch.nodes > 1:
            head += [f"--nnodes={launch.nodes}", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:PORT"]
        lines = [" ".join([*head, "-m", MODULE])]
        for token in self.argv:
            if token.startswith("--"):
                name, equals, value = token.partition("=")
                lines.append(f"    {name}{equals}{shlex.quote(value) if equals else ''}")
            else:
                lines[-1] += " " + shlex.quote(token)
        first = ""
        if data.prefix is not None and data.inputs and not dataset_files(data.prefix)[1].exists():
            prepare = [program("cca-megatron"), "data", "prepare", *data.inputs, "--output", data.prefix]
            prepare += ["--tokenizer", data.tokenizer, "--text-key", data.text_key]
            first = f"# first, as the dataset is not there yet: {shlex.join(prepare)}\n"
        return first + " \\\n".join(lines)


def program(name: str) -> str:
    """How to start a program of this environment from here, whether or not the environment is activated."""
    if shutil.which(name):
        return name
    return os.path.relpath(Path(sys.executable).parent / name)


class _Parser(ArgumentParser):
    """Raises instead of printing Megatron's usage, which is longer than any screen."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"Megatron refuses an argument: {message}")


def build_command(recipe: Recipe, device: Device) -> Command:
    """Translate a recipe and check it as far as possible without starting processes.

    Checked are the names of all arguments, the CCA settings against Megatron's, and Megatron's own
    rules for a run of that size. Whether the data is there is checked by :func:`check_data`.

    Raises:
        RecipeError: one message with everything that was found wrong.
    """
    from cca_megatron.training.argument_rules import argument_problems
    from cca_megatron.training.checkpoint import checkpoint_problems

    _refuse(recipe, [f"cca.{problem}" for problem in own_problems(recipe.cca)])
    if recipe.output is not None and recipe.output.exists() and not recipe.output.is_dir():
        raise RecipeError(f"output={recipe.output}: is a file; choose a folder")
    parser = _parser(device)
    argv = _argv(recipe, parser, device)
    args = parser.parse_args(argv)
    # What Megatron's own parse_args adds from the environment of a worker.
    args.rank, args.world_size = 0, recipe.world_size
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    _refuse(recipe, [*argument_problems(args), *checkpoint_problems(args)])
    _validate(recipe, args)
    return Command(recipe, argv, args)


def check_data(command: Command) -> None:
    """Raise RecipeError if a dataset that the arguments name is not there."""
    args = command.args
    if args.mock_data:
        return
    paths = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    prefixes = [p for group in paths if group for p in group if not _is_number(p)]
    if args.sft:
        _check_conversations(prefixes)
        return
    if not prefixes and args.data_args_path is None and args.per_split_data_args_path is None:
        raise RecipeError("no data: set data.prefix (and data.inputs), or megatron.data-path")
    for prefix in prefixes:
        missing = [str(f.resolve()) for f in dataset_files(prefix)[:2] if not f.is_file()]
        if missing:
            raise RecipeError(
                f"no dataset at {prefix}: {' and '.join(missing)} missing. Set data.inputs in the recipe, "
                f"or run: cca-megatron data prepare INPUT... --output {prefix} --tokenizer "
                f"{command.recipe.data.tokenizer}"
            )


def _check_conversations(paths: list[str]) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise RecipeError("sft: Megatron reads conversations with the package datasets; pip install datasets")
    missing = [str(Path(path).resolve()) for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise RecipeError(
            f"sft: {' and '.join(missing) or 'data-path'} missing; megatron.data-path=FILE.jsonl, a list of "
            'messages ("role", "content") under the key "messages" in each line, works'
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser(device: Device) -> _Parser:
    from megatron.training.arguments import add_megatron_arguments

    from cca_megatron.training.arguments import add_arguments

    parser = _Parser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return add_arguments(device)(parser)  # type: ignore[return-value]


def _argv(recipe: Recipe, parser: ArgumentParser, device: Device) -> list[str]:
    options = {o: action for action in parser._actions for o in action.option_strings}
    by_destination = {action.dest: action for action in parser._actions}
    argv = []
    for name, value in recipe.all_arguments().items():
        option = f"--{name}"
        if option not in options and f"--{name.replace('-', '_')}" in options:
            option = f"--{name.replace('-', '_')}"
        if option not in options and name.replace("-", "_") in by_destination:
            action = by_destination[name.replace("-", "_")]
            argv += _by_destination(recipe, name, action, value)
        elif option not in options:
            known = [o.removeprefix("--") for o in options if o.startswith("--")]
            raise RecipeError(f"{recipe.path}: {unknown_name('Megatron argument', name, known)}")
        else:
            argv += _tokens(recipe, option, options[option], value, device)
    if not {"--bf16", "--fp16"} & set(argv) and _FP32_RESIDUAL in argv:
        argv.remove(_FP32_RESIDUAL)  # as it is then anyway; Megatron refuses to be told
    argv += _own_argv("cca", recipe.cca)
    return argv if recipe.zaya is None else [*argv, "--zaya", *_own_argv("zaya", recipe.zaya)]


def _tokens(recipe: Recipe, option: str, action: argparse.Action, value: Any, device: Device) -> list[str]:
    """One setting as command-line tokens."""
    if value is None:
        return []
    if action.nargs == 0:  # a flag
        if option == "--bf16" and value == "auto":
            value = _bf16_is_faster(device)
        if not isinstance(value, bool):
            raise RecipeError(f"{recipe.path}: {option[2:]}={value!r}: is a flag; use true or false")
        if isinstance(action, argparse.BooleanOptionalAction) and not value:
            return [option.replace("--", "--no-", 1)]
        return [option] if value else []
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict) or any(isinstance(item, dict | list) for item in values):
        raise RecipeError(f"{recipe.path}: {option[2:]}={value!r}: must be a value or a list of values")
    if isinstance(value, list) and action.nargs is None:
        # Where Megatron takes one value that is a list, it reads Python: moe-layer-freq, window-size.
        is_tuple = getattr(action.type, "__name__", "") == "tuple_type"
        return [option, repr(tuple(value) if is_tuple else value).replace(" ", "")]
    return _option(option, values)


def _option(name: str, values: Iterable[Any]) -> list[str]:
    """An option and its values; one that begins with a minus would be taken for an option of its own."""
    words = [str(value) for value in values]
    if len(words) == 1 and words[0].startswith("-"):
        return [f"{name}={words[0]}"]
    return [name, *words]


def _by_destination(recipe: Recipe, name: str, action: argparse.Action, value: Any) -> list[str]:
    """A setting named as the attribute that a flag turns off: ``add_bias_linear: false``."""
    if not isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
        option = action.option_strings[-1]
        return [] if value is None else _option(option, [value])
    if not isinstance(value, bool):
        raise RecipeError(f"{recipe.path}: {name}={value!r}: must be true or false")
    return [action.option_strings[0]] if value == action.const else []


def _own_argv(prefix: str, settings: CCAConfig | ZayaSettings) -> list[str]:
    """The CCA or ZAYA settings that are not the default, as ``--cca-*`` or ``--zaya-*`` options."""
    argv = []
    for setting in fields(settings):
        value, option = getattr(settings, setting.name), setting.name.replace("_", "-")
        if value == setting.default:
            continue
        if isinstance(value, bool):
            argv.append(f"--{prefix}-{option}" if value else f"--no-{prefix}-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            argv += _option(f"--{prefix}-{option}", values)
    return argv


def _bf16_is_faster(device: Device) -> bool:
    """Whether the machine multiplies bf16 matrices in hardware."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _refuse(recipe: Recipe, problems: list[str]) -> None:
    if problems:
        raise RecipeError(f"{recipe.path} cannot run:\n  - " + "\n  - ".join(problems))


def _validate(recipe: Recipe, args: Namespace) -> None:
    """Megatron's own checks, which it would otherwise make in every process."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import validate_args

    choose_connections(args.use_megatron_fsdp or args.use_torch_fsdp2)
    with _megatron_refusals(recipe):
        validate_args(args)
        core_transformer_config_from_args(args)


@contextlib.contextmanager
def _megatron_refusals(recipe: Recipe) -> Iterator[None]:
    """Turn a failed assertion of Megatron into a message; it often has none but its own source."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = str(error) or f"the rule `{frame.line}` does not hold"
        raise RecipeError(
            f"{recipe.path} cannot run: Megatron says: {reason} ({Path(frame.filename).name}, "
            f"line {frame.lineno})"
        ) from error
    except SystemExit as error:
        raise RecipeError(f"{recipe.path} cannot run: Megatron stops at these arguments") from error
