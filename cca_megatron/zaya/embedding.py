"""The token that pads, as ``torch.nn.Embedding(padding_idx=...)`` treats it."""

from typing import Any

import torch
from torch import Tensor

from cca_megatron._compat import GPTModel, get_pg_rank, get_pg_size


def hold_padding_embedding(model: GPTModel, token: int | None) -> None:
    """Give the embedding of this token no gradient from the input, as ``transformers`` does.

    As an output, where embeddings are tied, it is trained like any other.

    Args:
        model: a pipeline stage; only the one with the embeddings is changed.
        token: its number; None changes nothing.
    """
    if token is None or not hasattr(model, "embedding"):
        return

    def hold(module: torch.nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        tokens: Tensor = args[0]
        if module.reduce_scatter_embeddings:  # [s / tp, b, hidden] instead of [b, s, hidden]
            size, rank = get_pg_size(module.tp_group), get_pg_rank(module.tp_group)
            tokens = tokens.transpose(0, 1).chunk(size)[rank]
        return torch.where((tokens == token)[..., None], embedded.detach(), embedded)

    model.embedding.word_embeddings.register_forward_hook(hold)
