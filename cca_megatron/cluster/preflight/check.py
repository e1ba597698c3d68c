"""The check of an allocation: every node examines itself, then neighbours, then all measure together.

Nodes talk through files in a shared folder alone, so one that is lost or hangs keeps nobody waiting longer
than agreed. The first node decides who is there and what comes next.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cca_megatron.cluster.ports import held_port
from cca_megatron.cluster.preflight.allocation import Allocation
from cca_megatron.cluster.preflight.judge import Verdict, judge
from cca_megatron.cluster.preflight.measures import Limits
from cca_megatron.cluster.preflight.node import Exchange, examine, take_part
from cca_megatron.cluster.preflight.report import (
    ExchangeReport,
    NodeReport,
    wait_for,
    write_json,
)

Say = Callable[[str, int, int], None]
"""Told what is going on, how many nodes are done with it, and of how many."""


def check(allocation: Allocation, limits: Limits, seconds: float, say: Say) -> Verdict | None:
    """Do this node's part, and judge all if it is the first.

    Args:
        allocation: the nodes.
        limits: what is too slow, too full or too few.
        seconds: that each part of the check may take.
        say: gets the progress, on the first node.

    Returns:
        None on all nodes but the first.

    Raises:
        OSError: the shared folder cannot be written.
    """
    folder = allocation.folder
    folder.mkdir(parents=True, exist_ok=True)
    with held_port() as port:
        if allocation.judges:
            say("examining nodes", 0, len(allocation.nodes))
        own = examine(allocation.node, allocation.address, port, folder, seconds)
        write_json(_report_file(folder, allocation.node), own)
        if allocation.judges:
            return _direct(allocation, limits, seconds, say)
        _follow(allocation, seconds)
        return None


def rounds(nodes: list[str]) -> list[list[list[str]]]:
    """Pairs of neighbours in a ring, in rounds that have each node once at most."""
    if len(nodes) < 2:
        return []
    pairs = [[node, nodes[(i + 1) % len(nodes)]] for i, node in enumerate(nodes)]
    if len(nodes) == 2:
        return [pairs[:1]]
    last = pairs.pop() if len(nodes) % 2 else None
    return [pairs[::2], pairs[1::2]] + ([[last]] if last else [])


def _report_file(folder: Path, node: str) -> Path:
    return folder / "nodes" / f"{node}.json"


def _plan_file(folder: Path, stage: int) -> Path:
    return folder / "plans" / f"{stage}.json"


def _exchange_file(folder: Path, stage: int, node: str) -> Path:
    return folder / f"exchange-{stage}" / f"{node}.json"


def _direct(allocation: Allocation, limits: Limits, seconds: float, say: Say) -> Verdict:
    """The first node's part: wait for reports, set up exchanges, judge."""
    folder = allocation.folder
    files = {node: _report_file(folder, node) for node in allocation.nodes}
    contents = wait_for(files, seconds, lambda done, of: say("examining nodes", done, of))
    reports = {node: NodeReport.from_json(contents[node]) for node in allocation.nodes if node in contents}
    stage = 0
    pairs: list[ExchangeReport] = []
    together: list[ExchangeReport] = []
    try:
        for groups in rounds(list(reports)):
            pairs += _exchange(allocation, stage, groups, reports, seconds, say)
            stage += 1
        working = [node for node in reports if any(pair.node == node and pair.rates for pair in pairs)]
        if len(working) > 1:
            together = _exchange(allocation, stage, [working], reports, seconds, say)
            stage += 1
    finally:
        write_json(_plan_file(folder, stage), {"groups": []})
    verdict = judge(list(allocation.nodes), reports, pairs, together, limits)
    write_json(folder / "report.json", asdict(verdict))
    return verdict


def _exchange(
    allocation: Allocation,
    stage: int,
    groups: list[list[str]],
    reports: dict[str, NodeReport],
    seconds: float,
    say: Say,
) -> list[ExchangeReport]:
    """Let groups of nodes measure at the same time; a node without an answer has a problem as its report."""
    exchanges = [asdict(Exchange.among([reports[node] for node in group])) for group in groups]
    write_json(_plan_file(allocation.folder, stage), {"groups": exchanges})
    members = [node for group in groups for node in group]
    text = "exchanges between nodes"
    say(text, 0, len(members))
    _play(allocation, stage, {"groups": exchanges}, seconds)
    files = {node: _exchange_file(allocation.folder, stage, node) for node in members}
    found = wait_for(files, seconds, lambda done, of: say(text, done, of))
    answers = []
    for group in groups:
        for node in group:
            silent = ExchangeReport(node, [n for n in group if n != node], {}, None, ["gave no answer"])
            answers.append(ExchangeReport(**found[node]) if node in found else silent)
    return answers


def _follow(allocation: Allocation, seconds: float) -> None:
    """What the first node plans, until its plan is empty or does not come."""
    for stage in itertools.count():
        file = _plan_file(allocation.folder, stage)
        # The first node may wait as long for reports, and once more for its own part.
        plan = wait_for({"": file}, 3 * seconds, lambda done, of: None).get("")
        if plan is None or not plan["groups"]:
            return
        _play(allocation, stage, plan, seconds)


def _play(allocation: Allocation, stage: int, plan: dict[str, Any], seconds: float) -> None:
    """This node's part in a plan, if it has one."""
    for group in plan["groups"]:
        if allocation.node in group["nodes"]:
            ranks = allocation.folder / f"exchange-{stage}" / "ranks"
            answer = take_part(Exchange(**group), allocation.node, ranks, seconds)
            write_json(_exchange_file(allocation.folder, stage, allocation.node), answer)
