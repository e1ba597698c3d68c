"""One ``cca-megatron train`` from start to end: check, prepare data, train, report."""

import os
import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.progress import DownloadColumn

from cca_megatron.data.prepare import Manifest, dataset_files, prepare, read_manifest
from cca_megatron.doctor import missing_build_tools
from cca_megatron.terminal import counted_bar
from cca_megatron.training import expert_shares, launch, report
from cca_megatron.training.checkpoint import latest_iteration
from cca_megatron.training.checkpoint_repair import repair
from cca_megatron.training.command import Command, Rendezvous, build_command, check_data, program
from cca_megatron.training.device import Device, describe, select_device
from cca_megatron.training.progress import LiveBar
from cca_megatron.training.recipe import Recipe, RecipeError, load_recipe


def prepare_command(recipe_path: Path, overrides: list[str]) -> tuple[Command, Device]:
    """Read and check a recipe for this machine.

    Raises:
        RecipeError: it cannot run.
        ValueError: ``CCA_DEVICE`` is wrong.
    """
    recipe = load_recipe(recipe_path, overrides)
    device = load_megatron_here()
    command = build_command(recipe, device)
    if command.args.cca_recompute_mix and (missing := missing_build_tools()):
        raise RecipeError(
            f"cca.recompute_mix=true: Megatron compiles a helper for it, and {' and '.join(missing)} "
            "cannot be found on the PATH; install it, or cca.recompute_mix=false works"
        )
    return command, device


def load_megatron_here() -> Device:
    """Import Megatron for the device of this machine, and say which it is.

    Raises:
        RecipeError: it cannot be imported.
        ValueError: ``CCA_DEVICE`` is wrong.
    """
    device = select_device()
    load_megatron(device)
    return device


def load_megatron(device: Device) -> None:
    """Import Megatron for this device.

    Raises:
        RecipeError: it cannot be imported, as with a Transformer Engine that is broken.
    """
    try:
        if device == "cpu":
            from cca_megatron.training import cpu_backend

            cpu_backend.install()
        import megatron.core.transformer  # noqa: F401
    except Exception as error:  # whatever the broken package raises
        raise RecipeError(
            f"Megatron cannot be imported: {error}. cca-megatron doctor says what is wrong"
        ) from error


def check_machine(recipe: Recipe, device: Device, nodes: int = 1) -> None:
    """Raise RecipeError if this machine, as one of as many nodes, cannot run the recipe."""
    if recipe.launch.nodes > nodes:
        raise RecipeError(
            f"launch.nodes={recipe.launch.nodes}: this command starts processes on one machine; "
            "launch.nodes=1 works. cca-megatron submit, launch/torchrun.sh and launch/mpirun.sh train on "
            "several, and --print-args shows what to start on each"
        )
    if device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        if recipe.launch.gpus_per_node > gpus:
            raise RecipeError(
                f"launch.gpus_per_node={recipe.launch.gpus_per_node}: this machine has {gpus}; "
                f"launch.gpus_per_node={gpus} works if the parallel sizes fit it"
            )


def train(command: Command, device: Device, console: Console, rendezvous: Rendezvous | None = None) -> bool:
    """Prepare the data if it is missing, train, and write the loss curve and a summary.

    Of several machines all train, and node 0 does the rest. The others find its data: torchrun does not
    start training before node 0 is ready.

    Returns:
        Whether it went to its end, or was stopped after saving a checkpoint.

    Raises:
        RecipeError: the data is missing, or does not fit the recipe.
        DataError: the data cannot be prepared.
        TrainingError: the training processes failed.
    """
    recipe = command.recipe
    console.print(describe(device), soft_wrap=True)
    _show_paths(recipe, console)
    first = rendezvous is None or rendezvous.node_rank == 0
    if first:
        prepare_start(command, console)
    total = command.args.train_iters
    reached = None if recipe.checkpoints is None else latest_iteration(recipe.checkpoints)
    if total is not None and reached is not None and reached >= total:
        console.print(
            f"all {total} iterations are done: megatron.train-iters={2 * total} would go on from there, "
            "output=FOLDER would start anew"
        )
    elif _run(command, device, console, rendezvous) == "stopped":
        return False
    if first:
        _report(command, console)
    return True


def prepare_start(command: Command, console: Console) -> None:
    """Make sure that the data is there and that the checkpoint to load is whole; once for all machines.

    Raises:
        RecipeError: the data is missing, or does not fit the recipe.
        DataError: the data cannot be prepared.
    """
    recipe = command.recipe
    ensure_data(recipe, console)
    check_data(command)
    if recipe.checkpoints is not None:
        for warning in repair(recipe.checkpoints, command.args.ckpt_format):
            console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _show_paths(recipe: Recipe, console: Console) -> None:
    for name, path in (("data", recipe.data.prefix), ("output", recipe.output)):
        if path is not None:
            console.print(f"{name}: {Path(path).resolve()}", markup=False, soft_wrap=True)


