"""How many tokens a model knows, where Megatron pads its embeddings to more rows."""

from typing import Any

_NAME = "true_vocab_size"


def remember_vocabulary(model: Any, size: int) -> None:
    """Note on a GPT model, unwrapped, how many tokens there are without padding."""
    setattr(model, _NAME, size)


def known_vocabulary(model: Any) -> int | None:
    """What :func:`remember_vocabulary` noted, or None."""
    return getattr(model, _NAME, None)
