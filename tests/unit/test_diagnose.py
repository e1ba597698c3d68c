"""What ``cca-megatron diagnose`` says of a run, and that what it advises exists."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from support import failure_logs as logs
from support.failure_logs import AttemptFolder, prefixed
from typer.testing import CliRunner

from cca_megatron.cli import app
from cca_megatron.cluster.advice import advice
from cca_megatron.cluster.failures import Failure
from cca_megatron.cluster.kinds import FailureKind
from cca_megatron.cluster.run_directory import Job
from cca_megatron.cluster.torchrun_log import failure_in_log

ROOT = Path(__file__).parents[2]
KINDS = get_args(FailureKind)


def diagnose(*arguments: object) -> str:
    """Output of the command, which must work."""
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def failed_twice(tmp_path) -> Path:
    """A job with an attempt that ran out of memory, and one whose node was lost."""
    first = AttemptFolder(tmp_path, 1, iteration_after=4, verdict="again", reason="out of memory")
    first.raised(0, logs.GLOO_CLOSED, 1500)
    first.raised(3, logs.CUDA_OUT_OF_MEMORY, 1500)
    first.write()
    second = AttemptFolder(
        tmp_path, 2, iteration_before=4, iteration_after=9, verdict="stop", reason="node lost"
    )
    second.raised(0, logs.GLOO_CLOSED, 1500)
    second.end(1, None)
    second.record.begun = 3000
    second.record.ended = 3090
    second.write()
    return tmp_path


def test_the_last_attempt_is_diagnosed_and_all_are_listed(failed_twice):
    text = diagnose(failed_twice)
    assert "attempt 2 of job 7 failed first with: node lost" in text
    assert "node2" in text
    assert "--sbatch=--exclude=node2" in text
    table = [line.split() for line in text.splitlines()[-2:]]
    assert [row[0] for row in table] == ["1", "2"]
    assert table[0][3:] == "16.7 0 to 4 again out of memory".split()
    assert table[1][3:] == "1.5 4 to 9 stop node lost".split()


def test_an_attempt_and_a_job_can_be_chosen(failed_twice):
    text = diagnose(failed_twice, "--attempt", 1, "--job", 7)
    assert "attempt 1 of job 7 failed first with: out of memory" in text
    assert "rank 3, node2" in text
    assert "torch.OutOfMemoryError: CUDA out of memory" in text
    (path, line) = re.search(r"log +(\S+):(\d+)", text).groups()
    assert "OutOfMemoryError" in Path(path).read_text().splitlines()[int(line) - 1]
    assert f"{line} > [rank3]: torch.OutOfMemoryError" in text
    assert "in step" in text  # lines before
    assert "^^^" not in text
    assert "megatron.micro-batch-size=1" in text


def test_programs_get_json(failed_twice):
    found = json.loads(diagnose(failed_twice, "--json", "--attempt", 1))
    assert found["failure"]["kind"] == "out of memory"
    assert found["failure"]["rank"] == 3
    assert found["failure"]["log"].endswith("rank-00003.err")
    assert [attempt["reason"] for attempt in found["attempts"]] == ["out of memory", "node lost"]
    assert found["advice"]


def test_nothing_failed(tmp_path):
    attempt = AttemptFolder(tmp_path, srun_status=0, verdict="finished")
    attempt.write()
    assert "attempt 1 of job 7: nothing failed; it went to its end" in diagnose(tmp_path)
    assert json.loads(diagnose(tmp_path, "--json"))["failure"] is None
    Job("7", 2, state="stopped", reason="asked to stop").write(tmp_path / "job.json")
    assert "nothing failed; the job stopped: asked to stop" in diagnose(tmp_path)
    attempt.record.ended = attempt.record.srun_status = attempt.record.verdict = None
    attempt.write()
    assert "nothing failed; it goes on" in diagnose(tmp_path)


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, failed_twice):
    assert "no run" in refusal(tmp_path / "nowhere")
    assert "no attempt 3 in this run (it has 2)" in refusal(failed_twice, "--attempt", 3)
    assert "no attempt 1 of job 8 in this run (jobs with attempts: 7)" in refusal(failed_twice, "--job", 8)
    (failed_twice / "logs" / "job-7" / "attempt-2" / "attempt.json").write_text("{")
    assert refusal(failed_twice)


@pytest.mark.parametrize(
    ("log", "exit_code", "kind"),
    [
        (prefixed(0, logs.GLOO_CLOSED) + prefixed(1, logs.NAN), 1, "NaN"),
        (prefixed(1, logs.NAN) + prefixed(0, logs.GLOO_CLOSED), 1, "NaN"),
        (logs.HOST_OUT_OF_MEMORY + prefixed(0, logs.GLOO_RESET), -9, "killed"),
        (prefixed(0, logs.GLOO_RESET), 16, "transient fault"),
        (logs.BAD_SETTINGS, 1, "settings"),
        (logs.BAD_CHECKPOINT, 1, "checkpoint"),
        (logs.BAD_ARGUMENT, 2, "settings"),
        (logs.SEGMENTATION_FAULT + prefixed(0, logs.GLOO_CLOSED), -11, "program"),
    ],
)
def test_a_run_on_this_machine_has_one_log_of_all_ranks(tmp_path, log, exit_code, kind):
    path = tmp_path / "logs" / "train-20261128-104049.log"
    path.parent.mkdir()
    path.with_name("train-20261128-094049.log").write_text(logs.TRAINING)
    path.write_text(logs.TRAINING + log + logs.TORCHRUN.format(exit_code))
    text = diagnose(tmp_path)
    assert f"log {path.name} failed first with: {kind}" in text
    assert ("rank 1" if kind != "settings" else "rank") in text


def test_torchruns_first_failure_may_be_a_consequence(tmp_path):
    """It takes the time at which processes end, not that of their exceptions."""
    log = tmp_path / "train.log"
    log.write_text(prefixed(1, logs.GLOO_CLOSED) + prefixed(0, logs.NAN) + logs.TORCHRUN.format(1))
    failure = failure_in_log(log)
    assert (failure.kind, failure.rank) == ("NaN", 0)


def test_lines_of_two_ranks_may_be_mixed(tmp_path):
    mine, other = (prefixed(*pair).splitlines() for pair in ((1, logs.SHORT_DATA), (0, logs.GLOO_CLOSED)))
    mixed = [line for pair in zip(mine, other + [""] * len(mine), strict=False) for line in pair]
    log = tmp_path / "train.log"
    log.write_text("\n".join(mixed) + "\n" + logs.TORCHRUN.format(1))
    failure = failure_in_log(log)
    assert (failure.kind, failure.rank) == ("data", 1)
    assert failure.message.startswith("ValueError: offset must be")


def test_a_log_without_a_report_shows_no_failure(tmp_path):
    log = tmp_path / "logs" / "train-1.log"
    log.parent.mkdir()
    log.write_text(logs.TRAINING)
    assert "nothing failed; the last step logged is 1 of 6" in diagnose(tmp_path)
    log.write_text("")
    assert "nothing failed; it ended before its first logged step" in diagnose(tmp_path)


WORKER = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 1:
    {failure}
dist.barrier()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [
        ("raise RuntimeError('something real')", "program", "something real"),
        ("os.kill(os.getpid(), 9)", "killed", "SIGKILL"),
        ("sys.exit(16)", "transient fault", "Megatron"),
    ],
)
def test_real_runs_of_torchrun(tmp_path, failure, kind, said):
    """Two ranks, of which one fails while the other waits for it."""
    (tmp_path / "worker.py").write_text(WORKER.format(failure=failure))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "worker.py",
    ]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.run(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    assert run.returncode == 1
    found = failure_in_log(tmp_path / "log")
    assert (found.kind, found.rank) == (kind, 1)
    assert said in found.message


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_advice_and_a_row_in_the_documentation(kind):
    assert advice(Failure(kind, 1, "node1", 0.0, "text", None, None))
    assert f"\n| {kind} |" in (ROOT / "docs/troubleshooting.md").read_text()


def test_a_node_is_excluded_only_where_it_is_to_blame():
    def excludes(kind: FailureKind, message: str = "") -> bool:
        return "node1" in " ".join(advice(Failure(kind, 1, "node1", 0.0, message, None, None)))

    assert excludes("node lost")
    assert excludes("GPU")
    assert not excludes("out of memory")
    assert excludes("result validation", "Rank 1: First rerun: unexpected result is not reproducible")
    assert not excludes("result validation", "Second rerun: unexpected result is not reproducible")


def test_settings_that_are_advised_exist():
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from cca_megatron.config import CCAConfig
    from cca_megatron.training.arguments import add_arguments
    from cca_megatron.training.recipe import LaunchSection

    texts = [step for kind in KINDS for step in advice(Failure(kind, 1, "node1", 0.0, "", None, None))]
    texts.append((ROOT / "docs/troubleshooting.md").read_text())
    named = {name for text in texts for name in re.findall(r"\b(megatron|cca|launch)\.([a-z][\w-]+)", text)}
    megatron = {setting for section, setting in named if section == "megatron"}
    parser = add_arguments("cpu")(add_megatron_arguments(ArgumentParser()))
    known = {option.lstrip("-") for option in parser._option_string_actions}
    assert megatron <= known, megatron - known
    assert {setting for section, setting in named if section == "cca"} <= set(CCAConfig.__dataclass_fields__)
    launch = {setting for section, setting in named if section == "launch"}
    assert launch <= set(LaunchSection.__dataclass_fields__), launch
