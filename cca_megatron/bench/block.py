"""One whole attention block: CCA fused, eager and compiled, against MHA, GQA and MLA."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from cca_kernels import cca_mix_reference
from cca_kernels.triton.accuracy import relative_errors
from cca_megatron.bench import measure
from cca_megatron.bench.attention import DIM, Block, CCABlock, Core, MLABlock, PlainBlock, Setup
from cca_megatron.bench.check import Checking, measured_if_right
from cca_megatron.bench.measure import PASSES, Timer, Workload
from cca_megatron.bench.mix import CHECKED_TOKENS, MixChecks, Variant
from cca_megatron.bench.results import Checked, Event
from cca_megatron.bench.shapes import MixShape

TOKENS_AT_ONCE = 16384
"""Shorter sequences come in batches of as many tokens."""
BOUNDS = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Relative error of a block: five steps that each round. It tells a wrong layout, and ranks nothing."""

Build = Callable[[Setup], Block]


@dataclass(frozen=True)
class Method:
    """One kind of attention block."""

    name: str
    hidden: int
    build: Build
    exact: Build
    """The same block by the definition, for the check."""
    core_rows: bool = True
    """Measure what lies between the projections too."""
    shape: MixShape | None = None
    variant: Variant | None = None
    """How CCA's mix, of this shape, is computed; None for other methods."""

    @property
    def variant_name(self) -> str | None:
        return None if self.variant is None else self.variant.name


def methods(shapes: Sequence[MixShape], choices: Sequence[Variant]) -> list[Method]:
    """CCA in every variant, and for each width the usual methods with heads of 128 channels.

    These are MHA with E/128 heads, GQA with a quarter as many key heads, and MLA, see :class:`MLABlock`; it
    projects between the projections, so that its core alone compares with nothing.
    """
    found = [
        Method(
            shape.name,
            shape.hidden,
            build=partial(CCABlock, shape, variant.mix),
            exact=partial(CCABlock, shape, cca_mix_reference),
            shape=shape,
            variant=variant,
        )
        for shape, variant in itertools.product(shapes, choices)
    ]
    for hidden in sorted({shape.hidden for shape in shapes}):
        heads = hidden // DIM
        mha = partial(PlainBlock, hidden, heads, heads)
        gqa = partial(PlainBlock, hidden, heads, heads // 4)
        mla = partial(MLABlock, hidden, heads)
        found += [
            Method(f"MHA {heads}", hidden, mha, mha),
            Method(f"GQA {heads}/{heads // 4}", hidden, gqa, gqa),
            Method(f"MLA {heads}", hidden, mla, mla, core_rows=False),
        ]
    return found


def measure_block(
    timer: Timer,
    choices: Sequence[Method],
    lengths: Sequence[int],
    core: Core,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    checked_tokens: int = CHECKED_TOKENS,
    started: Callable[[str], None] = lambda case: None,
) -> Iterator[Event]:
    """Check every method, then time it at every length with and without CUDA graphs.

    Rows of the part "block" are the whole block, causal. Rows of the part "core" are what the latency figures
    of arXiv 2510.04476 show, without projections: the causal forward pass and the backward pass without mask.
    """
    checks = _BlockChecks(Setup(core, device, dtype, checked_tokens))
    for tokens, method in itertools.product(lengths, choices):
        variant = method.variant_name
        started(f"{method.name} {variant or ''}, {tokens:,} tokens")
        measure.release()
        case = {"method": method.name, "hidden": method.hidden, "variant": variant, "tokens": tokens}
        rows = _rows(timer, method, Setup(core, device, dtype, tokens))
        yield from measured_if_right(case, checks.of(method), rows)


class _BlockChecks:
    """The check of each method, made once: of the mix by its own rule, then of the whole block."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._mix = MixChecks(setup.device, setup.dtype, setup.tokens)
        self._problems: dict[Method, list[str]] = {}

    def of(self, method: Method) -> Checking:
        """Make the checks if they are not made yet."""
        if method not in self._problems:
            of_mix = []
            if method.shape is not None and method.variant is not None:
                of_mix = yield from self._mix.of(method.shape, method.variant)
            errors, bound = self._errors(method), BOUNDS[self._setup.dtype]
            of_block = [
                f"{name} of the block has relative error {error:.1e}, allowed {bound:.1e}"
                for name, error in errors.items()
                if not error <= bound
            ]
            self._problems[method] = of_mix + of_block
            variant = method.variant_name or ""
            yield Checked(f"{method.name} block", variant, self._setup.tokens, errors, of_block)
        return self._problems[method]

    def _errors(self, method: Method) -> dict[str, float]:
        block = method.build(self._setup)
        exact = method.exact(replace(self._setup, core=Core(SDPBackend.MATH), dtype=torch.float64))
        exact.load_state_dict(block.state_dict())
        x, gradient = (self._setup.draw(1, method.hidden, seed) for seed in (0, 1))
        return relative_errors(*(_results(y, x, gradient) for y in (exact, block)))


def _results(block: Block, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    dtype = next(block.parameters()).dtype
    leaves = {"input": x.detach().to(dtype).requires_grad_()} | dict(block.named_parameters())
    out = block(leaves["input"])
    found = torch.autograd.grad(out, list(leaves.values()), gradient.to(dtype))
    names = (f"gradient of {name}" for name in leaves)
    return {"output": out.detach(), **dict(zip(names, found, strict=True))}


def _rows(timer: Timer, method: Method, setup: Setup) -> Iterator[dict[str, Any]]:
    batch = max(1, TOKENS_AT_ONCE // setup.tokens)
    block = method.build(setup)
    whole = [(which, graph, "block", True) for which in PASSES for graph in (True, False)]
    between = [("forward", True, "core", True), ("backward", True, "core", False)]
    for which, graph, part, causal in whole + (between if method.core_rows else []):
        make = _block_workload if part == "block" else partial(_core_workload, causal=causal)
        bytes_each = setup.tokens * batch * method.hidden * setup.dtype.itemsize
        seeds = range(measure.copies(bytes_each, setup.device))
        workloads = [make(block, setup, batch, seed) for seed in seeds]
        timing = timer([workload.job(which) for workload in workloads], graph=graph)
        yield {
            "attention": setup.core.backend.name,
            "part": part,
            "causal": causal,
            "batch": batch,
            "pass": which,
            "cuda_graph": graph,
            **measure.as_microseconds(timing),
        }


def _block_workload(block: Block, setup: Setup, batch: int, seed: int) -> Workload:
    x, gradient = (setup.draw(batch, block.down.in_features, 2 * seed + place) for place in (0, 1))
    leaves = [x.requires_grad_(), *block.parameters()]
    return Workload(lambda: (block(x),), leaves, [gradient])


def _core_workload(block: Block, setup: Setup, batch: int, seed: int, *, causal: bool) -> Workload:
    with torch.no_grad():
        latents = block.down(setup.draw(batch, block.down.in_features, 2 * seed))
    gradient = setup.draw(batch, block.up.in_features, 2 * seed + 1)
    leaves = [latents.requires_grad_(), *block.between()]
    return Workload(lambda: (block.attend(latents, causal),), leaves, [gradient])
