"""Machines without a scheduler meet and train together, and stop together."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.small_recipe import small_recipe
from training.conftest import environment, losses

from cca_megatron.cluster.by_hand import nodes_from
from cca_megatron.cluster.ports import held_port

ROOT = Path(__file__).parents[2]


def start(port: int, node_rank: int, log: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Start ``launch/torchrun.sh`` as one of two nodes."""
    variables = {"PYTHON": sys.executable, "MASTER": f"127.0.0.1:{port}"}
    variables |= {"NNODES": "2", "NODE_RANK": str(node_rank)}
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(ROOT / "launch/torchrun.sh"), *map(str, arguments)],
            env=environment() | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def test_hosts_by_name_and_by_number_say_the_same():
    by_name = nodes_from({"HOSTS": "a, b"}, {"b", "b.cluster"})
    assert by_name == nodes_from({"NNODES": "2", "NODE_RANK": "1", "MASTER": "a"}, set())
    nodes, rendezvous = by_name
    assert rendezvous is not None
    assert (nodes, rendezvous.node_rank, rendezvous.host) == (2, 1, "a")
    assert nodes_from({}, {"a"}) == nodes_from({"HOSTS": "a"}, {"a"}) == (1, None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HOSTS": "a b"}, "HOSTS=a b: must have this machine once, as here"),
        ({"HOSTS": "here here"}, "must have this machine once"),
        ({"NNODES": "2"}, "NNODES=2: NODE_RANK=0..1 and MASTER=HOST"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER": "a"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NNODES": "two"}, "NNODES=two: must be a whole number of at least 1"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER": "a:b"}, "MASTER=a:b: must be HOST or HOST:PORT"),
    ],
)
def test_hosts_that_do_not_fit_together_are_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        nodes_from(variables, {"here"})


def test_a_held_port_is_free_for_a_server_and_for_nobody_else():
    with held_port() as port:
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("", port))
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen()


@pytest.mark.long
def test_two_nodes_train_and_a_signal_to_either_saves_for_both(tmp_path):
    path = small_recipe(tmp_path, iterations=100_000)
    logs = [tmp_path / "first.log", tmp_path / "last.log"]
    with held_port() as port:
        first, last = (
            start(port, rank, log, path, "launch.gpus_per_node=1") for rank, log in enumerate(logs)
        )
        # Megatron's last rank prints the losses.
        while "iteration        3/" not in logs[1].read_text() and last.poll() is None:
            time.sleep(0.1)
        last.send_signal(signal.SIGTERM)
        statuses = first.wait(timeout=120), last.wait(timeout=120)
    texts = [log.read_text() for log in logs]
    assert statuses == (0, 0), texts[0][-3000:] + texts[1][-3000:]
    saved = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved >= 3
    assert "dataset: 20 documents" in texts[0]
    assert "dataset: 20 documents" not in texts[1]
    assert sorted(losses(tmp_path / "run/tensorboard")) == list(range(1, saved + 1))
    assert len(list((tmp_path / "run/logs").iterdir())) == 2
    assert (tmp_path / "run/loss.png").exists()
