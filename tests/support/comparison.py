"""One model in two parallel layouts: logits and every parameter's gradient, in fp64 or below.

Layouts are compared through distributed checkpoints: the layout of one rank saves its weights, the other
loads them; after the backward pass the gradients take the same way back under the names of the weights. So
a comparison needs to know nothing about how a parameter is cut.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from cca_megatron import CCAConfig
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.layout import ContextLayout
from cca_megatron.parallel.packed import set_context_shard
from cca_megatron.specs import cca_decoder_block_spec
from support.closeness import assert_close, relative_error
from support.megatron import (
    SEQUENCE,
    VOCAB,
    Layout,
    gpt_model,
    load,
    parallel,
    randomize,
    save,
    shared_directory,
    tiny_config,
)

BOUND = 1e-10


@dataclass(frozen=True)
class Model:
    """A model and its input.

    ``documents`` are the lengths of the documents of one packed sample, which all data-parallel ranks get;
    without them the input is a batch of plain samples.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    cca: CCAConfig = field(default_factory=CCAConfig)
    documents: tuple[int, ...] | None = None
    padding: int = 0
    """Tokens after the last document."""
    contiguous: bool = False
    """Cut the packed sample in one chunk per rank, which Megatron does not know, and say so to the layer."""

    def build(self, layout: Layout, dtype: torch.dtype) -> list[GPTModel]:
        """The chunks of this rank's pipeline stage, on the current layout."""
        config = tiny_config(layout, params_dtype=dtype, **self.settings)
        stages = range(layout.vpp) if layout.vpp > 1 else [None]
        return [
            gpt_model(config, cca_decoder_block_spec(config, vp_stage=stage, cca=self.cca), vp_stage=stage)
            for stage in stages
        ]

    def tokens(self) -> Tensor:
        """[samples, tokens + 1], the same on every rank."""
        samples, length = max(4, dist.get_world_size()), SEQUENCE
        if self.documents is not None:
            samples, length = 1, sum(self.documents) + self.padding
        generator = torch.Generator().manual_seed(3)
        return torch.randint(0, VOCAB, (samples, length + 1), generator=generator).cuda()

    def ends(self) -> np.ndarray | None:
        return None if self.documents is None else np.cumsum([0, *self.documents])

    def packing(self, cut: ContextLayout, group: dist.ProcessGroup) -> dict[str, Any]:
        """What a packed sample adds to the arguments of the model."""
        if self.documents is None:
            return {}
        cu_seqlens = torch.tensor(self.ends(), dtype=torch.int32).cuda()
        longest = max(self.documents)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        if self.contiguous and group.size() > 1:
            device = torch.device("cuda", torch.cuda.current_device())
            set_context_shard(packed, ContextShard(cut, group, device))
        return {"packed_seq_params": packed}

    def cut(self, tokens: int, size: int) -> ContextLayout:
        """How a sample lies on context-parallel ranks."""
        if self.contiguous:
            return ContextLayout.contiguous(tokens, size, self.ends())
        if self.documents is not None and self.cca.packed_zigzag == "document":
            return ContextLayout.zigzag_documents(tokens, size, self.ends())
        return ContextLayout.zigzag(tokens, size, self.ends())


@dataclass
class Result:
    """Of one forward and backward pass."""

    logits: Tensor
    """[samples, tokens, vocabulary], fp64, on every rank."""
    gradients: dict[str, Tensor]
    """By the parameters' names in the layout of one rank, fp64."""


_references: dict[str, tuple[str, Result]] = {}
_directories = contextlib.ExitStack()


def reference(model: Model) -> tuple[str, Result]:
    """The weights' directory, and the result of the layout of one rank in fp64; computed once per model."""
    key = repr(model)
    if key not in _references:
        directory = _directories.enter_context(shared_directory())
        with parallel(Layout()):
            (chunk,) = model.build(Layout(), torch.float64)
            randomize(chunk)
            save([chunk], f"{directory}/weights")
        _references[key] = directory, run(model, Layout(), torch.float64, f"{directory}/weights")
    return _references[key]


def forget_references() -> None:
    """Delete the weights on disk."""
    _references.clear()
    _directories.close()


