"""cos and sin of RoPE at each token, made once for all layers of a micro-batch.

A layer keeps them for its backward pass, 512 bytes per token at a head dim of 128. All layers get the same
angles and the same positions, so the tables are kept there, as an attribute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rotary_tables(
    angles: Tensor,
    scale: float,
    owner: Any = None,
    positions: Callable[[], Tensor] | None = None,
    base: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [S, 1 or B, 1, width].

    Args:
        angles: Megatron's table, [positions, 1 or B, 1, width]; row by row that of the tokens unless
            ``positions`` says otherwise.
        scale: factor of both (the concentration of YaRN).
        owner: what the positions follow from, packed documents or a step of generation; it keeps the tables.
        positions: makes the position of each token in its document, [S] or [S, B].
        base: RoPE base to use instead of the table's.
        interleaved: pairs are neighbouring channels.
    """
    positions_follow = owner is not None
    owner = owner if positions_follow else angles
    # Tables made in inference mode cannot be kept for a backward pass.
    key = (id(angles), scale, base, torch.is_inference_mode_enabled())
    kept = owner.__dict__.setdefault("cca_rotary_tables", {})
    # What a CUDA graph makes has its values from the replay on, and is of no use outside of it.
    captures = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if key in kept and not captures:
        return kept[key][0]
    at_tokens = angles
    if positions is not None:
        at_tokens = _rows(angles, positions())
    if base is not None:
        at_tokens = _with_base(at_tokens, base, interleaved)
    tables = at_tokens.cos() * scale, at_tokens.sin() * scale
    if not captures:
        # The owner may outlive these angles, whose id would then be another's.
        kept[key] = (tables, angles if positions_follow else None)
    return tables


def _rows(angles: Tensor, positions: Tensor) -> Tensor:
    """[S, 1 or B, 1, width]; padding may lie beyond the table, and its rows are not used."""
    rows = angles[positions.clamp(0, angles.shape[0] - 1)]
    return rows if positions.dim() == 1 else rows[:, :, 0]


def _with_base(angles: Tensor, base: float, interleaved: bool) -> Tensor:
    """The same positions with another base: the first pair turns by one radian per token with any."""
    width = angles.shape[-1]
    exponents = torch.arange(0, width, 2, device=angles.device, dtype=angles.dtype) / width
    turned = angles[..., :1] * (1.0 / base**exponents)
    return turned.repeat_interleave(2, -1) if interleaved else torch.cat([turned, turned], -1)
