"""The share of the tokens that each class of ZAYA's routers gets: logged while training, drawn after it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_TENSOR, _LARGEST, _SKIPPED = "expert share", "expert load/largest", "expert load/skipped"
_PANELS = 8


def finalize_and_log(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Finish the gradients, update the balancing biases, and log the shares that they were updated by.

    TensorBoard gets the largest share of any expert, as a multiple of an even one, and the share of tokens
    that skip, both over all layers; and every ``log_interval`` iterations all shares, [layers, classes].
    """
    from megatron.training import get_args, get_tensorboard_writer

    from cca_megatron._compat import parallel_state
    from cca_megatron.zaya.balancing import finalize_and_balance, routers_of

    finalize_and_balance(model, *args, **kwargs)
    settings = get_args()
    iteration = settings.curr_iteration + 1
    if not settings.tensorboard_dir or iteration % settings.tensorboard_log_interval:
        return
    classes = settings.num_experts + settings.zaya_skip_class
    shares = torch.zeros(settings.num_layers, classes, device=torch.cuda.current_device())
    for router in routers_of(model):
        assert router.class_share is not None
        shares[router.layer_number - 1] = router.class_share
    dist.all_reduce(shares, group=parallel_state.get_pipeline_model_parallel_group())
    writer = get_tensorboard_writer()
    if writer is None:
        return
    experts = shares[:, : settings.num_experts]
    writer.add_scalar(_LARGEST, experts.max() * settings.num_experts, iteration)
    writer.add_scalar(_SKIPPED, 1 - experts.sum() / (experts.sum(-1) > 0).sum(), iteration)
    if iteration % settings.log_interval == 0:
        writer.add_tensor(_TENSOR, shares.cpu(), iteration)


def read_shares(tensorboard: Path) -> dict[int, np.ndarray]:
    """[layers, classes] by iteration, from TensorBoard logs; a resumed run's values win."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    shares: dict[int, np.ndarray] = {}
    for file in sorted(tensorboard.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"tensors": 0})
        events.Reload()
        if _TENSOR in events.Tags()["tensors"]:
            shares |= {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(_TENSOR)}
    return dict(sorted(shares.items()))


def describe_shares(shares: dict[int, np.ndarray], num_experts: int) -> str:
    """The last quarter of a run in one line."""
    late = np.mean(list(shares.values())[-max(1, len(shares) // 4) :], axis=0)
    experts = late[late.sum(-1) > 0][:, :num_experts]
    return (
        f"shares of tokens from {experts.min():.1%} to {experts.max():.1%} (even: {1 / num_experts:.1%}), "
        f"skipped {1 - experts.sum(-1).mean():.1%}; means of the last quarter"
    )


def plot_shares(shares: dict[int, np.ndarray], num_experts: int, path: Path) -> None:
    """One panel per layer, or of a deep model eight of them: each expert's share over the iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, values = list(shares), np.stack(list(shares.values()))
    layers = np.flatnonzero(values.sum((0, 2)))
    shown = layers[np.linspace(0, len(layers) - 1, min(_PANELS, len(layers))).round().astype(int)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(2.4 * columns + 1, 2.2 * rows + 0.6), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, layer in zip(panels.flat, shown, strict=False):
        panel.plot(steps, 100 * values[:, layer, :num_experts], linewidth=0.8)
        if values.shape[-1] > num_experts:
            panel.plot(steps, 100 * values[:, layer, num_experts], linewidth=1, color="0.4", linestyle=":")
        panel.axhline(100 / num_experts, color="black", linestyle="--", linewidth=0.8)
        panel.set_title(f"layer {layer + 1}", fontsize=9)
        panel.grid(alpha=0.3)
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("share of the tokens (%)", fontsize=9)
    figure.suptitle("each expert (dashed: an even share, dotted: skipped)", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
