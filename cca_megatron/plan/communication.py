"""Bytes that one GPU sends in a training step, by parallel axis, and over which wires.

Collectives are counted as a ring runs them: an all-gather or reduce-scatter of n bytes over r ranks sends
(r - 1)/r * n on each, an all-reduce twice that. What is below a number per token, such as the counts of
tokens that experts get, is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cca_megatron.plan.layers import Experts, Layer, Mlp, Model
from cca_megatron.plan.memory import stage_layers, stage_parts
from cca_megatron.plan.parts import Parallel
from cca_megatron.plan.shapes import Run
from cca_megatron.plan.traffic import traffic

Axis = Literal["tensor", "context", "expert", "pipeline", "data"]
Pattern = Literal["ring", "neighbours", "all-to-all"]
"""A ring collective; sends to one neighbour, which one network card carries; an exchange of all with all."""
HALO, EMBEDDING, OUTPUT = "rows before a chunk", "embedding", "output and loss"
WHOLE, TIED = "gradients of what is whole", "gradients of tied embeddings"
"""Summed once, behind all micro-batches, as those of data parallelism are."""
_ALL_REDUCED_LOGITS = 3
"""Numbers in fp32 per token that a loss over a cut vocabulary sums over ranks: maximum, sum, the label's."""


_Counted = list[tuple[Layer, int]]
"""Kinds of layers, each with how often."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, as Megatron numbers them: every ``stride``-th of the run."""

    size: int
    stride: int

    def on_node(self, gpus_per_node: int) -> int:
        """How many of them share a node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


@dataclass(frozen=True)
class Message:
    """What one rank sends in a step on one axis for one purpose."""

    axis: Axis
    name: str
    forward: float
    """Bytes in forward passes."""
    backward: float
    """Bytes in backward passes and after them."""
    group: Group
    pattern: Pattern = "ring"

    @property
    def sent(self) -> float:
        """Bytes in all."""
        return self.forward + self.backward


def groups(parallel: Parallel) -> dict[Axis, Group]:
    """The ranks of each axis; Megatron's order is tensor, context, expert within data, data, pipeline."""
    inner = parallel.tensor * parallel.context
    return {
        "tensor": Group(parallel.tensor, 1),
        "context": Group(parallel.context, parallel.tensor),
        "expert": Group(parallel.expert, parallel.expert_tensor),
        "pipeline": Group(parallel.pipeline, inner * parallel.data),
        "data": Group(parallel.replicas, parallel.tensor),
    }


def communication(model: Model, parallel: Parallel, run: Run, stage: int = 0) -> list[Message]:
    """Everything that a GPU of this pipeline stage sends in one step."""
    stages = stage_layers(len(model.layers), parallel, run)
    own = model.counted(number for chunk in stages[stage] for number in chunk)
    times = run.micro_batches(parallel)
    messages: list[Message] = []
    if parallel.tensor > 1:
        messages += _tensor(model, own, parallel, run, stage, len(stages))
    if parallel.context > 1:
        messages += _context(own, parallel, run, model.element)
    messages += _expert(own, parallel, run, model.element)
    # So far for one micro-batch.
    messages = [
        Message(m.axis, m.name, m.forward * times, m.backward * times, m.group, m.pattern) for m in messages
    ]
    if parallel.pipeline > 1:
        messages += _pipeline(model, parallel, run, stage, len(stages))
    return [*messages, *_after(model, parallel, run, stages, stage)]


def _tensor(
    model: Model, layers: _Counted, parallel: Parallel, run: Run, stage: int, stages: int
) -> Iterator[Message]:
    group, tokens, element = groups(parallel)["tensor"], run.tokens(parallel), model.element
    part = (parallel.tensor - 1) / parallel.tensor
    row = part * model.hidden_size * element * tokens
    # In the backward pass a gathered input is gathered once more, for the gradient of the weight.
    forward, backward = (2, 3) if parallel.sequence else (2, 2)
    again = _forward_passes(run)
    attentions = sum(count for _, count in layers)
    mlps = sum(count for layer, count in layers if isinstance(layer.mlp, Mlp) or layer.mlp.shared)
    for name, count in (("attention", attentions), ("MLP", mlps)):
        yield Message(
            "tensor", name, forward * row * count, (backward + forward * (again - 1)) * row * count, group
        )
    # All layers have the same attention.
    for found in traffic(layers[0][0].attention.traffic_shape(element), parallel.tensor, 1) if layers else ():
        if found.name.startswith(("tensor beyond", "gradients of shared")):
            unit = (tokens if found.unit == "token" else 1) * attentions
            yield Message(
                "tensor",
                found.name,
                found.forward * unit,
                (found.backward + found.forward * (again - 1)) * unit,
                group,
            )
    if stage == 0:  # the embedding, whose rows lie on all ranks
        embedded = row if parallel.sequence else 2 * row
        yield Message("tensor", EMBEDDING, embedded, row if parallel.sequence else 0, group)
    if stage == stages - 1:
        numbers = 2 * part * _ALL_REDUCED_LOGITS * 4 * tokens
        gathered, summed = (row, 2 * row) if parallel.sequence else (0.0, 2 * row)
        yield Message("tensor", OUTPUT, gathered + numbers, summed, group)


