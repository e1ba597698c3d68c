"""Time of a training step: what each GPU computes, moves and sends, and what of it can run at once.

A model, not a measurement. Matrix products and core attention run at a share of the GPU's peak, everything
else at a share of its memory bandwidth. Communication of tensor and expert parallelism stops the computation;
keys and values of a ring travel beside attention; gradients and weights of data parallelism beside the
backward and forward passes, as far as these last.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

from cca_megatron.plan import hardware
from cca_megatron.plan.attention import MIX, CompressedAttention
from cca_megatron.plan.communication import (
    EMBEDDING,
    HALO,
    OUTPUT,
    TIED,
    WHOLE,
    Group,
    Message,
    communication,
)
from cca_megatron.plan.hardware import Gpu
from cca_megatron.plan.layers import DENSE, EXPERTS, ROUTER, SHARED, Layer, Model
from cca_megatron.plan.memory import stage_layers, stage_parts
from cca_megatron.plan.parts import Parallel
from cca_megatron.plan.shapes import Run

_RECOMPUTED_FLOPS = {
    "moe": (EXPERTS, ROUTER, SHARED),
    "mlp": (DENSE,),
    "shared_experts": (SHARED,),
    "core_attn": ("core attention",),
}
_ACCESSES = 3
"""Each kept tensor is written once, and read by the element-wise kernel and the matrix product after it."""
_LOSS_BYTES = 54
"""Per logit, of Megatron's cross entropy: a dozen passes over the fp32 copy, three over those in bf16."""
_ADAM_BYTES = 30
"""Per parameter: gradient, weight and moments read, the latter three written in fp32, the weight in bf16."""


@dataclass(frozen=True)
class Step:
    """A training step, in seconds and what follows from them."""

    seconds: float
    parts: dict[str, float]
    """Seconds of the slowest pipeline stage by what they go to; they add up to the step."""
    tokens_per_second: float
    """Of all GPUs together."""
    flops: float
    """Of the model, forward and backward, in a step; what is recomputed does not count."""
    mfu: float
    """Share of the peak that these make; of that of TF32 with fp32 weights."""


def step_time(model: Model, parallel: Parallel, run: Run, gpu: Gpu, flash: bool = True) -> Step:
    """Time of one step.

    Args:
        model: what is trained.
        parallel: on which layout.
        run: how.
        gpu: on what.
        flash: core attention is fused; otherwise it writes and reads its square of logits, as before 2023.
    """
    if model.element == 4:  # Transformer Engine multiplies fp32 as TF32
        gpu = replace(gpu, peak=gpu.peak * hardware.TF32_SHARE)
    stages = stage_layers(len(model.layers), parallel, run)
    count = run.micro_batches(parallel)
    passes = _all_stages(model, parallel, run, gpu, stages, flash)
    slowest = max(range(len(stages)), key=lambda stage: sum(passes[stage].values()))
    per_pass = passes[slowest]
    one = sum(per_pass.values())
    parts = {name: seconds * count for name, seconds in per_pass.items()}
    # The first micro-batch passes the other stages before this one is busy, or after it.
    others = sum(sum(one_pass.values()) for one_pass in passes) - one
    parts["pipeline bubble"] = others / parallel.chunks

    sent = communication(model, parallel, run, slowest)
    parts["data parallel"] = _exposed([message for message in sent if message.axis == "data"], run, gpu, one)
    for message in sent:
        if message.name in (WHOLE, TIED):
            name = "tensor parallel" if message.axis == "tensor" else "pipeline parallel"
            parts[name] = parts.get(name, 0.0) + _transfer(message.group, message.sent, message.pattern, gpu)
    parts["optimizer"] = _optimizer(model, parallel, run, stages, slowest, gpu)
    parts["overhead"] = sum(parts.values()) * hardware.STEP_OVERHEAD
    parts = {name: seconds for name, seconds in parts.items() if seconds}

    seconds = sum(parts.values())
    tokens = count * run.micro_batch * run.sequence * parallel.data
    flops = 3 * sum(model.flops(run.sequence).values()) * tokens
    return Step(seconds, parts, tokens / seconds, flops, flops / seconds / (gpu.peak * parallel.gpus))


