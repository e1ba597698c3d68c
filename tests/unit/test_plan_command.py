"""``cca-megatron plan`` on every shipped recipe, its search, and its times beside published ones."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.planned import DENSE, arguments
from typer.testing import CliRunner

from cca_megatron.cli import app
from cca_megatron.plan import published
from cca_megatron.plan.hardware import GPUS
from cca_megatron.plan.search import search
from cca_megatron.plan.shapes import model_from_args, run_from_args

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
ZAYA = ROOT / "configs" / "recipes" / "zaya1_8b_32k_64gpu.yaml"
MOE = ROOT / "configs" / "recipes" / "ccgqa_moe_1.5b_32k_64gpu.yaml"
DENSE_7B = ROOT / "configs" / "recipes" / "ccgqa_7b_4k_64gpu.yaml"
ALONE = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
"""The environment without what the tests themselves set."""
LIMIT = 5.0
"""Seconds of CPU time for a whole command."""


def plan(*words, succeeds=True):
    result = CliRunner().invoke(app, ["plan", *map(str, words)])
    assert (result.exit_code == 0) is succeeds, result.output
    return result.output


def figures(folder, *words):
    plan(*words, "--json", folder / "plan.json")
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_planned(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (found,) = figures(tmp_path, path)
    assert found["parameters_total"] == sum(found["parameters"].values()) > 1e6
    assert found["step"]["seconds"] == pytest.approx(sum(found["step"]["parts"].values()))
    assert found["memory"]["fits"]
    assert 0 < found["step"]["mfu"] < 1


def test_a_plan_takes_less_than_five_seconds_of_cpu_and_no_compiler(tmp_path):
    """PyTorch's compiler would be loaded by Megatron's decorators, and a plan has no use for it."""
    script = (
        "import sys; from typer.testing import CliRunner; from cca_megatron.cli import app; "
        f"assert CliRunner().invoke(app, ['plan', {str(ZAYA)!r}]).exit_code == 0; "
        "import torch; assert torch.compile.__module__ == 'torch'; "
        "sys.exit('torch._inductor.compile_fx' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    # Twice if need be: on a machine with much else to do, the same work takes more of a CPU's time.
    assert any(cpu_seconds(command, tmp_path) < LIMIT for _ in range(2))


def cpu_seconds(command, folder) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = ALONE | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_other_attention_and_lengths_stand_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        ZAYA,
        "--compare",
        "mha,gqa,mla,mha",
        "--seq-length",
        "32768,131072,32768",
        "--gpu",
        "H200",
        "--plot",
        tmp_path / "plan.png",
    )
    found = figures(tmp_path, *words)
    assert [(one["attention"], one["sequence"]) for one in found] == [
        (kind, length) for length in (32768, 131072) for kind in ("cca", "mha", "gqa", "mla")
    ]
    assert {one["gpu"]["name"] for one in found} == {"H200 141GB"}
    cca, mha, gqa, mla = (one["kv_cache_bytes_per_token"] for one in found[:4])
    assert (mha / cca, gqa / cca) == (8, 2)  # 16 and 4 KV heads of 128 channels beside 2
    assert mla == 40 * (512 + 64) * 2
    assert all(one["step"]["seconds"] > found[0]["step"]["seconds"] for one in found[1:4])
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize("gpus", [8, 16384])
def test_more_gpus_take_less_time(gpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (ZAYA, "megatron.global-batch-size=4096", "--gpus")
    one, other = (figures(tmp_path, *words, count)[0] for count in (64, gpus))
    assert other["parallel"]["gpus"] == gpus
    assert (other["step"]["seconds"] < one["step"]["seconds"]) is (gpus > 64)


def test_four_million_tokens_are_planned_and_found_too_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        ZAYA,
        "megatron.context-parallel-size=8",
        "megatron.global-batch-size=8",
        "--seq-length",
        4 * 2**20,
    )
    assert "does not fit" in plan(*words)


def test_search_ranks_what_fits(tmp_path):
    args = arguments(tmp_path, DENSE, {}, gpus=8, global_batch_size=64)
    found = search(model_from_args(args), 8, run_from_args(args), GPUS["h100"])
    assert len(found) > 10
    assert [c.step.seconds for c in found] == sorted(c.step.seconds for c in found)


@pytest.mark.parametrize(
    "words",
    [
        (
            DENSE_7B,
            "megatron.pipeline-model-parallel-size=4",
            "megatron.num-virtual-stages-per-pipeline-rank=2",
        ),
        (
            DENSE_7B,
            "megatron.pipeline-model-parallel-size=4",
            "megatron.decoder-first-pipeline-num-layers=5",
            "megatron.decoder-last-pipeline-num-layers=7",
        ),
        (MOE, "--gpus", "32"),
        (ZAYA, "--seq-length", "8192"),
    ],
    ids=["interleaved", "unequal stages", "experts", "zaya"],
)
def test_overrides_of_a_search_give_the_layout_it_ranked(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = figures(tmp_path, *words, "--search")
    assert len(found) > 100
    for candidate in found[:: len(found) // 12]:
        (again,) = figures(tmp_path, words[0], *candidate.pop("overrides"))
        assert again == candidate


def test_a_search_needs_no_layout_of_the_recipe_on_these_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_m = ROOT / "configs" / "recipes" / "ccgqa_7b_1m_512gpu.yaml"
    assert "must be a multiple of 64" in plan(one_m, "--gpus", "8", succeeds=False)
    found = figures(tmp_path, one_m, "--gpus", "8", "--search", "--seq-length", "131072")
    assert {one["parallel"]["gpus"] for one in found} == {8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "h1000"), "h100 works"),
        (("--compare", "mhla"), "mha, gqa, mla are known"),
        (("--seq-length", "4k"), "4096,32768 works"),
        (("--gpus", "12"), "gpus=8 works"),
        (("--search", "--compare", "mha"), "one at a time"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(ZAYA), *words])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("run", published.RUNS, ids=lambda run: f"{run.name}, {run.parallel.gpus} GPUs")
def test_step_times_are_near_published_ones(run):
    assert abs(run.error) < 0.1


def test_the_documentation_has_the_errors_that_the_code_makes():
    assert published.markdown() in (ROOT / "docs" / "planner.md").read_text()
