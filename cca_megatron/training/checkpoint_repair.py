"""A checkpoint that is not whole is never the one that is loaded."""

import os
import re
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from cca_megatron.training.checkpoint import RELEASE, TRACKER, iteration_directory, latest_iteration

_DAMAGE = (Exception, CheckpointException)
"""Whatever half a file makes JSON, pickle and PyTorch raise; PyTorch's own is no ``Exception``."""
_ITERATION = re.compile(r"iter_(\d{7,})")


def broken_part(directory: Path, checkpoint_format: str = "torch_dist") -> str | None:
    """What is missing or cut short in the folder of one iteration; None if it is whole.

    The index of a distributed checkpoint says how long each file must be, so this reads the index and no
    weights. Of Megatron's older format, without an index, nothing is known but that it is there.

    Args:
        directory: of the iteration.
        checkpoint_format: Megatron's ``--ckpt-format``.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import FileSystemReader

    if not directory.is_dir() or not any(directory.iterdir()):
        return f"{directory.name}: there is nothing"
    if any(directory.glob("mp_rank_*")):
        return None
    for name in (".metadata", "metadata.json") if checkpoint_format == "torch_dist" else (".metadata",):
        if not (directory / name).is_file():
            return f"{directory.name}/{name} is missing"
    try:
        stored = FileSystemReader(directory).read_metadata().storage_data
    except _DAMAGE as error:
        return f"{directory.name}/.metadata cannot be read ({type(error).__name__})"
    sizes: dict[str, int] = {}
    for part in stored.values():
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sorted(sizes.items()):
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found is None or found < size:
            has = "is missing" if found is None else f"has {found:,} bytes"
            return f"{directory.name}/{name} {has} of {size:,}"
    if checkpoint_format == "torch_dist":
        try:
            dist_checkpointing.load_common_state_dict(str(directory))
        except _DAMAGE as error:
            return f"{directory.name}: what all ranks share cannot be read ({type(error).__name__})"
    return None


def repair(checkpoints: Path, checkpoint_format: str, distrusted: int | None = None) -> list[str]:
    """Make Megatron's tracker name the newest whole checkpoint, if the one it names is not.

    What is broken is kept, under another name. A checkpoint newer than the tracker's was not finished and
    is left to be overwritten.

    Args:
        checkpoints: where Megatron saves.
        checkpoint_format: Megatron's ``--ckpt-format``.
        distrusted: an iteration that could not be loaded, whatever its index says.

    Returns:
        Warnings: what was found, and what is done instead.
    """
    tracker = checkpoints / TRACKER
    if not tracker.is_file() or tracker.read_text().strip() == RELEASE:
        return []
    named = latest_iteration(checkpoints)
    warnings = [] if named is not None else [f"{TRACKER} is damaged"]
    for iteration in sorted(_iterations(checkpoints, named), reverse=True):
        directory = iteration_directory(checkpoints, iteration)
        problem = broken_part(directory, checkpoint_format)
        if problem is None and iteration == distrusted:
            problem = f"{directory.name} could not be loaded"
        if problem is None:
            break
        warnings.append(f"checkpoint of iteration {iteration} is damaged: {problem}")
        _set_aside(directory)
    else:
        tracker.unlink()
        return [*warnings, "there is no whole checkpoint: training starts anew"]
    if iteration != named:
        _write_tracker(checkpoints, iteration)
        warnings.append(f"going on from the checkpoint of iteration {iteration} instead")
    return warnings


def _iterations(checkpoints: Path, named: int | None) -> set[int]:
    """Those that there are up to the one that is named, and that one."""
    matches = [_ITERATION.fullmatch(folder.name) for folder in checkpoints.iterdir()]
    found = {int(match[1]) for match in matches if match}
    return found if named is None else {i for i in found if i <= named} | {named}


def _set_aside(directory: Path) -> None:
    if not directory.is_dir():
        return
    number = 1
    while (aside := directory.with_name(f"damaged-{directory.name}-{number}")).exists():
        number += 1
    directory.rename(aside)


def _write_tracker(checkpoints: Path, iteration: int) -> None:
    part = checkpoints / f".{TRACKER}.{os.getpid()}"
    part.write_text(str(iteration))
    part.replace(checkpoints / TRACKER)
