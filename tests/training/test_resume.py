"""A run that goes on from a checkpoint loses nothing: same losses, in the same layout or another."""

import pytest
from training.conftest import losses, pretrain

STEPS, SAVED = 6, 3
DENSE = f"""
    --train-iters {STEPS} --micro-batch-size 2 --global-batch-size 4 --save-interval {SAVED}
    --use-distributed-optimizer
""".split()
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]
EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1] --moe-ffn-hidden-size 24
    --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --bf16
""".split()


ZAYA = """
    --zaya --zaya-router-hidden-size 12 --zaya-balancing-rate 0.05 --fp32-residual-connection
    --num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 24
    --moe-router-load-balancing-type none --expert-model-parallel-size 2
    --moe-token-dispatcher-type alltoall --bf16
""".split()


@pytest.fixture(scope="module")
def tensor_parallel_run(dataset, tmp_path_factory):
    """Six iterations under tensor and sequence parallelism, saved after the third."""
    folder = tmp_path_factory.mktemp("tp2")
    arguments = [*DENSE, *RESHARDABLE, "--data-path", dataset]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    out = pretrain(2, *arguments, *layout, "--save", f"{folder}/save", "--tensorboard-dir", f"{folder}/log")
    assert "CCA attention: 2 layers" in out
    assert "device: cpu" in out
    return folder, arguments, layout


def go_on(folder, arguments, processes, name):
    """Losses of a run that starts from the checkpoint of the third iteration."""
    log = folder / name / "log"
    where = ["--load", f"{folder}/save", "--ckpt-step", str(SAVED), "--save", f"{folder}/{name}/save"]
    out = pretrain(processes, *arguments, *where, "--tensorboard-dir", str(log))
    assert "could not find" not in out
    return losses(log)


def test_resuming_repeats_the_uninterrupted_run_exactly(tensor_parallel_run):
    folder, arguments, layout = tensor_parallel_run
    whole, rest = losses(folder / "log"), go_on(folder, [*arguments, *layout], 2, "again")
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert whole[STEPS] < whole[1]
    assert rest == {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}


def test_a_tensor_parallel_checkpoint_goes_on_in_one_process(tensor_parallel_run):
    """Weights and optimizer state: every later loss agrees, to the rounding of fp32."""
    folder, arguments, _ = tensor_parallel_run
    # Megatron pads the vocabulary to a multiple of this times TP, and the padding has logits too.
    same_padding = ["--make-vocab-size-divisible-by", "4"]
    whole, rest = losses(folder / "log"), go_on(folder, [*arguments, *same_padding], 1, "single")
    assert sorted(rest) == list(range(SAVED + 1, STEPS + 1))
    for step, loss in rest.items():
        assert loss == pytest.approx(whole[step], rel=1e-5)


@pytest.mark.parametrize("experts", [EXPERTS, ZAYA], ids=["linear router", "zaya"])
def test_experts_in_bf16_resume_exactly(dataset, tmp_path, experts):
    """Expert parallelism and the distributed optimizer, as in the quickstart; ZAYA's balancing biases too."""
    arguments = [*DENSE, *experts, "--data-path", dataset]
    pretrain(2, *arguments, "--save", f"{tmp_path}/save", "--tensorboard-dir", f"{tmp_path}/log")
    whole, rest = losses(tmp_path / "log"), go_on(tmp_path, arguments, 2, "again")
    assert rest == {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}
