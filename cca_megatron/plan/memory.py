"""Memory of one GPU in a training step, in bytes.

The peak is what stays (weights, gradients, optimizer, activations of the micro-batches under way, buffers)
and the larger of two things that come and go: logits with their gradient, and the layer that is in its
backward pass. The CUDA context, NCCL's own buffers and fragmentation are not in it; they take what is left of
the GPU above its nominal size (:mod:`cca_megatron.plan.hardware`).
"""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace

from cca_megatron.plan.layers import Kept, Layer, Mlp, Model
from cca_megatron.plan.parts import Parallel, Part
from cca_megatron.plan.shapes import Run, model_from_args, parallel_from_args, run_from_args

# What Megatron's --recompute-modules let go of. With Transformer Engine a norm that is fused into the linear
# after it cannot be recomputed, which leaves the one before experts.
_RECOMPUTED = {
    "core_attn": {"log_sum_exp"},
    "moe_act": {"moe_act_out"},
    "mlp": {"mlp", "mlp_act"},
    "moe": {"router", "expert_fc1", "moe_act", "moe_act_out", "shared_experts"},
    "shared_experts": {"shared_experts"},
    "layernorm": {"mlp_input"},
}
_ATTENTION = {"core_attn", "attn_proj", "mix", "qkv_linear"}
_WITHOUT_GRADIENT = {"attn_norm", "mlp_norm", "residual", "dropout", "input_scale", "log_sum_exp"}
"""Beside the others: masks and sums have none, and that of the residual stream is no more than one row."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that has most."""

    stage: int
    """Pipeline stage of that GPU."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass, of all micro-batches under way."""
    logits: float
    """Logits, their fp32 copy and gradient, while the loss is computed, or the output weight's gradient."""
    working: float
    """Of the layer in its backward pass: what is recomputed, and gradients."""
    communication: float
    """Buffers of tensor, context, expert and pipeline parallelism."""
    offloaded: float
    """Activations on the host."""
    under_way: float
    """Micro-batches whose activations are kept."""
    layers: tuple[float, ...]
    """Kept by each layer of the stage for one micro-batch."""

    @property
    def total(self) -> float:
        """The peak."""
        stays = self.weights + self.gradients + self.optimizer + self.activations + self.communication
        return stays + max(self.logits, self.working)


def memory_per_gpu(args: Namespace) -> Memory:
    """Memory of the fullest GPU of the run that these arguments start.

    Args:
        args: parsed, and completed by Megatron (:func:`cca_megatron.training.command.build_command`), for
            whichever device. Reckoned is a run on GPUs with Transformer Engine and the fused kernels.

    Raises:
        RecipeError: a setting that is not reckoned.
    """
    return memory(model_from_args(args), parallel_from_args(args), run_from_args(args))


def memory(model: Model, parallel: Parallel, run: Run) -> Memory:
    """The same from shapes."""
    stages = stage_layers(len(model.layers), parallel, run)
    plain = run if run.recompute != "full" else replace(run, recompute=None)
    each = [_one_layer(model, layer, parallel, plain) for layer in model.kinds]
    return max(
        (_of_stage(model, parallel, run, stages, stage, each) for stage in range(len(stages))),
        key=lambda memory: memory.total,
    )


