"""After a run: its loss curve as a picture, and a summary in a few lines."""

import math
from dataclasses import dataclass
from pathlib import Path

from cca_megatron.data.bigram import bigram_cross_entropy
from cca_megatron.data.prepare import Manifest, read_manifest
from cca_megatron.data.tokenizer import BYTES
from cca_megatron.training.checkpoint import count_parameters, latest_iteration
from cca_megatron.training.command import Command

Curve = list[tuple[int, float]]
"""(iteration, loss) points in order."""


@dataclass(frozen=True)
class Curves:
    """Losses in nats per token over all runs of an output folder."""

    training: Curve
    validation: Curve


def read_curves(tensorboard: Path) -> Curves:
    """Training and validation loss from TensorBoard logs; a resumed run's values win."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[str, dict[int, float]] = {"lm loss": {}, "lm loss validation": {}}
    for file in sorted(tensorboard.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in points.keys() & set(events.Tags()["scalars"]):
            points[tag] |= {event.step: event.value for event in events.Scalars(tag)}
    training, validation = (sorted(points[tag].items()) for tag in points)
    return Curves(training, validation)


def bigram_of(command: Command) -> float | None:
    """The bigram baseline of the recipe's byte-level dataset, in nats per token; None for others."""
    data, args = command.recipe.data, command.args
    if data.prefix is None or data.tokenizer != BYTES or args.data_path != [data.prefix]:
        return None
    try:
        return bigram_cross_entropy(data.prefix, args.split, args.vocab_size)
    except ValueError:  # a split without validation
        return None


def plot_losses(curves: Curves, bigram: float | None, path: Path) -> None:
    """Training and validation loss over iterations, with the bigram baseline as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if curves.training:
        axes.plot(*zip(*curves.training, strict=True), label="training", linewidth=1, color="0.6")
    if curves.validation:
        axes.plot(*zip(*curves.validation, strict=True), label="validation", marker="o", markersize=3)
    if bigram is not None:
        axes.axhline(bigram, label="bigram model", linestyle="--", color="tab:red", linewidth=1)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def summary(command: Command, curves: Curves, bigram: float | None) -> list[tuple[str, str]]:
    """What a run came to, as (name, text) lines."""
    args, checkpoints = command.args, command.recipe.checkpoints
    lines = []
    iteration = None if checkpoints is None else latest_iteration(checkpoints)
    if checkpoints is not None and iteration is not None:
        lines.append(("parameters", f"{count_parameters(checkpoints, iteration):,}"))
        tokens = iteration * args.global_batch_size * args.seq_length
        lines.append(("tokens seen", f"{tokens:,} in {iteration} iterations"))
    prefix = command.recipe.data.prefix
    manifest = None if prefix is None else read_manifest(prefix)
    for name, curve in (("training", curves.training), ("validation", curves.validation)):
        if curve:
            lines.append((f"{name} loss", _loss_text(curve[-1][1], manifest)))
    if bigram is not None:
        lines.append(("bigram model", _loss_text(bigram, manifest)))
    lines.append(("KV cache", _cache_text(command)))
    if checkpoints is not None and iteration is not None:
        lines.append(("checkpoint", f"{checkpoints.resolve()} (iteration {iteration})"))
    return lines


def _loss_text(loss: float, manifest: Manifest | None) -> str:
    text = f"{loss:.3f} nats per token"
    if manifest is not None and math.isfinite(loss):
        bits = loss / math.log(2) * manifest.tokens / manifest.text_bytes
        text += f", {bits:.3f} bits per byte"
    return text


def _cache_text(command: Command) -> str:
    """Keys and values of one token over all attention layers, in bf16."""
    from cca_megatron.plan.shapes import attention_from_args  # imports Megatron

    args = command.args
    layers = args.num_layers
    if args.hybrid_layer_pattern is not None:
        layers = args.hybrid_layer_pattern.partition("/")[0].count("*")
    cached = attention_from_args(args).cache_elements()
    ours, mha = (2 * layers * elements for elements in (cached, 2 * args.hidden_size))
    return f"{ours:,} bytes per token in bf16, {mha / ours:.3g} times less than MHA's {mha:,}"