def _forward_passes(run: Run) -> int:
    return 2 if run.recompute == "full" else 1


def _context(layers: _Counted, parallel: Parallel, run: Run, element: int) -> Iterator[Message]:
    group, tokens = groups(parallel)["context"], run.tokens(parallel)
    count = sum(count for _, count in layers)
    pattern: Pattern = {"p2p": "neighbours", "a2a": "all-to-all"}.get(run.cp_comm_type, "ring")  # type: ignore[assignment]
    for name, kind in (
        (HALO, "context:"),
        (f"keys and values ({run.cp_comm_type})", f"context, {run.cp_comm_type}:"),
    ):
        forward = backward = 0.0
        for row in traffic(layers[0][0].attention.traffic_shape(element), parallel.tensor, parallel.context):
            if row.name.startswith(kind):
                # A rank has the ends of two chunks; of two ranks one has both in the middle.
                unit = tokens if row.unit == "token" else min(parallel.context - 1, 2) * run.micro_batch
                forward += row.forward * unit * count
                backward += row.backward * unit * count
        backward += forward * (_forward_passes(run) - 1)
        yield Message("context", name, forward, backward, group, "neighbours" if name == HALO else pattern)


def _expert(layers: _Counted, parallel: Parallel, run: Run, element: int) -> Iterator[Message]:
    experts = [(layer.mlp, count) for layer, count in layers if isinstance(layer.mlp, Experts)]
    again = 2 if run.recompute == "full" or "moe" in run.recompute_modules else 1
    if not experts:
        return
    tokens, hidden = run.tokens(parallel) / parallel.sequence_parts, layers[0][0].hidden_size
    if parallel.expert > 1:
        # There and back, and the weights of the choice beside the tokens.
        out = (parallel.expert - 1) / parallel.expert
        visits = sum(e.chosen * count for e, count in experts)
        there = visits * tokens * out * (hidden * element + 4)
        back = visits * tokens * out * hidden * element
        both = there + back
        group = groups(parallel)["expert"]
        yield Message("expert", "tokens to experts and back", both, both * again, group, "all-to-all")
    if parallel.expert_tensor > 1:
        each = sum(e.visits(parallel) * count for e, count in experts) * run.tokens(parallel)
        part = (parallel.expert_tensor - 1) / parallel.expert_tensor
        both = 2 * part * each * hidden * element
        yield Message("tensor", "experts", both, both * again, Group(parallel.expert_tensor, 1))


def _pipeline(model: Model, parallel: Parallel, run: Run, stage: int, stages: int) -> Iterator[Message]:
    """Hidden states to the next stage, gradients to the one before; with chunks in a circle."""
    width = model.hidden_size + model.state_width
    one = (
        run.tokens(parallel) / parallel.sequence_parts * width * model.residual * run.micro_batches(parallel)
    )
    forward = parallel.chunks - (stage == stages - 1)
    backward = parallel.chunks - (stage == 0)
    group = groups(parallel)["pipeline"]
    yield Message("pipeline", "hidden states", forward * one, backward * one, group, "neighbours")


def _after(
    model: Model, parallel: Parallel, run: Run, stages: list[list[range]], stage: int
) -> Iterator[Message]:
    """Once a step: gradients and weights over data-parallel ranks, and what tensor-parallel ranks share."""
    parts = stage_parts(model, stages, stage)
    dense = sum(n * part.on_rank(parallel) for part, n in parts if part.cut != "expert")
    routed = sum(n * part.on_rank(parallel) for part, n in parts if part.cut == "expert")
    whole = sum(n * part.count for part, n in parts if part.cut == "whole")
    data = groups(parallel)["data"]
    beside = parallel.expert * parallel.expert_tensor
    for name, count, group in (
        ("gradients and weights", dense, data),
        ("experts' gradients and weights", routed, Group(parallel.expert_replicas, beside)),
    ):
        part = (group.size - 1) / group.size
        if not count or group.size == 1:
            continue
        gradients = part * count * run.gradient_bytes
        weights = part * count * model.element if run.distributed_optimizer else gradients
        yield Message("data", name, weights, gradients, group)
    if parallel.tensor > 1 and parallel.sequence:
        summed = 2 * (parallel.tensor - 1) / parallel.tensor * whole * run.gradient_bytes
        yield Message("tensor", WHOLE, 0, summed, groups(parallel)["tensor"])
    if len(stages) > 1 and model.tied and stage in (0, len(stages) - 1):
        table = model.embedding_parts()[0].on_rank(parallel) * run.gradient_bytes
        ends = Group(2, (parallel.pipeline - 1) * groups(parallel)["pipeline"].stride)
        yield Message("pipeline", TIED, 0, table, ends)
