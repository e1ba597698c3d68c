"""The share of the tokens that each expert got, read from TensorBoard's logs, told and drawn."""

from pathlib import Path

import numpy as np

TENSOR = "expert share"
"""Its name in TensorBoard."""
_PANELS = 8


def read_shares(tensorboard: Path) -> dict[int, np.ndarray]:
    """[layers, classes] by iteration, from TensorBoard logs; a resumed run's values win."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    shares: dict[int, np.ndarray] = {}
    for file in sorted(tensorboard.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"tensors": 0})
        events.Reload()
        if TENSOR in events.Tags()["tensors"]:
            shares |= {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(TENSOR)}
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
