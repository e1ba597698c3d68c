"""Tables of the documentation from stored results of the benchmarks that run Megatron."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cca_megatron.bench.published import ratio_to_mha
from cca_megatron.bench.report import markdown
from cca_megatron.bench.results import is_of_cpu, newest, read_all
from cca_megatron.bench.sizes import BASELINE

_BLOCK = re.compile(r"(<!-- bench (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet."

Row = dict[str, Any]


def update_docs(path: Path, folder: Path) -> None:
    """Replace what stands between the markers ``<!-- bench NAME -->`` and ``<!-- /bench -->`` by tables.

    Raises:
        ValueError: a name is none of :data:`TABLES`, or there are no markers.
    """
    results = read_all(folder)
    text = path.read_text()
    names = [match[2] for match in _BLOCK.finditer(text)]
    unknown = [name for name in names if name not in TABLES]
    if unknown or not names:
        raise ValueError(
            f"{path}: <!-- bench {unknown[0] if unknown else 'NAME'} -->: the tables are {', '.join(TABLES)}"
        )
    path.write_text(_BLOCK.sub(lambda match: f"{match[1]}{table(match[2], results)}\n{match[3]}", text))


def table(name: str, results: list[dict[str, Any]]) -> str:
    """One of :data:`TABLES`, of the newest result with rows for it, with where and how it was measured."""
    benchmark, make = TABLES[name]
    found = [result for result in newest(results) if result["benchmark"] == benchmark]
    if not found:
        return NOT_MEASURED
    return f"{provenance(found[-1])}\n\n{make(found[-1]['rows'])}"


def provenance(result: dict[str, Any]) -> str:
    """The command, machine, versions and date of a result, and what its figures are good for."""
    m = result["machine"]
    versions = f"torch {m['torch']}, megatron-core {m['megatron-core']}"
    load = f", load {m['load']}" if m.get("load") else ""
    line = f"`{m['command']}` on {m['device']} ({versions}, {m['date'][:10]}{load})."
    return f"{line} **CPU ratios: they compare within this run only.**" if is_of_cpu(m) else line


def _matched(matching: str) -> Callable[[list[Row]], str]:
    def make(rows: list[Row]) -> str:
        own = [row for row in rows if row["matched"] == matching]
        lengths = [f"{row['tokens']:,}" for row in own]
        head = ["", "heads", "parameters", "cached, B/token", "kept, B/token"]
        head += [f"{name} tokens" for name in lengths]
        lines = []
        for name in own[0]["methods"]:
            last = own[-1]["methods"][name]
            cells = [name, last["heads"], f"{last['parameters']:,}", f"{last['cache_bytes_per_token']:,}"]
            cells.append(f"{last['kept_bytes'] / own[-1]['tokens']:,.0f}")
            cells += [_passes(row["methods"][name]) for row in own]
            lines.append(cells)
        return markdown(head, lines)

    return make


def _passes(method: Row) -> str:
    return " / ".join(f"{method[which]['ratio']:.2f}" for which in ("forward", "backward", "both"))


def _published(rows: list[Row]) -> str:
    own = [row for row in rows if row["matched"] == "width"]
    head = ["forward, without projections"]
    head += [f"{row['tokens']:,}: {which}" for row in own for which in ("here", "published")]
    lines = []
    for name, method in own[0]["methods"].items():
        if "core" in method and name != BASELINE:
            line = [name]
            for row in own:
                published = ratio_to_mha(name, row["tokens"])
                line.append(f"{row['methods'][name]['core']['ratio']:.2f}")
                line.append("" if published is None else f"{published:.2f}")
            lines.append(line)
    return markdown(head, lines)


def _context(rows: list[Row]) -> str:
    head = ["", "ranks", "exchange", "work of the busiest rank", "bytes sent, counted", "planned"]
    lines = [
        [
            row["method"],
            str(row["ranks"]),
            row["comm_type"] or "none",
            f"{row['work_ratio']:.2f}",
            f"{row['sent_bytes']:,.0f}",
            f"{row['planned_bytes']:,.0f}",
        ]
        for row in rows
    ]
    return markdown(head, lines)


def _step(rows: list[Row]) -> str:
    (row,) = rows
    head = ["recipe", "processes", "tokens/step", "s/step (lowest to highest)", "tokens/s", *row["share"]]
    seconds = f"{row['seconds']:.2f} ({row['seconds_low']:.2f} to {row['seconds_high']:.2f})"
    line = [row["recipe"], f"{row['processes']}, {row['dtype']}", f"{row['tokens_per_step']:,}", seconds]
    line += [f"{row['tokens_per_second']:,.0f}", *(f"{share:.0%}" for share in row["share"].values())]
    return markdown(head, [line])


def _data(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        name, against = row.get("kind"), "a plain read"
        if row["part"] == "prepare":
            name, against = f"prepare, {row['workers']} processes", "one process"
        lines.append([str(name), f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f} of {against}"])
    return markdown(["", "tokens/s", "speed"], lines)


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "width": ("matched", _matched("width")),
    "parameters": ("matched", _matched("parameters")),
    "kv-cache": ("matched", _matched("kv-cache")),
    "published": ("matched", _published),
    "cp": ("cp", _context),
    "step": ("step", _step),
    "data": ("data", _data),
}
"""By the name in the documentation, the benchmark and what makes the table of its rows."""