def ensure_data(recipe: Recipe, console: Console) -> None:
    """Prepare the data if it is missing.

    Raises:
        RecipeError: what is there was made from something else.
        DataError: the data cannot be prepared.
    """
    data = recipe.data
    if data.prefix is None:
        return
    if not dataset_files(data.prefix)[1].exists():
        if data.inputs:
            prepare_data(console, data.inputs, data.prefix, data.tokenizer, text_key=data.text_key)
        return
    manifest = read_manifest(data.prefix)
    if manifest is None:  # made by another tool
        return
    if _resolved(manifest.tokenizer) != _resolved(data.tokenizer):
        raise RecipeError(
            f"data.prefix={data.prefix} was made with tokenizer {manifest.tokenizer!r}, not with "
            f"{data.tokenizer!r}; data.tokenizer={manifest.tokenizer} or another data.prefix works"
        )
    if not data.inputs:
        return
    found, wanted = (
        ([os.path.normpath(name) for name in source.inputs], source.text_key) for source in (manifest, data)
    )
    if found != wanted:
        raise RecipeError(
            f"data.prefix={data.prefix} was made from {found[0]} with text_key {found[1]!r}, not from "
            f"{wanted[0]} with {wanted[1]!r}; choose another data.prefix"
        )


def _resolved(tokenizer: str) -> str:
    """The name of a tokenizer, with the path in it, if there is one, made absolute."""
    kind, _, name = tokenizer.partition(":")
    return f"{kind}:{Path(name).resolve()}" if name and Path(name).exists() else tokenizer


def prepare_data(
    console: Console, inputs: list[str], prefix: str, tokenizer: str, **options: object
) -> Manifest:
    """Make a dataset with a progress bar, and say what came of it."""
    with counted_bar(console, "preparing data", DownloadColumn()) as progress:
        manifest = prepare(inputs, prefix, tokenizer, progress=progress, **options)  # type: ignore[arg-type]
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
    plural = "" if manifest.documents == 1 else "s"
    console.print(
        f"dataset: {manifest.documents:,} document{plural}, {manifest.tokens:,} tokens in "
        f"{Path(prefix).resolve()}.bin" + (f" (skipped: {skipped})" if skipped else ""),
        markup=False,
        soft_wrap=True,
    )
    return manifest


def _run(command: Command, device: Device, console: Console, rendezvous: Rendezvous | None) -> launch.Outcome:
    recipe, args = command.recipe, command.args
    log = None
    if recipe.output is not None:
        node = "" if rendezvous is None else f"-node{rendezvous.node_rank}"
        log = recipe.output / "logs" / time.strftime(f"train-%Y%m%d-%H%M%S{node}.log")
        console.print(f"log: {log.resolve()}", markup=False, soft_wrap=True)
    if not console.is_terminal:

        def show(line: str) -> None:
            print(line, flush=True)

        outcome = launch.run(command, device, log, show, show, rendezvous)
    else:
        bar = LiveBar(console, args.train_iters or 0, args.global_batch_size * args.seq_length)
        with bar.shown():
            outcome = launch.run(command, device, log, bar.feed, bar.note, rendezvous)
            if outcome == "finished":
                bar.finish()
    if outcome != "finished":
        reached = None if recipe.checkpoints is None else latest_iteration(recipe.checkpoints)
        saved = "" if outcome == "saved" else " without saving a checkpoint"
        again = "starts anew" if reached is None else f"goes on from the checkpoint of iteration {reached}"
        console.print(f"stopped{saved}; the same command {again}", soft_wrap=True)
    return outcome


def _report(command: Command, console: Console) -> None:
    recipe = command.recipe
    if recipe.output is None or recipe.tensorboard is None:
        return
    curves, bigram = report.read_curves(recipe.tensorboard), report.bigram_of(command)
    lines = report.summary(command, curves, bigram)
    if curves.training:
        picture = recipe.output / "loss.png"
        report.plot_losses(curves, bigram, picture)
        lines.append(("loss curve", str(picture.resolve())))
        lines.append(("TensorBoard", f"{program('tensorboard')} --logdir {recipe.tensorboard}"))
    shares = expert_shares.read_shares(recipe.tensorboard)
    if shares:
        picture = recipe.output / "experts.png"
        expert_shares.plot_shares(shares, command.args.num_experts, picture)
        lines.append(("experts", expert_shares.describe_shares(shares, command.args.num_experts)))
        lines.append(("", str(picture.resolve())))
    if recipe.launch.nodes == 1:
        lines += [
            ("next", f"train longer: {_again(recipe, 'megatron.train-iters=N')}"),
            ("", f"try a variant: {_again(recipe, 'cca.temperature=exp', 'output=runs/exp')}"),
        ]
    console.print()
    for name, text in lines:
        console.print(f"{name:<16}{text}", markup=False, soft_wrap=True)


def _again(recipe: Recipe, *changes: str) -> str:
    """The command of this run with other settings."""
    changed = {change.partition("=")[0] for change in changes}
    kept = [o for o in recipe.overrides if o.partition("=")[0].replace("_", "-") not in changed]
    return shlex.join([program("cca-megatron"), "train", str(recipe.path), *kept, *changes])
