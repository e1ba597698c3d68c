"""Losses and gradients of a small model, with the loss of all tokens at once or in chunks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn import functional as F

from cca_megatron.specs import cca_decoder_block_spec
from cca_megatron.training.loss import chunked_loss
from support.closeness import assert_close
from support.megatron import SEQUENCE, Layout, batch_of_tokens, gpt_model, parallel, randomize, tiny_config

Results = dict[str, Tensor]
MICROBATCHES, SAMPLES = 2, 2


def in_double(labels: Tensor, logits: Tensor) -> Tensor:
    """A model's loss in fp64; Megatron's own computes in fp32."""
    logits = gather_from_tensor_model_parallel_region(logits)
    return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


def computed(
    layout: Layout,
    chunk_size: int | None,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[GPTModel], None] | None = None,
    ddp: dict[str, Any] | None = None,
    **settings: Any,
) -> Results:
    """This rank's losses and gradients after Megatron's own schedule over two micro-batches.

    Args:
        layout: the parallel layout.
        chunk_size: tokens in a chunk; None for Megatron's own path.
        tied: use the embedding as output weight.
        dtype: of the weights.
        prepare: called with the model before it runs.
        ddp: settings of data parallelism.
        settings: of the model's configuration.
    """
    with parallel(layout):
        config = tiny_config(layout, params_dtype=dtype, **settings)
        spec = cca_decoder_block_spec(config)
        model = gpt_model(config, spec, share_embeddings_and_output_weights=tied)
        randomize(model, seed=dist.get_rank())
        if prepare is not None:
            prepare(model)
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(**(ddp or {})), model)
        losses = _forward_backward(wrapped, chunk_size, layout)
        results = {
            f"gradient of {n}": p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad
        }
    return {"losses": torch.cat(losses), **results} if losses else results


def _forward_backward(model: Any, chunk_size: int | None, layout: Layout) -> list[Tensor]:
    tokens = batch_of_tokens(MICROBATCHES * SAMPLES)
    length = SEQUENCE // layout.cp
    here = slice(length * parallel_state.get_context_parallel_rank(), None)
    processor = {} if chunk_size is None else {
        "output_processor": chunked_loss,
        "output_processor_context": chunk_size,
    }  # fmt: skip
    seen: list[Tensor] = []

    def forward_step(batches: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(batches)[:, here][:, : length + 1]
        positions = torch.arange(length).cuda().expand(SAMPLES, -1)
        return chunk(batch[:, :-1], positions, None, labels=batch[:, 1:], **processor), loss

    def loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(losses.detach().clone())
        # Tokens count unequally, as with a mask.
        weights = torch.linspace(0, 1, losses.numel()).cuda().view_as(losses)
        return (losses * weights).sum() / SEQUENCE, {}

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(tokens.split(SAMPLES)),
        model=model,
        num_microbatches=MICROBATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=SAMPLES,
    )
    finalize_model_grads([model])
    return seen


def largest_chunk(layout: Layout, chunk_size: int) -> int:
    """The most tokens whose logits a rank computes at once."""
    sizes = []

    def prepare(model: GPTModel) -> None:
        right = model.compute_language_model_loss

        def counting(labels: Tensor, logits: Tensor) -> Tensor:
            sizes.append(labels.numel())
            assert logits.shape[:2] == labels.t().shape
            return right(labels, logits)

        model.compute_language_model_loss = counting

    computed(layout, chunk_size, prepare=prepare)
    return max(sizes)


def assert_same(expected: Results, got: Results, bound: float) -> None:
    """Fail unless every loss and gradient agrees, relative in norm."""
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert value.any(), f"{name} is zero: nothing is compared"
        assert_close(name, value, got[name], bound)
