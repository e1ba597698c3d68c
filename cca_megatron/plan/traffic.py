"""Bytes that an attention layer sends over the ranks of each parallel axis.

    python -m cca_megatron.plan.traffic --tp 2 --cp 4

prints them for the attention of ZAYA1-8B beside multi-head attention of the same width, as a Markdown table.
Counted is the payload that one rank sends in one layer, per token of its share of the sequence (or per chunk
boundary, or per micro-batch); collectives are counted as a ring runs them. A test compares the formulas with
what a run really sends (``tests/distributed/test_traffic.py``).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from cca_megatron.config import PRESET_HEAD_DIM, PRESET_HIDDEN_SIZE, check_config, preset, preset_names
from cca_megatron.parallel.rules import exchanged_kv_heads


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer, as Megatron's settings describe it."""

    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    conv_kernel_sizes: tuple[int, int] | None = (2, 2)
    """None: ordinary attention, which has nothing to exchange at chunk boundaries."""
    element_bytes: int = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends for one layer, forward and backward."""

    name: str
    forward: float
    backward: float
    unit: str = "token"


def traffic(shape: AttentionShape, tp: int = 1, cp: int = 1) -> list[Traffic]:
    """What each axis sends with ``tp`` tensor-parallel and ``cp`` context-parallel ranks."""
    rows = list(_tensor(shape, tp)) if tp > 1 else []
    return rows + (list(_context(shape, tp, cp)) if cp > 1 else [])


def _tensor(shape: AttentionShape, tp: int) -> Iterator[Traffic]:
    hidden = (tp - 1) / tp * shape.hidden_size * shape.element_bytes
    yield Traffic("tensor: all-reduce of output and input gradient", 2 * hidden, 2 * hidden)
    # In the backward pass the input is gathered once more, for the gradient of the weight.
    yield Traffic("tensor with sequence: all-gathers and reduce-scatters", 2 * hidden, 3 * hidden)
    if tp > shape.kv_heads:
        latents = (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim * shape.element_bytes
        gathered = (tp - 1) / tp * latents
        yield Traffic("tensor beyond the KV heads: latents", gathered, gathered)
        if shape.conv_kernel_sizes is not None:
            parts = shape.kv_heads  # one row of each part is reduced, all but one of them zero
            summed = 2 * (tp - 1) / tp * parts * _group_parameters(shape) * shape.element_bytes
            yield Traffic("gradients of shared convs", 0, summed, unit="micro-batch")


def _context(shape: AttentionShape, tp: int, cp: int) -> Iterator[Traffic]:
    size, dim = shape.element_bytes, shape.head_dim
    queries, keys = shape.query_heads // tp, max(shape.kv_heads // tp, 1)
    if shape.conv_kernel_sizes is not None:
        row = _halo_row(shape, tp) * _halo_rows(shape.conv_kernel_sizes) * size
        yield Traffic("context: rows before a chunk", row, row, unit="chunk")
    kv = 2 * keys * dim
    sent_on = (cp - 1) * kv * size
    summed = kv * max(size, 4)  # gradients are summed over ranks in fp32 or better
    yield Traffic("context, p2p: keys and values", sent_on, sent_on + cp * summed)
    yield Traffic("context, all_gather: keys and values", sent_on, sent_on + (cp - 1) * summed)
    copies = exchanged_kv_heads(queries, keys, cp)
    if copies is not None:
        heads = 2 * (queries + copies)  # q, k, v there and the output back
        exchanged = (cp - 1) / cp * heads * dim * size
        yield Traffic("context, a2a: heads for tokens", exchanged, exchanged)


def _group_parameters(shape: AttentionShape) -> int:
    """Parameters of the mix of one KV group, biases and temperature included."""
    k0, k1 = shape.conv_kernel_sizes or (0, 0)
    channels = (shape.query_heads // shape.kv_heads + 1) * shape.head_dim
    return channels * (k0 + 1 + shape.head_dim * k1 + 1) + 1


def _halo_rows(conv_kernel_sizes: tuple[int, int]) -> int:
    """Rows that a chunk needs from before it; the value shift needs one also where the convs need none."""
    return max(sum(conv_kernel_sizes) - 2, 1)


def _halo_row(shape: AttentionShape, tp: int) -> int:
    """Channels in each row on the rank that sends most: latents, and of the value what is delayed."""
    keys = max(shape.kv_heads // tp, 1)
    queries = shape.query_heads // min(tp, shape.kv_heads)
    has_convs = sum(shape.conv_kernel_sizes or ()) > 2
    delayed = min(keys * shape.head_dim, shape.kv_heads * shape.head_dim // 2)
    return has_convs * (queries + keys) * shape.head_dim + delayed


def markdown(shapes: dict[str, AttentionShape], tp: int, cp: int) -> str:
    """One row for each axis, one column for each shape: bytes forward + backward."""
    columns = {name: {row.name: row for row in traffic(shape, tp, cp)} for name, shape in shapes.items()}
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [
        f"| TP={tp}, CP={cp} | per | " + " | ".join(columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for name in rows:
        found = [column.get(name) for column in columns.values()]
        unit = next(row.unit for row in found if row is not None)
        cells = ["-" if row is None else f"{row.forward:,.0f} + {row.backward:,.0f}" for row in found]
        lines.append(f"| {name} | {unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry point of ``python -m cca_megatron.plan.traffic``."""
    parser = argparse.ArgumentParser(
        prog="python -m cca_megatron.plan.traffic",
        description="Bytes that one rank sends in one attention layer, forward + backward, by parallel axis.",
    )
    parser.add_argument("--preset", choices=preset_names(), default="zaya1_8b", help="shape of the latents")
    parser.add_argument("--hidden-size", type=int, default=PRESET_HIDDEN_SIZE)
    parser.add_argument("--head-dim", type=int, default=PRESET_HEAD_DIM)
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks")
    parser.add_argument("--cp", type=int, default=4, help="context-parallel ranks")
    args = parser.parse_args()
    try:
        print(comparison(args.preset, args.hidden_size, args.head_dim, args.tp, args.cp))
    except ValueError as error:
        parser.error(str(error))


def comparison(name: str, hidden_size: int, head_dim: int, tp: int, cp: int) -> str:
    """The table of a preset beside multi-head attention of the same width.

    Raises:
        ValueError: the sizes do not fit the preset.
    """
    heads, cca = preset(name, hidden_size, head_dim)
    check_config(
        SimpleNamespace(
            **heads,
            hidden_size=hidden_size,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
        ),
        cca,
    )
    ours = AttentionShape(
        hidden_size, heads["num_attention_heads"], heads["num_query_groups"], head_dim, cca.conv_kernel_sizes
    )
    count = hidden_size // head_dim
    mha = AttentionShape(hidden_size, count, count, head_dim, conv_kernel_sizes=None)
    return markdown({name: ours, "MHA": mha}, tp, cp)


if __name__ == "__main__":
    main()