def stage_layers(layers: int, parallel: Parallel, run: Run) -> list[list[range]]:
    """Layers of each pipeline stage, chunk by chunk, as Megatron cuts them."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=run.first_layers,
        num_layers_in_last_pipeline_stage=run.last_layers,
        account_for_embedding_in_pipeline_split=run.embedding_counts,
        account_for_loss_in_pipeline_split=run.loss_counts,
    )

    def chunk(stage: int, number: int) -> range:
        at = number if parallel.chunks > 1 else None
        first = get_transformer_layer_offset(config, at, stage)
        return range(first, first + get_num_layers_to_build(config, at, stage))

    return [[chunk(stage, n) for n in range(parallel.chunks)] for stage in range(parallel.pipeline)]


def stage_parts(model: Model, stages: list[list[range]], stage: int) -> list[tuple[Part, int]]:
    """Parameters that a pipeline stage holds, each with how often."""
    is_first, is_last = stage == 0, stage == len(stages) - 1
    layers = model.counted(number for chunk in stages[stage] for number in chunk)
    parts = [(part, count) for layer, count in layers for part in layer.parts()]
    if is_first:
        parts += [(part, 1) for part in model.embedding_parts()]
    if is_last:
        parts += [(part, 1) for part in model.output_parts(has_embedding=is_first)]
    return parts


def micro_batches_under_way(stage: int, parallel: Parallel, run: Run) -> float:
    """Whose activations a stage keeps at most; with chunks, in whole micro-batches of all of them."""
    count, behind = run.micro_batches(parallel), parallel.pipeline - stage
    if parallel.chunks == 1:
        return min(behind, count)
    warm_up = 2 * (behind - 1) + (parallel.chunks - 1) * parallel.pipeline
    return min(warm_up + 1, count * parallel.chunks) / parallel.chunks


def _of_stage(
    model: Model,
    parallel: Parallel,
    run: Run,
    stages: list[list[range]],
    stage: int,
    each: list[tuple[float, float, float]],
) -> Memory:
    parts = stage_parts(model, stages, stage)
    dense = sum(n * part.on_rank(parallel) for part, n in parts if part.cut != "expert")
    routed = sum(n * part.on_rank(parallel) for part, n in parts if part.cut == "expert")
    shards = [1.0, 1.0]
    if run.distributed_optimizer:
        replicas = (parallel.replicas, parallel.expert_replicas)
        shards = [max(1.0, count / run.optimizer_instances) for count in replicas]
    optimizer = (dense / shards[0] + routed / shards[1]) * run.optimizer_bytes * run.optimizer_on_gpu

    tokens, under_way = run.tokens(parallel), micro_batches_under_way(stage, parallel, run)
    held = [_held(model, [each[model.kind_of[n]] for n in chunk], parallel, run) for chunk in stages[stage]]
    kept = [bytes_ * tokens for chunk in held for bytes_ in chunk.kept]
    offloaded = sum(chunk.offloaded for chunk in held) * tokens * under_way
    activations = sum(kept) * under_way
    logits = 0.0
    if stage == parallel.pipeline - 1:
        # Input and output of the final norm.
        activations += 2 * model.hidden_size * model.element / parallel.sequence_parts * tokens
        logits = _logits(model, parallel, run, tokens)
    return Memory(
        stage=stage,
        weights=(dense + routed) * model.element,
        gradients=(dense + routed) * run.gradient_bytes,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        working=max((chunk.working for chunk in held), default=0.0) * tokens,
        communication=_buffers(model, parallel, run, tokens),
        offloaded=offloaded,
        under_way=under_way,
        layers=tuple(kept),
    )


@dataclass(frozen=True)
class _Held:
    """Of a chunk of layers, in bytes per token."""

    kept: tuple[float, ...]
    working: float
    offloaded: float


def _held(model: Model, layers: list[tuple[float, float, float]], parallel: Parallel, run: Run) -> _Held:
    """Args: layers, as :func:`_one_layer` gives them without full recomputation."""
    if run.recompute != "full":
        return _Held(
            tuple(kept for kept, _, _ in layers),
            max((working for _, working, _ in layers), default=0.0),
            sum(offloaded for _, _, offloaded in layers),
        )
    unit = run.recompute_layers
    recomputed = len(layers) if run.recompute_method == "uniform" else min(unit, len(layers))
    group = unit if run.recompute_method == "uniform" else 1
    own = parallel.tensor if run.distribute_saved else parallel.sequence_parts
    start = (model.hidden_size * model.residual + model.state_width * model.element) / own
    starts = [start if number % group == 0 else 0.0 for number in range(recomputed)]
    groups = [layers[first : first + group] for first in range(0, recomputed, group)]
    working = [sum(kept for kept, _, _ in part) + max(work for _, work, _ in part) for part in groups]
    working += [work for _, work, _ in layers[recomputed:]]
    kept = (*starts, *(kept for kept, _, _ in layers[recomputed:]))
    return _Held(kept, max(working, default=0.0), offloaded=0.0)


def _one_layer(model: Model, layer: Layer, parallel: Parallel, run: Run) -> tuple[float, float, float]:
    """Bytes per token: kept on the GPU; alive beside them in the backward pass; on the host."""
    kept = layer.kept(parallel, model.element, model.residual)
    gone = {name for module in run.recompute_modules for name in _RECOMPUTED.get(module, ())}
    if isinstance(layer.mlp, Mlp):
        gone.discard("mlp_input")
    recomputed = _sum(kept, gone)
    offloaded = _sum(kept, run.offload_modules - gone) * run.offload_fraction
    # Of each tensor that the attention or the MLP keeps there is one gradient.
    attention = _sum(kept, _ATTENTION)
    mlp = _sum(kept, set(kept) - _ATTENTION - _WITHOUT_GRADIENT)
    return _sum(kept, kept) - recomputed - offloaded, recomputed + max(attention, mlp), offloaded


def _sum(kept: Kept, names: Iterable[str]) -> float:
    return sum(kept.get(name, 0.0) for name in names)


def _logits(model: Model, parallel: Parallel, run: Run, tokens: float) -> float:
    """Megatron's loss holds the logits and a copy in fp32, or their gradient in fp32 and in bf16.

    Behind it stands the gradient in bf16 alone, beside that of the output weight before it is added up.
    """
    both = model.element if run.in_place_loss or model.element == 4 else model.element + 4
    at_once = tokens if run.loss_chunk is None else min(tokens, run.loss_chunk)
    per_word = max(at_once * both, (at_once + model.hidden_size) * model.element)
    logits = model.vocabulary / parallel.tensor * per_word
    gathered = at_once * model.hidden_size * model.element * (parallel.sequence_parts > 1)
    return logits + gathered


def _buffers(model: Model, parallel: Parallel, run: Run, tokens: float) -> float:
    """What is received or about to be sent, beside what layers keep."""
    hidden = tokens * model.hidden_size
    buffers = hidden * model.element if parallel.sequence_parts > 1 else 0.0
    if parallel.pipeline > 1:
        buffers += (
            2
            * (hidden * model.residual + tokens * model.state_width * model.residual)
            / (parallel.sequence_parts)
        )
    if parallel.context > 1:
        shape = model.layers[0].attention.traffic_shape(model.element)
        heads = max(shape.kv_heads // parallel.tensor, 1)
        others = {"p2p": 1, "all_gather": parallel.context}.get(run.cp_comm_type, 0)
        # Keys and values of other ranks, and gradients for them, summed in fp32.
        buffers += others * 2 * heads * shape.head_dim * tokens * (model.element + 4)
    experts = [layer.mlp for layer in model.kinds if not isinstance(layer.mlp, Mlp)]
    if experts and parallel.expert * parallel.expert_tensor > 1:
        buffers += hidden * model.element * max(mlp.visits(parallel) for mlp in experts)
    return buffers
