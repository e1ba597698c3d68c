"""Benchmarks time what passed its check and nothing else, and report what was measured and nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from cca_kernels import cca_mix, cca_mix_reference
from cca_megatron.bench import block, command, machine, measure, report
from cca_megatron.bench.attention import Core
from cca_megatron.bench.check import MixCheck
from cca_megatron.bench.collect import collect
from cca_megatron.bench.measure import Ceilings, CudaTimer, Job, Timing, Workload
from cca_megatron.bench.mix import Variant, flops, measure_mix, moved_bytes
from cca_megatron.bench.results import Checked, Measured, Refused, Result, describe, read_all
from cca_megatron.bench.shapes import ZAYA1, MixShape
from cca_megatron.training.device import select_device

ROOT = Path(__file__).parents[2]
DEVICE = torch.device(select_device())
SHAPE = MixShape("tiny", 512, 2, 1, dim=16)
CEILINGS = Ceilings(copy_gb_per_s=100.0, gemm_tflop_per_s=10.0)
TOKENS = 16
EAGER = Variant("eager", partial(cca_mix, backend="reference"), baseline=True)
FUSED = Variant("fused", partial(cca_mix, backend="triton"), baseline=False)


@pytest.fixture(autouse=True)
def small_and_exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(measure, "release", lambda: None)  # there is nothing to release, which takes a second
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wall_clock(jobs, *, graph):
    """In place of CUDA events, which a CPU does not have."""
    start = time.perf_counter()
    for job in jobs:
        if job.prepare is not None:
            job.prepare()
        job.run()
    elapsed = time.perf_counter() - start
    return Timing(elapsed, elapsed, elapsed, peak_bytes=0)


def measured(*variants, shape=SHAPE, **options):
    """Events of the variants at one length, by kind."""
    events = list(
        measure_mix(
            wall_clock,
            CEILINGS,
            [shape],
            [TOKENS],
            variants,
            DEVICE,
            **{"dtype": torch.float32, "checked_tokens": TOKENS, **options},
        )
    )
    return [[e for e in events if isinstance(e, kind)] for kind in (Checked, Measured, Refused)]


def test_bytes_and_operations():
    head = 128 * 2  # bytes
    assert moved_bytes(ZAYA1, 1) == {
        "forward": (12 + 12) * head + 2 * 64 * 4,
        "backward": (12 + 10 + 10 + 12) * head + 2 * 64 * 4,
        "both": 68 * head + 4 * 64 * 4,
    }
    assert moved_bytes(ZAYA1, 1000)["forward"] == 1000 * moved_bytes(ZAYA1, 1)["forward"]
    assert flops(ZAYA1, 7)["forward"] == 7 * 10 * 3 * (2 * 128 * 128)
    assert flops(ZAYA1, 7)["both"] == 3 * flops(ZAYA1, 7)["forward"]


def test_right_variants_are_timed():
    """The kernels (in the interpreter, without a GPU) and the reference."""
    checks, rows, refused = measured(FUSED, EAGER)
    assert not refused
    assert len(checks) == 2
    assert len(rows) == 2 * 3 * 2
    for event in rows:
        row = event.row
        assert row["us"] > 0
        speed = moved_bytes(SHAPE, TOKENS, element_size=4)[row["pass"]] / row["us"] * 1e6
        assert row["gb_per_s"] == pytest.approx(speed / 1e9)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 100)
        assert row["of_gemm"] == pytest.approx(row["tflop_per_s"] / 10)


def wrong_key(*args, **kwargs):
    q, k, v = cca_mix_reference(*args, **kwargs)
    return q, k * 1.001, v


def wrong_gradient(mixed, *args, **kwargs):
    q, k, v = cca_mix_reference(mixed, *args, **kwargs)
    return q, k, v + 0.01 * (mixed[..., -1, :] - mixed[..., -1, :].detach())


def not_finite(*args, **kwargs):
    q, k, v = cca_mix_reference(*args, **kwargs)
    return q, k, v / 0


def raises(*args, **kwargs):
    raise RuntimeError("out of memory\nand more")


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (wrong_key, "k has relative error 1.00e-03, allowed 1.00e-05"),
        (wrong_gradient, "gradient of mixed has relative error"),
        (not_finite, "v has relative error inf"),
        (raises, "RuntimeError: out of memory"),
    ],
)
@pytest.mark.parametrize("baseline", [False, True])
def test_wrong_variants_have_no_speed(mix, message, baseline):
    _, rows, refused = measured(Variant("wrong", mix, baseline), EAGER)
    assert {event.row["variant"] for event in rows} == {"eager"}
    [event] = refused
    assert event.case == {"shape": "tiny", "variant": "wrong", "tokens": TOKENS}
    assert message in event.problem.replace("4.00e-05", "1.00e-05")
    assert not re.search(r"\d us|GB/s|FLOP", describe(event))


def test_bf16_is_held_to_the_bound_and_to_eager():
    """Eager is the baseline it defines; as a candidate it rounds too often."""
    check = MixCheck(SHAPE.inputs(256, torch.bfloat16, DEVICE), SHAPE.settings)
    eager = check.errors(cca_mix_reference)
    assert not check.problems(eager, baseline=True)
    assert any("q has relative error" in problem for problem in check.problems(eager, baseline=False))
    worse = eager | {"gradient of conv1": 1.06 * eager["gradient of conv1"]}
    assert len(check.problems(worse, baseline=True)) == 1


@pytest.mark.parametrize("which", measure.PASSES)
def test_passes(which):
    """Backward starts from a fresh forward pass every time, and only its own part is run."""
    x, calls = torch.ones(3, requires_grad=True), []

    def forward():
        calls.append("forward")
        return [(x * x).sum()]

    job = Workload(forward, [x], [torch.tensor(1.0)]).job(which)
    for _ in range(2):
        if job.prepare is not None:
            job.prepare()
        before = len(calls)
        result = job.run()
        assert len(calls) - before == (0 if which == "backward" else 1)
        if which != "forward":
            assert torch.equal(result[0], torch.full((3,), 2.0))
    assert (job.prepare is None) == (which != "backward")


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("which", measure.PASSES)
def test_cuda_timer(which, graph):
    """With the real clock, on a GPU; without one its events are stand-ins and there are no graphs."""
    if DEVICE.type == "cpu" and graph:
        pytest.skip("CUDA graphs need a GPU")
    a = torch.randn(32, 32, device=DEVICE, requires_grad=True)
    jobs = [Workload(lambda: [a @ a], [a], [torch.ones_like(a)]).job(which) for _ in range(3)]
    timing = CudaTimer(seconds=1e-3)(jobs, graph=graph)
    assert timing.low <= timing.median <= timing.high
    assert DEVICE.type == "cpu" or timing.low > 0 < timing.peak_bytes


def test_ceilings():
    def second(jobs, *, graph):
        assert isinstance(jobs[0], Job)
        return Timing(1.0, 1.0, 1.0, 0)

    ceilings = measure.measure_ceilings(second, DEVICE, megabytes=1, side=8)
    assert ceilings == Ceilings(2 * 2**20 / 1e9, 2 * 8**3 / 1e12)


def test_core_attention_is_softmax():
    q, k, v = (torch.randn(5, 2, heads, 8, dtype=torch.float64, device=DEVICE) for heads in (4, 2, 2))
    core = Core(torch.nn.attention.SDPBackend.MATH)
    for causal in (True, False):
        scores = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(2, 2)) / 8**0.5
        if causal:
            scores += torch.full((5, 5), -torch.inf, device=DEVICE).triu(1)
        expected = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v.repeat_interleave(2, 2)).flatten(2)
        assert torch.allclose(core(q, k, v, causal), expected)


def test_blocks(monkeypatch):
    monkeypatch.setattr(block, "TOKENS_AT_ONCE", 16)
    shape = MixShape("CCA", 512, 4, 2)
    choices = block.methods([shape], [EAGER, Variant("wrong", wrong_key, baseline=False)])
    core = Core(torch.nn.attention.SDPBackend.MATH)
    settings = {"dtype": torch.float32, "checked_tokens": 8}
    events = list(block.measure_block(wall_clock, choices, [8], core, DEVICE, **settings))
    [refused] = [event for event in events if isinstance(event, Refused)]
    assert (refused.case["method"], refused.case["variant"]) == ("CCA", "wrong")
    rows = [event.row for event in events if isinstance(event, Measured)]
    count = {
        name: sum(row["method"] == name for row in rows) for name in ("CCA", "MHA 4", "GQA 4/1", "MLA 4")
    }
    assert count == {"CCA": 8, "MHA 4": 8, "GQA 4/1": 8, "MLA 4": 6}
    assert {row["batch"] for row in rows} == {2}
    assert {(row["pass"], row["causal"]) for row in rows if row["part"] == "core"} == {
        ("forward", True),
        ("backward", False),
    }


MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "1.2",
    "cuda": "13.0",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "commit": "abc",
    "date": "2026-01-02T03:04:05Z",
    "command": "cca-megatron bench mix",
}


def made_up_results():
    """Figures that are recognised again. Nothing stores them."""
    times = {"us_low": 1.0, "us_high": 3.0, "peak_bytes": 0, "cuda_graph": True}
    mix, attention = (Result(name, MACHINE, {}) for name in ("mix", "block"))
    for variant, us in (("fused", 41.0), ("eager", 777.0)):
        row = {"shape": "ZAYA1", "variant": variant, "tokens": 16384, "pass": "forward", "us": us}
        mix.add(Measured(row | times | {"gb_per_s": 2345.0, "of_copy": 0.5}))
    mix.add(Refused({"shape": "ZAYA1", "variant": "compile", "tokens": 16384}, "no compiler"))
    for method, variant, part, which, us in (
        ("ZAYA1", "fused", "block", "both", 1234.0),
        ("MHA 16", None, "block", "both", 4321.0),
        ("ZAYA1", "fused", "core", "forward", 555.0),
    ):
        row = {"method": method, "hidden": 2048, "variant": variant, "part": part, "pass": which}
        attention.add(Measured(row | times | {"tokens": 16384, "us": us}))
    return mix, attention


def test_readme_table():
    results = [vars(result) for result in made_up_results()]
    table = report.readme_table(results)
    assert "| ZAYA1 | 41 / not measured | not measured / not measured | 777 / not measured |" in table
    assert "2,345 (50%)" in table
    assert "Cases without a speed, because a check failed or they did not run: ZAYA1 compile." in table
    assert "| ZAYA1 fused, E = 2,048 | 1,234 |" in table
    assert "| MHA 16, E = 2,048 | 4,321 |" in table
    assert "| ZAYA1 fused | 555 | not measured | 1,413 | 8,689 |" in table
    assert (
        "NVIDIA H100 80GB HBM3 (driver 1.2, cuda 13.0, torch 2.13.0, triton 3.7.1, commit abc, 2026-01-02)"
        in table
    )
    results[1]["machine"] = MACHINE | {"device": "another"}
    assert "ublished" not in report.readme_table(results)


def test_nothing_measured_is_said():
    assert report.readme_table([]) == report.NOT_MEASURED
    assert report.readme_table([vars(Result("mix", MACHINE, {}))]) == report.NOT_MEASURED


def test_report_command(tmp_path):
    """Plots and README from files; nothing of the README but the table changes."""
    for result in made_up_results():
        result.write(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- bench step -->\nold\n<!-- /bench -->\n")
    options = ["--results", tmp_path / "results", "--plots", tmp_path / "plots", "--readme", readme]
    options += ["--docs", docs]
    arguments = ["report", *map(str, options)]
    run = CliRunner().invoke(command.app, arguments)
    assert run.exit_code == 0, run.output
    table = report.readme_table(read_all(tmp_path / "results"))
    assert readme.read_text() == f"before\n{report.BEGIN}\n{table}\n{report.END}\nafter\n"
    assert docs.read_text() == "<!-- bench step -->\nNot measured yet.\n<!-- /bench -->\n"
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["block-nvidia-h100-80gb-hbm3.png", "mix-nvidia-h100-80gb-hbm3.png"]
    readme.write_text("no markers")
    assert CliRunner().invoke(command.app, arguments).exit_code == 1
    (tmp_path / "results" / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is no result"):
        read_all(tmp_path / "results")


def test_readme_shows_the_stored_results(tmp_path):
    readme = ROOT / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    report.update_readme(copy, ROOT / "benchmarks/results")
    assert copy.read_text() == readme.read_text()


def test_time_limit_and_storage(tmp_path):
    """What was measured until then is stored, with the machine; what was not is not."""
    rows = [
        {"shape": "tiny", "variant": "fused", "tokens": 1, "pass": "both", "cuda_graph": True}
        for _ in range(2)
    ]
    times = {"us": 1.0, "us_low": 1.0, "us_high": 1.0, "peak_bytes": 0}

    def events(started):
        for row in rows:
            started("a case")
            yield Measured(row | times)

    collect(Result("mix", MACHINE, {"copy_gb_per_s": 1.0}), events, 2, 0.0, tmp_path)
    [path] = tmp_path.iterdir()
    assert path.name == "mix-nvidia-h100-80gb-hbm3-2026-01-02t03-04-05z.json"
    stored = json.loads(path.read_text())
    assert stored["rows"] == [rows[0] | times]
    assert stored["machine"] == MACHINE


def test_what_was_measured_is_stored_when_killed(tmp_path):
    def events(started):
        started("a case")
        yield Measured({"shape": "tiny", "us": 1.0})
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit):
        collect(Result("mix", MACHINE, {}), events, 2, None, tmp_path, lambda event: "a line")
    [path] = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"] == [{"shape": "tiny", "us": 1.0}]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_that_cannot_be_written_is_named_before_measuring(tmp_path, capsys):
    def events(started):
        raise AssertionError("it measured")

    (tmp_path / "file").write_text("")
    with pytest.raises(typer.Exit):
        collect(Result("mix", MACHINE, {}), events, 1, None, tmp_path / "file" / "results")
    assert "Not a directory" in capsys.readouterr().err


def test_machine_is_named():
    facts = machine.facts()
    assert facts["torch"] == torch.__version__
    assert facts["megatron-core"].startswith("0.19")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", facts["date"])
    assert "cca-megatron" in facts["command"]


@pytest.mark.parametrize("arguments", ["mix --tune", "block --quick"])
def test_without_a_gpu_commands_refuse(arguments):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "cca_megatron.cli", "bench", *arguments.split()],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: cca-megatron bench {arguments.split()[0]} needs a CUDA GPU")
    assert not run.stdout
