"""``cca-megatron`` as a user runs it: from a recipe to a trained model, stopped, resumed, refused."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from training.conftest import MODEL, environment, losses

from cca_megatron.data.bigram import bigram_cross_entropy
from cca_megatron.training.checkpoint import checkpoint_problems
from cca_megatron.training.recipe import RecipeError
from cca_megatron.training.session import prepare_command


def recipe(corpus: Path, folder: Path, iterations: int) -> Path:
    """The small model as a recipe: two ranks, a mixture of experts."""
    words = " ".join(MODEL).split("--")[1:]
    megatron = {}
    for name, *values in (word.split() for word in words):
        megatron[name] = yaml.safe_load(values[0]) if values else True
    for name in ("tokenizer-type", "vocab-size", "lr-decay-iters"):
        del megatron[name]
    megatron |= {
        "num-experts": 2,
        "moe-layer-freq": [0, 1],
        "moe-router-topk": 1,
        "moe-router-pre-softmax": True,
        "expert-model-parallel-size": 2,
        "use-distributed-optimizer": True,
        "micro-batch-size": 2,
        "train-iters": iterations,
        "eval-interval": 4,
        "save-interval": 100,
    }
    content = {
        "megatron": megatron,
        "data": {"inputs": [str(corpus)], "prefix": "data/corpus", "tokenizer": "bytes"},
        "output": "runs/test",
        "launch": {"gpus_per_node": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def cca_megatron(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cca_megatron.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment() | variables, capture_output=True, text=True)


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A folder in which the recipe has been trained, and what that printed."""
    folder = tmp_path_factory.mktemp("user")
    path = recipe(corpus, folder, iterations=8)
    run = cca_megatron(folder, "train", path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    return folder, path, run


def test_training_from_a_recipe(trained):
    folder, _, run = trained
    output = folder / "runs" / "test"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(losses(output / "tensorboard")) == list(range(1, 9))
    assert (output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "8"
    log = "".join(p.read_text() for p in (output / "logs").iterdir())
    for text in (run.stdout, log):
        assert "CCA attention: 2 layers, local backend" in text
        assert "iteration        8/       8" in text
    first = run.stdout.splitlines()[0]
    assert first.startswith("device: cpu (no GPU found)")
    assert f"output: {output}" in run.stdout  # relative paths are shown resolved
    assert (
        f"dataset: 20 documents, {(folder / 'data' / 'corpus.bin').stat().st_size // 2:,} tokens"
        in run.stdout
    )


def test_the_summary_is_true(trained):
    folder, _, run = trained
    lines = run.stdout[run.stdout.index("\nparameters") :].splitlines()
    summary = {line[:16].strip(): line[16:] for line in lines}
    hidden, latents, dense, expert = 32, 8 * 8, 3 * 32 * 48, 2 * 3 * 32 * 48
    attention = latents * hidden + hidden * 32 + 48 * (2 + 1) + 48 * (16 + 1) + 2
    total = 2 * (attention + 2 * hidden) + dense + expert + 2 * hidden + hidden + 258 * hidden
    assert summary["parameters"] == f"{total:,}"
    assert summary["tokens seen"] == f"{8 * 4 * 32:,} in 8 iterations"
    assert summary["KV cache"] == "128 bytes per token in bf16, 2 times less than MHA's 256"
    bigram = bigram_cross_entropy(str(folder / "data" / "corpus"), "90,10,0", 257)
    tokens = (folder / "data" / "corpus.bin").stat().st_size // 2
    bits = bigram / math.log(2) * tokens / (tokens - 20)
    assert summary["bigram model"] == f"{bigram:.3f} nats per token, {bits:.3f} bits per byte"
    validation = [line for line in run.stdout.splitlines() if "validation loss at iteration 8" in line][-1]
    assert summary["validation loss"].startswith(f"{float(validation.split()[-7]):.3f} nats")


def test_a_finished_run_is_not_repeated_and_can_go_on(trained):
    folder, path, _ = trained
    again = cca_megatron(folder, "train", path)
    assert again.returncode == 0
    assert "all 8 iterations are done: megatron.train-iters=16" in again.stdout
    assert "loss curve" in again.stdout
    longer = cca_megatron(folder, "train", path, "megatron.train-iters=10")
    assert longer.returncode == 0, longer.stdout[-3000:] + longer.stderr
    assert "successfully loaded checkpoint" in longer.stdout
    assert "iteration        9/      10" in longer.stdout
    assert "iteration        8/      10" not in longer.stdout


ANOTHER_MODEL = {
    "megatron.num-layers=4": "num_layers=4, but the checkpoint in /.* has 2",
    "cca.conv_kernel_sizes=[3,2]": r"cca_conv_kernel_sizes=\[3, 2\], but the checkpoint",
    "cca.temperature=exp": "cca_temperature='exp', but the checkpoint in .* has 'linear'",
    "megatron.rotary-interleaved=true": "rotary_interleaved=True, but the checkpoint in .* has False",
    "megatron.window-size=[8,0]": r"window_size=.*, but the checkpoint in .* has None",
    "cca.qk_mean=false": "cca_qk_mean=False, but the checkpoint in .* has True",
}


@pytest.mark.parametrize("override", ANOTHER_MODEL)
def test_a_checkpoint_of_another_model_is_refused(trained, override, monkeypatch):
    folder, path, _ = trained
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match=f"{ANOTHER_MODEL[override]}.*train into another output folder"):
        prepare_command(path, [override, "megatron.moe-layer-freq=1"])
    prepare_command(path, [override, "megatron.moe-layer-freq=1", "output=runs/new"])


def test_what_is_not_in_the_weights_may_change(trained, monkeypatch):
    folder, path, _ = trained
    monkeypatch.chdir(folder)
    prepare_command(path, ["cca.recompute_mix=true", "cca.temperature_init=2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--spec my.specs cca", "spec=.*this entry builds CCA by itself"),
        ("--reset-attention-mask", "--dataloader-inter-document-masking keeps documents apart"),
        ("--cca-temperature exp --load {checkpoints}", "cca_temperature='exp', but the checkpoint"),
    ],
)
def test_the_entry_without_a_recipe_checks_too(trained, arguments, message):
    """As a job script starts it; one message, before any process group."""
    folder, _, _ = trained
    words = arguments.format(checkpoints=folder / "runs/test/checkpoints").split()
    command = [sys.executable, "-m", "cca_megatron.training.pretrain", *MODEL, "--mock-data", *words]
    run = subprocess.run(
        [*command, "--micro-batch-size", "1", "--train-iters", "1"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert re.search(message, run.stderr), run.stderr


def test_a_refusal_changes_nothing(trained):
    folder, path, _ = trained
    before = files(folder)
    for overrides, message in {
        ("megatron.hidden-size=64",): "hidden_size=64, but the checkpoint",
        ("data.inputs=[python-stdlib]", "output=runs/other"): "was made from",
        ("data.tokenizer=hf:x", "data.inputs=null", "output=runs/other"): "was made with tokenizer 'bytes'",
    }.items():
        run = cca_megatron(folder, "train", path, *overrides)
        assert run.returncode == 1
        assert message in run.stderr
        assert "Traceback" not in run.stderr
    assert files(folder) == before


def test_a_broken_transformer_engine_is_explained(trained, tmp_path):
    """Megatron tolerates its absence, but not one that fails to import."""
    folder, path, _ = trained
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no CUDA library')")
    for arguments in (
        ("train", path),
        ("data", "prepare", "a.txt", "--output", "d", "--tokenizer", "bytes"),
        ("convert", "hf-to-megatron", ".", "new"),
        ("convert", "megatron-to-hf", ".", "new"),
        ("generate", ".", "--prompt", "a"),
    ):
        run = cca_megatron(folder, *arguments, PYTHONPATH=str(tmp_path))
        assert run.returncode == 1
        assert "Megatron cannot be imported: no CUDA library. cca-megatron doctor says" in run.stderr
        assert "Traceback" not in run.stderr


def test_settings_given_as_their_defaults_are_the_same_model(trained, monkeypatch):
    """A tuple by default and a list when given."""
    folder, path, _ = trained
    monkeypatch.chdir(folder)
    made = prepare_command(path, [])[0].args
    made.cca_conv_kernel_sizes = [2, 2]
    assert checkpoint_problems(made) == []


def test_a_failing_run_says_why(trained):
    """A failure that only shows in the workers: the first exception, not torchrun's report."""
    folder, path, _ = trained
    for suffix in (".bin", ".idx"):
        (folder / f"damaged{suffix}").write_bytes(b"no dataset" * 10)
    damaged = ("data.prefix=damaged", "data.inputs=[]", "output=runs/failed")
    run = cca_megatron(folder, "train", path, *damaged)
    assert run.returncode == 1
    assert "AssertionError: bad header, cannot read: damaged.idx" in run.stderr
    assert "ChildFailedError" not in run.stderr


def test_ctrl_c_saves_and_the_run_goes_on(corpus, tmp_path):
    """After a periodic save too: from then on Megatron's workers have children that must not be stopped."""
    path = recipe(corpus, tmp_path, iterations=400)
    process = subprocess.Popen(
        [sys.executable, "-m", "cca_megatron.cli", "train", path, "megatron.save-interval=2"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "iteration        3/" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=120)
    text = "".join(seen) + rest
    assert process.returncode == 0, text[-3000:]
    assert "stopping: a checkpoint is saved after this step" in text
    assert "stopped; the same command goes on from the checkpoint of iteration" in text
    saved = int((tmp_path / "runs/test/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 400
    run = cca_megatron(tmp_path, "train", path, f"megatron.train-iters={saved + 1}")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    assert f"iteration {saved + 1:8d}/{saved + 1:8d}" in run.stdout


@pytest.mark.parametrize("line", ["log:", "iteration        3/"])
def test_ctrl_c_before_training_and_twice_stops_at_once(corpus, tmp_path, line):
    """Nothing is saved, and nothing else is said."""
    path = recipe(corpus, tmp_path, iterations=400)
    process = subprocess.Popen(
        [sys.executable, "-m", "cca_megatron.cli", "train", path],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for text in process.stdout:
        if line in text:
            break
    time.sleep(0.5)  # torchrun is starting its workers
    process.send_signal(signal.SIGINT)
    if line != "log:":
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    start = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert process.returncode == 130, rest[-3000:]
    assert "stopped without saving a checkpoint; the same command starts anew" in rest
    if line == "log:":
        assert "stopping: training has not begun, so there is nothing to save" in rest


def test_help_teaches(tmp_path):
    for arguments, words in {
        (): ["train", "data", "doctor", "quickstart.yaml"],
        ("train",): ["SECTION.KEY=VALUE", "--print-args", "CCA_DEVICE", "last checkpoint"],
        ("data", "prepare"): ["python-stdlib", "--tokenizer", "sentencepiece:PATH", "--strict"],
    }.items():
        run = cca_megatron(tmp_path, *arguments, "--help")
        assert run.returncode == 0
        for word in words:
            assert word in run.stdout, word


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_ctrl_c_while_preparing_data(tmp_path, seconds):
    """In a terminal it reaches the workers too: one line, at once, and nothing left."""
    prepare = ["data", "prepare", "--output", "out/d", "--tokenizer", "bytes", "--workers", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cca_megatron.cli", *prepare, *["python-stdlib"] * 20],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell may have started these tests in the background, where Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(tmp_path.glob("out/d.part-*.bin")):
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "stopped; nothing was written\n")
    assert not list((tmp_path / "out").iterdir())


def test_preparing_data(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\0")
    prepare = ("data", "prepare", "a.txt", "b.bin", "--output", "out/d", "--tokenizer", "bytes")
    run = cca_megatron(tmp_path, *prepare)
    assert run.returncode == 0, run.stderr
    assert "dataset: 1 document, 5 tokens in" in run.stdout
    assert "(skipped: 1 binary)" in run.stdout
    again = cca_megatron(tmp_path, *prepare)
    assert again.returncode == 1
    assert "exists already; --overwrite replaces it" in again.stderr
    inside_a_file = cca_megatron(tmp_path, *prepare[:-3], "a.txt/d", *prepare[-2:])
    assert inside_a_file.returncode == 1
    assert re.search("error: (File exists|Not a directory): /.*a.txt", inside_a_file.stderr)
    strict = cca_megatron(tmp_path, *prepare, "--strict", "--overwrite")
    assert strict.returncode == 1
    assert "b.bin is binary" in strict.stderr
