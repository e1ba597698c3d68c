"""What would be submitted, and what is said of a run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cca_megatron.cli import app
from cca_megatron.cluster import submit
from cca_megatron.cluster.run_directory import Attempt, Job, RunDirectory
from cca_megatron.cluster.slurm import SlurmError
from cca_megatron.training.command import build_command
from cca_megatron.training.heartbeat import FOLDER_VARIABLE, read_heartbeats
from cca_megatron.training.recipe import RecipeError, load_recipe

RECIPE = """
model: {preset: ccgqa_1x4x, hidden-size: 32, kv-channels: 4, num-layers: 2, max_position_embeddings: 16}
megatron: {seq-length: 16, micro-batch-size: 1, train-iters: 4, lr: 1.0e-3, mock-data: true,
           tokenizer-type: NullTokenizer, vocab-size: 64}
output: runs/mine
launch: {nodes: 2, gpus_per_node: 4}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CCA_DEVICE", raising=False)
    (tmp_path / "base.yaml").write_text(RECIPE)
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nmegatron: {lr: 0.5}\n")
    return build_command(load_recipe(tmp_path / "mine.yaml", ["megatron.train-iters=9"]), "cpu")


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_run_directory_stands_alone(command, tmp_path):
    """Its recipe holds what it extends and the overrides, and is the same command."""
    run, files = submit.run_files(command, submit.Request())
    assert run.root == tmp_path / "runs" / "mine"
    assert not run.root.exists()
    submit.store(run, files)
    again = build_command(load_recipe(run.recipe, []), "cpu")
    assert again.recipe.arguments == command.recipe.arguments
    assert (again.args.lr, again.args.train_iters) == (0.5, 9)
    assert run.arguments.read_text().splitlines() == command.argv
    assert yaml.safe_load(run.recipe.read_text())["output"] == str(run.root)
    assert "torch==" in (run.root / "environment.txt").read_text()


def test_options_reach_sbatch(command):
    request = submit.Request("1-0", "gpu", "me", None, ["--qos=high", "--nodes=3"])
    options = directives(submit.run_files(command, request)[1]["job.sbatch"])
    for option in ("--gpus-per-node=4", "--time=1-0", "--partition=gpu", "--account=me", "--qos=high"):
        assert option in options
    assert "--signal=B:USR1@300" in options
    assert "--requeue" in options
    assert [o for o in options if o.startswith("--nodes")][-1] == "--nodes=3"  # the user's come last
    assert len([o for o in options if o.startswith("--signal")]) == 1
    defaults = directives(submit.run_files(command, submit.Request())[1]["job.sbatch"])
    assert not any(o.startswith(("--time", "--partition", "--account")) for o in defaults)


def test_gpus_are_asked_for_as_the_site_wants(command):
    own = submit.Request(options=["--gres=gpu:h100:4"])
    options = directives(submit.run_files(command, own)[1]["job.sbatch"])
    assert "--gres=gpu:h100:4" in options
    assert not any(option.startswith("--gpus") for option in options)


@pytest.mark.parametrize("limit", ["5", "4:59", "0:04:59", "0-0:05"])
def test_a_limit_shorter_than_the_warning_is_refused(command, limit):
    with pytest.raises(
        RecipeError, match=rf"--time {limit}: must be longer than the 300 s .* --time 15 works"
    ):
        submit.submit(command, submit.Request(limit))


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("4:30", 270), ("1:00:30", 3630), ("2-0", 172800), ("1-1:30", 91800), ("UNLIMITED", None)],
)
def test_limits_are_read_as_slurm_does(limit, seconds):
    assert submit._seconds(limit) == seconds


def test_what_slurm_refuses_leaves_nothing_behind(command, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: Invalid time limit' >&2\nexit 1\n"
    )
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(SlurmError, match="Invalid time limit"):
        submit.submit(command, submit.Request("nonsense"))
    assert not (tmp_path / "runs").exists()


def test_a_container_sees_the_run_and_the_data(command, tmp_path, monkeypatch):
    data = dataclasses.replace(command.recipe.data, prefix="/big/disk/corpus")
    recipe = dataclasses.replace(command.recipe, data=data, output=Path("/scratch/a b"))
    site = tmp_path / "site.env"
    files = submit.run_files(dataclasses.replace(command, recipe=recipe), submit.Request(container="a.sqsh"))[
        1
    ]
    site.write_text(files["site.env"])
    show = ["bash", "-c", f'source {site}; echo "$CCA_CONTAINER_MOUNTS"']
    here = str(tmp_path)
    said = subprocess.run(show, env={"PWD": here}, cwd=here, capture_output=True, text=True).stdout.strip()
    assert said == f"{here}:{here},/scratch/a b:/scratch/a b,/big/disk:/big/disk"


def test_the_script_is_bash(command, tmp_path):
    script = tmp_path / "job.sbatch"
    request = submit.Request(container="image.sqsh")
    files = submit.run_files(command, request)[1]
    script.write_text(files["job.sbatch"])
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "export CCA_CONTAINER=image.sqsh" in files["site.env"]


