"""Megatron-FSDP as it runs on GPUs: gradients are averaged, a reduction that gloo lacks."""

import pytest
import torch
from training.conftest import losses, pretrain

# On the CPU backend PyTorch seems to have a GPU by the name of "cpu".
has_gpus = torch.cuda.is_available() and torch.cuda.get_device_name() != "cpu"
pytestmark = pytest.mark.skipif(not has_gpus or torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("strategy", ["optim", "optim_grads", "optim_grads_params"])
def test_same_curve_as_plain_data_parallelism(strategy, dataset, tmp_path):
    common = "--train-iters 5 --micro-batch-size 2 --global-batch-size 4".split()
    common += ["--data-path", dataset]
    pretrain(2, *common, "--tensorboard-dir", f"{tmp_path}/plain")
    fsdp = ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", strategy]
    fsdp += ["--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor"]
    pretrain(2, *common, *fsdp, "--tensorboard-dir", f"{tmp_path}/sharded")
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
