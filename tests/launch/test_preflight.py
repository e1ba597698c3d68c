"""A check of nodes finds what is slow, broken, different or missing, and blames nobody else."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import pytest
from training.conftest import environment

from cca_megatron.cluster.preflight import allocation, gpus
from cca_megatron.cluster.preflight.bounded import output_of
from cca_megatron.cluster.preflight.check import rounds
from cca_megatron.cluster.preflight.judge import Verdict, judge
from cca_megatron.cluster.preflight.measures import Limits
from cca_megatron.cluster.preflight.node import disk_rates
from cca_megatron.cluster.preflight.report import ExchangeReport, NodeReport, wait_for, write_json
from cca_megatron.cluster.preflight.show import show

# In the form that nvidia-smi gives these fields; written for this test, not recorded on a machine.
EIGHT_H100 = "".join(
    f"{i}, NVIDIA H100 80GB HBM3, GPU-{i:04}, 570.86.15, Enabled, 0, 345, 1980, 0x0000000000000001, 16, 16\n"
    for i in range(8)
)
HEALTHY = {
    "gemm": 700.0,
    "copy": 2900.0,
    "host": 55.0,
    "all_reduce": 420.0,
    "all_to_all": 330.0,
    "p2p": 370.0,
}


def node(name: str, gpu_lines: str = EIGHT_H100) -> NodeReport:
    """A healthy node, with a little noise that depends on its name."""
    found = gpus.parse(gpu_lines)
    noise = 1 + sum(name.encode()) % 7 / 200
    rates = {measure: [rate * noise] * (len(found) or 2) for measure, rate in HEALTHY.items()}
    return NodeReport(
        name,
        gpus=found,
        under_load=copy.deepcopy(found),
        versions={"driver": "570.86.15", "torch": "2.13.0"},
        free_gib={"output": 900.0, "temporary files": 90.0, "/dev/shm": 90.0},
        rates=rates | {"write": [1.5], "read": [3.0]},
    )


def exchanges(names: list[str], broken: str | None = None) -> list[ExchangeReport]:
    """What pairs of neighbours report; none of those with the broken node works."""
    answers = []
    for pairs in rounds(names):
        for pair in pairs:
            failed = broken in pair
            for own in pair:
                partner = [other for other in pair if other != own]
                problems = ["across: rank 0 did not get beyond begun: time-out"] if failed else []
                answers.append(
                    ExchangeReport(own, partner, {} if failed else {"p2p": [45.0] * 8}, None, problems)
                )
    return answers


def verdict(*changed: NodeReport, broken: str | None = None, **more) -> Verdict:
    """Of five nodes, some of them changed."""
    names = [f"node{i}" for i in range(5)]
    reports = {name: node(name) for name in names} | {report.node: report for report in changed}
    return judge(
        names, reports, more.get("pairs", exchanges(names, broken)), more.get("together", []), Limits()
    )


def test_in_a_container_the_nodes_are_known_without_scontrol(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    known = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node2", "CCA_NODES": "node1 node2 "}
    found = allocation.find(step | known, tmp_path)
    assert (found.node, found.nodes) == ("node2", ("node1", "node2"))


def test_healthy_nodes_are_fine():
    assert verdict().findings == []


def replaced(report: NodeReport, index: int, **fields: object) -> NodeReport:
    """The report with one GPU changed, also under load."""
    for seen in (report.gpus, report.under_load):
        seen[index] = dataclasses.replace(seen[index], **fields)
    return report


def changed(**fields: object) -> NodeReport:
    return dataclasses.replace(node("node3"), **fields)


def with_rate(measure: str, rank: int, part: float) -> NodeReport:
    report = node("node3")
    report.rates[measure][rank] *= part
    return report


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (with_rate("gemm", 5, 0.8), r"GEMM of rank 5: 5\d\d TFLOP/s, usual here is 7"),
        (with_rate("gemm", 5, 0.5), r"GEMM of rank 5: 3\d\d TFLOP/s; a NVIDIA H100 80GB HBM3 has at"),
        (with_rate("host", 0, 0.25), "host link of rank 0"),
        (with_rate("all_reduce", 0, 0.7), "all-reduce of rank 0"),
        (with_rate("write", 0, 0.1), "write: 0.1"),
        (replaced(node("node3"), 2, uncorrected_errors=3), "GPU 2: 3 uncorrected ECC errors"),
        (replaced(node("node3"), 2, ecc="Disabled"), "GPU 2: ECC is off"),
        (replaced(node("node3"), 2, pcie_width=8), "GPU 2: 8 of 16 PCIe lanes"),
        (replaced(node("node3"), 2, clock_reasons=0x44, clock=900), "hardware thermal slowdown under load"),
        (node("node3", EIGHT_H100.split("7, ")[0]), "7 GPUs instead of 8"),
        (changed(processes=["process 71 (python, 900 MiB)"]), "process 71 .* computes on its GPUs"),
        (changed(versions={"driver": "550.54", "torch": "2.13.0"}), "driver 550.54, other nodes have 570"),
        (changed(versions={"driver": "570.86.15"}), "torch absent, other nodes have 2.13.0"),
        (changed(free_gib={"output": 900.0, "/dev/shm": 0.06}), "free space for /dev/shm: 0.06 GiB, at"),
        (changed(problems=["nvidia-smi did not end within 60 s"]), "nvidia-smi did not end"),
    ],
)  # fmt: skip
def test_a_bad_node_is_found_and_no_other(report, text):
    result = verdict(report)
    assert result.bad_nodes == ["node3"]
    (finding,) = result.findings
    assert re.search(text, finding.text), finding.text


def test_a_node_that_does_not_answer_is_named():
    names = ["node1", "node2", "node3"]
    there = ["node1", "node3"]
    result = judge(names, {name: node(name) for name in there}, exchanges(there), [], Limits())
    assert [(f.node, f.text[:14]) for f in result.findings] == [("node2", "did not answer")]


def test_nobody_waits_longer_than_agreed_for_a_file(tmp_path):
    write_json(tmp_path / "a.json", {"here": 1})
    files = {name: tmp_path / f"{name}.json" for name in "ab"} | {"c": tmp_path / "no folder" / "c.json"}
    said = []
    begun = time.monotonic()
    assert wait_for(files, 0.5, lambda done, of: said.append((done, of))) == {"a": {"here": 1}}
    assert 0.5 <= time.monotonic() - begun < 20
    assert said[-1] == (1, 3)


def test_of_nodes_that_cannot_exchange_the_one_without_a_working_neighbour_is_blamed():
    result = verdict(broken="node2")
    assert [finding.node for finding in result.findings] == ["node2"]
    assert "cannot exchange with node3 and node1" in result.findings[0].text
    assert result.reports["node1"].rates["p2p_across"] == [45.0] * 8


def test_the_better_neighbour_counts():
    names = [f"node{i}" for i in range(5)]
    pairs = exchanges(names)
    for pair in pairs:
        if "node4" in (pair.node, *pair.partners):
            pair.rates["p2p"][3] = 11.0
    result = verdict(pairs=pairs)
    assert [finding.node for finding in result.findings] == ["node4"]
    assert "p2p across of rank 3: 11 GB/s, usual here is 45" in result.findings[0].text


def test_a_clock_that_differs_is_found_even_if_it_is_the_first_nodes():
    skews = {"node0": 0.0, "node1": 7.0, "node2": 7.01, "node3": 6.99, "node4": 7.0}
    together = [ExchangeReport(name, [], {}, skew, []) for name, skew in skews.items()]
    result = verdict(together=together)
    assert [f.text for f in result.findings] == ["clock differs by -7.0 s from the others'"]
    assert result.bad_nodes == ["node0"]


def test_what_fails_only_together_blames_no_node():
    together = [ExchangeReport("node0", [], {}, None, ["across: rank 0 did not get beyond begun"])]
    result = verdict(together=together)
    assert [finding.node for finding in result.findings] == [None]
    assert result.bad_nodes == []


def test_of_two_nodes_the_slower_is_found():
    slow = with_rate("copy", 1, 0.7)
    result = judge(["node1", "node3"], {"node1": node("node1"), "node3": slow}, [], [], Limits())
    assert result.bad_nodes == ["node3"]


@pytest.mark.parametrize("count", range(2, 10))
def test_rounds_have_each_node_once_and_all_neighbours_meet(count):
    names = [str(i) for i in range(count)]
    plan = rounds(names)
    for pairs in plan:
        members = [name for pair in pairs for name in pair]
        assert len(members) == len(set(members))
    met = {frozenset(pair) for pairs in plan for pair in pairs}
    assert met == {frozenset((names[i], names[(i + 1) % count])) for i in range(count)}
    assert rounds(["alone"]) == []


def test_a_gpu_without_ecc_or_clocks_is_read():
    (gpu,) = gpus.parse("0, Tesla T4, GPU-1, 550.54, [N/A], [N/A], [Unknown Error], 1590, [N/A], 8, 16\n")
    assert (gpu.ecc, gpu.uncorrected_errors, gpu.clock, gpu.max_clock) == (None, None, None, 1590)
    assert gpu.slowdowns == []
    assert gpus.parse("") == []


def test_processes_are_read():
    text = "4711, /usr/bin/python3, 12345 MiB\n4712, [Not Found], [N/A]\n"
    assert gpus.parse_processes(text) == [
        "process 4711 (/usr/bin/python3, 12345 MiB)",
        "process 4712 ([Not Found], [N/A])",
    ]


def test_a_program_that_hangs_or_fails_is_named_in_time():
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="sleep did not end within 1 s"):
        output_of(["sleep", "60"], 1)
    assert time.monotonic() - begun < 20
    with pytest.raises(RuntimeError, match="sh failed with status 3: no such field"):
        output_of(["sh", "-c", "echo no such field >&2; exit 3"], 20)


def test_the_probe_of_the_disk_is_removed(tmp_path):
    rates = disk_rates(tmp_path / "probe", 1 << 20)
    assert rates["write"][0] > 0
    assert rates["read"][0] > 0
    assert not list(tmp_path.iterdir())


def test_the_nodes_to_avoid_are_printed_as_sbatch_takes_them(capsys, tmp_path):
    slow, broken = with_rate("gemm", 0, 0.6), dataclasses.replace(node("node1"), problems=["a problem"])
    show(verdict(slow, broken), tmp_path / "report.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "to avoid them: sbatch --exclude=node1,node3"
    assert "node1: a problem" in lines
    table = {line.split()[0]: line.split() for line in lines[2:7]}
    assert table["node3"][-1] == "bad"
    assert table["node2"][1] == "8"


SLOW = """\
import sys
if "cca_megatron.cluster.preflight.rank" in sys.orig_argv:
    import torch
    product = torch.matmul
    torch.matmul = lambda *given: [product(*given) for _ in range(30)][-1]
