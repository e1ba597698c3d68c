"""From prompts to continuations with a model in memory."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cca_megatron._compat import GPTModel, InferenceMode
from cca_megatron.generation_cache import GenerationContext
from cca_megatron.vocabulary import known_vocabulary


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Raises:
        ValueError: a setting is out of its range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}: must be at least 0; 0 takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie above 0 and be at most 1; 0.9 works")


@torch.inference_mode()
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    vocab_size: int | None = None,
    chunk_size: int = 2048,
    on_token: Callable[[int], None] | None = None,
) -> tuple[list[list[int]], GenerationContext]:
    """Continue a batch of prompts, which may differ in length.

    Under tensor parallelism every rank calls it with the same arguments and gets the same tokens.

    Args:
        model: one pipeline stage with the whole model, in evaluation mode.
        prompts: token numbers, at least one each. :func:`unpadded` makes them of a padded batch.
        max_new_tokens: at most so many for each.
        sampling: None takes the likeliest token.
        stop: a sequence ends with any of these, which is not returned.
        vocab_size: tokens that may be drawn; None means all, without rows that pad the
            embeddings where that is known (:mod:`cca_megatron.vocabulary`).
        chunk_size: tokens of the prompts that go through the model at once.
        on_token: called with the number of tokens after each.

    Returns:
        The new tokens of each prompt, and the context with the cache.

    Raises:
        ValueError: a prompt is empty, or a number is out of its range.
    """
    vocab_size = vocab_size or known_vocabulary(model) or model.vocab_size
    _check(prompts, max_new_tokens, chunk_size, vocab_size)
    _check_length(model, max(map(len, prompts)) + max_new_tokens)
    sampling = sampling or Sampling()
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    context = GenerationContext(len(prompts), longest + max_new_tokens, padding if padding.any() else None)
    generator = torch.Generator().manual_seed(sampling.seed)

    def run(part: Tensor) -> Tensor:
        start = context.sequence_len_offset
        # Of use to learned positions only: RoPE's are counted where the padding is known, too.
        positions = (start + torch.arange(part.shape[1], device=device) - padding[:, None]).clamp(min=0)
        logits = model(part, positions, None, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(part.shape[1])
        return logits[:, -1, :vocab_size]

    new: list[list[int]] = [[] for _ in prompts]
    live = set(range(len(prompts)))
    with InferenceMode.active():
        for part in tokens.split(chunk_size, 1):
            logits = run(part)
        context.enable_decode_mode()
        for count in range(1, max_new_tokens + 1):
            chosen = _next_token(logits, sampling, generator)
            for row, token in enumerate(chosen.tolist()):
                if row in live and token in stop:
                    live.discard(row)
                elif row in live:
                    new[row].append(token)
            if on_token is not None:
                on_token(count)
            if not live or count == max_new_tokens:
                break
            logits = run(chosen[:, None].to(device))
    return new, context


def unpadded(tokens: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """The prompts of a batch [B, S] that is padded on the left or right, where the mask is 0."""
    return [row[mask.bool()].tolist() for row, mask in zip(tokens, attention_mask, strict=True)]


def _next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """[B, vocabulary] -> [B] on the CPU, where every rank draws the same."""
    logits = logits.float().cpu()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / sampling.temperature
    ordered, tokens = scaled.softmax(-1).sort(-1, descending=True)
    # A token is out if those before it have the probability already.
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0)
    return tokens.gather(-1, torch.multinomial(ordered, 1, generator=generator))[:, 0]


def _check_length(model: GPTModel, length: int) -> None:
    if model.position_embedding_type == "learned_absolute" and length > model.max_sequence_length:
        raise ValueError(
            f"prompts and max_new_tokens take {length} tokens, and the model has learned "
            f"{model.max_sequence_length} positions; fewer new tokens work"
        )


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk_size: int, vocab: int) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: each must have at least one token")
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    outside = [token for prompt in prompts for token in prompt if not 0 <= token < vocab]
    if outside:
        raise ValueError(f"prompts: token {outside[0]} is outside of the vocabulary of {vocab}")
