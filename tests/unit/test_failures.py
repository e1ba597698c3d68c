"""The first real failure is found among those that follow from it, and is told for what it is."""

import itertools
import random

import pytest
from support import failure_logs as logs
from support.failure_logs import AttemptFolder, prefixed, touch

from cca_megatron.cluster import kinds
from cca_megatron.cluster.failures import first_failure

KINDS = {
    "out of memory": [logs.CUDA_OUT_OF_MEMORY, logs.HOST_OUT_OF_MEMORY, logs.traceback("MemoryError")],
    "NaN": [logs.NAN],
    "data": [logs.NO_DATA, logs.SHORT_DATA, logs.LOADER],
    "checkpoint": [logs.BAD_CHECKPOINT, logs.DISK_FULL],
    "settings": [logs.BARE_ASSERTION],
    "GPU": [logs.ECC],
    "program": [logs.traceback("RuntimeError: the shapes do not match: error in nan_to_num")],
}
REAL = [(kind, text) for kind, texts in KINDS.items() for text in texts]
CONSEQUENCES = [logs.GLOO_CLOSED, logs.GLOO_RESET, logs.GLOO_TIMEOUT, logs.STORE_TIMEOUT, logs.NCCL_REMOTE]
IDS = [text.strip().splitlines()[-1][:40] for _, text in REAL]


@pytest.mark.parametrize(("kind", "text"), REAL, ids=IDS)
@pytest.mark.parametrize("culprit", [0, 2, 3])
def test_the_one_that_failed_is_told_from_those_that_waited(tmp_path, kind, text, culprit):
    """Though the others have the same time, one is first in the listing, and all have tracebacks."""
    attempt = AttemptFolder(tmp_path)
    for rank in range(4):
        consequence = CONSEQUENCES[rank % len(CONSEQUENCES)]
        attempt.raised(rank, text if rank == culprit else consequence, time=1500.0)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank) == (kind, culprit)
    assert failure.node == attempt.node_of(culprit)
    assert failure.time == 1500
    line = failure.log.read_text().splitlines()[failure.line - 1]
    assert failure.message.splitlines()[0].split(":")[0] in line


def test_without_telling_consequences_the_wrong_rank_is_blamed(tmp_path, monkeypatch):
    """The tests above see it if closed connections are taken for failures of their own."""
    attempt = AttemptFolder(tmp_path)
    attempt.raised(0, logs.GLOO_CLOSED, time=1500)
    attempt.raised(3, logs.CUDA_OUT_OF_MEMORY, time=1500)
    folder = attempt.write()
    assert first_failure(folder).rank == 3
    monkeypatch.setattr(kinds, "_while_waiting", lambda text: None)
    assert first_failure(folder).rank == 0


