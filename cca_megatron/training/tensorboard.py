"""Values for TensorBoard, and Weights & Biases beside it: at the steps and on the rank Megatron writes."""

from typing import Any


def logged_iteration(args: Any) -> int | None:
    """The iteration that is being trained, if TensorBoard gets its values; None at all other steps.

    The same on every rank, so that ranks can gather values for the one that writes.
    """
    iteration = args.curr_iteration + 1
    return iteration if args.tensorboard_dir and iteration % args.tensorboard_log_interval == 0 else None


def write_scalars(values: dict[str, float], iteration: int) -> None:
    """Write values by tag, if this is the rank that writes: the last one."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is None or not values:
        return
    for tag, value in values.items():
        writer.add_scalar(tag, value, iteration)
    if wandb:
        wandb.log(values, iteration)
