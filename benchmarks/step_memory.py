"""Peak memory and time of a whole training step on the CPU, with the settings that make long sequences fit.

    python benchmarks/step_memory.py --json benchmarks/results/memory/step.json --plot docs/step_memory.png

trains one step of a small CCA model by the real entry, each case in a process of its own. What a process with
64 tokens needs (libraries, weights, gradients, optimizer) is subtracted.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from own_process import facts, peak_bytes, write

MODEL = """
    --hidden-size 256 --ffn-hidden-size 768 --swiglu --disable-bias-linear --normalization RMSNorm
    --num-attention-heads 4 --group-query-attention --num-query-groups 1 --kv-channels 64
    --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 65535 --split 90,10,0 --num-workers 0
    --micro-batch-size 1 --train-iters 1 --eval-iters 0 --lr 1e-3 --log-interval 1
""".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
SELECTIVE = "--recompute-granularity selective --recompute-modules layernorm mlp --cca-recompute-mix".split()


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--plot", type=Path, help="draw it to this file")
    args = parser.parse_args()
    chunks = ["--loss-chunk-size", str(args.chunk_size)]
    cases = {
        "everything kept": [],
        "loss in chunks": chunks,
        "full recompute": FULL,
        "loss in chunks,\nselective recompute": [*chunks, *SELECTIVE],
        "loss in chunks,\nfull recompute": [*chunks, *FULL],
    }
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "CCA_DEVICE": "cpu"}
    base, _ = step(64, args.layers, [])
    rows: list[dict[str, Any]] = []
    for name, options in cases.items():
        peak, seconds = step(args.tokens, args.layers, options)
        rows.append({"case": name.replace("\n", " "), "options": options})
        rows[-1] |= {"bytes": peak - base, "process_seconds": round(seconds, 1)}
        print(f"{rows[-1]['case']:<40} {(peak - base) / 1e9:.2f} GB  {seconds:.0f} s", flush=True)
    result = {
        **{name: getattr(args, name) for name in ("tokens", "layers", "chunk_size")},
        "model": MODEL,
        "base_bytes": base,
        "rows": rows,
        "machine": facts(),
    }
    if args.json:
        write(args.json, result)
    if args.plot:
        plot(result, list(cases), args.plot)


def step(tokens: int, layers: int, options: list[str]) -> tuple[int, float]:
    """Peak bytes and seconds of a process that trains one step."""
    words = ["-m", "cca_megatron.training.pretrain", *MODEL, "--num-layers", str(layers)]
    words += ["--seq-length", str(tokens), "--max-position-embeddings", str(tokens)]
    started = time.monotonic()
    peak, _ = peak_bytes(*words, *options)
    return peak, time.monotonic() - started


def plot(result: dict[str, Any], names: list[str], path: Path) -> None:
    """A bar for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    bars = axes.barh(names, [row["bytes"] / 1e9 for row in result["rows"]])
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("peak memory of a training step beside weights and optimizer, GB")
    axes.set_title(
        f"{result['layers']} CCA layers of width 256, {result['tokens']:,} tokens, 65,536 words, fp32",
        fontsize=10,
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
