"""Plots of the benchmarks that run Megatron: over the length of the sequence, and over ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cca_megatron.bench.results import is_of_cpu, newest, slug
from cca_megatron.bench.sizes import BASELINE

Row = dict[str, Any]
_TITLES = {"width": "same width", "parameters": "same parameters", "kv-cache": "same KV cache"}
_RATIO = f"forward + backward, time over {BASELINE}'s"
_QUANTITIES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "latency": (_RATIO, lambda method: float(method["both"]["ratio"])),
    "kept": ("kept for the backward pass, MiB", lambda method: method["kept_bytes"] / 2**20),
    "memory": ("live tensors at most, MiB", lambda method: method["peak_bytes"] / 2**20),
}
"""By the name of the picture, what it shows of a method and how it is called."""
_STYLES = {"p2p": "-", "all_gather": "--", "a2a": ":"}
"""Of the lines, by way of exchange."""


def plot_runs(results: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Pictures of the newest results of ``bench block --matched`` and ``bench cp`` of each device."""
    pictures = []
    for result in newest(results):
        if result["benchmark"] == "matched":
            pictures += [_matched(result, name, folder) for name in _QUANTITIES]
        elif result["benchmark"] == "cp":
            pictures.append(_context(result, folder))
    return pictures


def _matched(result: dict[str, Any], name: str, folder: Path) -> Path:
    """A panel for each matching, a line for each method, the sequence length along."""
    text, value = _QUANTITIES[name]
    rows = result["rows"]
    matchings = list(dict.fromkeys(row["matched"] for row in rows))
    figure, grid = _panels(len(matchings))
    for axes, matching in zip(grid, matchings, strict=True):
        own = [row for row in rows if row["matched"] == matching]
        lengths = [row["tokens"] for row in own]
        for method in own[0]["methods"]:
            found = [row["methods"][method] for row in own]
            line = axes.plot(lengths, [value(f) for f in found], label=method, marker="o", markersize=4)
            if name == "latency":
                low, high = ([f["both"][bound] for f in found] for bound in ("ratio_low", "ratio_high"))
                axes.fill_between(lengths, low, high, alpha=0.15, color=line[0].get_color())
        axes.set_xscale("log", base=2)
        if name != "latency":
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set(title=_TITLES[matching], xlabel="tokens of the sequence")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel(text)
    figure.legend(*grid[0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    row = rows[0]
    what = f"attention layer, hidden size {row['hidden']:,}, head dim {row['head_dim']}, {row['dtype']}"
    return _save(figure, result, what, folder, f"matched-{name}")


def _context(result: dict[str, Any], folder: Path) -> Path:
    """Bytes that are sent, and the work of the busiest rank, over the number of ranks."""
    rows = result["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, (left, right) = _panels(2)
    for number, method in enumerate(methods):
        for way, style in _STYLES.items():
            own = [row for row in rows if row["method"] == method and row["comm_type"] in (way, None)]
            look = {"color": f"C{number}", "linestyle": style, "marker": "o", "markersize": 4}
            sent = [row for row in own if row["ranks"] > 1]
            left.plot([row["ranks"] for row in sent], [row["sent_bytes"] / 2**20 for row in sent], **look)
            right.plot([row["ranks"] for row in own], [row["work_ratio"] for row in own], **look)
    left.set(title="counted", ylabel="sent by the rank that sends most, MiB")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    right.set(title="work of the busiest rank", ylabel="over that of one rank")
    for axes in (left, right):
        axes.set_xlabel("context-parallel ranks")
        axes.set_xticks(sorted({row["ranks"] for row in rows}))
        axes.grid(alpha=0.3)
    colors = {method: {"color": f"C{number}"} for number, method in enumerate(methods)}
    ways = {way: {"color": "black", "linestyle": style} for way, style in _STYLES.items()}
    handles = [left.plot([], [], label=name, **look)[0] for name, look in (colors | ways).items()]
    figure.legend(handles=handles, fontsize=9, loc="outside right upper")
    what = f"attention layer, {rows[0]['tokens']:,} tokens, hidden size {rows[0]['hidden']:,}, fp32"
    return _save(figure, result, what, folder, "cp")


def _panels(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, count, figsize=(4 * count, 4), layout="constrained", squeeze=False)
    return figure, grid[0]


def _save(figure: Any, result: dict[str, Any], what: str, folder: Path, name: str) -> Path:
    from matplotlib import pyplot

    machine = result["machine"]
    label = "\nCPU: compare within this run only, no GPU figure" if is_of_cpu(machine) else ""
    figure.suptitle(f"{what}\n{machine['device']}, {machine['date'][:10]}{label}", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{slug(machine['device'])}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
