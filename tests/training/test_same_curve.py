"""From one checkpoint, every layout and memory option trains the same curve."""

import pytest
from training.conftest import losses, pretrain

STEPS = 5
RUN = f"--train-iters {STEPS} --micro-batch-size 2 --global-batch-size 4".split()
DOCUMENTS = ["--dataloader-inter-document-masking"]
EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1] --moe-ffn-hidden-size 24
    --moe-aux-loss-coeff 0
""".split()

# name: (model, processes, arguments)
VARIANTS = {
    "tensor parallel": ("dense", 2, "--tensor-model-parallel-size 2"),
    "sequence parallel": ("dense", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pipeline": ("dense", 2, "--pipeline-model-parallel-size 2"),
    "data parallel": (
        "dense",
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "full recompute": (
        "dense",
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        " --cca-recompute-mix",
    ),
    "selective recompute": (
        "dense",
        1,
        "--recompute-granularity selective --recompute-modules core_attn layernorm --cca-recompute-mix",
    ),
    "hybrid stack": ("dense", 1, "--hybrid-layer-pattern *-*-"),
    "documents, sequence parallel": (
        "documents",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "context, ring": ("dense", 2, "--context-parallel-size 2"),
    "context, all-gather": ("dense", 2, "--context-parallel-size 2 --cp-comm-type all_gather"),
    "context, all-to-all": ("dense", 2, "--context-parallel-size 2 --cp-comm-type a2a --cca-recompute-mix"),
    "one group, tensor parallel": ("one group", 2, "--tensor-model-parallel-size 2"),
    "one group, distributed optimizer": (
        "one group",
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "documents, context": ("documents", 2, "--context-parallel-size 2"),
    "documents, context, one sample": (
        "documents",
        2,
        "--context-parallel-size 2 --micro-batch-size 1 --cp-comm-type all_gather",
    ),
    "experts, context": ("experts", 2, "--context-parallel-size 2 --expert-model-parallel-size 2"),
    "documents, pipeline": ("documents", 2, "--pipeline-model-parallel-size 2 --micro-batch-size 1"),
    "experts, all-to-all": (
        "experts",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "experts, all-gather": (
        "experts",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
    ),
    "experts, pipeline": ("experts", 2, "--pipeline-model-parallel-size 2"),
}
MODELS = {
    "dense": [],
    "one group": ["--num-query-groups", "1", "--clip-grad", "0.1"],
    "documents": DOCUMENTS,
    "experts": EXPERTS,
}


def padding(arguments: str) -> list[str]:
    """Megatron pads the vocabulary to a multiple of this times TP: the same model needs the same product."""
    return ["--make-vocab-size-divisible-by", "2" if "tensor" in arguments else "4"]


@pytest.fixture(scope="module")
def baselines(dataset, tmp_path_factory):
    """For each model a checkpoint, and the losses of one process that starts from it."""
    made = {}

    def baseline(model):
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            common = [*RUN, *MODELS[model], "--data-path", dataset]
            first = [*common, *padding(""), "--train-iters", "1", "--save", f"{folder}/save"]
            pretrain(1, *first, "--save-interval", "1", "--no-save-optim")
            start = [*common, "--load", f"{folder}/save", "--finetune", "--no-load-optim", "--no-load-rng"]
            pretrain(1, *start, *padding(""), "--tensorboard-dir", f"{folder}/log")
            made[model] = folder, start, losses(folder / "log")
        return made[model]

    return baseline


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_same_curve_as_one_process(name, baselines, tmp_path):
    model, processes, arguments = VARIANTS[name]
    _, start, expected = baselines(model)
    pretrain(
        processes, *start, *arguments.split(), *padding(arguments), "--tensorboard-dir", f"{tmp_path}/log"
    )
    got = losses(tmp_path / "log")
    assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
    assert expected[STEPS] < expected[1]
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=1e-5), f"iteration {step}"