def test_of_two_failures_the_earlier_counts(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.raised(0, logs.DISK_FULL, time=1501)
    attempt.raised(3, logs.NAN, time=1500.5)
    assert first_failure(attempt.write()).rank == 3


@pytest.mark.parametrize("order", itertools.permutations([0, 1, 2]))
def test_the_order_of_records_does_not_matter(tmp_path, order):
    attempt = AttemptFolder(tmp_path, nodes=3)
    for index in order:
        rank = 2 * index
        attempt.raised(rank, logs.NAN if index == 1 else logs.GLOO_CLOSED, time=1500 + rank)
    assert first_failure(attempt.write()).rank == 2


def test_a_killed_worker_is_told_from_those_that_its_agent_ended(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.failed(0, -15, 1500)
    attempt.failed(1, -9, 1500)
    attempt.raised(2, logs.GLOO_RESET, 1499)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank, failure.message) == ("killed", 1, "killed by SIGKILL")
    attempt.slurm(
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. "
        "Some of the step tasks have been OOM Killed.\n"
    )
    failure = first_failure(attempt.path)
    assert (failure.kind, failure.rank) == ("out of memory", 1)
    assert "oom_kill event" in failure.message


def test_a_worker_that_says_why_and_hangs_on_its_way_out_is_not_taken_for_killed(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.raised(1, logs.NAN, 1500, exit_code=-9)
    attempt.raised(2, logs.NO_DATA, 1501, exit_code=-6)
    assert first_failure(attempt.write()).kind == "NaN"
    late = AttemptFolder(tmp_path / "late")
    late.raised(2, logs.NO_DATA, 1501, exit_code=-6)
    assert first_failure(late.write()).kind == "data"
    # One that only waited, and was then killed by its agent, is no reason.
    late.raised(0, logs.GLOO_CLOSED, 1400, exit_code=-9)
    assert first_failure(late.write()).rank == 2


def test_a_failure_that_no_agent_recorded_is_found_in_its_log(tmp_path):
    """A rank hung after its exception, until the time-outs of the others ended the attempt."""
    attempt = AttemptFolder(tmp_path)
    for rank in (0, 1, 2):
        attempt.failed(rank, -6, 1600)
        attempt.log(rank, err=logs.NCCL_WATCHDOG.format(rank=rank))
    touch(attempt.log(3, err=prefixed(3, logs.SHORT_DATA)), 1000)
    read = []
    failure = first_failure(attempt.write(), lambda done, total: read.append((done, total)))
    assert (failure.kind, failure.rank, failure.time) == ("data", 3, 1000)
    assert read
    attempt.log(3, err=logs.SHORT_DATA)  # it was caught: PyTorch says of none that it ended rank 3
    assert first_failure(attempt.path).kind == "hang"


@pytest.mark.parametrize(
    ("exit_code", "out", "kind", "said"),
    [
        (16, logs.REPRODUCIBLE_NAN, "transient fault", "Unexpected result nan on rank 3"),
        (17, logs.TRANSIENT, "result validation", "Possible transient error"),
        (17, logs.OTHER_GPU_AGREES, "result validation", "it was likely correct"),
    ],
)
def test_megatrons_exit_codes_name_the_rank_with_the_result(tmp_path, exit_code, out, kind, said):
    """All ranks end with the code; one had the result, and another a spike that Megatron let pass."""
    attempt = AttemptFolder(tmp_path)
    for rank in range(4):
        attempt.failed(rank, exit_code, 1500)
    attempt.log(1, out=logs.TRAINING + logs.SPIKE.format(rank=1))
    attempt.log(3, out=logs.TRAINING + logs.SPIKE.format(rank=3) + out.format(rank=3) + logs.TRAINING)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank, failure.node) == (kind, 3, "node2")
    assert said in failure.message
    assert "spike" not in failure.message
    assert failure.log.name == "rank-00003.out"


def test_megatrons_exit_code_alone_is_enough(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.failed(2, 16, 1500)
    attempt.raised(0, logs.GLOO_CLOSED, 1499)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank) == ("transient fault", 2)


@pytest.mark.parametrize(
    ("err", "exit_code", "kind", "message"),
    [
        (logs.BAD_SETTINGS, 1, "settings", "num_attention_heads=4"),
        (logs.BAD_ARGUMENT, 2, "settings", "unrecognized arguments: --no-such-arg"),
        (logs.SEGMENTATION_FAULT, -11, "program", "ended by SIGSEGV: Fatal Python error: Segmentation fault"),
        ("", 1, "program", "exit code 1"),
        ("", 3, "program", "exit code 3"),
        ("cannot open display\n", 1, "program", "exit code 1: cannot open display"),
    ],
)
def test_endings_without_a_traceback(tmp_path, err, exit_code, kind, message):
    attempt = AttemptFolder(tmp_path)
    attempt.failed(2, exit_code, 1500)
    attempt.log(2, err=err)
    attempt.failed(0, -15, 1500)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank) == (kind, 2)
    assert message in failure.message