def _all_stages(
    model: Model, parallel: Parallel, run: Run, gpu: Gpu, stages: list[list[range]], flash: bool
) -> list[dict[str, float]]:
    """Of each pipeline stage, seconds of one micro-batch; stages of the same layers are reckoned once."""
    found: dict[tuple[object, ...], dict[str, float]] = {}
    passes = []
    for stage, chunks in enumerate(stages):
        kinds = sorted(model.kind_of[number] for chunk in chunks for number in chunk)
        key = (stage == 0, stage == len(stages) - 1, *kinds)
        if key not in found:
            found[key] = _micro_batch(model, parallel, run, gpu, stages, stage, flash)
        passes.append(found[key])
    return passes


def _micro_batch(
    model: Model, parallel: Parallel, run: Run, gpu: Gpu, stages: list[list[range]], stage: int, flash: bool
) -> dict[str, float]:
    """Seconds of one micro-batch on this stage, forward and backward."""
    tokens = run.tokens(parallel)
    parts: dict[str, float] = defaultdict(float)
    layers = model.counted(number for chunk in stages[stage] for number in chunk)
    for layer, times in layers:
        for name, seconds in _layer(model, layer, parallel, run, gpu, tokens, flash).items():
            parts[name] += times * seconds
    count = sum(times for _, times in layers)
    if stage == len(stages) - 1:
        logits = tokens * model.vocabulary / parallel.tensor
        products = 3 * 2 * model.hidden_size * logits / (gpu.peak * gpu.gemm)
        if run.loss_chunk is not None:  # logits are made again for the backward pass
            products *= 4 / 3
        per_logit = 2 * model.element if run.in_place_loss else _LOSS_BYTES
        parts["output and loss"] += products + logits * per_logit / _bandwidth(gpu)
    compute = sum(parts.values())
    attention = parts["core attention"]
    sent = communication(model, parallel, run, stage)
    passes = run.micro_batches(parallel)
    for message in sent:
        seconds = _transfer(message.group, message.sent / passes, message.pattern, gpu)
        if message.axis == "tensor" and message.name != WHOLE:
            once = message.name in (EMBEDDING, OUTPUT)
            parts["tensor parallel"] += seconds + _latency(1 if once else count)
        elif message.axis == "expert":
            parts["expert parallel"] += seconds + 2 * _latency(count)
        elif message.axis == "context":
            hidden = attention if message.pattern == "neighbours" and message.name != HALO else 0.0
            parts["context parallel"] += max(0.0, seconds - hidden) + _latency(count)
        elif message.axis == "pipeline" and message.name == "hidden states":
            # Chunks send beside the computation of others.
            waits = seconds if parallel.chunks == 1 else max(0.0, seconds - compute)
            parts["pipeline parallel"] += waits + 2 * hardware.LATENCY
    return dict(parts)


def _layer(
    model: Model, layer: Layer, parallel: Parallel, run: Run, gpu: Gpu, tokens: float, flash: bool
) -> dict[str, float]:
    """Seconds of one layer, forward and backward, without communication."""
    product = gpu.peak * gpu.gemm
    flops = layer.flops(run.sequence)
    forward = {
        name: tokens * count / (parallel.sequence_parts if name == ROUTER else parallel.tensor) / product
        for name, count in flops.items()
        if name not in ("core attention", MIX)
    }
    weights = sum(part.on_rank(parallel) for part in layer.parts()) * model.element
    moved = _ACCESSES * sum(layer.kept(parallel, model.element, model.residual).values()) * tokens + weights
    memory = moved / _bandwidth(gpu)
    core = _core_attention(layer, flops["core attention"], parallel, run, gpu, tokens, flash)
    mix = _mix(layer, parallel, model.element, gpu, tokens)

    again = set(flops) if run.recompute == "full" else set()
    again |= {name for module in run.recompute_modules for name in _RECOMPUTED_FLOPS.get(module, ())}
    recomputed = sum(seconds for name, seconds in forward.items() if name in again)
    recomputed += core[0] * ("core attention" in again) + memory * (run.recompute == "full")
    recomputed += mix[0] * (run.recompute == "full" or getattr(layer.attention, "recompute_mix", False))
    return {
        "matrix products": 3 * sum(forward.values()),
        "core attention": sum(core),
        "attention mix": sum(mix),
        "memory-bound kernels": 3 * memory,
        "recomputation": recomputed,
    }


