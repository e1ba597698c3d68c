"""Where tokens lie under context parallelism: every token once, pieces and blocks as defined."""

import numpy as np
import pytest

from cca_megatron.parallel.layout import ContextLayout


def drawn(size, kind, seed):
    """A layout of random documents: empty ones, of one token, shorter than a chunk, with padding."""
    rng = np.random.default_rng(seed)
    unit = 2 * size if kind == "zigzag_documents" else 1
    lengths = rng.integers(0, 9, size=rng.integers(1, 8)) * unit
    lengths[rng.integers(len(lengths))] += unit
    ends = np.cumsum([0, *lengths])
    tokens = -(-int(ends[-1] + rng.integers(0, 2 * size)) // (2 * size)) * 2 * size
    return getattr(ContextLayout, kind)(tokens, size, ends)


KINDS = ["zigzag", "zigzag_documents", "contiguous"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_pieces_say_where_every_token_is(size, kind, seed):
    layout = drawn(size, kind, seed)
    held = [layout.token_indices(rank) for rank in range(size)]
    assert all(len(tokens) == layout.tokens // size for tokens in held)
    assert sorted(np.concatenate(held)) == list(range(layout.tokens))
    document = np.searchsorted(layout.cu_seqlens, np.arange(layout.tokens), side="right") - 1
    for rank, tokens in enumerate(held):
        pieces = layout.of_rank(rank)
        filled = 0
        for i in range(len(pieces.start)):
            run = pieces.run(i)
            assert run.start == filled
            filled = run.stop
            expected = pieces.start[i] + np.arange(pieces.length[i])
            assert (tokens[run] == expected).all()
            assert (document[expected] == pieces.document[i]).all()
            assert layout.cu_seqlens[pieces.document[i]] + pieces.position[i] == pieces.start[i]
        # What no piece covers is padding, and lies at the end.
        assert (tokens[filled:] >= layout.cu_seqlens[-1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_causal_attention_within_documents(size, kind, seed):
    layout = drawn(size, kind, seed)
    allowed = np.zeros((layout.tokens, layout.tokens), int)
    held = [layout.token_indices(rank) for rank in range(size)]
    for rank, queries in enumerate(held):
        for source, keys in enumerate(held):
            for block in layout.blocks(rank, source):
                rows, columns = queries[block.queries], keys[block.keys]
                whole = np.ones((len(rows), len(columns)), int)
                allowed[np.ix_(rows, columns)] += np.tril(whole) if block.causal else whole
    document = np.searchsorted(layout.cu_seqlens, np.arange(layout.tokens), side="right") - 1
    is_token = np.arange(layout.tokens) < layout.cu_seqlens[-1]
    same = (document[:, None] == document) & is_token[:, None] & is_token
    assert (allowed == np.tril(same)).all()


def test_zigzag_gives_every_rank_the_same_work():
    layout = ContextLayout.zigzag(64, 4)
    work = [
        [
            sum(
                (b.queries.stop - b.queries.start) * (b.keys.stop - b.keys.start) / (2 if b.causal else 1)
                for b in layout.blocks(rank, (rank - step) % 4)
            )
            for step in range(4)
        ]
        for rank in range(4)
    ]
    assert all(row == work[0] for row in work)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextLayout.zigzag(12, 4), "12 tokens with context_parallel_size=4: .* 16 works"),
        (lambda: ContextLayout.contiguous(6, 4), "6 tokens .* 8 works"),
        (
            lambda: ContextLayout.zigzag_documents(12, 2, np.array([0, 4, 10])),
            r"document 1 has 6 tokens .*multiple of 4 .*packed_zigzag='stream'",
        ),
        (
            lambda: ContextLayout.zigzag_documents(5, 2, np.array([0, 4])),
            "1 tokens of padding after the last document",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