def test_the_workers_own_report_counts_more_than_its_log(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.failed(1, 1, 1500, message=logs.NO_DATA)
    attempt.log(1, err="")
    failure = first_failure(attempt.write())
    assert failure.kind == "data"
    assert "indexed_dataset.py" in failure.message
    attempt.log(1, err=logs.TRAINING + prefixed(1, logs.NO_DATA) + logs.EXCEPTION_IGNORED)
    failure = first_failure(attempt.path)
    assert "One or both" in failure.log.read_text().splitlines()[failure.line - 1]


def test_what_python_ignores_is_no_reason(tmp_path):
    attempt = AttemptFolder(tmp_path)
    log = attempt.raised(1, logs.NO_DATA, 1500)
    log.write_text(log.read_text() + logs.EXCEPTION_IGNORED)
    assert first_failure(attempt.write()).message.startswith("AssertionError: One or both")
    log.write_text(logs.NO_DATA + logs.EXCEPTION_IGNORED)  # before the ranks know their numbers
    assert first_failure(attempt.path).message.startswith("AssertionError: One or both")


def test_an_exception_that_was_caught_is_no_reason(tmp_path):
    caught = logs.TRAINING + logs.HOST_OUT_OF_MEMORY + logs.TRAINING
    attempt = AttemptFolder(tmp_path)
    attempt.failed(1, 1, 1500)
    attempt.log(1, err=caught + prefixed(1, logs.NO_DATA) + caught)
    assert first_failure(attempt.write()).kind == "data"
    for exit_code, kind in ((-9, "killed"), (-11, "program"), (16, "transient fault")):
        killed = AttemptFolder(tmp_path / str(exit_code))
        killed.failed(1, exit_code, 1500)
        killed.log(1, err=caught)
        assert first_failure(killed.write()).kind == kind


def test_a_chain_of_exceptions_is_told_by_its_last_and_judged_by_its_first(tmp_path):
    real = AttemptFolder(tmp_path / "real")
    wrapped = logs.traceback("KeyError: 'k'") + logs.DIRECT_CAUSE + logs.traceback("RuntimeError: wrapped")
    real.raised(1, wrapped, 1500)
    assert first_failure(real.write()).message.startswith("RuntimeError: wrapped")
    # Closing connections fails after the real failure: still real.
    real.raised(0, logs.NAN + logs.IN_HANDLING + logs.GLOO_CLOSED, 1400)
    assert (first_failure(real.write()).rank, first_failure(real.path).kind) == (0, "NaN")
    # A closed connection, and what its handling ran into: still a consequence.
    waited = (
        logs.GLOO_CLOSED
        + logs.IN_HANDLING
        + logs.traceback("AttributeError: 'NoneType' has no attribute 'x'")
    )
    real.raised(2, waited, 1300)
    assert first_failure(real.write()).rank == 0


def test_a_checkpoint_that_failed_by_a_lost_connection_is_a_consequence(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.raised(
        0, logs.BAD_CHECKPOINT.replace("EOFError: Ran out of input", "RuntimeError: Broken pipe"), 1400
    )
    attempt.failed(2, -9, 1500)
    assert first_failure(attempt.write()).rank == 2


def test_an_exception_group_shows_its_members(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.raised(1, logs.GROUP, 1500)
    message = first_failure(attempt.write()).message
    for text in ("many (2 sub-exceptions)", "ValueError: a", "TypeError: b", "/home/me/train.py:3"):
        assert text in message


def test_a_message_of_several_lines_is_kept(tmp_path):
    attempt = AttemptFolder(tmp_path)
    attempt.raised(1, logs.traceback("ValueError: line one\nline two: error\n\nline four"), 1500)
    assert first_failure(attempt.write()).message.splitlines()[:2] == [
        "ValueError: line one",
        "line two: error",
    ]


def test_colours_and_overwritten_lines_do_not_hide_a_failure(tmp_path):
    text = prefixed(1, logs.NAN).replace("RuntimeError", "\x1b[1;31mRuntimeError\x1b[0m")
    text = text.replace("[rank1]", "\x1b[35m[rank1]\x1b[0m")
    bar = "".join(f"\rloading {percent}%" for percent in range(100)) + "\r\n"
    attempt = AttemptFolder(tmp_path)
    attempt.raised(1, "", 1500)
    attempt.log(1, err=bar + text.replace("\n", "\r\n"))
    failure = first_failure(attempt.write())
    assert failure.kind == "NaN"
    assert failure.message.startswith("RuntimeError: Rank 1")


def test_a_failure_is_found_in_long_logs_without_reading_all(tmp_path):
    noise = logs.TRAINING * 40_000  # 10 MB
    attempt = AttemptFolder(tmp_path)
    attempt.raised(0, logs.GLOO_CLOSED, 1499)
    attempt.failed(1, 1, 1500)
    stacks = "frame #0: c10::Error::Error + 0x96 (0x7f3b6e7236fc in libc10.so)\n" * 20_000  # 1.3 MB
    log = attempt.log(1, err=noise + prefixed(1, logs.NO_DATA) + stacks)
    failure = first_failure(attempt.write())
    assert failure.kind == "data"
    assert "One or both" in log.read_text().splitlines()[failure.line - 1]


def test_junk_and_nothing_are_survived(tmp_path):
    junk = random.Random(1).randbytes(300_000)
    attempt = AttemptFolder(tmp_path)
    for rank, text in enumerate((junk, b"", junk.replace(b"\n", b""), b"\n\n")):
        attempt.failed(rank, 1, 1500 + rank)
        attempt.log(rank, err=text)
    failure = first_failure(attempt.write())
    assert (failure.kind, failure.rank) == ("program", 0)
    (attempt.path / "node2" / "rank-00003.err").unlink()
    (attempt.path / "node1" / "node.json").write_text('{"node": "no')
    assert first_failure(attempt.path).rank == 2


def test_nothing_failed(tmp_path):
    attempt = AttemptFolder(tmp_path, srun_status=0)
    for rank in range(4):
        attempt.log(rank, out=logs.TRAINING, err=logs.HOST_OUT_OF_MEMORY + logs.TRAINING)
    assert first_failure(attempt.write()) is None
    running = AttemptFolder(tmp_path / "running", srun_status=None)
    running.end(0, None)
    running.lose(1)
    running.record.ended = None
    assert first_failure(running.write()) is None
    with pytest.raises(FileNotFoundError):
        first_failure(tmp_path / "logs" / "job-7" / "attempt-9")
