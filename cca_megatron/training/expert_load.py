"""The share of the tokens that each expert gets: counted and logged while training, drawn after it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cca_megatron._compat import TopKRouter
from cca_megatron.training.arguments import zaya_settings_from_args
from cca_megatron.training.tensorboard import logged_iteration
from cca_megatron.zaya.router import ZayaRouter

_TENSOR = "expert share"
_PANELS = 8


def num_classes(settings: Any) -> int:
    """What the routers of these arguments choose among: the experts, and ZAYA's class that skips them."""
    zaya = zaya_settings_from_args(settings)
    skips = zaya is not None and zaya.has_mlp_router and zaya.skip_class
    return (settings.num_experts or 0) + skips


def count_tokens(model: list[Any]) -> list[Any]:
    """Let Megatron's routers count what they choose at the steps that are logged; ZAYA's count by themselves.

    A hook for Megatron's ``pre_wrap_hooks``: it takes the chunks of a stage, and returns them. With CUDA
    graphs nothing is counted: this would run when they are captured, and not when they are replayed.
    """
    for chunk in model:
        if chunk.config.cuda_graph_impl != "none":
            continue
        for router in chunk.modules():
            if isinstance(router, TopKRouter) and not isinstance(router, ZayaRouter):
                router.register_forward_hook(_count)
    return model


def _count(router: Any, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
    from megatron.training import get_args

    # Once per token: neither in evaluation nor in the first of two passes of recomputation.
    if router.training and torch.is_grad_enabled() and logged_iteration(get_args()) is not None:
        counts = outputs[1].sum(0)
        earlier = getattr(router, "counts_for_log", None)
        router.counts_for_log = counts if earlier is None else earlier + counts


def shares_of(routers: list[TopKRouter]) -> list[Tensor]:
    """For each router [classes], the share of the tokens of the global batch that each class got.

    Where a token visits several experts, of its visits. All ranks that hold these layers must call it
    together: the counts of Megatron's routers are summed over them, in one all-reduce.
    """
    counted = iter(_counted([router for router in routers if not isinstance(router, ZayaRouter)]))
    shares = [router.class_share if isinstance(router, ZayaRouter) else next(counted) for router in routers]
    return [share for share in shares if share is not None]


def _counted(routers: list[Any]) -> Tensor:
    """[routers, experts]; starts counting anew."""
    device = torch.cuda.current_device()
    counts = torch.zeros(len(routers), routers[0].num_experts if routers else 0, device=device)
    for row, router in zip(counts, routers, strict=True):
        if getattr(router, "counts_for_log", None) is not None:
            row += router.counts_for_log
            router.counts_for_log = None
    if routers:
        dist.all_reduce(counts, group=routers[0].tp_dp_cp_group)
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def write_shares(shares: Tensor, iteration: int) -> None:
    """Write [layers, classes] for :func:`read_shares`, if this is the rank that writes and there are any."""
    from megatron.training import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is not None and shares.any():
        writer.add_tensor(_TENSOR, shares, iteration)


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
    skipped = f", skipped {1 - experts.sum(-1).mean():.1%}" if late.shape[-1] > num_experts else ""
    return (
        f"shares of tokens from {experts.min():.1%} to {experts.max():.1%} (even: {1 / num_experts:.1%})"
        f"{skipped}; means of the last quarter"
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
    dotted = ", dotted: skipped" if values.shape[-1] > num_experts else ""
    figure.suptitle(f"each expert (dashed: an even share{dotted})", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
