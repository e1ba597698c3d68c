"""Where tokens lie under context parallelism: every token once, pieces and blocks as defined."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cca_megatron.parallel.halo import plan_halo
from cca_megatron.parallel.layout import ContextLayout

KINDS = ["zigzag", "zigzag_documents", "contiguous"]


@st.composite
def layouts(draw, kinds=KINDS, sizes=(1, 2, 3, 4)):
    """Documents of any lengths: empty ones, of one token, shorter than a chunk, padding after the last."""
    size, kind = draw(st.sampled_from(sizes)), draw(st.sampled_from(kinds))
    unit = 2 * size if kind == "zigzag_documents" else 1
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    ends = np.cumsum([0, *lengths]) * unit
    tokens = max(int(ends[-1]), 1) + draw(st.integers(0, 4 * size))
    return getattr(ContextLayout, kind)(-(-tokens // (2 * size)) * 2 * size, size, ends)


@given(layouts())
def test_pieces_say_where_every_token_is(layout):
    size = layout.size
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


@given(layouts())
def test_blocks_are_causal_attention_within_documents(layout):
    allowed = np.zeros((layout.tokens, layout.tokens), int)
    held = [layout.token_indices(rank) for rank in range(layout.size)]
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


@given(layouts(), st.integers(0, 6))
def test_every_row_before_an_edge_comes_from_where_it_is(layout, rows):
    """The plans of all ranks together, without a network: each delivers the rows it promises."""
    plans = [plan_halo(layout, rank, rows, torch.device("cpu")) for rank in range(layout.size)]
    held = [layout.token_indices(rank) for rank in range(layout.size)]
    for rank, plan in enumerate(plans):
        assert plan.send_counts[rank] == plan.receive_counts[rank]
        came = []
        for sender, other in enumerate(plans):
            assert other.send_counts[rank] == plan.receive_counts[sender]
            start = sum(other.send_counts[:rank])
            came += held[sender][other.send[start : start + other.send_counts[rank]].numpy()].tolist()
        before = np.full((plan.edges * rows), -1)
        before[plan.slots.numpy()] = came
        pieces = layout.of_rank(rank)
        edges = pieces.select(pieces.position > 0)
        back = np.arange(rows, 0, -1)
        exists = edges.position[:, None] >= back
        expected = np.where(exists, edges.start[:, None] - back, -1)
        assert (before.reshape(-1, rows) == expected).all() if rows else not came
        lengths = np.minimum(edges.length, rows)
        assert plan.edge_cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
        tokens = [start + np.arange(n) for start, n in zip(edges.start, lengths, strict=True)]
        assert held[rank][plan.edge_tokens.numpy()].tolist() == np.concatenate([[], *tokens]).tolist()


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
        (lambda: ContextLayout.zigzag(8, 2, np.array([0, 4, 12])), r"cu_seqlens=\[ 0  4 12\] for 8 tokens"),
        (lambda: ContextLayout.zigzag_documents(8, 2, np.array([4, 8])), "must start at 0, never fall"),
        (lambda: ContextLayout.contiguous(8, 2, np.array([0, 6, 4])), "must start at 0, never fall"),
    ],
)
def test_what_cannot_be_cut_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
