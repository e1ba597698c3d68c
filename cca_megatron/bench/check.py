"""What must be right before it is timed."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cca_kernels import cca_mix_reference
from cca_kernels.triton.accuracy import (
    Gradients,
    Mix,
    Results,
    allowed_error,
    random_gradients,
    relative_errors,
    results_of,
)
from cca_kernels.triton.launch import Inputs, Settings
from cca_megatron.bench.results import Checked, Event, Measured, Refused

_NOISE = 1.05
_BASELINE = 4
_FEW = 64


@dataclass
class MixCheck:
    """Compares variants with the reference in fp64, outputs and all gradients, on one set of inputs.

    The rule, for relative errors: at most 2.5e-3 in outputs and 5e-3 in gradients in bf16 (1e-5 in fp32); and
    in bf16 and fp16 not above the error of the eager reference in the same dtype. The second is taken with a
    factor of 1.05, because both are sums of random rounding errors, and not for tensors of less than 64
    elements (the gradient of the temperature), where the reference's error is luck.

    The reference itself rounds after each conv and misses the first part, so that a *baseline* (eager or
    compiled reference) is held to four times that, which is enough to tell it from a broken one.
    """

    inputs: Inputs
    settings: Settings
    _gradients: Gradients = field(init=False)
    _exact: Results = field(init=False)
    _eager: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._gradients = random_gradients(self.inputs, self.settings)
        self._exact = self._results(cca_mix_reference, torch.float64)
        self._eager = relative_errors(self._exact, self._results(cca_mix_reference, self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return self.inputs.mixed.dtype

    def _results(self, mix: Mix, dtype: torch.dtype) -> Results:
        return results_of(mix, self.inputs, self.settings, self._gradients, dtype)

    def errors(self, mix: Mix) -> dict[str, float]:
        """Relative error of each output and gradient."""
        return relative_errors(self._exact, self._results(mix, self._dtype))

    def problems(self, errors: dict[str, float], *, baseline: bool) -> list[str]:
        """One message for each error that the rule does not allow."""
        found = []
        is_half = self._dtype.itemsize == 2
        for name, error in errors.items():
            allowed = allowed_error(name, self._dtype) * (_BASELINE if baseline else 1)
            if is_half and self._exact[name].numel() >= _FEW:
                allowed = min(allowed, _NOISE * self._eager[name])
            if not error <= allowed:
                found.append(f"{name} has relative error {error:.2e}, allowed {allowed:.2e}")
        return found


Checking = Generator[Checked, None, list[str]]
"""Gives the checks that it makes, and returns the problems that they and earlier ones found."""


def measured_if_right(
    case: dict[str, Any], checking: Checking, rows: Iterable[dict[str, Any]]
) -> Iterator[Event]:
    """The checks of a case, then its rows; they are not asked for where there are problems.

    What raises (out of memory, does not compile, ...) refuses its case: the others go on.
    """
    try:
        if problems := (yield from checking):
            yield Refused(case, "; ".join(problems))
            return
        for row in rows:
            yield Measured(case | row)
    except Exception as error:
        yield Refused(case, f"{type(error).__name__}: {error}".splitlines()[0])
