"""A sweep of the quality benchmark trains what is missing, a few at a time, and goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import quality
import quality_runs
import yaml
from quality_runs import Run, train_all

from cca_megatron.training.launch import TrainingError

ROOT = Path(__file__).parents[2]
TINY = {
    "model": {
        "hidden-size": 64,
        "kv-channels": 8,
        "num-layers": 1,
        "ffn-hidden-size": 96,
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable-bias-linear": True,
        "position-embedding-type": "rope",
        "max-position-embeddings": 32,
    },
    "megatron": {
        "seq-length": 32,
        "micro-batch-size": 2,
        "train-iters": 4,
        "lr": 1e-3,
        "split": "90,10,0",
        "eval-interval": 2,
        "eval-iters": 1,
        "log-interval": 1,
        "num-workers": 0,
    },
}


@pytest.fixture
def stub_run(tmp_path, monkeypatch):
    """Runs that are small programs instead of trainings; what they print is in ``events``, in order."""
    events = tmp_path / "events"
    finished = []
    monkeypatch.setattr(Run, "finish", lambda run: finished.append(run.variant) or 2.5)

    def make(name, program):
        folder = tmp_path / name
        folder.mkdir()
        launch = SimpleNamespace(gpus_per_node=1)
        words = [sys.executable, "-c", f"log = open({str(events)!r}, 'a', 1)\n{program}"]
        return Run(
            name, 1, folder, SimpleNamespace(torchrun=lambda: words, recipe=SimpleNamespace(launch=launch))
        )

    make.events, make.finished = events, finished
    return make


def test_no_more_runs_at_a_time_than_asked_for(stub_run):
    program = "import time; print('+', file=log); time.sleep(0.7); print('-', file=log)"
    left = []
    runs = [stub_run(name, program) for name in "abcde"]
    train_all(runs, 2, "cpu", lambda run, loss, count: left.append(count))
    depth, depths = 0, []
    for event in stub_run.events.read_text().split():
        depth += 1 if event == "+" else -1
        depths.append(depth)
    assert max(depths) == 2
    assert sorted(stub_run.finished) == list("abcde")
    assert left == [4, 3, 2, 1, 0]


def test_a_failed_run_is_named_and_ends_the_others(stub_run):
    fails = stub_run("fails", "raise ValueError('too large')")
    waits = stub_run("waits", "import time; time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(TrainingError, match="fails: ValueError: too large"):
        train_all([fails, waits], 2, "cpu", lambda *ended: None)
    assert time.monotonic() - started < 30
    assert stub_run.finished == []


def test_a_run_that_another_sweep_still_trains_is_left_alone(stub_run):
    run = stub_run("busy", "pass")
    with (
        quality_runs._owned(run.folder),
        pytest.raises(TrainingError, match="another process still trains it"),
    ):
        train_all([run], 1, "cpu", lambda *ended: None)


@pytest.fixture
def sweep(tmp_path):
    """Start the benchmark on a tiny recipe, as a user does."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number:02}.txt").write_text(f"{number} bottles of water on the wall\n" * 40)
    data = {"inputs": [str(texts)], "prefix": str(tmp_path / "data/texts"), "tokenizer": "bytes"}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY | {"data": data}))

    def start(*words):
        return subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks/quality.py"), str(recipe), *words],
            cwd=tmp_path,
            env=os.environ | {"CCA_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_a_sweep_without_jobs_is_refused(jobs, capsys):
    with pytest.raises(SystemExit):
        quality._parser().parse_args(["--jobs", jobs])
    assert "must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.long
def test_a_sweep_trains_reports_and_repeats_nothing(sweep, tmp_path):
    words = "--variants ccgqa mla --seeds 1 --jobs 2 --json found.json --plot found.png".split()
    first = sweep(*words)
    output, _ = first.communicate(timeout=600)
    assert first.returncode == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["variant"] for run in found["runs"]] == ["ccgqa", "mla"]
    assert all([iteration for iteration, _ in run["validation"]] == [2, 4] for run in found["runs"])
    assert (tmp_path / "found.png").stat().st_size > 10_000
    logs = [tmp_path / f"runs/quality/{name}-seed1/train.log" for name in ("ccgqa", "mla")]
    trained = [log.stat().st_mtime_ns for log in logs]
    again, _ = sweep(*words).communicate(timeout=600)
    assert again.endswith(output[output.index("| attention") :])
    assert [log.stat().st_mtime_ns for log in logs] == trained
    other, _ = sweep("megatron.lr=0.1", *words).communicate(timeout=600)
    assert "has other settings; another --output works" in other


@pytest.mark.long
def test_a_stopped_sweep_goes_on_from_its_checkpoint(sweep, tmp_path):
    words = "megatron.train-iters=400 megatron.eval-interval=400 --variants ccgqa --seeds 1".split()
    log, folder = tmp_path / "runs/quality/ccgqa-seed1/train.log", tmp_path / "runs/quality/ccgqa-seed1"
    first = sweep(*words)
    deadline = time.monotonic() + 300
    while not (log.exists() and "] iteration        5/" in log.read_text()):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=300)
    assert "stopped after 0 of 1 runs; the same command goes on" in output
    assert not (folder / "result.json").exists()
    saved = int((folder / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    second = sweep(*words)
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0, output
    assert f"] iteration {saved + 1:8}/" in log.read_text()
    assert "] iteration        5/" not in log.read_text()
