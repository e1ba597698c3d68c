"""From stored results to the table in the README. Every figure comes from a result file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cca_megatron.bench.results import FOLDER, label, newest, read_all

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
NOT_MEASURED = (
    "Not measured on a GPU yet: the kernels are checked in Triton's interpreter and compiled for sm_80, "
    "sm_90 and sm_100 without one. What follows are goals, not results."
)
PUBLISHED = {
    ("MHA 16", "forward"): 1785,
    ("CCA-4x", "forward"): 1330,
    ("ZAYA1", "forward"): 1413,
    ("MHA 16", "backward"): 9799,
    ("CCA-4x", "backward"): 8599,
    ("ZAYA1", "backward"): 8689,
}
"""Microseconds at 16,384 tokens, read off the figures of arXiv 2510.04476: one H100, head dim 128."""
_PUBLISHED_TOKENS = 16384
_VARIANTS = ("fused", "compile", "eager")
_PASSES = ("forward", "backward")

Row = dict[str, Any]


def readme_table(results: list[dict[str, Any]]) -> str:
    """The newest result of each command and device as Markdown; a sentence where there is none."""
    last = [result for result in newest(results) if result["benchmark"] in _TABLES]
    if not last:
        return NOT_MEASURED
    parts = []
    for result in sorted(last, key=lambda r: (str(r["machine"]["device"]), r["benchmark"] != "mix")):
        parts += [_provenance(result), *_TABLES[result["benchmark"]](result)]
        if result["refused"]:
            names = ", ".join(sorted({label(row) for row in result["refused"]}))
            parts.append(f"Cases without a speed, because a check failed or they did not run: {names}.")
    return "\n\n".join(parts)


def update_readme(path: Path, folder: Path = FOLDER) -> None:
    """Replace what stands between the two marker lines by the table of the results in the folder.

    Raises:
        ValueError: the file does not have the markers, once each and in order.
    """
    text = path.read_text()
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{path} must have the lines {BEGIN} and {END} once each, in this order")
    path.write_text(f"{before}{begin}{readme_table(read_all(folder))}\n{end}{after}")


def _provenance(result: dict[str, Any]) -> str:
    m = result["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("driver", "cuda", "torch", "triton") if m.get(name))
    commit = f", commit {m['commit']}" if m.get("commit") else ""
    where = f"{m['device']} ({versions}{commit}, {m['date'][:10]})"
    return f"`{m['command']}` on {where}, bf16, medians with CUDA graphs:"


def _mix_tables(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["rows"] if row["cuda_graph"]]
    if not rows:
        return []
    tokens = _goal_length(rows)
    head = [f"mix of {tokens:,} tokens, forward / backward, us", *_VARIANTS]
    head += ["fused forward, GB/s (of a copy)", "fused backward, GB/s (of a copy)"]
    lines = []
    for shape in _ordered(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape and row["tokens"] == tokens]
        line = [shape]
        for variant in _VARIANTS:
            times = (_cell(own, "us", "{:,.0f}", variant=variant, which=which) for which in _PASSES)
            line.append(" / ".join(times))
        for which in _PASSES:
            speed = _cell(own, "gb_per_s", "{:,.0f}", variant="fused", which=which)
            line.append(f"{speed} ({_cell(own, 'of_copy', '{:.0%}', variant='fused', which=which)})")
        lines.append(line)
    return [markdown(head, lines)]


def _block_tables(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["rows"] if row["cuda_graph"]]
    blocks = [row for row in rows if row["part"] == "block"]
    cores = [row for row in rows if row["part"] == "core" and row["tokens"] == _PUBLISHED_TOKENS]
    tables = [_block_table(blocks)] if blocks else []
    if cores:
        published = "H100" in str(result["machine"]["device"])
        tables.append(_core_table(cores, published))
        if published:
            tables.append("Published: read off the latency figures of arXiv 2510.04476, not measured here.")
    return tables


def _block_table(rows: list[Row]) -> str:
    lengths = sorted({row["tokens"] for row in rows})
    lines = []
    for hidden, name in _ordered((row["hidden"], label(row)) for row in rows):
        own = [row for row in rows if (row["hidden"], label(row)) == (hidden, name)]
        cells = [
            _cell([row for row in own if row["tokens"] == tokens], "us", "{:,.0f}", which="both")
            for tokens in lengths
        ]
        lines.append([f"{name}, E = {hidden:,}", *cells])
    head = ["attention block, forward + backward, us", *(f"{tokens:,} tokens" for tokens in lengths)]
    return markdown(head, lines)


def _core_table(rows: list[Row], published: bool) -> str:
    head = [f"without projections, {_PUBLISHED_TOKENS:,} tokens, us", "forward, causal", "backward, no mask"]
    if published:
        head += ["forward, published", "backward, published"]
    lines = []
    for method, name in _ordered((row["method"], label(row)) for row in rows):
        own = [row for row in rows if label(row) == name]
        line = [name, *(_cell(own, "us", "{:,.0f}", which=which) for which in _PASSES)]
        if published:
            figures = (PUBLISHED.get((method, which)) for which in _PASSES)
            line += ["" if figure is None else f"{figure:,}" for figure in figures]
        lines.append(line)
    return markdown(head, lines)


_TABLES = {"mix": _mix_tables, "block": _block_tables}


def _goal_length(rows: list[Row]) -> int:
    lengths = {row["tokens"] for row in rows}
    return 16384 if 16384 in lengths else max(lengths)


def _ordered(items: Iterable[Any]) -> list[Any]:
    """Without repeats, in order of appearance."""
    return list(dict.fromkeys(items))


def _cell(rows: list[Row], key: str, form: str, *, which: str, variant: str | None = None) -> str:
    """The figure of a pass."""
    for row in rows:
        if row["pass"] == which and variant in (None, row["variant"]):
            return form.format(row[key])
    return "not measured"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table whose first column is text."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
