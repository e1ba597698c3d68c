"""Which tokens every context-parallel rank holds, and where their predecessors are.

Under context parallelism a rank holds *chunks* of the token stream. Documents cut chunks into *pieces*:
a piece is a run of tokens of one document that lies in one chunk. Everything that crosses ranks is said
in pieces: which rows the convs need from elsewhere, each token's position, and what attends to what.

The pieces are computed on the host, once per micro-batch or once for all where nothing is packed, so
that no layer waits for the device.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Chunks(NamedTuple):
    """Runs of the token stream, in stream order; each array has one entry per chunk."""

    owner: Integers
    """The rank that holds it."""
    start: Integers
    """Where it starts in the stream."""
    offset: Integers
    """Where it starts in its owner's tokens."""


class Pieces(NamedTuple):
    """Runs of one document within one chunk, in stream order; each array has one entry per piece."""

    owner: Integers
    document: Integers
    start: Integers
    """Where it starts in the stream."""
    position: Integers
    """Where it starts in its document."""
    length: Integers
    offset: Integers
    """Where it starts in its owner's tokens."""

    def select(self, which: Integers | NDArray[np.bool_]) -> "Pieces":
        """The chosen pieces."""
        return Pieces(*(field[which] for field in self))

    def run(self, which: int) -> slice:
        """Where one piece lies in its owner's tokens."""
        return slice(int(self.offset[which]), int(self.offset[which] + self.length[which]))


class Block(NamedTuple):
    """Queries of one rank that attend to keys of another, as runs of their tokens."""

    queries: slice
    keys: slice
    causal: bool
    """They are the same tokens; otherwise every key comes before every query."""
    offset: int
    """By how many tokens the first query comes after the first key."""

    @property
    def nearest(self) -> int:
        """Tokens between the query and the key that are closest to each other."""
        return max(0, self.offset - (self.keys.stop - self.keys.start - 1))

    @property
    def farthest(self) -> int:
        """Tokens between the last query and the first key."""
        return self.offset + self.queries.stop - self.queries.start - 1

    def is_cut_by(self, window: int) -> bool:
        """Whether some of the keys before a query are too far for a window of so many tokens before it."""
        return self.farthest > window


