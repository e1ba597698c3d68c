"""What ``quality.py`` found: a table for each comparison, with the paper's order beside it, and a plot."""

import statistics
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from quality_variants import REFERENCE, TABLES, Row

_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided, 95 %: standard errors from which on a difference of 2, 3 ... seeds counts."""

_VERDICTS = {
    "same": "in the paper's order",
    "opposite": "in the opposite order",
    "undecided": "undecided, in the paper",
}


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds, and its standard error; None with one seed."""

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        """Of independent values."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    @property
    def differs_from_zero(self) -> bool:
        """Whether the 95 % confidence interval excludes zero; never with one value."""
        if self.error is None:
            return False
        return abs(self.mean) > _T95[min(self.count - 2, len(_T95) - 1)] * self.error

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" +- {self.error:.4f}")


Losses = dict[str, dict[int, float]]
"""Validation loss at the end, nats per token, by variant and seed."""


def final_losses(runs: list[dict[str, Any]]) -> Losses:
    """Of the runs in a result file."""
    losses: Losses = {}
    for run in runs:
        losses.setdefault(run["variant"], {})[run["seed"]] = run["validation"][-1][1]
    return losses


def difference(losses: Losses, variant: str, other: str) -> Estimate | None:
    """How much more loss a variant has than another, seed by seed; None without a common seed.

    Runs with the same seed see the same data in the same order, so most of the spread over seeds cancels.
    """
    common = losses.get(variant, {}).keys() & losses.get(other, {}).keys()
    pairs = [losses[variant][seed] - losses[other][seed] for seed in sorted(common)]
    return Estimate.of(pairs) if pairs else None


def compare_with_paper(losses: Losses, rows: tuple[Row, ...]) -> list[tuple[str, str]]:
    """For each two rows that differ in the paper, (statement, "same", "opposite" or "undecided").

    Undecided is a difference whose 95 % confidence interval includes zero, or of one seed.
    """
    verdicts = []
    for first, second in combinations(rows, 2):
        if first.paper is None or second.paper is None or first.paper == second.paper:
            continue
        better, worse = (first, second) if first.paper < second.paper else (second, first)
        found = difference(losses, worse.variant, better.variant)
        if found is None:
            continue
        verdict = "undecided"
        if found.differs_from_zero:
            verdict = "same" if found.mean > 0 else "opposite"
        verdicts.append((f"{better.label} < {worse.label}", verdict))
    return verdicts


def tables(runs: list[dict[str, Any]]) -> str:
    """All tables and the comparisons with the paper, in Markdown."""
    losses = final_losses(runs)
    counts = {run["variant"]: run["parameters"] for run in runs}
    texts = [_table(name, rows, losses, counts) for name, rows in TABLES.items()]
    return "\n\n".join(text for text in texts if text)


def _table(name: str, rows: tuple[Row, ...], losses: Losses, counts: dict[str, int]) -> str:
    rows = tuple(row for row in rows if row.variant in losses)
    if not rows:
        return ""
    has_paper = any(row.paper is not None for row in rows)
    paper = " paper, 1B |" if has_paper else ""
    lines = [
        f"| {name} | parameters | seeds | loss, nats per token | more than {REFERENCE.upper()} |{paper}",
        "|---|---:|---:|---:|---:|" + ("---:|" if has_paper else ""),
    ]
    for row in rows:
        ours, more = losses[row.variant], difference(losses, row.variant, REFERENCE)
        cells = [row.label, f"{counts[row.variant]:,}", str(len(ours)), str(Estimate.of([*ours.values()]))]
        cells.append("" if more is None or row.variant == REFERENCE else str(more))
        if has_paper:
            cells.append("" if row.paper is None else f"{row.paper:g}")
        lines.append(f"| {' | '.join(cells)} |")
    verdicts = compare_with_paper(losses, rows)
    lines += [""] if verdicts else []
    for verdict, text in _VERDICTS.items():
        found = [statement for statement, its in verdicts if its == verdict]
        lines += [f"- {text}: {', '.join(found)}"] if found else []
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Curves with their spread over seeds, and below the losses at the end, seed by seed, for each table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = final_losses(result["runs"])
    shown = {name: [row for row in rows if row.variant in losses] for name, rows in TABLES.items()}
    figure, grid = pyplot.subplots(
        2, len(shown), figsize=(5 * len(shown), 7.5), layout="constrained", squeeze=False
    )
    tokens = result["global_batch_size"] * result["seq_length"] / 1e6
    for (name, rows), curves, ends in zip(shown.items(), *grid, strict=True):
        for number, row in enumerate(rows):
            _draw_curve(curves, row, result["runs"], tokens)
            _draw_end(ends, number, losses, row)
        curves.set(title=name, xlabel="training tokens, millions", ylabel="validation loss, nats per token")
        curves.legend(fontsize="small")
        ends.axvline(0, color="0.6", linewidth=1)
        ends.set_yticks(range(len(rows)), [row.label for row in rows])
        ends.invert_yaxis()
        ends.locator_params(axis="x", nbins=6)
        ends.set_xlabel(f"loss at the end minus {REFERENCE.upper()}'s, nats per token")
        curves.grid(alpha=0.3)
        ends.grid(alpha=0.3)
    seeds = max((len(by_seed) for by_seed in losses.values()), default=0)
    figure.suptitle(
        f"{result['runs'][0]['parameters'] / 1e6:.2f} million parameters each, up to {seeds} seeds; bands: "
        "lowest to highest seed; bars: standard error"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_curve(axes: Any, row: Row, runs: list[dict[str, Any]], tokens: float) -> None:
    """The mean over seeds, and a band from lowest to highest; the first point would be off the scale."""
    curves = [dict(run["validation"][1:]) for run in runs if run["variant"] == row.variant]
    common = sorted(set.intersection(*map(set, curves)))
    values = [[curve[iteration] for curve in curves] for iteration in common]
    x = [iteration * tokens for iteration in common]
    (line,) = axes.plot(x, [statistics.fmean(v) for v in values], label=row.label, marker="o", markersize=3)
    axes.fill_between(
        x, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15
    )


def _draw_end(axes: Any, height: int, losses: Losses, row: Row) -> None:
    more = difference(losses, row.variant, REFERENCE)
    if more is None:
        return
    color = f"C{height}"
    reference, own = losses[REFERENCE], losses[row.variant]
    seeds = sorted(own.keys() & reference.keys())
    axes.plot([own[s] - reference[s] for s in seeds], [height] * len(seeds), ".", color=color, alpha=0.5)
    axes.errorbar(more.mean, height, xerr=more.error or 0, fmt="D", color=color, capsize=4, markersize=5)
