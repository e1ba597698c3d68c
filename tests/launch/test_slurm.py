"""Jobs on a real SLURM: what interrupts them costs no more than the steps since the last checkpoint."""

import json
import subprocess

import pytest
from support.cluster import PROGRAM, ROOT, Run, environment


@pytest.fixture
def run(tmp_path):
    """A run that goes on for a while."""
    return Run(tmp_path, **{"train-iters": 300})


def assert_same_curve(run, curve, iterations):
    losses = run.losses()
    assert sorted(losses) == list(range(1, iterations + 1))
    assert {step: losses[step] for step in losses} == {step: curve[step] for step in losses}


def test_a_job_outlives_its_time_limit(cluster, curve, run):
    """Warned before the limit it saves, is requeued, and goes on: the joined curve is the uninterrupted."""
    job = cluster.submit(run)
    cluster.wait("it trains", lambda: run.reached(25))
    again = cluster.run(str(PROGRAM), "submit", str(run.recipe), cwd=run.recipe.parent, status=1)
    assert f"belongs to job {job}, which waits or runs" in again.stderr
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what SLURM sends before the limit
    assert cluster.finish(run, job)["state"] == "finished"
    first, second = run.attempts()
    assert (first["verdict"], first["reason"], first["time_limit"]) == ("requeue", "time limit", True)
    assert first["iteration_after"] == second["iteration_before"] >= 25
    assert (second["restart"], second["verdict"], second["iteration_after"]) == (1, "finished", 300)
    assert_same_curve(run, curve, 300)
    status = json.loads(cluster.run(str(PROGRAM), "status", str(run.root), "--json").stdout)
    assert (status["job"]["state"], status["slurm"], status["checkpoint"]) == ("finished", "over", 300)


@pytest.mark.long
def test_a_job_submitted_by_hand_trains(cluster, curve, tmp_path):
    run = Run(tmp_path)
    options = ["--parsable", "--nodes=2", f"--chdir={ROOT}", f"--output={tmp_path}/slurm-%j.log"]
    job = cluster.run("sbatch", *options, "slurm/pretrain.sbatch", str(run.recipe), cwd=ROOT).stdout.strip()
    cluster.wait("it begins", lambda: (run.root / "job.json").exists())
    assert cluster.finish(run, job)["state"] == "finished"
    assert_same_curve(run, curve, 60)


@pytest.mark.long
def test_a_job_that_is_asked_to_stop_saves_and_does_not_return(cluster, curve, run):
    job = cluster.submit(run)
    cluster.wait("it trains", lambda: run.reached(25))
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    record = cluster.finish(run, job)
    assert (record["state"], record["reason"]) == ("stopped", "asked to stop")
    (attempt,) = run.attempts()
    assert attempt["iteration_after"] >= 25
    assert_same_curve(run, curve, attempt["iteration_after"])


@pytest.mark.long
def test_a_killed_worker_costs_the_steps_since_the_checkpoint(cluster, curve, run):
    job = cluster.submit(run)
    cluster.wait("it trains", lambda: run.reached(25))
    (worker,) = cluster.workers("node2")
    cluster.control("on-node", "node2", "kill", "-KILL", worker)
    assert cluster.finish(run, job)["state"] == "finished"
    first, second = run.attempts()
    assert (first["verdict"], first["reason"]) == ("again", "killed")
    assert second["iteration_before"] == first["iteration_after"] >= 20
    assert (second["attempt"], second["restart"]) == (2, 0)  # in the same allocation
    assert_same_curve(run, curve, 300)
    assert "rank 1" in run.log(job)
    assert "node2" in run.log(job)


@pytest.mark.long
def test_a_worker_that_hangs_is_found(cluster, curve, run):
    job = cluster.submit(run, "launch.hang_minutes=0.5")
    cluster.wait("it trains", lambda: run.reached(25))
    (worker,) = cluster.workers("node1")
    cluster.control("on-node", "node1", "kill", "-STOP", worker)
    assert cluster.finish(run, job)["state"] == "finished"
    first, *_, last = run.attempts()
    assert (first["verdict"], first["reason"]) == ("again", "hang")
    assert last["verdict"] == "finished"
    assert_same_curve(run, curve, 300)


