"""Tuning takes the fastest tiles that are right, and measures them once."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cca_kernels import cca_mix_reference
from cca_kernels.triton import tuning
from cca_kernels.triton.accuracy import random_gradients, random_inputs, results_of
from cca_kernels.triton.configs import Tile, safe_config
from cca_kernels.triton.launch import Inputs, Settings
from cca_megatron.training.device import select_device

DEVICE = torch.device(select_device())
SETTINGS = Settings(
    qk_mean=True,
    value_delay_from=8,
    exponential=False,
    interleaved=False,
    first_query=0,
    query_count=2,
    order="sbhd",
)
TOKENS = 16


@pytest.fixture(autouse=True)
def small_and_exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FakeKernels:
    """Right results at a made-up cost. Some tiles are wrong, and some do not compile."""

    now = 0

    def __init__(self, inputs, settings, config):
        self._inputs, self._settings, self._config = inputs, settings, config

    def _results(self, gradients):
        arguments = (self._inputs, self._settings, gradients, torch.float32)
        return results_of(cca_mix_reference, *arguments)

    def forward(self):
        tile = self._config.mix
        if tile.warps > 8:
            raise RuntimeError("out of resource: shared memory")
        FakeKernels.now += 1024 // tile.rows // tile.stages + tile.warps
        if tile.rows == 16:  # the fastest, and wrong
            FakeKernels.now -= 100
        results = self._results(random_gradients(self._inputs, self._settings))
        return results["q"] * (1.1 if tile.rows == 16 else 1), results["k"], results["v"], None

    def backward(self, d_q, d_k, d_v, q, k, norms):
        config = self._config
        FakeKernels.now += config.latent_gradient.rows + 10000 // config.filter_gradient_programs
        results = self._results((d_q, d_k, d_v))
        return [results.get(f"gradient of {name}") for name in Inputs._fields]


def fake_clock(run):
    before = FakeKernels.now
    run()
    return FakeKernels.now - before


def inputs(tokens=TOKENS):
    return random_inputs(tokens, groups=1, queries=2, dim=16, dtype=torch.float32, device=DEVICE)


def test_tuning_takes_the_fastest_that_is_right(monkeypatch):
    monkeypatch.setattr(tuning, "Launch", FakeKernels)
    lines = []
    config = tuning.tune(inputs(), SETTINGS, clock=fake_clock, report=lines.append)
    assert config.mix == Tile(rows=64, inner=16, warps=4, stages=2)
    assert config.latent_gradient.rows == 16
    start = safe_config(torch.float32, 16)
    assert config.conv_output_gradient == start.conv_output_gradient
    assert config.filter_gradient_programs == 2 * start.filter_gradient_programs
    for wrong in ("rows=16, inner=16, warps=4", "rows=64, inner=16, warps=16"):
        of_wrong = [line for line in lines if line.startswith("mix") and wrong in line]
        assert of_wrong
        assert all("not timed" in line for line in of_wrong)


def test_the_kernels_pass_the_check_of_the_tuner():
    trial = tuning._Trial(inputs(), SETTINGS, fake_clock, print)
    config = safe_config(torch.float32, 16)
    assert trial.problem(config) is None
    assert "ZeroDivisionError" in trial.problem(tuning._with_tile(config, "mix", rows=0))


def test_tuned_tiles_are_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "Launch", FakeKernels)
    monkeypatch.setattr(tuning, "TIMED_TOKENS", TOKENS)
    monkeypatch.setattr(tuning, "_in_use", {})

    def refuse(run):
        raise AssertionError("measured again")

    # Below autograd, as in an operator.
    with torch._C._AutoDispatchBelowAutograd():
        first = tuning.tuned_config(inputs(3), SETTINGS, clock=fake_clock)
    assert first.mix.rows == 64
    assert tuning.tuned_config(inputs(3), SETTINGS, clock=refuse) is first
    tuning._in_use.clear()  # as in another process
    assert tuning.tuned_config(inputs(), SETTINGS, clock=refuse) == first
    [path] = (tmp_path / "cache").glob("*.json")
    stored = json.loads(path.read_text())
    assert (stored["element_size"], stored["head_dim"]) == (4, 16)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    path.write_text("{}")  # of another version
    tuning._in_use.clear()
    assert tuning.tuned_config(inputs(), SETTINGS, clock=fake_clock) == first


def test_of_several_processes_one_tunes(tmp_path):
    searches = []

    def search():
        searches.append(1)
        time.sleep(0.2)
        return safe_config(torch.float32, 16)

    with ThreadPoolExecutor(4) as pool:
        path = tmp_path / "tiles.json"
        found = list(pool.map(lambda _: tuning._stored(path, {}, search), range(4)))
    assert found == [safe_config(torch.float32, 16)] * 4
    assert len(searches) == 1
