"""Parallel layouts that a run could have, reckoned and ranked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cca_megatron.parallel.rules import exchanged_kv_heads
from cca_megatron.plan.attention import HeadAttention
from cca_megatron.plan.hardware import Gpu
from cca_megatron.plan.layers import Experts, Mlp, Model
from cca_megatron.plan.memory import Memory, memory
from cca_megatron.plan.parts import Parallel
from cca_megatron.plan.shapes import Run
from cca_megatron.plan.step import Step, step_time

_MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A layout, with what it takes."""

    parallel: Parallel
    run: Run
    memory: Memory
    step: Step

    def overrides(self, parallel: Parallel, run: Run) -> list[str]:
        """What to add to ``cca-megatron train RECIPE`` for this layout.

        Args:
            parallel: the recipe's own layout.
            run: how the recipe trains.
        """
        p, r = self.parallel, self.run
        settings = {
            "tensor-model-parallel-size": p.tensor,
            "sequence-parallel": str(p.sequence).lower(),
            "context-parallel-size": p.context,
            "pipeline-model-parallel-size": p.pipeline,
            "expert-model-parallel-size": p.expert,
            "expert-tensor-parallel-size": p.expert_tensor,
            "micro-batch-size": r.micro_batch,
        }
        settings |= _cut_evenly(parallel, run)
        overrides = [f"megatron.{name}={value}" for name, value in settings.items()]
        if r.recompute == "full":
            overrides += [
                "megatron.recompute-granularity=full",
                "megatron.recompute-method=uniform",
                "megatron.recompute-num-layers=1",
                "megatron.recompute-modules=null",
            ]
        elif r.recompute is None:
            overrides += ["megatron.recompute-granularity=null", "megatron.recompute-modules=null"]
        return overrides


def search(model: Model, gpus: int, run: Run, gpu: Gpu) -> list[Candidate]:
    """All layouts of this many GPUs that fit their memory, the fastest first.

    Tried are tensor (within a node), context, pipeline (without chunks) and expert parallelism in powers of
    two and what divides the layers, micro-batches of 1 to 8 samples, and recomputation of nothing, as in
    ``run`` and of everything. The global batch stays.
    """
    found = []
    for parallel in _layouts(model, gpus, run, gpu):
        for trial in _runs(run):
            for micro in _MICRO_BATCHES:
                if run.global_batch % (micro * parallel.data):
                    break
                one = replace(trial, micro_batch=micro)
                held = memory(model, parallel, one)
                if held.total > gpu.memory:
                    break
                found.append(Candidate(parallel, one, held, step_time(model, parallel, one, gpu)))
    return sorted(found, key=lambda candidate: candidate.step.seconds)


def _layouts(model: Model, gpus: int, run: Run, gpu: Gpu) -> Iterator[Parallel]:
    attention = model.layers[0].attention
    experts = [layer.mlp for layer in model.kinds if isinstance(layer.mlp, Experts)]
    for tensor in _powers_of_two(min(gpu.gpus_per_node, gpus)):
        if not _fits_tensor(model, tensor):
            continue
        for context in _powers_of_two(gpus // tensor):
            if run.sequence % (2 * context * tensor) or not _fits_context(attention, run, tensor, context):
                continue
            for pipeline in range(1, min(len(model.layers), gpus // (tensor * context)) + 1):
                data, rest = divmod(gpus, tensor * context * pipeline)
                if rest or len(model.layers) % pipeline or run.global_batch % data:
                    continue
                ways = _powers_of_two(min(experts[0].count, gpus // pipeline)) if experts else [1]
                for expert in ways:
                    if experts and (experts[0].count % expert or gpus // pipeline % expert):
                        continue
                    yield Parallel(
                        tensor=tensor,
                        sequence=tensor > 1,
                        context=context,
                        pipeline=pipeline,
                        expert=expert,
                        expert_tensor=1 if experts else tensor,
                        data=data,
                    )


def _runs(run: Run) -> list[Run]:
    own = replace(run, first_layers=None, last_layers=None, embedding_counts=False, loss_counts=False)
    whole = replace(
        own, recompute="full", recompute_method="uniform", recompute_layers=1, recompute_modules=frozenset()
    )
    nothing = replace(own, recompute=None, recompute_method=None, recompute_modules=frozenset())
    return list(dict.fromkeys((nothing, own, whole)))


def _cut_evenly(parallel: Parallel, run: Run) -> dict[str, str]:
    """Settings that undo what this recipe says about the layers of its pipeline stages."""
    settings = {}
    if parallel.chunks > 1:
        settings["num-virtual-stages-per-pipeline-rank"] = "null"
        settings["num-layers-per-virtual-pipeline-stage"] = "null"
    if run.first_layers is not None:
        settings["decoder-first-pipeline-num-layers"] = "null"
    if run.last_layers is not None:
        settings["decoder-last-pipeline-num-layers"] = "null"
    if run.embedding_counts:
        settings["account-for-embedding-in-pipeline-split"] = "false"
    if run.loss_counts:
        settings["account-for-loss-in-pipeline-split"] = "false"
    return settings


def _fits_tensor(model: Model, tensor: int) -> bool:
    attention = model.layers[0].attention
    widths = [layer.mlp.ffn for layer in model.kinds if isinstance(layer.mlp, Mlp)]
    if model.vocabulary % tensor or any(width % tensor for width in widths):
        return False
    if not isinstance(attention, HeadAttention):
        return True
    groups = attention.kv_heads
    return attention.query_heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)


def _fits_context(attention: object, run: Run, tensor: int, context: int) -> bool:
    if run.cp_comm_type != "a2a" or not isinstance(attention, HeadAttention):
        return True
    queries, keys = attention.query_heads // tensor, max(attention.kv_heads // tensor, 1)
    return exchanged_kv_heads(queries, keys, context) is not None


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]
