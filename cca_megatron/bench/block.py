"""One whole attention block: CCA fused, eager and compiled, against MHA, GQA and MLA."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from cca_kernels import cca_mix_reference
from cca_kernels.triton.tuning import relative_errors
from cca_megatron.bench import measure
from cca_megatron.bench.attention import DIM, Block, CCABlock, Core, MLABlock, PlainBlock
from cca_megatron.bench.measure import PASSES, Timer, Workload
from cca_megatron.bench.mix import CHECKED_TOKENS, MixChecks, Variant
from cca_megatron.bench.results import Checked, Event, Measured, Refused
from cca_megatron.bench.shapes import MixShape

TOKENS_AT_ONCE = 16384
"""Shorter sequences come in batches of as many tokens."""
BOUNDS = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Relative error of a block: five steps that each round. It tells a wrong layout, and ranks nothing."""


Build = Callable[[Core, torch.device, torch.dtype, int], Block]
"""Takes core attention, device, dtype and the length of a sequence."""


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
    checks = _BlockChecks(core, device, dtype, checked_tokens)
    for tokens, method in itertools.product(lengths, choices):
        variant = None if method.variant is None else method.variant.name
        started(f"{method.name} {variant or ''}, {tokens:,} tokens")
        measure.release()
        case = {"method": method.name, "hidden": method.hidden, "variant": variant, "tokens": tokens}
        try:
            yield from checks.new(method)
            if problems := checks.problems(method):
                yield Refused(case, "; ".join(problems))
                continue
            for row in _rows(timer, method, tokens, core, device, dtype):
                yield Measured(case | {"attention": core.backend.name} | row)
        except Exception as error:  # out of memory, does not compile, ...: the other methods go on
            yield Refused(case, f"{type(error).__name__}: {error}".splitlines()[0])


class _BlockChecks:
    """The check of each method, made once: of the mix by its own rule, then of the whole block."""

    def __init__(self, core: Core, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
        self._core, self._device, self._dtype, self._tokens = core, device, dtype, tokens
        self._mix = MixChecks(device, dtype, tokens)
        self._known: dict[Method, list[str]] = {}

    def new(self, method: Method) -> Iterator[Checked]:
        """Make the checks if they are not made yet, and give what they found."""
        if method in self._known:
            return
        problems = []
        variant = None
        if method.shape is not None and method.variant is not None:
            variant = method.variant.name
            yield from self._mix.new(method.shape, method.variant)
            problems += self._mix.problems(method.shape, method.variant)
        errors = self._errors(method)
        bound = BOUNDS[self._dtype]
        of_block = [
            f"{name} of the block has relative error {error:.1e}, allowed {bound:.1e}"
            for name, error in errors.items()
            if not error <= bound
        ]
        self._known[method] = problems + of_block
        yield Checked(f"{method.name} block", variant or "", self._tokens, errors, of_block)

    def problems(self, method: Method) -> list[str]:
        """Of checks that were made."""
        return self._known[method]

    def _errors(self, method: Method) -> dict[str, float]:
        block = method.build(self._core, self._device, self._dtype, self._tokens)
        exact = method.exact(Core(SDPBackend.MATH), self._device, torch.float64, self._tokens)
        exact.load_state_dict(block.state_dict())
        x, gradient = (
            _draw(self._tokens, 1, method.hidden, self._device, self._dtype, seed) for seed in (0, 1)
        )
        return relative_errors(*(_results(y, x, gradient) for y in (exact, block)))


def _draw(tokens: int, batch: int, width: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, batch, width, generator=generator, device=device).to(dtype)


def _results(block: Block, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    dtype = next(block.parameters()).dtype
    leaves = {"input": x.detach().to(dtype).requires_grad_()} | dict(block.named_parameters())
    out = block(leaves["input"])
    found = torch.autograd.grad(out, list(leaves.values()), gradient.to(dtype))
    names = (f"gradient of {name}" for name in leaves)
    return {"output": out.detach(), **dict(zip(names, found, strict=True))}


def _rows(
    timer: Timer, method: Method, tokens: int, core: Core, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    batch = max(1, TOKENS_AT_ONCE // tokens)
    block = method.build(core, device, dtype, tokens)
    whole = [(which, graph, "block", True) for which in PASSES for graph in (True, False)]
    between = [("forward", True, "core", True), ("backward", True, "core", False)]
    for which, graph, part, causal in whole + (between if method.core_rows else []):
        make = _block_workload if part == "block" else partial(_core_workload, causal=causal)
        count = measure.copies(tokens * batch * method.hidden * dtype.itemsize, device)
        workloads = [make(block, method.hidden, tokens, batch, seed) for seed in range(count)]
        timing = timer([workload.job(which) for workload in workloads], graph=graph)
        yield {
            "part": part,
            "causal": causal,
            "batch": batch,
            "pass": which,
            "cuda_graph": graph,
            **measure.as_microseconds(timing),
        }


def _block_workload(block: Block, hidden: int, tokens: int, batch: int, seed: int) -> Workload:
    like = next(block.parameters())
    x, gradient = (
        _draw(tokens, batch, hidden, like.device, like.dtype, 2 * seed + place) for place in (0, 1)
    )
    leaves = [x.requires_grad_(), *block.parameters()]
    return Workload(lambda: (block(x),), leaves, [gradient])


def _core_workload(
    block: Block, hidden: int, tokens: int, batch: int, seed: int, *, causal: bool
) -> Workload:
    like = next(block.parameters())
    with torch.no_grad():
        latents = block.down(_draw(tokens, batch, hidden, like.device, like.dtype, 2 * seed))
    gradient = _draw(tokens, batch, block.up.in_features, like.device, like.dtype, 2 * seed + 1)
    leaves = [latents.requires_grad_(), *block.between()]
    return Workload(lambda: (block.attend(latents, causal),), leaves, [gradient])
