"""The planner's step times beside published ones of dense models whose layout was published with them.

    python -m cca_megatron.plan.published

prints the table of docs/planner.md. The shares in :mod:`cca_megatron.plan.hardware` that are marked as fitted
were chosen with these runs in view, so the errors say how well one set of numbers fits runs from 1.7 to 1,008
billion parameters, not how well it foretells others.
"""

from dataclasses import dataclass

from cca_megatron.plan.attention import HeadAttention
from cca_megatron.plan.hardware import GPUS
from cca_megatron.plan.layers import Layer, Mlp, Model
from cca_megatron.plan.parts import Parallel
from cca_megatron.plan.shapes import Run
from cca_megatron.plan.step import Step, step_time


@dataclass(frozen=True)
class Published:
    """A run, and the seconds that its step took."""

    name: str
    source: str
    gpu: str
    model: Model
    parallel: Parallel
    run: Run
    seconds: float
    flash: bool = True

    def reckoned(self) -> Step:
        """The planner's step."""
        return step_time(self.model, self.parallel, self.run, GPUS[self.gpu], self.flash)

    @property
    def error(self) -> float:
        """Of the planner's time, relative."""
        return self.reckoned().seconds / self.seconds - 1


def _gpt(heads: int, hidden: int, layers: int) -> Model:
    """GPT-3's kind: LayerNorm, biases, dropout, learned positions; 51,200 tokens, sequences of 2,048."""
    layer = Layer(
        HeadAttention(hidden, heads, heads, hidden // heads, bias=True),
        Mlp(hidden, 4 * hidden, gated=False, bias=True),
        norm_parameters=2 * hidden,
        dropout=True,
    )
    return Model((layer,) * layers, vocabulary=51200, positions=2048)


def _narayanan(
    name: str,
    heads: int,
    hidden: int,
    layers: int,
    tensor: int,
    pipeline: int,
    gpus: int,
    batch: int,
    teraflops: int,
) -> Published:
    """A row of table 1; its time follows from the FLOPs of equation 3, which count recomputation.

    Micro-batches and chunks of the model are not given there: 1 and 1 are taken.
    """
    flops = (
        96 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
    )
    return Published(
        name,
        "arXiv 2104.04473, table 1",
        "a100",
        _gpt(heads, hidden, layers),
        Parallel(tensor=tensor, pipeline=pipeline, expert_tensor=tensor, data=gpus // (tensor * pipeline)),
        Run(
            2048,
            1,
            batch,
            distributed_optimizer=False,
            gradient_bytes=2,
            recompute="full",
            recompute_method="uniform",
            overlap_gradients=False,
            overlap_weights=False,
        ),
        flops / (teraflops * 1e12 * gpus),
        flash=False,
    )


def _korthikanti(
    name: str,
    heads: int,
    hidden: int,
    layers: int,
    pipeline: int,
    chunks: int,
    batch: int,
    micro: int,
    seconds: float,
) -> Published:
    """Tables 3 and 5, "present work": sequence parallelism, core attention recomputed."""
    return Published(
        name,
        "arXiv 2205.05198, tables 3 and 5",
        "a100",
        _gpt(heads, hidden, layers),
        Parallel(tensor=8, sequence=True, pipeline=pipeline, chunks=chunks, expert_tensor=8),
        Run(
            2048,
            micro,
            batch,
            distributed_optimizer=False,
            recompute="selective",
            recompute_modules=frozenset({"core_attn"}),
            overlap_gradients=False,
            overlap_weights=False,
        ),
        seconds,
        flash=False,
    )


def _nemotron(data: int, batch: int, seconds: float) -> Published:
    """Nemotron-4 340B on Megatron-LM: table 2. Chunks of one layer are taken; it says "with interleaving"."""
    layer = Layer(HeadAttention(18432, 96, 8, 192), Mlp(18432, 73728, gated=False), norm_parameters=2 * 18432)
    return Published(
        "Nemotron-4 340B",
        "arXiv 2406.11704, table 2",
        "h100",
        Model((layer,) * 96, vocabulary=256000, tied=False),
        Parallel(tensor=8, sequence=True, pipeline=12, chunks=8, expert_tensor=8, data=data),
        Run(4096, 1, batch),
        seconds,
    )


def _llama(context: int, data: int, sequence: int, batch: int, teraflops: float) -> Published:
    """Llama 3 405B, not Megatron but on the same axes: table 4. Its text says chunks of one layer."""
    layer = Layer(HeadAttention(16384, 128, 8, 128), Mlp(16384, 53248, gated=True), norm_parameters=16384)
    model = Model((layer,) * 126, vocabulary=128256, tied=False)
    parallel = Parallel(
        tensor=8, sequence=True, context=context, pipeline=16, chunks=8, expert_tensor=8, data=data
    )
    run = Run(sequence, 1, batch * data, cp_comm_type="all_gather", embedding_counts=True, loss_counts=True)
    flops = 3 * sum(model.flops(sequence).values()) * sequence * run.global_batch
    seconds = flops / (teraflops * 1e12 * parallel.gpus)
    return Published("Llama 3 405B", "arXiv 2407.21783, table 4", "h100", model, parallel, run, seconds)


RUNS = (
    _narayanan("GPT 1.7B", 24, 2304, 24, 1, 1, 32, 512, 137),
    _narayanan("GPT 3.6B", 32, 3072, 30, 2, 1, 64, 512, 138),
    _narayanan("GPT 7.5B", 32, 4096, 36, 4, 1, 128, 512, 142),
    _narayanan("GPT 18B", 48, 6144, 40, 8, 1, 256, 1024, 135),
    _narayanan("GPT 39B", 64, 8192, 48, 8, 2, 512, 1536, 138),
    _narayanan("GPT 76B", 80, 10240, 60, 8, 4, 1024, 1792, 140),
    _narayanan("GPT 146B", 96, 12288, 80, 8, 8, 1536, 2304, 148),
    _narayanan("GPT 310B", 128, 16384, 96, 8, 16, 1920, 2160, 155),
    _narayanan("GPT 530B", 128, 20480, 105, 8, 35, 2520, 2520, 163),
    _narayanan("GPT 1008B", 160, 25600, 128, 8, 64, 3072, 3072, 163),
    _korthikanti("GPT 22B", 64, 6144, 48, 1, 1, 4, 4, 1.10),
    _korthikanti("GPT 175B", 96, 12288, 96, 8, 3, 64, 1, 13.75),
    _korthikanti("GPT 530B", 128, 20480, 105, 35, 3, 280, 1, 37.83),
    _korthikanti("GPT 1T", 160, 25600, 128, 64, 1, 512, 1, 71.49),
    _nemotron(16, 768, 10.3),
    _nemotron(32, 1536, 10.3),
    _nemotron(64, 2304, 8.0),
    _llama(1, 64, 8192, 32, 430),
    _llama(1, 128, 8192, 16, 400),
    _llama(16, 8, 131072, 16, 380),
)


def markdown() -> str:
    """The table of docs/planner.md."""
    lines = [
        "| run | GPUs | TP, CP, PP x chunks, DP | sequence | published, s | planner, s | error | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        p = run.parallel
        layout = f"{p.tensor}, {p.context}, {p.pipeline} x {p.chunks}, {p.data}"
        lines.append(
            f"| {run.name} | {p.gpus:,} {run.gpu.upper()} | {layout} | {run.run.sequence:,} | "
            f"{run.seconds:.2f} | {run.reckoned().seconds:.2f} | {run.error:+.1%} | {run.source} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
