"""Attempts that ended for another reason than a worker that failed."""

import pytest
from support import failure_logs as logs
from support.failure_logs import AttemptFolder

from cca_megatron.cluster.failures import first_failure


def test_a_node_that_never_says_how_it_ended_is_lost(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.raised(0, logs.GLOO_RESET, 1500)
    attempt.failed(1, -15, 1500)
    attempt.end(1, None)
    attempt.heartbeat(2, 20, 1490)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.node, failure.rank, failure.time) == ("node lost", "node2", None, 1490)
    attempt.lose(1)
    (attempt.path / "node2" / "node.json").unlink()
    assert first_failure(attempt.write()).node == "node2"
    # A worker that failed before is the reason, though its node was ended at once.
    attempt.raised(1, logs.NAN, 1501)
    assert first_failure(attempt.write()).kind == "NaN"


def test_a_node_that_slurm_names_is_lost(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.raised(2, logs.GLOO_RESET, 1500)
    attempt.end(0, None)
    attempt.end(1, None)
    assert first_failure(attempt.write()).node is None
    attempt.slurm(
        "slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-28T11:00:00 DUE TO NODE FAILURE, SEE "
        "SLURMCTLD LOG FOR DETAILS ***\nsrun: error: Node failure on node2\n"
    )
    failure = first_failure(attempt.path)
    assert (failure.kind, failure.node) == ("node lost", "node2")


def test_the_job_script_may_be_lost_with_its_node(tmp_path):
    attempt = AttemptFolder(tmp_path, nodes=1, srun_status=None)
    attempt.record.ended = None
    attempt.lose(0)
    folder = attempt.write()
    assert first_failure(folder) is None
    AttemptFolder(tmp_path, number=2, nodes=1, srun_status=0).write()
    failure = first_failure(folder)
    assert (failure.kind, failure.node) == ("node lost", "node1")


def test_slurms_words_count_for_their_attempt_alone(tmp_path):
    first, second = (AttemptFolder(tmp_path, number=n) for n in (1, 2))
    for attempt in (first, second):
        attempt.raised(2, logs.GLOO_RESET, 1500)
        attempt.write()
    first.slurm(
        "attempt 1 of job 7 on node1, node2 (cpu), from the start\nsrun: error: Node failure on node2\n"
    )
    first.slurm("attempt 2 of job 7 on node1, node2 (cpu), from iteration 4\n")
    assert first_failure(first.path).kind == "node lost"
    assert first_failure(second.path).kind == "network"


def test_the_time_limit_is_no_failure_of_a_worker(tmp_path):
    attempt = AttemptFolder(tmp_path, time_limit=True, iteration_before=4, iteration_after=9, srun_status=0)
    failure = first_failure(attempt.write())
    assert failure.kind == "time limit"
    assert "iteration 9 is saved" in failure.message
    # It could not save in time.
    late = AttemptFolder(tmp_path / "late", time_limit=True)
    late.failed(1, -9, 1999)
    late.failed(2, -15, 1998)
    assert first_failure(late.write()).kind == "time limit"
    assert "no checkpoint" in first_failure(late.path).message
    # It failed to save.
    late.raised(0, logs.DISK_FULL, 1997)
    assert first_failure(late.write()).kind == "checkpoint"


def test_a_hang_names_the_rank_that_stopped_first_and_where(tmp_path):
    attempt = AttemptFolder(tmp_path)
    for rank, count in enumerate((120, 120, 118, 120)):
        attempt.heartbeat(rank, count, 1400 + rank)
        attempt.failed(rank, -6 if rank % 2 else -9, 1900, end="hung")
        attempt.log(rank, err=logs.ABORTED_BY_AGENT)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank, failure.node, failure.time) == ("hang", 2, "node2", 1402)
    assert "118" in failure.message
    assert "line 77 in read_batch" in failure.message
    assert "Current thread" in failure.log.read_text().splitlines()[failure.line - 1]


def test_a_hang_of_all_ranks_blames_none(tmp_path):
    attempt = AttemptFolder(tmp_path)
    for rank in range(4):
        attempt.heartbeat(rank, 120, 1400 + rank)
        attempt.failed(rank, -9, 1900, end="hung")
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank) == ("hang", None)


@pytest.mark.parametrize("has_heartbeats", [True, False])
def test_time_outs_alone_are_a_hang(tmp_path, has_heartbeats):
    attempt = AttemptFolder(tmp_path)
    for rank in (0, 1, 2):
        attempt.failed(rank, -6, 1900 + rank)
        attempt.log(rank, err=logs.NCCL_WATCHDOG.format(rank=rank))
    attempt.failed(3, -15, 1903)
    for rank in range(4) if has_heartbeats else ():
        attempt.heartbeat(rank, 99 if rank == 3 else 100, 1300)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank) == ("hang", 3 if has_heartbeats else 0)
    assert "Watchdog caught collective operation timeout" in failure.message


@pytest.mark.parametrize("text", [logs.NCCL_REMOTE, logs.STORE_TIMEOUT, logs.GLOO_CLOSED])
def test_broken_connections_alone_are_the_network(tmp_path, text):
    attempt = AttemptFolder(tmp_path)
    attempt.failed(0, -15, 1400)
    attempt.raised(1, text, 1501)
    attempt.raised(2, text, 1502)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank) == ("network", 1)


def test_nodes_that_never_meet_are_the_network(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.agent_failed(0, 1300, "torchrun: RendezvousTimeoutError: ")
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank, failure.node) == ("network", None, "node1")


def test_workers_that_were_cancelled(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.failed(0, -15, 1400)
    attempt.slurm("slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-28T11:00:00 ***\n")
    failure = first_failure(attempt.write())
    assert failure.kind == "killed"
    assert "CANCELLED" in failure.message


def test_a_job_that_starts_no_worker_shows_what_slurm_says(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.lose(0)
    attempt.lose(1)
    attempt.slurm("srun: error: node1: task 0: Exited with exit code 127\n")
    failure = first_failure(attempt.write())
    assert failure.kind == "program"
    assert "exit code 127" in failure.message
    attempt.slurm(logs.traceback("ModuleNotFoundError: No module named 'cca_megatron'"))
    assert "ModuleNotFoundError" in first_failure(attempt.path).message
