"""The loss a few tokens at a time, so that the logits of all tokens are never in memory.

The logits of 131,072 tokens over a vocabulary of 262,272 are 137 GB in fp32. The forward pass here keeps one
loss per token and no logits; the backward pass computes each chunk's logits again and turns them into
gradients before it goes on to the next. The forward pass cannot make the gradients already, as in some fused
losses: what each token counts for (mask, mean over tokens, loss scale) is known only behind it.

A chunk goes through the model's own output layer and loss, so tensor and sequence parallelism, tied weights,
MuP and the fused loss are Megatron's. It takes one more product with the output weight than the plain loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def chunked_loss(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: int,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """The loss of each token; an ``output_processor`` for GPTModel, which calls it on the last stage.

    Args:
        hidden_states: [S, B, E], what the decoder returns; with sequence parallelism [S / TP, B, E].
        output_layer: Megatron's column-parallel linear layer: a share of the vocabulary on each rank.
        output_weight: [V / TP, E], where the embedding's is used; None for the layer's own.
        labels: [B, S], on every tensor-parallel rank.
        context: tokens in a chunk, given to the model as ``output_processor_context``. A chunk has at least
            one position of every sample and sequence-parallel rank.
        compute_language_model_loss: losses [B, S] of labels [B, S] and logits [S, B, V / TP].
        scale_logits: MuP's factor.

    Returns:
        [B, S], what the model returns without it: fp32, whatever the dtype of the weights.
    """
    shards = output_layer.tp_group.size() if output_layer.sequence_parallel else 1
    head = _Head(
        output_layer,
        compute_language_model_loss,
        scale_logits,
        positions=max(1, context // (labels.shape[0] * shards)),
    )
    weight = output_layer.weight if output_weight is None else output_weight
    # Sequence parallelism gathers the same positions of all ranks into one chunk.
    losses: Tensor = _ChunkedLoss.apply(hidden_states, weight, labels.unflatten(1, (shards, -1)), head)
    return losses.flatten(1)


@dataclass(frozen=True)
class _Head:
    """What follows the decoder, and how much of a rank's sequence goes through it at once."""

    output_layer: Any
    compute_loss: Callable[[Tensor, Tensor], Tensor]
    scale_logits: Callable[[Tensor], Tensor]
    positions: int

    def losses(self, hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Losses [B, shards, positions] of one chunk: hidden states [positions, B, E], labels as losses."""
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return self.compute_loss(labels.flatten(1), self.scale_logits(logits)).view_as(labels)

    def gradients(
        self, hidden_states: Tensor, weight: Tensor, labels: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Those of one chunk's hidden states and of the weight, from that of its losses."""
        with torch.enable_grad():
            hidden_states = hidden_states.detach().requires_grad_()
            losses = self.losses(hidden_states, weight, labels)
        inputs = (hidden_states, weight) if weight.requires_grad else (hidden_states,)
        # Not backward(): the hooks of data parallelism must run once, when all chunks are done.
        of_hidden, *of_weight = torch.autograd.grad(losses, inputs, gradient, allow_unused=True)
        return of_hidden, of_weight[0] if of_weight else None


class _ChunkedLoss(torch.autograd.Function):
    """Losses [B, shards, S / shards] chunk by chunk, and chunk by chunk again for the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, labels: Tensor, head: _Head) -> Tensor:
        ctx.save_for_backward(hidden_states, weight, labels)
        ctx.head = head
        chunks = zip(hidden_states.split(head.positions), labels.split(head.positions, -1), strict=True)
        return torch.cat([head.losses(hidden, weight, label) for hidden, label in chunks], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_states, weight, labels = ctx.saved_tensors
        head: _Head = ctx.head
        of_hidden, of_weight = torch.empty_like(hidden_states), None
        total = _weight_gradient_sum(weight, head.output_layer)
        chunks = zip(
            hidden_states.split(head.positions),
            of_hidden.split(head.positions),
            labels.split(head.positions, -1),
            gradients[0].split(head.positions, -1),
            strict=True,
        )
        for hidden, out, label, gradient in chunks:
            if total is not None and of_weight is not None:
                total += of_weight
            of_weight = None  # frees it before the next chunk's logits
            part, of_weight = head.gradients(hidden, weight, label, gradient)
            out.copy_(part)
        if total is not None and of_weight is not None and total is not getattr(weight, "main_grad", None):
            of_weight = total.add_(of_weight).to(weight.dtype)
        return of_hidden, of_weight, None, None


def _weight_gradient_sum(weight: Tensor, output_layer: Any) -> Tensor | None:
    """What all chunks but the last add their gradient of the weight to; None if that is not done here.

    It has the precision of fp32 at least, as many parts would round in bf16 with every addition. Where it is
    Megatron's ``main_grad``, the last chunk's takes the usual way to there, and with it the hooks of data
    parallelism run.
    """
    if not weight.requires_grad or output_layer.gradient_accumulation_fusion:  # then the layer adds by itself
        return None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.dtype == dtype:
        return main_grad
    return torch.zeros_like(weight, dtype=dtype)