def _core_attention(
    layer: Layer, flops: float, parallel: Parallel, run: Run, gpu: Gpu, tokens: float, flash: bool
) -> tuple[float, float]:
    own = tokens * flops / parallel.tensor
    if flash:
        shares = gpu.attention
        # The backward pass computes the logits once more: five products instead of two.
        return own / (gpu.peak * shares[0]), 2.5 * own / (gpu.peak * shares[1])
    # Both halves of the square; the softmax and the dropout each read and write it, and keep a mask of bytes.
    heads = layer.attention.query_heads / parallel.tensor
    square = heads * tokens * run.sequence
    seconds = 2 * own / (gpu.peak * gpu.gemm) + square * 11 / _bandwidth(gpu)
    return seconds, 2 * seconds


def _mix(layer: Layer, parallel: Parallel, element: int, gpu: Gpu, tokens: float) -> tuple[float, float]:
    """The fused kernels at their goal, forward and backward: every tensor is read and written once."""
    attention = layer.attention
    if not isinstance(attention, CompressedAttention):
        return 0.0, 0.0
    groups = min(parallel.tensor, attention.kv_heads)
    latents, values = attention.channels / groups, attention.key_width / groups
    forward = (2 * latents + 2 * values) * element
    backward = (8 * latents + 5 * values) * element
    speed = tokens / (gpu.bandwidth * hardware.MEMORY_SHARE)
    return forward * speed, backward * speed


def _transfer(group: Group, sent: float, pattern: str, gpu: Gpu) -> float:
    """Seconds in which a rank sends these bytes."""
    on_node = group.on_node(gpu.gpus_per_node)
    if on_node >= group.size:
        return sent / gpu.nvlink
    card = gpu.network * hardware.NETWORK_SHARE
    if pattern == "neighbours":
        return sent / card
    if pattern == "all-to-all":
        away = (group.size - on_node) / (group.size - 1)
        return max(sent * away / card, sent * (1 - away) / gpu.nvlink)
    # A ring leaves the node once, over the cards of all its members there.
    return sent / min(gpu.nvlink, card * on_node)


def _latency(layers: int) -> float:
    """Of the collectives of all layers: two each, forward and backward."""
    return 4 * hardware.LATENCY * layers


def _exposed(messages: list[Message], run: Run, gpu: Gpu, one_pass: float) -> float:
    """Seconds of data parallelism that nothing hides; dense weights and experts share what does."""
    gradients = sum(_transfer(each.group, each.backward, each.pattern, gpu) for each in messages)
    weights = sum(_transfer(each.group, each.forward, each.pattern, gpu) for each in messages)
    if run.overlap_gradients:
        gradients = max(0.05 * gradients, gradients - hardware.HIDDEN_GRADIENTS * one_pass * 2 / 3)
    if run.overlap_weights:
        weights = max(0.05 * weights, weights - one_pass / 3)
    return gradients + weights


def _optimizer(
    model: Model, parallel: Parallel, run: Run, stages: list[list[range]], stage: int, gpu: Gpu
) -> float:
    parts = stage_parts(model, stages, stage)
    held = sum(n * part.on_rank(parallel) / _shards(parallel, run, part.cut == "expert") for part, n in parts)
    on_gpu = held * run.optimizer_on_gpu * _ADAM_BYTES / _bandwidth(gpu)
    # Gradients to the host and weights back.
    off = held * (1 - run.optimizer_on_gpu) * (4 + model.element) / hardware.HOST_BANDWIDTH
    return on_gpu + off


def _shards(parallel: Parallel, run: Run, is_expert: bool) -> float:
    if not run.distributed_optimizer:
        return 1.0
    return max(1.0, (parallel.expert_replicas if is_expert else parallel.replicas) / run.optimizer_instances)


def _bandwidth(gpu: Gpu) -> float:
    return gpu.bandwidth * hardware.MEMORY_SHARE
