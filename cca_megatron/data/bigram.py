"""A baseline without a neural network: how well each token predicts the next one."""

import numpy as np

_SMOOTHING = 0.1
"""Added to every count, so that a pair never seen in training keeps a probability."""


def bigram_cross_entropy(prefix: str, split: str, vocab_size: int) -> float:
    """Cross-entropy of a bigram model, in nats per token, on the validation part of a dataset.

    Counts come from the training part; both parts are those that Megatron takes for ``--split``.
    Document boundaries are tokens like others.

    Args:
        prefix: the dataset.
        split: Megatron's ``--split``, such as ``"95,5,0"``.
        vocab_size: number of token ids; its square is held in memory.

    Raises:
        ValueError: the training or the validation part has no pair of tokens.
    """
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    total = len(dataset.sequence_lengths)
    ranges = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    counts = []
    for part, name in zip(ranges[:2], ("training", "validation"), strict=True):
        start, end = (round(edge * total) for edge in part) if part is not None else (0, 0)
        tokens = np.concatenate([dataset[i] for i in range(start, end)]) if end > start else np.zeros(0)
        if len(tokens) < 2:
            raise ValueError(f"split={split}: the {name} part of {prefix} has no text")
        counts.append(_pair_counts(tokens.astype(np.int64), vocab_size))
    train, valid = counts
    smoothed = train + _SMOOTHING
    log_probability = np.log(smoothed) - np.log(smoothed.sum(1, keepdims=True))
    return float(-(valid * log_probability).sum() / valid.sum())


def _pair_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """[vocab_size, vocab_size]: how often the second token follows the first."""
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    return np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