"""
NODE = """\
import sys
from pathlib import Path
from cca_megatron.cluster.preflight.allocation import Allocation
from cca_megatron.cluster.preflight.check import check
from cca_megatron.cluster.preflight.measures import Limits
allocation = Allocation(sys.argv[1], ("node1", "node2"), "127.0.0.1", Path(sys.argv[2]))
verdict = check(allocation, Limits(least=0.15), 300, lambda *progress: None)
sys.exit(0 if verdict is None else len(verdict.findings))
"""


@pytest.mark.long
def test_a_slow_node_is_found_by_measurement(tmp_path):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path / "slow"), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, name, str(tmp_path / "check")], env=environment() | more
        )
        for name, more in (("node1", {}), ("node2", {"PYTHONPATH": path}))
    ]
    statuses = [process.wait(timeout=600) for process in processes]
    report = json.loads((tmp_path / "check/report.json").read_text())
    # Other programs may slow this machine's disk for one of them, so only the products are looked at.
    slow = [finding["node"] for finding in report["findings"] if finding["text"].startswith("GEMM of rank")]
    assert slow == ["node2"], report["findings"]
    assert "node2" in report["bad_nodes"]
    assert statuses[0] > 0
    assert statuses[1] == 0
    assert report["together"]["all_reduce"] > 0
    assert abs(report["skew"]["node2"]) < 0.5
    assert {"write", "read", "p2p_across"} <= report["reports"]["node1"]["rates"].keys()


@pytest.mark.long
def test_processes_of_torchrun_check_their_machine_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "cca_megatron.cli", "preflight", "--free-gib=0", f"--output={tmp_path}"]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("the node is fine") == 1
    assert len(list(tmp_path.glob("*/report.json"))) == 1