@pytest.mark.long
@pytest.mark.parametrize("node", ["node1", "node2"])  # the batch script runs on the first
def test_a_lost_node_costs_the_steps_since_the_checkpoint(cluster, curve, run, node):
    job = cluster.submit(run)
    cluster.wait("it trains", lambda: run.reached(25))
    cluster.control("crash-node", node)
    try:
        cluster.wait("the job ends", lambda: cluster.state(job) != "RUNNING")
    finally:
        cluster.control("start-node", node)
    assert cluster.finish(run, job)["state"] == "finished"
    first, *_, last = run.attempts()
    assert first["iteration_after"] >= 20
    assert last["verdict"] == "finished"
    assert_same_curve(run, curve, 300)


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over(cluster, curve, tmp_path):
    run = Run(tmp_path)
    cluster.finish(run, cluster.submit(run))
    newest = run.root / "checkpoints" / "iter_0000060"
    weights = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1000])
    job = cluster.submit(run, "megatron.train-iters=80")
    assert cluster.finish(run, job)["state"] == "finished"
    assert run.attempts()[-1]["iteration_before"] == 40
    assert "warning: checkpoint of iteration 60 is damaged: iter_0000060/" in run.log(job)
    assert "going on from the checkpoint of iteration 40 instead" in run.log(job)
    assert_same_curve(run, curve, 80)


@pytest.mark.long
def test_a_job_that_makes_no_progress_stops(cluster, tmp_path):
    """Killed before it saves, again and again."""
    run = Run(tmp_path, **{"train-iters": 300, "save-interval": 1000})
    job = cluster.submit(run, "launch.max_stalls=2")
    for attempts in (1, 2):
        cluster.wait("it trains", lambda n=attempts: len(run.attempts()) == n and cluster.workers("node2"))
        cluster.control("on-node", "node2", "kill", "-KILL", *cluster.workers("node2"))
        cluster.wait("it notices", lambda n=attempts: run.attempts()[n - 1]["verdict"] is not None)
    record = cluster.finish(run, job)
    assert record["state"] == "stopped"
    assert "launch.max_stalls=2: 2 attempts in a row saved no new checkpoint" in record["reason"]


@pytest.mark.long
def test_settings_that_cannot_work_stop_the_job_at_once(cluster, tmp_path):
    run = Run(tmp_path)
    job = cluster.submit(run)
    cluster.finish(run, job)
    (run.root / "recipe.yaml").write_text((run.root / "recipe.yaml").read_text().replace("lr:", "lrr:"))
    job = cluster.run(
        "sbatch", "--parsable", str(run.root / "job.sbatch"), str(run.root), cwd=tmp_path
    ).stdout.strip()
    cluster.wait("it ends", lambda: run.job()["job_id"] == job or not cluster.state(job))
    record = cluster.finish(run, job)
    assert record["state"] == "stopped"
    assert "unknown Megatron argument 'lrr'" in record["reason"]


@pytest.mark.long
def test_a_result_that_fails_validation_stops_the_job(cluster, tmp_path):
    """Megatron's exit code 17, which torchrun hides. The error is Megatron's own injection."""
    run = Run(tmp_path, **{"error-injection-rate": 60, "error-injection-type": "transient_error"})
    job = cluster.submit(run)
    record = cluster.finish(run, job)
    assert (record["state"], record["reason"]) == ("stopped", "result validation")
    assert len(run.attempts()) == 1
    assert "Possible transient error" in cluster.run(str(PROGRAM), "diagnose", str(run.root)).stdout


def test_a_dry_run_writes_nothing(tmp_path):
    run = Run(tmp_path)
    command = [PROGRAM, "submit", run.recipe, "--dry-run", "--time", "2:00:00", "--sbatch=--qos=high"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("#SBATCH --nodes=2", "#SBATCH --time=2:00:00", "#SBATCH --qos=high", "--num-layers"):
        assert text in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yaml"]
