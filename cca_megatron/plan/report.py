"""Tables on the terminal."""

from rich.console import Console
from rich.table import Table

from cca_megatron.plan.search import Candidate
from cca_megatron.plan.summary import Plan

_NOTICE = (
    "A model, not a measurement: docs/planner.md says what it counts and how exact each part is. Experts are "
    "taken to be evenly loaded, and the GPU to run Transformer Engine and the fused kernels."
)
_SHOWN = 10
"""Layouts of a search."""


def show_plan(console: Console, plan: Plan) -> None:
    """All figures of one run."""
    _heading(console, plan)
    for table in (_parameters(plan), _memory(plan), _communication(plan), _time(plan)):
        console.print(table)
        console.print()
    step = plan.step
    console.print(
        f"step {step.seconds:.3g} s, {step.tokens_per_second:,.0f} tokens/s "
        f"({step.tokens_per_second / plan.parallel.gpus:,.0f} per GPU), {step.mfu:.1%} of the peak"
    )
    _fits(console, plan)
    console.print(_NOTICE, style="dim", soft_wrap=True)


def show_comparison(console: Console, plans: list[Plan]) -> None:
    """One line for each run."""
    table = _table(
        "attention",
        "tokens",
        "weights, G",
        "cache, B",
        "memory, GB",
        "step, s",
        "tok/s/GPU",
        "MFU",
    )
    for plan in plans:
        memory = f"{_giga(plan.memory.total)}{'' if plan.fits else ' !'}"
        table.add_row(
            plan.name,
            f"{plan.run.sequence:,}",
            f"{sum(plan.parameters.values()) / 1e9:.3f}",
            f"{plan.model.cache_bytes():,.0f}",
            memory,
            f"{plan.step.seconds:.3g}",
            f"{plan.step.tokens_per_second / plan.parallel.gpus:,.0f}",
            f"{plan.step.mfu:.1%}",
        )
    _heading(console, plans[0])
    console.print(table)
    if not all(plan.fits for plan in plans):
        console.print(f"! does not fit the {_giga(plans[0].gpu.memory)} GB of one {plans[0].gpu.name}")
    console.print(_NOTICE, style="dim", soft_wrap=True)


def show_search(
    console: Console, plan: Plan, gpus: int, found: list[Candidate], overrides: list[list[str]]
) -> None:
    """The fastest layouts of this many GPUs that fit, and how to train on the first."""
    console.print(f"{gpus:,} x {plan.gpu.name}; {_batch(plan)}", soft_wrap=True)
    if not found:
        console.print(
            f"no layout of {gpus:,} {plan.gpu.name} fits and divides the batch; more GPUs, shorter sequences "
            "or another megatron.global-batch-size may",
            soft_wrap=True,
        )
        return
    table = _table("TP", "CP", "PP", "EP", "DP", "micro-batch", "recompute", "memory, GB", "step, s", "MFU")
    for candidate in found[:_SHOWN]:
        p = candidate.parallel
        table.add_row(
            *map(str, (p.tensor, p.context, p.pipeline, p.expert, p.data, candidate.run.micro_batch)),
            candidate.run.recompute or "none",
            _giga(candidate.memory.total),
            f"{candidate.step.seconds:.3g}",
            f"{candidate.step.mfu:.1%}",
        )
    console.print(table)
    console.print(f"{len(found)} layouts fit; the first: " + " ".join(overrides[0]), soft_wrap=True)
    console.print(_NOTICE, style="dim", soft_wrap=True)


def _heading(console: Console, plan: Plan) -> None:
    p = plan.parallel
    console.print(
        f"{p.gpus:,} x {plan.gpu.name}: TP {p.tensor}, CP {p.context}, PP {p.pipeline} x {p.chunks}, "
        f"EP {p.expert}, DP {p.data}; {_batch(plan)}",
        soft_wrap=True,
    )


def _batch(plan: Plan) -> str:
    return f"{plan.run.global_batch:,} sequences of {plan.run.sequence:,} tokens a step"


def _fits(console: Console, plan: Plan) -> None:
    total, limit = plan.memory.total, plan.gpu.memory
    if plan.fits:
        console.print(f"fits: {_giga(total)} of {_giga(limit)} GB", style="green")
    else:
        console.print(
            f"does not fit: {_giga(total)} of {_giga(limit)} GB; --search shows layouts that do", style="red"
        )


def _parameters(plan: Plan) -> Table:
    table = _table("part", "parameters, M", "FLOPs per token, M")
    for name in dict.fromkeys((*plan.parameters, *plan.flops)):
        count = plan.parameters.get(name)
        flops = plan.flops.get(name)
        table.add_row(
            name,
            "" if count is None else f"{count / 1e6:,.2f}",
            "" if flops is None else f"{flops / 1e6:,.2f}",
        )
    total, flops = sum(plan.parameters.values()), sum(plan.flops.values())
    table.add_row("total", f"{total / 1e6:,.2f}", f"{flops / 1e6:,.2f}", style="bold")
    table.add_row(
        "used by a token", f"{plan.used_parameters / 1e6:,.2f}", f"{3 * flops / 1e6:,.2f} with backward"
    )
    table.add_row("KV cache", "", f"{plan.model.cache_bytes():,.0f} bytes per token")
    return table


def _memory(plan: Plan) -> Table:
    table, m = _table("memory per GPU", "GB"), plan.memory
    rows = [
        ("weights", m.weights),
        ("gradients", m.gradients),
        ("optimizer", m.optimizer),
        (f"activations of {m.under_way:.3g} micro-batches", m.activations),
        ("communication buffers", m.communication),
        ("logits" if m.logits >= m.working else "layer in its backward pass", max(m.logits, m.working)),
    ]
    for name, size in rows:
        table.add_row(name, _giga(size))
    table.add_row("peak", _giga(m.total), style="bold")
    if m.offloaded:
        table.add_row("activations on the host", _giga(m.offloaded))
    return table


def _communication(plan: Plan) -> Table:
    table = _table("sent by a GPU in a step", "axis", "ranks", "over", "forward, GB", "backward, GB")
    for message in plan.messages:
        near = message.group.on_node(plan.gpu.gpus_per_node) >= message.group.size
        table.add_row(
            message.name,
            message.axis,
            f"{message.group.size:,}",
            "NVLink" if near else "network",
            _giga(message.forward),
            _giga(message.backward),
        )
    return table


def _time(plan: Plan) -> Table:
    table = _table("where the time goes", "s", "share")
    for name, seconds in sorted(plan.step.parts.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.3g}", f"{seconds / plan.step.seconds:.1%}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _giga(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e10 else f"{size / 1e9:,.1f}"
