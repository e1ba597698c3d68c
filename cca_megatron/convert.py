"""``cca-megatron convert``: ZAYA1 checkpoints in and out of Hugging Face's format."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import DownloadColumn

from cca_megatron.terminal import console, counted_bar, fail

if TYPE_CHECKING:
    import torch

    from cca_megatron.config import CCAConfig
    from cca_megatron.hf.convert import Conversion
    from cca_megatron.training.device import Device

app = typer.Typer(no_args_is_help=True, help="Convert ZAYA1 checkpoints from and to Hugging Face's format.")

_Target = Annotated[Path, typer.Argument(metavar="DST", help="A new folder; it appears when it is complete.")]
_Verify = Annotated[
    bool, typer.Option("--verify", help="Read every tensor back and compare it with its source.")
]


@app.command("hf-to-megatron")
def from_hf(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Folder with config.json and *.safetensors, of either release."),
    ],
    target: _Target,
    verify: _Verify = False,
) -> None:
    """Make a Megatron checkpoint that any TP, PP and EP loads.

    DST also gets the model as a recipe to extend (model.yaml), the tokenizer's files, and a manifest.
    Unknown, missing or misshapen tensors are named before anything is written. A tensor is in memory at a
    time.
    """
    from cca_megatron.training.session import load_megatron_here

    with _failures(), counted_bar(console, "converting", DownloadColumn()) as report:
        arguments = partial(_arguments, load_megatron_here())
        from cca_megatron.hf.convert import hf_to_megatron

        conversion = hf_to_megatron(source, target, arguments, verify, report)
    _show(conversion, target)
    console.print(
        f"train it: a recipe with  extends: {target.resolve() / 'model.yaml'}  and under megatron:\n"
        f"  pretrained-checkpoint: {target.resolve()}",
        markup=False,
        soft_wrap=True,
    )


@app.command("megatron-to-hf")
def to_hf(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A checkpoint folder of Megatron, saved in any layout.")
    ],
    target: _Target,
    step: Annotated[int | None, typer.Option(help="Iteration to convert; by default the latest.")] = None,
    verify: _Verify = False,
) -> None:
    """Make a folder that transformers, vLLM and SGLang load.

    Shards hold 2 GB, or one tensor that is larger; no more than one is in memory.
    """
    from cca_megatron.training.session import load_megatron_here

    with _failures(), counted_bar(console, "converting", DownloadColumn()) as report:
        load_megatron_here()
        from cca_megatron.hf.convert import megatron_to_hf
        from cca_megatron.training.arguments import cca_config_from_args
        from cca_megatron.training.checkpoint import open_checkpoint

        directory, args = open_checkpoint(source, step)
        cca = cca_config_from_args(args)
        conversion = megatron_to_hf(directory, target, vars(args), cca, verify, report)
    _show(conversion, target)


def _arguments(
    device: "Device",
    settings: Mapping[str, Any],
    cca: "CCAConfig",
    dtype: "torch.dtype",
    tokenizer: Path | None,
) -> Namespace:
    """Megatron's arguments of a run of this model, checked, as its checkpoints carry them."""
    import torch

    from cca_megatron.hf.config import zaya_settings
    from cca_megatron.training.command import build_command
    from cca_megatron.training.recipe import DataSection, LaunchSection, Recipe

    arguments = {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if name != "zaya" and not name.startswith("zaya_")
    }
    arguments |= {
        "seq-length": min(4096, settings["max_position_embeddings"]),
        "micro-batch-size": 1,
        "train-iters": 1,
        "lr": 1e-5,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tokenizer-type": "NullTokenizer" if tokenizer is None else "HuggingFaceTokenizer",
    }
    if tokenizer is not None:
        arguments["tokenizer-model"] = str(tokenizer)
    recipe = Recipe(
        path=Path("the converted model"),
        cca=cca,
        arguments=arguments,
        data=DataSection(),
        launch=LaunchSection(),
        output=None,
        zaya=zaya_settings(settings),
    )
    return build_command(recipe, device).args


@contextmanager
def _failures() -> Iterator[None]:
    """One line instead of a traceback for what a user can mend."""
    from cca_megatron.training.recipe import RecipeError

    try:
        yield
    except (RecipeError, OSError, ValueError) as error:
        fail(error)
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        console.print("stopped; nothing was written")
        raise typer.Exit(130) from None


def _is_interrupt(error: BaseException) -> bool:
    """Ctrl-C, which torch.distributed.checkpoint wraps in an exception of its own, by rank."""
    wrapped = getattr(error, "failures", {}).values()
    return isinstance(error, KeyboardInterrupt) or any(isinstance(e, KeyboardInterrupt) for e, _ in wrapped)


def _show(conversion: "Conversion", target: Path) -> None:
    verified = ", every one read back and equal" if conversion.verified else ""
    console.print(
        f"{conversion.tensors:,} tensors, {conversion.parameters:,} parameters, "
        f"{conversion.bytes / 1e9:.2f} GB ({conversion.style} names){verified}\n{target.resolve()}",
        markup=False,
        soft_wrap=True,
    )
