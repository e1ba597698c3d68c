"""Opt-in tuning: measure tiles on the GPU at hand, and keep the fastest ones that are right.

:func:`tune` searches around the entry of the table; :func:`tuned_config` remembers what it found in a file.
"""

import fcntl
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

from cca_kernels.reference import cca_mix_reference
from cca_kernels.triton.accuracy import (
    allowed_error,
    random_gradients,
    random_inputs,
    relative_errors,
    results_of,
)
from cca_kernels.triton.configs import Config, Tile, config_for, safe_config
from cca_kernels.triton.launch import Inputs, Launch, Settings

CACHE_VARIABLE = "CCA_KERNELS_CACHE"
"""Environment variable that names the folder of tuned tiles, instead of ``~/.cache/cca_kernels``."""
TILES = ("mix", "conv_output_gradient", "latent_gradient", "filter_gradient")
TIMED_TOKENS = 32768
"""Inputs and outputs of so many exceed the L2 cache of every GPU so far."""
_CHECKED_TOKENS = 1999  # not a multiple of any tile, so that the last one is partial

Clock = Callable[[Callable[[], object]], float]
"""Runs a function and says how long it takes, in microseconds."""


def gpu_clock(run: Callable[[], object]) -> float:
    """Median over replays of a CUDA graph: the host's part in starting kernels is no matter of tiles."""
    return 1e3 * float(triton.testing.do_bench_cudagraph(run, return_mode="median"))


def tune(
    inputs: Inputs,
    settings: Settings,
    *,
    clock: Clock = gpu_clock,
    report: Callable[[str], None] = lambda line: None,
) -> Config:
    """The fastest tiles for these inputs among those near the table's entry.

    The kernels are independent, so their tiles are searched one after the other, each in two steps: rows
    and warps together, halved and doubled; then, around the best of these, the inner block halved and
    doubled, one pipeline stage less and more, and for the filter gradient half and twice the programs.
    A candidate must compile, start, and agree with the reference in fp64, outputs and gradients, by
    ``accuracy.BOUNDS``; only then is it timed.

    Args:
        inputs: what to time; the check takes their first 1,999 tokens.
        settings: of the operator.
        clock: how to time.
        report: gets a line about every candidate.

    Raises:
        RuntimeError: neither the table's tiles nor the safe ones pass.
    """
    trial = _Trial(inputs, settings, clock, report)
    mixed = inputs.mixed
    starts = (config_for(mixed), safe_config(mixed.dtype, mixed.shape[-1]))
    problems = [trial.problem(config) for config in starts]
    if None not in problems:
        raise RuntimeError(f"the kernels fail their check on {mixed.device}: {problems[0]}")
    best = starts[problems.index(None)]
    for name in TILES:
        times: dict[Config, float] = {}
        for step in (_shapes, _pipelines):
            for config in [best, *step(name, best)]:
                if config not in times:
                    times[config] = trial.time(name, config)
            best = min(times, key=times.__getitem__)
    return best


class _Trial:
    """Checks and times configs."""

    def __init__(
        self, inputs: Inputs, settings: Settings, clock: Clock, report: Callable[[str], None]
    ) -> None:
        self._inputs, self._settings, self._clock, self._report = inputs, settings, clock, report
        self._gradients = random_gradients(inputs, settings)
        self._short = _first_tokens(inputs, _CHECKED_TOKENS)
        d_q, d_k, d_v = (g[:_CHECKED_TOKENS] for g in self._gradients)
        self._short_gradients = d_q, d_k, d_v
        self._exact = results_of(
            cca_mix_reference, self._short, settings, self._short_gradients, torch.float64
        )

    def time(self, name: str, config: Config) -> float:
        """Microseconds of the pass that the tile ``name`` takes part in; infinite if it fails."""
        what = f"{name} {getattr(config, name)}"
        if name == "filter_gradient":
            what += f" programs={config.filter_gradient_programs}"
        problem = self.problem(config)
        if problem is not None:
            self._report(f"{what}: not timed, {problem}")
            return math.inf
        elapsed = self._clock(self._pass(name, config))
        self._report(f"{what}: {elapsed:.1f} us")
        return elapsed

    def problem(self, config: Config) -> str | None:
        """What keeps a config from being right; None if it agrees with the reference."""
        launch = Launch(self._short, self._settings, config)
        try:
            q, k, v, norms = launch.forward()
            gradients = launch.backward(*self._short_gradients, q, k, norms)
        except Exception as error:  # does not compile, out of shared memory, ...
            return f"{type(error).__name__}: {error}".splitlines()[0]
        named = zip(Inputs._fields, gradients, strict=True)
        results = {"q": q, "k": k, "v": v} | {f"gradient of {n}": g for n, g in named if g is not None}
        for name, found in relative_errors(self._exact, results).items():
            allowed = allowed_error(name, self._inputs.mixed.dtype)
            if found > allowed:
                return f"{name} has relative error {found:.1e}, allowed {allowed:.1e}"
        return None

    def _pass(self, name: str, config: Config) -> Callable[[], object]:
        launch = Launch(self._inputs, self._settings, config)
        q, k, _, norms = launch.forward()
        if name == "mix":
            return launch.forward
        return lambda: launch.backward(*self._gradients, q, k, norms)


