"""The picture of ``cca-megatron plan --plot``: memory of a GPU and time of a token, side by side."""

from pathlib import Path
from typing import Any

from cca_megatron.plan.summary import Plan

_MEMORY = ("weights", "gradients", "optimizer", "activations", "communication", "logits or layer")
_LEAST = 0.01
"""Share of the longest bar below which a part of the time is put with others."""


def plot_plans(plans: list[Plan], path: Path) -> None:
    """Two bars for each plan, in GB and in microseconds per token; the ending of the path is the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{plan.name}\n{_length(plan.run.sequence)}" for plan in plans]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    memory = {name: [_memory(plan)[name] / 1e9 for plan in plans] for name in _MEMORY}
    _bars(left, labels, memory)
    limit = plans[0].gpu.memory / 1e9
    left.axhline(limit, color="black", linestyle="--", linewidth=1)
    left.set_ylim(0, 1.08 * max(limit, *(plan.memory.total / 1e9 for plan in plans)))
    left.set_ylabel("memory of one GPU, GB")
    left.set_title(f"Memory (dashed: what a {plans[0].gpu.name} has)")
    _bars(right, labels, _time(plans))
    right.set_ylabel("time per token and GPU, us")
    right.set_title("Where the time goes")
    p = plans[0].parallel
    figure.suptitle(
        f"Reckoned, not measured: {p.gpus:,} x {plans[0].gpu.name}, TP {p.tensor}, CP {p.context}, "
        f"PP {p.pipeline}, EP {p.expert}, DP {p.data}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, labels: list[str], parts: dict[str, list[float]]) -> None:
    base = [0.0] * len(labels)
    for number, (name, values) in enumerate(parts.items()):
        if any(values):
            axes.bar(labels, values, bottom=base, label=name, color=f"C{number}", width=0.6)
            base = [low + value for low, value in zip(base, values, strict=True)]
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _memory(plan: Plan) -> dict[str, float]:
    m = plan.memory
    sizes = (m.weights, m.gradients, m.optimizer, m.activations, m.communication, max(m.logits, m.working))
    return dict(zip(_MEMORY, sizes, strict=True))


def _time(plans: list[Plan]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for plan in plans for name in plan.step.parts)
    scale = [1e6 * plan.parallel.gpus / (plan.step.tokens_per_second * plan.step.seconds) for plan in plans]
    times = {
        name: [plan.step.parts.get(name, 0.0) * one for plan, one in zip(plans, scale, strict=True)]
        for name in names
    }
    longest = max(plan.step.seconds * one for plan, one in zip(plans, scale, strict=True))
    small = [name for name, values in times.items() if max(values) < _LEAST * longest]
    shown = {name: values for name, values in times.items() if name not in small}
    if small:
        shown["others"] = [sum(times[name][n] for name in small) for n in range(len(plans))]
    return shown


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
