"""A verdict as text."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cca_megatron.cluster.preflight.judge import Verdict
from cca_megatron.cluster.preflight.measures import MEASURES
from cca_megatron.terminal import console

_LOG_WIDTH = 160
"""Of a log file, which no terminal limits."""


def show(verdict: Verdict, file: Path) -> None:
    """Print a table with a line for each node, what is wrong, and the nodes to avoid."""
    out = console if console.is_terminal else Console(width=_LOG_WIDTH, highlight=False)
    out.print(_table(verdict))
    if verdict.together:
        rates = ", ".join(f"{MEASURES[name].title} {rate:.3g}" for name, rate in verdict.together.items())
        out.print(f"all nodes together, slowest rank: {rates} GB/s", soft_wrap=True)
    for finding in verdict.findings:
        out.print(f"{finding.node or 'unknown node'}: {finding.text}", markup=False, soft_wrap=True)
    out.print(f"details: {file.resolve()}", markup=False, soft_wrap=True)
    if verdict.bad_nodes:
        out.print(f"to avoid them: sbatch --exclude={','.join(verdict.bad_nodes)}", soft_wrap=True)
    elif not verdict.findings:
        count = len(verdict.nodes)
        out.print("the node is fine" if count == 1 else f"all {count} nodes are fine", style="green")


def _table(verdict: Verdict) -> Table:
    """Of each measure the slowest rank of each node."""
    measured = [m for m in MEASURES if any(m in report.rates for report in verdict.reports.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column("node")
    table.add_column("GPUs", justify="right")
    for name in measured:
        table.add_column(f"{MEASURES[name].title}\n{MEASURES[name].unit}", justify="right")
    table.add_column("clock\nms", justify="right")
    table.add_column("")
    for node in verdict.nodes:
        report = verdict.reports.get(node)
        mark = "[red]bad[/]" if node in verdict.bad_nodes else "[green]ok[/]"
        if report is None:
            table.add_row(node, *["-"] * (len(measured) + 2), mark)
            continue
        rates = [report.rates.get(name) for name in measured]
        skew = verdict.skew.get(node)
        table.add_row(
            node,
            str(len(report.gpus)),
            *(f"{min(rate):.3g}" if rate else "-" for rate in rates),
            "-" if skew is None else f"{skew * 1000:+.1f}",
            mark,
        )
    return table