def run(model: Model, layout: Layout, dtype: torch.dtype, weights: str) -> Result:
    """Load the weights in this layout and dtype, and run it once."""
    with shared_directory() as directory:
        with parallel(layout):
            chunks = model.build(layout, dtype)
            load(chunks, weights)
            # For bf16; what it calls fp32 is less than fp64 parameters have.
            settings = {"overlap_grad_reduce": False, "grad_reduce_in_fp32": dtype == torch.bfloat16}
            config = DistributedDataParallelConfig(**settings)
            ddps = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
            logits = forward_backward(model, layout, ddps)
            _gradients_as_weights(chunks)
            save(chunks, f"{directory}/gradients")
        with parallel(Layout()):
            whole = model.build(Layout(), torch.float64)
            load(whole, f"{directory}/gradients")
    return Result(logits.double(), {n: p.detach().clone() for n, p in whole[0].named_parameters()})


def compare(layout: Layout, model: Model, bound: float = BOUND) -> None:
    """Fail unless this layout computes in fp64 what one rank does."""
    weights, expected = reference(model)
    got = run(model, layout, torch.float64, f"{weights}/weights")
    assert_close("logits", expected.logits, got.logits, bound)
    for name, gradient in expected.gradients.items():
        assert gradient.any(), f"gradient of {name} is zero: nothing is compared"
        assert_close(f"gradient of {name}", gradient, got.gradients[name], bound)


def compare_rounding(layout: Layout, model: Model, dtype: torch.dtype, floor: float) -> None:
    """Fail if in this dtype this layout is twice as far from fp64 as one rank, and further than the floor.

    A scalar's gradient is a sum in which most cancels, so a bound for all of them says little; and of one or
    two numbers the error is a matter of chance: four times, then.
    """
    weights, exact = reference(model)
    one, other = (run(model, where, dtype, f"{weights}/weights") for where in (Layout(), layout))
    for name, reference_value in {"logits": exact.logits, **exact.gradients}.items():
        values = [r.logits if name == "logits" else r.gradients[name] for r in (one, other)]
        of_one, error = (relative_error(reference_value, value) for value in values)
        times = 2 if reference_value.numel() > 2 else 4
        assert error <= max(times * of_one, floor), f"{name}: error {error:.2e}, on one rank {of_one:.2e}"


def forward_backward(model: Model, layout: Layout, ddps: list[DistributedDataParallel]) -> Tensor:
    """Megatron's own schedule over the global batch: gathered logits; gradients are reduced.

    The loss is a cross-entropy in the model's dtype over gathered logits: Megatron's own computes in fp32.
    """
    data_parallel, context = (
        parallel_state.get_data_parallel_group(),
        parallel_state.get_context_parallel_group(),
    )
    microbatches = layout.pp if layout.vpp > 1 else 1  # as many as interleaving needs
    tokens = model.tokens()
    if model.documents is not None:
        tokens = tokens.expand(data_parallel.size() * microbatches, -1)
    mine = tokens.chunk(data_parallel.size())[data_parallel.rank()].chunk(microbatches)
    length = tokens.shape[1] - 1
    cut = model.cut(length, context.size())
    here = torch.from_numpy(cut.token_indices(context.rank())).cuda()
    seen = []

    def forward_step(batches: Iterator[Tensor], chunk: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(batches)
        positions = torch.arange(length).cuda().expand(batch.shape[0], -1)
        out = chunk(batch[:, here], positions[:, here], None, **model.packing(cut, context))
        return out, partial(loss, batch[:, 1:][:, here])

    def loss(labels: Tensor, out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = gather_from_tensor_model_parallel_region(out)
        seen.append(logits.detach())
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return value / context.size(), {}  # the schedule multiplies by it

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in ddps] if len(ddps) > 1 else iter(mine),
        model=ddps if len(ddps) > 1 else ddps[0],
        num_microbatches=microbatches,
        seq_length=length,
        micro_batch_size=mine[0].shape[0],
    )
    if ddps[0].module.config.finalize_model_grads_func is None:  # else the schedule has called it
        finalize_model_grads(ddps)
    logits = None
    if seen:
        order = np.argsort(np.concatenate([cut.token_indices(r) for r in range(context.size())]))
        logits = _gathered(torch.cat(seen), context, dim=1)[:, order]
        logits = _gathered(logits, data_parallel, dim=0)
        logits = logits[:1] if model.documents is not None else logits
    box = [logits]
    stages = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(box, dist.get_global_rank(stages, stages.size() - 1), group=stages)
    return box[0].to(tokens.device)


def _gathered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def _gradients_as_weights(chunks: list[GPTModel]) -> None:
    """Let checkpoints see the gradients, in fp64, under the names of the weights."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.double()
