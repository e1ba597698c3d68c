"""SLURM on this machine, and a recipe small enough for it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.small_recipe import MODEL

ROOT = Path(__file__).parents[2]
MINI_SLURM = ROOT / "tests" / "launch" / "mini_slurm.sh"
PROGRAM = Path(sys.executable).parent / "cca-megatron"
RECIPE = {
    "model": MODEL
    | {
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "hidden-dropout": 0,
        "attention-dropout": 0,
    },
    "megatron": {
        "seq-length": 32,
        "micro-batch-size": 1,
        "global-batch-size": 2,
        "train-iters": 60,
        "lr": 1e-2,
        "lr-decay-iters": 1000,
        "eval-iters": 0,
        "eval-interval": 1000,
        "save-interval": 20,
        "log-interval": 1,
        "tensorboard-log-interval": 1,
        "num-workers": 0,
        "mock-data": True,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": 257,
    },
    "launch": {"nodes": 2, "gpus_per_node": 1},
}


def environment(**more: str) -> dict[str, str]:
    """Without what an outer launcher, or another test, has set."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "CCA_", "SLURM", "SBATCH", "SRUN")
    kept = {k: v for k, v in os.environ.items() if not k.startswith((*outer, "CUDA_DEVICE_MAX"))}
    return kept | {"CCA_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


class Cluster:
    """SLURM's and our commands, against the cluster of this test session."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.environment = environment(
            MINI_SLURM_DIR=str(folder),
            MINI_SLURM_PORT=str(20000 + os.getpid() % 10000),
            SLURM_CONF=str(folder / "etc" / "slurm.conf"),
        )

    def control(self, *arguments: str) -> str:
        """Run mini_slurm.sh."""
        return self.run(str(MINI_SLURM), *arguments).stdout

    def run(
        self, *command: str, cwd: Path | None = None, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, which must end with this status."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, run: "Run", *settings: str) -> str:
        """Submit a run; returns the job's id."""
        done = self.run(str(PROGRAM), "submit", str(run.recipe), *settings, cwd=run.recipe.parent)
        return done.stdout.split()[1]

    def state(self, job_id: str) -> str:
        """``RUNNING``, ``PENDING``, ...; nothing when it is over."""
        return self.run("squeue", "--noheader", "--jobs", job_id, "--format", "%T").stdout.strip()

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
            time.sleep(0.2)

    def finish(self, run: "Run", job_id: str) -> dict:
        """Wait for the end of a job; returns its record."""
        over = ("finished", "stopped")
        self.wait(
            f"job {job_id} ends\n{run.log(job_id)}",
            lambda: run.job()["state"] in over and not self.state(job_id),
        )
        return run.job()

    def workers(self, node: str) -> list[str]:
        """Process ids of the ranks on a node, as seen in it."""
        listed = self.control("on-node", node, "ps", "-eo", "pid=,args=").splitlines()
        ours = [line for line in listed if "cca_megatron.training.pretrain" in line]
        return [line.split()[0] for line in ours if "spawn_main" not in line and "cluster.node" not in line]


class Run:
    """A recipe and the folder it writes to."""

    def __init__(self, folder: Path, **megatron: object):
        self.root = folder / "run"
        self.recipe = folder / "tiny.yaml"
        content = RECIPE | {"output": str(self.root), "megatron": {**RECIPE["megatron"], **megatron}}
        self.recipe.write_text(yaml.safe_dump(content))

    def job(self) -> dict:
        return json.loads((self.root / "job.json").read_text())

    def attempts(self) -> list[dict]:
        files = self.root.glob("logs/job-*/attempt-*/attempt.json")
        return sorted((json.loads(file.read_text()) for file in files), key=lambda attempt: attempt["begun"])

    def log(self, job_id: str) -> str:
        file = self.root / "logs" / f"job-{job_id}.log"
        return file.read_text() if file.exists() else ""

    def reached(self, iteration: int) -> bool:
        """Whether a step is in the log of any attempt."""
        logs = self.root.glob("logs/job-*/attempt-*/*/rank-*.out")
        return any(f"iteration {iteration:8d}/" in log.read_text() for log in logs)

    def losses(self) -> dict[int, set[float]]:
        """All losses that were logged for a step: more than one where it was repeated."""
        events = EventAccumulator(str(self.root / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        losses: dict[int, set[float]] = {}
        for event in events.Scalars("lm loss"):
            losses.setdefault(event.step, set()).add(event.value)
        return losses