def _first_tokens(inputs: Inputs, count: int) -> Inputs:
    x = inputs
    return x._replace(
        mixed=x.mixed[:count],
        cos=None if x.cos is None else x.cos[:count],
        sin=None if x.sin is None else x.sin[:count],
        cu_seqlens=None if x.cu_seqlens is None else x.cu_seqlens.clamp(max=count),
    )


def _shapes(name: str, config: Config) -> Iterator[Config]:
    tile: Tile = getattr(config, name)
    for rows in (tile.rows // 2, tile.rows, tile.rows * 2):
        for warps in (tile.warps // 2, tile.warps, tile.warps * 2):
            if rows >= 8 and 1 <= warps <= 16:
                yield _with_tile(config, name, rows=rows, warps=warps)


def _pipelines(name: str, config: Config) -> Iterator[Config]:
    tile: Tile = getattr(config, name)
    if tile.inner:  # one without an inner product has no pipeline
        for inner in (tile.inner // 2, tile.inner * 2):
            if inner >= 16:
                yield _with_tile(config, name, inner=inner)
        for stages in (tile.stages - 1, tile.stages + 1):
            if stages >= 1:
                yield _with_tile(config, name, stages=stages)
    if name == "filter_gradient":
        for programs in (config.filter_gradient_programs // 2, config.filter_gradient_programs * 2):
            yield replace(config, filter_gradient_programs=programs)


def _with_tile(config: Config, name: str, **fields: int) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **fields)})


def tuned_config(inputs: Inputs, settings: Settings, *, clock: Clock = gpu_clock) -> Config:
    """Tiles tuned for this GPU, from the cache or measured now (minutes, once) and stored there.

    The cache is one file per device name, version of Triton, element size and head dim. Tuning takes random
    data with the numbers of heads of ``inputs``. Of several processes one tunes and the others wait for its
    file. While a CUDA graph is captured nothing can be measured: the table's tiles are returned then.
    """
    mixed = inputs.mixed
    device = torch.cuda.get_device_name(mixed.device) if mixed.is_cuda else "cpu"
    key = {
        "device": device,
        "triton": triton.__version__,
        "element_size": mixed.dtype.itemsize,
        "head_dim": mixed.shape[-1],
    }
    path = _folder() / (re.sub(r"[^a-z0-9.]+", "-", "-".join(map(str, key.values())).lower()) + ".json")
    if path in _in_use:
        return _in_use[path]
    if mixed.is_cuda and torch.cuda.is_current_stream_capturing():
        return config_for(mixed)

    def measure() -> Config:
        groups, heads, dim = mixed.shape[2:]
        with torch.cuda.device_of(mixed):
            sample = random_inputs(TIMED_TOKENS, groups, heads - 2, dim, mixed.dtype, mixed.device)
            return tune(sample, settings, clock=clock)

    _in_use[path] = _stored(path, key, measure)
    return _in_use[path]


_in_use: dict[Path, Config] = {}
"""What this process has read or measured: tiles are asked for at every call."""


def _folder() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "cca_kernels"


def _stored(path: Path, key: dict[str, Any], measure: Callable[[], Config]) -> Config:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(path)
        if known is not None:
            return known
        # The operator runs below autograd and perhaps inside dispatch modes. These are per thread, and the
        # check needs neither.
        with ThreadPoolExecutor(1) as thread:
            config = thread.submit(measure).result()
        # Readers see a whole file or none, even where locks do not reach over the network.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(key | {"config": asdict(config)}, file, indent=1)
        os.replace(file.name, path)
        return config


def _read(path: Path) -> Config | None:
    """None if there is no file, or none of this version."""
    try:
        fields = json.loads(path.read_text())["config"]
        return Config(**fields | {name: Tile(**fields[name]) for name in TILES})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
