"""Peak memory of the output layer and the loss on the CPU in fp32: all tokens at once, in chunks.

    python benchmarks/loss_memory.py --json benchmarks/results/memory/loss.json --plot docs/loss_memory.png

runs Megatron's output layer and loss forward and backward under its data parallelism, each case in a process
of its own: the peak of its resident memory beside what it holds before (libraries, weight, main_grad, input).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from own_process import PeakBytes, facts, peak_bytes, write


def main() -> None:
    """Measure every case; with --case, be one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--plot", type=Path, help="draw it to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(step(args.tokens, args.vocabulary, args.hidden, args.case)))
        return
    sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocabulary", "hidden")]
    rows: list[dict[str, Any]] = []
    for chunk_size in (None, *args.chunk_sizes):
        _, output = peak_bytes(__file__, *sizes, f"--case={chunk_size or 'all'}")
        row = {"chunk_size": chunk_size, **json.loads(output.splitlines()[-1])}
        rows.append(row)
        times, name = rows[0]["bytes"] / row["bytes"], chunk_size or "all tokens"
        print(f"{name:>10}  {row['bytes'] / 1e9:.2f} GB  {times:.1f}x", flush=True)
    result = {
        **{name: getattr(args, name) for name in ("tokens", "vocabulary", "hidden")},
        "rows": rows,
        "machine": facts(),
    }
    if args.json:
        write(args.json, result)
    if args.plot:
        plot(result, args.plot)


def step(tokens: int, vocabulary: int, hidden: int, case: str) -> dict[str, int]:
    """Peak bytes of one forward and backward pass, with "all" logits or this size of a chunk."""
    from cca_megatron.training import cpu_backend

    cpu_backend.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from cca_megatron.training.loss import chunked_loss

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    layer = ColumnParallelLinear(
        hidden, vocabulary, config=config, init_method=config.init_method, bias=False
    )
    torch.nn.init.normal_(layer.weight, std=0.02)
    DistributedDataParallel(config, DistributedDataParallelConfig(), layer)
    language = LanguageModule(config)
    states = torch.randn(tokens, 1, hidden, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))
    layer.weight.main_grad.zero_()  # it is in memory from the first step on
    memory = PeakBytes()
    if case == "all":
        losses = language.compute_language_model_loss(labels, layer(states)[0])
    else:
        losses = chunked_loss(
            hidden_states=states,
            output_layer=layer,
            output_weight=None,
            labels=labels,
            context=int(case),
            compute_language_model_loss=language.compute_language_model_loss,
            scale_logits=language._scale_logits,
        )
    losses.mean().backward()
    return {"bytes": memory.beside()}


def plot(result: dict[str, Any], path: Path) -> None:
    """Peak memory over the chunk size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole, *chunked = result["rows"]
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    axes.axhline(whole["bytes"] / 1e9, color="tab:red", label="all tokens at once")
    sizes, values = [row["chunk_size"] for row in chunked], [row["bytes"] / 1e9 for row in chunked]
    axes.plot(sizes, values, marker="o", label="in chunks")
    for size, value in zip(sizes, values, strict=True):
        axes.annotate(f"{value:.2f}", (size, value), (0, 8), textcoords="offset points", ha="center")
    axes.annotate(
        f"{whole['bytes'] / 1e9:.2f}", (sizes[0], whole["bytes"] / 1e9), (0, -14), textcoords="offset points"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set(xlabel="tokens in a chunk", ylabel="peak memory, GB", yscale="log", ylim=(0.1, 10))
    axes.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.set_title(
        f"Output layer and loss, forward + backward, fp32: {result['tokens']:,} tokens x "
        f"{result['vocabulary']:,} words, hidden {result['hidden']:,}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