@dataclass(frozen=True, eq=False)
class ContextLayout:
    """The token stream of one micro-batch as it lies on the ranks of a context-parallel group."""

    size: int
    """Ranks."""
    tokens: int
    """Length of the whole stream, padding included."""
    chunks: Chunks
    cu_seqlens: Integers
    """[documents + 1], where each document starts in the stream, and the end of the last."""
    by_document: bool = False
    """Every document is cut for itself: the one packed layout that Transformer Engine knows."""

    def __post_init__(self) -> None:
        check_documents(self.cu_seqlens, self.tokens)

    @staticmethod
    def zigzag(tokens: int, size: int, cu_seqlens: Integers | None = None) -> "ContextLayout":
        """The stream cut in 2 * size chunks as a whole; rank r holds chunks r and 2 * size - 1 - r.

        Without ``cu_seqlens`` this is Megatron's layout of a plain batch, with it the one of
        ``--dataloader-inter-document-masking``, where documents cross ranks anywhere.

        Raises:
            ValueError: the stream cannot be cut evenly.
        """
        if tokens % (2 * size):
            raise ValueError(
                f"{tokens} tokens with context_parallel_size={size}: zigzag needs a multiple of "
                f"{2 * size}; {-(-tokens // (2 * size)) * 2 * size} works"
            )
        length = tokens // (2 * size)
        chunk = np.arange(2 * size)
        is_front = chunk < size
        owner = np.where(is_front, chunk, 2 * size - 1 - chunk)
        chunks = Chunks(owner, chunk * length, np.where(is_front, 0, length))
        return ContextLayout(size, tokens, chunks, _documents(cu_seqlens, tokens))

    @staticmethod
    def zigzag_documents(tokens: int, size: int, cu_seqlens: Integers) -> "ContextLayout":
        """Every document cut in 2 * size chunks for itself: Megatron's ``thd`` layout.

        Raises:
            ValueError: a document or the padding after the last cannot be cut evenly.
        """
        check_documents(cu_seqlens, tokens)
        lengths = np.diff(cu_seqlens)
        uneven = np.flatnonzero(lengths % (2 * size))
        if uneven.size:
            which = int(uneven[0])
            raise ValueError(
                f"document {which} has {lengths[which]} tokens (padding included) with "
                f"context_parallel_size={size}: cut one by one, documents need a multiple of {2 * size} "
                "tokens. Where the whole stream is cut (--dataloader-inter-document-masking), set "
                "CCAConfig(packed_zigzag='stream')"
            )
        if (tokens - cu_seqlens[-1]) % size:
            raise ValueError(
                f"{tokens - cu_seqlens[-1]} tokens of padding after the last document with "
                f"context_parallel_size={size}: each rank must hold equally many"
            )
        chunk = np.arange(2 * size)
        is_front = chunk < size
        length = (lengths // (2 * size))[:, None]
        owner = np.where(is_front, chunk, 2 * size - 1 - chunk)
        start = cu_seqlens[:-1, None] + chunk * length
        offset = cu_seqlens[:-1, None] // size + np.where(is_front, 0, length)
        nonempty = np.repeat(lengths > 0, 2 * size)
        cut = Chunks(np.broadcast_to(owner, start.shape).ravel(), start.ravel(), offset.ravel())
        rank, end = np.arange(size), int(cu_seqlens[-1])
        padding = Chunks(rank, end + rank * ((tokens - end) // size), np.full(size, end // size))
        parts = zip((f[nonempty] for f in cut), padding, strict=True)
        return ContextLayout(size, tokens, Chunks(*map(np.concatenate, parts)), cu_seqlens, by_document=True)

    @staticmethod
    def contiguous(tokens: int, size: int, cu_seqlens: Integers | None = None) -> "ContextLayout":
        """The stream cut in ``size`` chunks, one for each rank in order.

        Raises:
            ValueError: the stream cannot be cut evenly.
        """
        if tokens % size:
            raise ValueError(
                f"{tokens} tokens with context_parallel_size={size}: each rank must hold equally many; "
                f"{-(-tokens // size) * size} works"
            )
        rank = np.arange(size)
        chunks = Chunks(rank, rank * (tokens // size), np.zeros(size, np.int64))
        return ContextLayout(size, tokens, chunks, _documents(cu_seqlens, tokens))

    def undivided(self) -> "ContextLayout":
        """The same chunks of one single document, for convs that mix across documents."""
        return ContextLayout(self.size, self.tokens, self.chunks, _documents(None, self.tokens))

    @cached_property
    def pieces(self) -> Pieces:
        """All pieces of all ranks. Padding after the last document belongs to none."""
        start = np.unique(np.concatenate([self.chunks.start, self.cu_seqlens]))
        start = start[start < self.cu_seqlens[-1]]
        chunk = np.searchsorted(self.chunks.start, start, side="right") - 1
        document = np.searchsorted(self.cu_seqlens, start, side="right") - 1
        return Pieces(
            owner=self.chunks.owner[chunk],
            document=document,
            start=start,
            position=start - self.cu_seqlens[document],
            length=np.diff(start, append=self.cu_seqlens[-1]),
            offset=self.chunks.offset[chunk] + start - self.chunks.start[chunk],
        )

    def of_rank(self, rank: int) -> Pieces:
        """The pieces of one rank, in the order in which it holds them."""
        return self.pieces.select(self.pieces.owner == rank)

    def token_indices(self, rank: int) -> Integers:
        """[tokens / size], where in the stream each token of a rank comes from.

        This cuts a batch: ``whole[layout.token_indices(rank)]``.
        """
        lengths = np.diff(self.chunks.start, append=self.tokens)
        runs = zip(self.chunks.start, lengths, self.chunks.owner, strict=True)
        return np.concatenate([start + np.arange(n) for start, n, owner in runs if owner == rank])

    def blocks(self, rank: int, source: int) -> list[Block]:
        """Everything that the tokens of ``rank`` attend to among those of ``source``."""
        queries, keys = self.of_rank(rank), self.of_rank(source)
        by_document: dict[int, list[int]] = {}
        for i, document in enumerate(keys.document.tolist()):
            by_document.setdefault(document, []).append(i)
        blocks = []
        for i, document in enumerate(queries.document.tolist()):
            for j in by_document.get(document, ()):
                offset = int(queries.position[i] - keys.position[j])
                if offset >= 0:
                    blocks.append(Block(queries.run(i), keys.run(j), causal=offset == 0, offset=offset))
        return blocks


def check_documents(cu_seqlens: Integers, tokens: int) -> None:
    """Raise ValueError unless the documents follow each other within a stream of so many tokens."""
    ordered = len(cu_seqlens) > 0 and cu_seqlens[0] == 0 and bool((np.diff(cu_seqlens) >= 0).all())
    if not ordered or cu_seqlens[-1] > tokens:
        raise ValueError(
            f"cu_seqlens={np.array2string(cu_seqlens, threshold=8)} for {tokens} tokens: must start at 0, "
            f"never fall, and end at or before {tokens}"
        )


def _documents(cu_seqlens: Integers | None, tokens: int) -> Integers:
    return np.array([0, tokens]) if cu_seqlens is None else cu_seqlens
