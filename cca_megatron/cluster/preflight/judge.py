"""From what nodes found out to the nodes that a job should avoid."""

import statistics
from collections import Counter
from dataclasses import dataclass, field

from cca_megatron.cluster.preflight.measures import CPU_LEAST, MEASURES, SKEW_SECONDS, Limits, floors
from cca_megatron.cluster.preflight.report import ExchangeReport, NodeReport


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    node: str | None
    """None if it cannot be said which node is to blame."""
    text: str


@dataclass
class Verdict:
    """The outcome of a check."""

    nodes: list[str]
    reports: dict[str, NodeReport]
    """Of the nodes that answered."""
    together: dict[str, float]
    """GB/s of the slowest rank when all nodes exchange, by measure."""
    skew: dict[str, float]
    """Seconds by which a node's clock is ahead of the first's."""
    findings: list[Finding]
    bad_nodes: list[str] = field(init=False)
    """In the order of the allocation."""

    def __post_init__(self) -> None:
        named = {finding.node for finding in self.findings}
        self.bad_nodes = [node for node in self.nodes if node in named]


def judge(
    nodes: list[str],
    reports: dict[str, NodeReport],
    pairs: list[ExchangeReport],
    together: list[ExchangeReport],
    limits: Limits,
) -> Verdict:
    """Judge an allocation; adds to each report the rate that the node reached with its better neighbour.

    Args:
        nodes: all that should be there.
        reports: of those that answered.
        pairs: of nodes with each of their neighbours.
        together: of all nodes at once.
        limits: what is too slow, too full or too few.
    """
    findings = [
        Finding(node, "did not answer: lost, hung, or it does not see the shared folder")
        for node in nodes
        if node not in reports
    ]
    for node, report in reports.items():
        findings += [Finding(node, problem) for problem in report.problems]
        findings += [Finding(node, text) for text in _gpu_problems(report)]
        for place, free in report.free_gib.items():
            if free < limits.free_gib[place]:
                findings.append(
                    Finding(
                        node, f"free space for {place}: {free:.2g} GiB, at least {limits.free_gib[place]:g}"
                    )
                )
    findings += _pairs(reports, pairs)
    findings += _counts(reports, limits)
    findings += _versions(reports)
    findings += _rates(reports, limits)
    skew = {answer.node: answer.skew for answer in together if answer.skew is not None}
    # The clock that most agree with is right, not the first node's.
    middle = statistics.median_low(skew.values()) if skew else 0.0
    findings += [
        Finding(node, f"clock differs by {seconds - middle:+.1f} s from the others'")
        for node, seconds in skew.items()
        if abs(seconds - middle) > SKEW_SECONDS
    ]
    if not any(finding.node for finding in findings):
        findings += [
            Finding(None, f"all nodes together: {answer.node}: {problem}")
            for answer in together
            for problem in answer.problems
        ]
    slowest = {
        name: min(rate for answer in together for rate in answer.rates[name])
        for name in ("all_reduce", "all_to_all", "p2p")
        if together and all(name in answer.rates for answer in together)
    }
    return Verdict(nodes, reports, slowest, skew, findings)


def _gpu_problems(report: NodeReport) -> list[str]:
    texts = [f"{process} computes on its GPUs" for process in report.processes]
    for gpu in report.gpus:
        name = f"GPU {gpu.index}"
        if gpu.uncorrected_errors:
            texts.append(f"{name}: {gpu.uncorrected_errors} uncorrected ECC errors; it needs a reset")
        if gpu.ecc == "Disabled":
            texts.append(f"{name}: ECC is off")
        if gpu.pcie_width is not None and gpu.pcie_width < (gpu.max_pcie_width or 0):
            texts.append(f"{name}: {gpu.pcie_width} of {gpu.max_pcie_width} PCIe lanes")
    for gpu in report.under_load:
        if gpu.slowdowns:
            texts.append(
                f"GPU {gpu.index}: {' and '.join(gpu.slowdowns)} under load, {gpu.clock} of "
                f"{gpu.max_clock} MHz"
            )
    return texts


def _pairs(reports: dict[str, NodeReport], pairs: list[ExchangeReport]) -> list[Finding]:
    """Of two nodes that cannot exchange, the one to blame has no neighbour with which it can."""
    findings = []
    for node, report in reports.items():
        own = [pair for pair in pairs if pair.node == node]
        rates = [pair.rates["p2p"] for pair in own if not pair.problems and "p2p" in pair.rates]
        if rates:
            report.rates["p2p_across"] = max(rates, key=min)
        elif own:
            with_whom = " and ".join(partner for pair in own for partner in pair.partners)
            findings.append(Finding(node, f"cannot exchange with {with_whom}: {own[0].problems[0]}"))
    return findings


def _counts(reports: dict[str, NodeReport], limits: Limits) -> list[Finding]:
    found = {node: len(report.gpus) for node, report in reports.items()}
    expected = limits.gpus if limits.gpus is not None else max(found.values(), default=0)
    return [
        Finding(node, f"{count} GPUs instead of {expected}")
        for node, count in found.items()
        if count != expected
    ]


def _versions(reports: dict[str, NodeReport]) -> list[Finding]:
    """Nodes that differ from most; of as many on either side those of the first node are taken."""
    findings = []
    for name in dict.fromkeys(name for report in reports.values() for name in report.versions):
        found = {node: r.versions.get(name, "absent") for node, r in reports.items() if r.versions}
        usual, _ = Counter(found.values()).most_common(1)[0]
        findings += [
            Finding(node, f"{name} {version}, other nodes have {usual}")
            for node, version in found.items()
            if version != usual
        ]
    return findings


def _rates(reports: dict[str, NodeReport], limits: Limits) -> list[Finding]:
    findings = []
    for name, measure in MEASURES.items():
        everywhere = [rate for report in reports.values() for rate in report.rates.get(name, [])]
        for node, report in reports.items():
            rates = report.rates.get(name)
            if not rates:
                continue
            slowest = min(rates)
            # Of two the higher: the slower one is to be found, not both to be near their mean.
            usual = statistics.median_high(everywhere)
            least = limits.least or (measure.least if report.gpus else CPU_LEAST)
            floor = floors(report.gpus[0].name if report.gpus else None).get(name, 0.0)
            where = f" of rank {rates.index(slowest)}" if len(rates) > 1 else ""
            rate = f"{measure.title}{where}: {slowest:.3g} {measure.unit}"
            if slowest < floor:
                findings.append(Finding(node, f"{rate}; a {report.gpus[0].name} has at least {floor:.3g}"))
            elif slowest < least * usual:
                findings.append(Finding(node, f"{rate}, usual here is {usual:.3g}"))
    return findings
