"""Plots of the kernels' results: time over the length of the sequence."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from cca_megatron.bench.results import label, newest, slug

_TITLES = {"mix": "mix", "block": "attention block"}


def plot(results: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A picture for each of the newest results of the kernels, with a panel for each shape or width."""
    return [_plot(result, folder) for result in newest(results) if result["benchmark"] in _TITLES]


def _plot(result: dict[str, Any], folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(result["rows"])
    columns, device = max(1, len(panels)), result["machine"]["device"]
    figure, grid = pyplot.subplots(1, columns, figsize=(5 * columns, 4), layout="constrained", squeeze=False)
    for axes, (panel, lines) in zip(grid[0], panels.items(), strict=False):
        for line, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), label=line, marker="o", markersize=3)
        axes.set(title=panel, xlabel="tokens", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    grid[0][0].set_ylabel("forward + backward, us")
    figure.suptitle(f"{_TITLES[result['benchmark']]}, {device}, bf16, CUDA graphs")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{slug(device)}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


Lines = dict[str, list[tuple[int, float]]]
"""Tokens and microseconds of everything that is compared."""


def _panels(rows: list[dict[str, Any]]) -> dict[str, Lines]:
    panels: dict[str, Lines] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["pass"] == "both" and row["cuda_graph"] and row.get("part", "block") == "block":
            of_mix = "shape" in row
            panel = row["shape"] if of_mix else f"E = {row['hidden']:,}"
            line = row["variant"] if of_mix else label(row)
            panels[panel][line].append((row["tokens"], row["us"]))
    return panels
