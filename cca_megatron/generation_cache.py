"""What a layer keeps between the calls of a generation, in Megatron's static inference context.

Keys and values of every token, and the few rows that convs and value shift look back to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cca_kernels import Boundary
from cca_megatron._compat import StaticInferenceContext

_BOUNDARIES = "cca_boundaries"


class GenerationContext(StaticInferenceContext):
    """Megatron's static context for a batch of prompts of different lengths.

    Prompts end together: shorter ones are padded on the left, and padding is invisible to them. A plain
    ``StaticInferenceContext`` works too, for prompts of one length.

    Args:
        max_batch_size: prompts.
        max_sequence_length: tokens of the longest prompt and of what is generated.
        left_padding: [batch], tokens of padding before each prompt; None where there is none.
        all_logits: let the model return the logits of every token instead of the last.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_sequence_length: int,
        left_padding: Tensor | None = None,
        all_logits: bool = False,
    ):
        super().__init__(max_batch_size, max_sequence_length)
        self.left_padding = left_padding
        self.config.materialize_only_last_token_logits = not all_logits

    @property
    def cache_bytes(self) -> int:
        """Of all layers' keys and values on this rank."""
        return sum(x.numel() * x.element_size() for kv in self.key_value_memory_dict.values() for x in kv)

    @property
    def state_bytes(self) -> int:
        """Of what convs and value shift look back to, on this rank."""
        states = self.__dict__.get(_BOUNDARIES, {})
        return sum(x.numel() * x.element_size() for boundary in states.values() for x in boundary)


@dataclass
class Step:
    """One call of the model: which tokens it is about. Shared by all layers."""

    start: int
    positions: Tensor
    """[S], or [S, B] with padding, where it is negative for padding."""
    left_padding: Tensor | None
    given_padding: Tensor | None
    """The same as the context has it, to see whether it is still that."""

    def visible(self, window: int | None, first: int, end: int) -> Tensor | None:
        """Which of the keys ``first`` to ``end`` each query sees: [1 or B, 1, S, keys], True where it does.

        None where a single query sees all of them.
        """
        tokens = self.positions.shape[0]
        device = self.positions.device
        query = self.start + torch.arange(tokens, device=device)[:, None]
        key = torch.arange(first, end, device=device)
        if tokens == 1 and self.left_padding is None:
            return None
        seen = key <= query
        if window is not None:
            seen &= key >= query - window
        if self.left_padding is None:
            return seen[None, None]
        # Padding sees itself, for a query that sees nothing has no softmax.
        return (seen & (key >= self.left_padding[:, None, None]))[:, None] | (key == query)


def step_of(context: Any, tokens: int, device: torch.device) -> Step:
    """The current call, made once for all layers."""
    start = context.sequence_len_offset
    kept = context.__dict__.get("cca_step")
    padding = getattr(context, "left_padding", None)
    is_same = kept is not None and (kept.start, kept.positions.shape[0]) == (start, tokens)
    if is_same and kept.given_padding is padding:
        return kept
    positions = start + torch.arange(tokens, device=device)
    given = padding
    if padding is not None:
        padding = padding.to(device)
        positions = positions[:, None] - padding
    context.cca_step = Step(start, positions, padding, given)
    return context.cca_step


class LayerCache:
    """Keys and values of one layer, [max tokens, max batch, KV heads, D], and the boundary of its mix.

    Keys and values lie in the context's ``key_value_memory_dict``, as those of any Megatron attention.
    """

    def __init__(self, context: Any, layer_number: int):
        self.context, self.layer_number = context, layer_number

    def boundary(self) -> Boundary | None:
        """The rows before this call's tokens; None at the start."""
        if self.context.sequence_len_offset == 0:
            return None
        return self._boundaries[self.layer_number]

    def remember(self, mixed: Tensor, rows: int, delay_from: int | None) -> None:
        """Keep the last rows of the latents [S, B, G, R+2, D] for the next call."""
        latents, value = mixed[..., :-1, :], mixed[-1, ..., -1, :].flatten(1)
        before = self.boundary()
        zeros = latents.new_zeros(rows, *latents.shape[1:])
        earlier = zeros if before is None else before.latents[0]
        last = torch.cat([earlier, latents])[-rows:] if rows else zeros
        delayed = value[:, value.shape[1] if delay_from is None else delay_from :]
        self._boundaries[self.layer_number] = Boundary(last[None], delayed[None])

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep [S, B, KV heads, D] of this call, and return those of all tokens so far.

        Raises:
            ValueError: the context is too small.
        """
        context, (tokens, batch) = self.context, key.shape[:2]
        start = context.sequence_len_offset
        end = start + tokens
        if end > context.max_sequence_length or batch > context.max_batch_size:
            raise ValueError(
                f"the inference context holds {context.max_batch_size} sequences of "
                f"{context.max_sequence_length} tokens; {batch} of {end} are wanted: make it larger"
            )
        kept = context.key_value_memory_dict.get(self.layer_number)
        if kept is None:
            shape = (context.max_sequence_length, context.max_batch_size)
            kept = tuple(x.new_empty(*shape, *x.shape[2:]) for x in (key, value))
            context.key_value_memory_dict[self.layer_number] = kept
        keys, values = (cache[:, :batch] for cache in kept)
        keys[start:end], values[start:end] = key, value
        return keys[:end], values[:end]

    @property
    def _boundaries(self) -> dict[int, Boundary]:
        return self.context.__dict__.setdefault(_BOUNDARIES, {})
