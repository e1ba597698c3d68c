"""What a job decides before and after an attempt."""

import json
import struct
import tempfile
import time
from pathlib import Path

import pytest

from cca_megatron.cluster import job as jobs
from cca_megatron.cluster import node as agent
from cca_megatron.cluster.ownership import JobError, claim
from cca_megatron.cluster.run_directory import Attempt, Job, RunDirectory, read_json, run_of, write_json
from cca_megatron.training.recipe import LaunchSection

LAUNCH = LaunchSection(nodes=2, max_restarts=5, max_stalls=2)


def never(job_id: str) -> bool:
    return False


def always(job_id: str) -> bool:
    return True


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    claim(run, "7", 2, never)
    return run


def save(run: RunDirectory, iteration: int) -> None:
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def attempt(run: RunDirectory, before: int | None = None, number: int = 1, **changes) -> Path:
    folder = run.attempt_folder("7", number)
    record = Attempt(number, 0, ["node1", "node2"], iteration_before=before)
    for name, value in changes.items():
        setattr(record, name, value)
    record.write(folder / "attempt.json")
    for rank, node in enumerate(record.nodes):
        (folder / node).mkdir(exist_ok=True)
        (folder / node / f"rank-{rank:05}.out").write_text("")
        (folder / node / f"rank-{rank:05}.err").write_text("")
        node_ends(folder, node, rank)
    return folder


def node_ends(folder: Path, node: str, rank: int, exit_code: int = 0, message: str = "") -> None:
    failure = {"rank": rank, "local_rank": 0, "pid": 9, "exit_code": exit_code, "time": time.time()}
    record = {"node": node, "begun": 1.0, "ended": 2.0, "ranks": [rank], "heartbeats": {}}
    record["end"] = "failed" if exit_code else "finished"
    record["failures"] = [{**failure, "message": message}] if exit_code else []
    write_json(folder / node / "node.json", record)


def test_success_finishes(run):
    folder = attempt(run)
    save(run, 30)
    assert jobs.end(folder, 0, time_limit=False, stop_asked=False)[0] == "finished"
    assert Job.read(run.job_file).state == "finished"
    assert Attempt.read(folder / "attempt.json").iteration_after == 30


@pytest.mark.parametrize(
    ("reached", "events", "arguments", "verdict"),
    [
        (100, (True, False), [], "finished"),  # the last step was done when the warning came
        (100, (False, True), [], "finished"),
        (60, (False, False), [], "requeue"),  # exit-duration-in-mins, or a signal from outside
        (60, (False, False), ["--exit-interval", "60"], "finished"),
        (60, (True, False), ["--exit-interval", "90"], "requeue"),
        (60, (False, True), [], "stop"),
    ],
)
def test_it_is_finished_when_there_is_nothing_left_to_do(run, reached, events, arguments, verdict):
    run.arguments.write_text("\n".join(["--train-iters", "100", *arguments]))
    folder = attempt(run)
    save(run, reached)
    assert jobs.end(folder, 0, *events)[0] == verdict


def test_failed_validation_stops_at_the_time_limit_too(run):
    folder = attempt(run)
    node_ends(folder, "node1", 0, 17)
    assert jobs.end(folder, 1, time_limit=True, stop_asked=False)[0] == "stop"


def test_logs_that_cannot_be_read_do_not_end_a_run(run, monkeypatch):
    folder = attempt(run)
    (folder / "node1" / "node.json").write_text("[]")
    assert jobs.end(folder, 1, time_limit=False, stop_asked=False)[0] == "again"


@pytest.mark.parametrize("status", [0, 1])  # whether or not they saved in time
def test_the_time_limit_requeues(run, status):
    folder = attempt(run)
    assert jobs.end(folder, status, time_limit=True, stop_asked=False)[0] == "requeue"
    assert Job.read(run.job_file).state == "running"


def test_asked_to_stop_it_stops(run):
    assert jobs.end(attempt(run), 0, time_limit=True, stop_asked=True)[0] == "stop"
    assert Job.read(run.job_file).reason == "asked to stop"


def test_a_killed_worker_leads_to_another_attempt(run):
    folder = attempt(run)
    node_ends(folder, "node2", 1, -9, "Signal 9 (SIGKILL) received by PID 9")
    verdict, said = jobs.end(folder, 1, time_limit=False, stop_asked=False)
    assert verdict == "again"
    assert "rank 1 of node2" in said


@pytest.mark.parametrize(
    "how", [(16, ""), (1, "torch.AcceleratorError: CUDA error: uncorrectable ECC error")]
)
def test_a_fault_of_a_gpu_leads_to_another_node(run, how):
    folder = attempt(run)
    (folder / "node2" / "rank-00001.err").write_text(f"Traceback (most recent call last):\n{how[1]}\n")
    node_ends(folder, "node2", 1, *how)
    assert jobs.end(folder, 1, time_limit=False, stop_asked=False)[0] == "resubmit node2"
    record = Job.read(run.job_file)
    assert (record.state, record.bad_nodes) == ("resubmitted", ["node2"])
    # The new job stays away from it, and goes on counting; one that the user submits begins anew.
    assert claim(run, "8", 2, never).submitted == record.submitted
    assert claim(run, "8", 2, never).bad_nodes == ["node2"]
    later = claim(run, "9", 2, never)
    assert later.submitted > record.submitted
    assert later.bad_nodes == []


def test_failed_validation_stops(run):
    folder = attempt(run)
    node_ends(folder, "node1", 0, 17)
    assert jobs.end(folder, 1, time_limit=False, stop_asked=False)[0] == "stop"
    assert Job.read(run.job_file).reason == "result validation"