@pytest.mark.parametrize(
    ("site", "request_", "python"),
    [
        ({}, submit.Request(), sys.executable),
        ({"CCA_PYTHON": "/opt/python"}, submit.Request(), "/opt/python"),
        ({}, submit.Request(container="a $b.sqsh"), ""),  # that of the image
        ({"CCA_CONTAINER": "a.sqsh"}, submit.Request(), ""),
    ],
)
def test_the_python_of_the_job_is_that_of_its_place(command, tmp_path, site, request_, python):
    script = tmp_path / "site.env"
    script.write_text(submit.run_files(command, request_)[1]["site.env"])
    show = ["bash", "-c", f'source {script}; echo "$CCA_PYTHON|$CCA_CONTAINER|$CCA_ROOT"']
    said = subprocess.run(show, env=site, capture_output=True, text=True).stdout.strip()
    image = request_.container or site.get("CCA_CONTAINER", "")
    assert said == f"{python}|{image}|{submit.PROJECT}"


def test_of_an_installed_package_the_job_finds_the_scripts(command, tmp_path, monkeypatch):
    share = tmp_path / "share" / "cca-megatron"
    for name in ("slurm/site.env", "slurm/pretrain.sbatch", "launch/h100.env"):
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        (share / name).write_text((submit.PROJECT / name).read_text())
    monkeypatch.setattr(submit, "PROJECT", tmp_path / "site-packages")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert f"export CCA_ROOT={share}\n" in submit.run_files(command, submit.Request())[1]["site.env"]


def test_options_with_spaces_reach_sbatch(command, monkeypatch):
    recipe = dataclasses.replace(command.recipe, output=Path("/a b/50%/my run"))
    command = dataclasses.replace(command, recipe=recipe)
    options = directives(submit.run_files(command, submit.Request("1", "b c"))[1]["job.sbatch"])
    for option in ("--job-name='my run'", "--partition='b c'", "--output='/a b/50%%/my run/logs/job-%j.log'"):
        assert option in options


def test_pyxis_is_found_however_much_srun_says(tmp_path):
    """grep would end at the first match, and srun of a closed pipe."""
    fake = tmp_path / "srun"
    fake.write_text("#!/bin/bash\necho --container-image\nfor i in {1..50000}; do echo more options; done\n")
    fake.chmod(0o755)
    for name in ("pretrain", "preflight"):
        script = (submit.PROJECT / "slurm" / f"{name}.sbatch").read_text()
        begin = script.index('if [ -n "$CCA_CONTAINER" ]; then\n    ')
        check = script[begin : script.index("    step+=", begin)]
        command = ["bash", "-c", f"set -euo pipefail; {check} fi; echo found"]
        variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CCA_CONTAINER": "a.sqsh"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.stdout == "found\n", done.stderr


def test_secrets_are_not_written_down(command, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    files = submit.run_files(command, submit.Request())[1]
    assert "NCCL_DEBUG=INFO" in files["environment.txt"]
    assert not any("hunter2" in text for text in files.values())


def test_without_an_output_there_is_no_run(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("output: runs/mine\n", ""))
    command = build_command(load_recipe(tmp_path / "r.yaml", []), "cpu")
    with pytest.raises(RecipeError, match=r"has no output; output=runs/NAME works"):
        submit.run_files(command, submit.Request())


def test_without_slurm_it_says_what_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CCA_DEVICE", "cpu")
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = CliRunner().invoke(app, ["submit", "r.yaml"])
    assert done.exit_code == 1
    assert "sbatch: is not on the PATH" in done.output
    assert "launch/torchrun.sh" in done.output


def test_a_size_that_cannot_run_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CCA_DEVICE", "cpu")
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = CliRunner().invoke(app, ["submit", "r.yaml", "megatron.tensor-model-parallel-size=3"])
    assert done.exit_code == 1
    assert "cannot run" in done.output
    assert not (tmp_path / "runs").exists()


def test_status_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    run = RunDirectory(tmp_path)
    Job("7", 2, state="stopped", reason="data").write(run.job_file)
    for number, verdict in ((1, "again"), (2, "stop")):
        folder = run.attempt_folder("7", number)
        record = Attempt(number, 0, ["n1"], begun=100.0 * number, ended=160.0 * number)
        record.iteration_before, record.iteration_after, record.verdict = 10, 20, verdict
        record.write(folder / "attempt.json")
    (folder / "n1").mkdir()
    line = " iteration       25/     100 | elapsed time per iteration (ms): 500.0 | lm loss: 2.5E+00 |\n"
    (folder / "n1" / "rank-00001.out").write_text("[2026-01-01] " + line)
    (folder / "n1" / "rank-00000.out").write_text("nothing here\n")
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for text in ("stopped: data", "25 of 100, loss 2.5000, 0.50 s each", "iterations 10 to 20: stop"):
        assert text in done.output
    found = json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).output)
    assert found["last_step"]["number"] == 25
    assert len(found["attempts"]) == 2


def test_a_cancelled_job_does_not_seem_to_run(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    run = RunDirectory(tmp_path / "run")
    Job("7", 2, state="running").write(run.job_file)
    Attempt(1, 0, ["n1"], begun=100.0).write(run.attempt_folder("7", 1) / "attempt.json")
    said = CliRunner().invoke(app, ["status", str(run.root)]).output
    assert "ended from outside; SLURM: over" in said
    assert "0.0 min, iterations 0 to ...: ended from outside" in said
    assert "running" not in said


def test_status_of_no_run(tmp_path):
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code == 1
    assert "no job was submitted into this folder" in done.output


def test_heartbeats_count_forward_passes(tmp_path, monkeypatch):
    from cca_megatron.training import heartbeat

    monkeypatch.setattr(heartbeat, "_heart", None)
    heartbeat.beat()  # nobody asked
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    for _ in range(5):
        heartbeat.beat()
    assert {rank: beat.count for rank, beat in read_heartbeats(tmp_path).items()} == {3: 5}