@pytest.mark.parametrize(("reached", "verdict"), [(10, "stop"), (20, "again")])
@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError: CUDA out of memory.",
        "cca_megatron.data.sources.DataError: a.bin: is cut short",
    ],
)
def test_what_fails_at_once_would_fail_again(run, reached, verdict, error):
    folder = attempt(run, before=10)
    save(run, reached)
    message = f"Traceback (most recent call last):\n{error}"
    (folder / "node1" / "rank-00000.err").write_text(message)
    node_ends(folder, "node1", 0, 1, message)
    assert jobs.end(folder, 1, time_limit=False, stop_asked=False)[0] == verdict


def test_a_second_job_is_refused(run):
    with pytest.raises(JobError, match=r"belongs to job 7.*scancel 7 ends it, output=FOLDER"):
        claim(run, "8", 2, always)
    assert claim(run, "7", 2, always).job_id == "7"  # itself, requeued


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ([(0, 10), (10, 10), (10, 10)], "max_stalls=2: 2 attempts in a row saved no new checkpoint"),
        ([(i, i + 1) for i in range(6)], "max_restarts=5"),
    ],
)
def test_without_progress_or_after_many_restarts_it_stops(run, progress, message):
    for number, (before, after) in enumerate(progress, 1):
        attempt(run, before, number, iteration_after=after, verdict="again")
    with pytest.raises(JobError, match=message):
        jobs._check_bounds(run, Job.read(run.job_file), LAUNCH)


@pytest.mark.parametrize("progress", [[], [(0, 10), (10, 10)], [(0, 0), (0, 10), (10, 10)]])
def test_with_progress_it_goes_on(run, progress):
    for number, (before, after) in enumerate(progress, 1):
        attempt(run, before, number, iteration_after=after, verdict="again")
    jobs._check_bounds(run, Job.read(run.job_file), LAUNCH)


def test_attempts_before_this_submission_do_not_count(run):
    for number in range(1, 9):
        attempt(run, 5, number, begun=1.0, iteration_after=5, verdict="again")
    jobs._check_bounds(run, Job.read(run.job_file), LAUNCH)


def test_what_nobody_closed_was_ended_from_outside(run):
    folder = attempt(run, before=10)
    save(run, 20)
    jobs._close_open_attempts(run)
    record = Attempt.read(folder / "attempt.json")
    assert (record.verdict, record.iteration_after) == ("requeue", 20)


def test_a_checkpoint_that_could_not_be_loaded_is_distrusted(run):
    attempt(run, before=20, verdict="again", reason="checkpoint")
    assert jobs._distrusted(run) == 20
    attempt(run, before=10, number=2, verdict="again", reason="killed")
    assert jobs._distrusted(run) is None


def test_a_checkpoint_that_was_loaded_is_trusted_if_saving_the_next_one_fails(run):
    """A full disk must not cost the good checkpoints."""
    folder = attempt(run, before=20, verdict="again", reason="checkpoint")
    seen = folder / "node2" / "node.json"
    write_json(seen, json.loads(seen.read_text()) | {"heartbeats": {"1": {"count": 9, "time": 5.0}}})
    assert jobs._distrusted(run) is None


def test_a_new_job_owns_the_run_while_it_waits(run):
    """Nothing can be submitted between the job that ends and the one that goes on elsewhere."""
    folder = attempt(run)
    node_ends(folder, "node2", 1, 16)
    jobs.end(folder, 1, time_limit=False, stop_asked=False)
    began = Job.read(run.job_file).submitted
    assert jobs._main(["hand-over", str(run.root), "8"]) == 0
    with pytest.raises(JobError, match="belongs to job 8"):
        claim(run, "9", 2, lambda job_id: job_id == "8")
    job = claim(run, "8", 2, never)
    assert (job.state, job.submitted, job.bad_nodes) == ("running", began, ["node2"])


def test_a_wrong_device_stops_the_job_with_a_reason(run, monkeypatch):
    run.recipe.write_text("launch: {nodes: 2}\n")
    for name, value in {"CCA_DEVICE": "tpu", "CCA_ACTIVE_JOBS": "7", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CCA_NODES", "node1 node2")
    assert jobs._main(["begin", str(run.root)]) == 1
    job = Job.read(run.job_file)
    assert (job.state, "tpu" in job.reason) == ("stopped", True)


def test_what_an_agent_closed_stays(tmp_path, monkeypatch):
    """The thread that watches may be late."""
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    record = agent._NodeRecord(tmp_path)
    (record.heartbeats / "0").write_bytes(struct.pack("<qd", 4, 5.0))
    record.close("finished")
    closed = read_json(tmp_path / "node1" / "node.json")
    record.write()
    assert read_json(tmp_path / "node1" / "node.json") == closed
    assert (closed["end"], closed["heartbeats"]) == ("finished", {"0": {"count": 4, "time": 5.0}})
    assert not record.heartbeats.exists()


def test_an_agent_does_not_find_the_heartbeats_of_another(tmp_path, monkeypatch):
    """They are old, and it would end its workers at once."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folders = {agent._NodeRecord(tmp_path / "attempt").heartbeats for _ in range(2)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path}


def test_records_are_whole_or_not_there(run, monkeypatch):
    before = run.job_file.read_text()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Job("8", 4).write(run.job_file)
    assert run.job_file.read_text() == before
    assert json.loads(before)["job_id"] == "7"


def test_an_attempt_knows_its_run(run):
    assert run_of(run.attempt_folder("7", 3)) == (run, "7")
    with pytest.raises(ValueError, match="is no folder of an attempt"):
        run_of(run.root / "checkpoints" / "iter_0000010")
