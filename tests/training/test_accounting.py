"""What a run of the real entry logs: FLOPs by time, and values of every layer at TensorBoard's steps."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.conftest import MODEL, pretrain
from training.test_same_curve import EXPERTS, ZAYA

RUN = """
    --train-iters 4 --micro-batch-size 2 --global-batch-size 4 --tensorboard-log-interval 2
    --log-throughput --log-timers-to-tensorboard
""".split()
OF_ATTENTION = ["temperature mean", "temperature max", "logit bound", "conv0 norm", "conv1 norm"]
TOKENS = 4 * 32


Logged = dict[str, dict[int, float]]
"""Values by tag and step."""


def scalars(folder) -> Logged:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def train(
    processes: int, arguments: list[str], dataset: str, folder
) -> tuple[str, dict[str, dict[int, float]]]:
    log = ["--tensorboard-dir", str(folder)]
    output = pretrain(processes, *RUN, *arguments, "--data-path", dataset, *log, model=MODEL)
    return output, scalars(folder)


def test_throughput_is_the_flops_of_the_model_by_time(dataset, tmp_path):
    output, logged = train(2, [*EXPERTS, "--expert-model-parallel-size", "2"], dataset, tmp_path)
    hidden, queries, keys, vocabulary, length = 32, 32, 16, 258, 32
    attention = hidden * (queries + 2 * keys) + queries * hidden
    convs = (queries + keys) * (2 + 8 * 2)
    core = 2 * queries * length / 2
    dense, experts = 3 * hidden * 48, 2 * 3 * hidden * 24 + hidden * 4  # two of four experts, and the router
    forward = 2 * (2 * (attention + convs + core) + dense + experts + hidden * vocabulary)
    assert f"FLOPs: {3 * forward:.4g} per token" in output
    for step, seconds in logged["iteration-time"].items():
        got = logged["throughput"][step] * 1e12 * 2 * seconds
        assert got == pytest.approx(3 * forward * TOKENS, rel=1e-5), step

    for tag in OF_ATTENTION:
        for layer in (1, 2):
            assert sorted(logged[f"{tag}/layer {layer}"]) == [2, 4], tag
    assert sorted(logged["expert load/layer 2"]) == [2, 4]
    assert "expert load/layer 1" not in logged
    # The values are those before the step's update: at step 2 temperatures have been updated once.
    assert logged["temperature mean/layer 1"][2] == pytest.approx(1, abs=0.02)
    assert logged["temperature mean/layer 1"][2] != 1
    assert logged["logit bound/layer 1"][2] == pytest.approx(
        8**0.5 * logged["temperature max/layer 1"][2], rel=1e-5
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "arguments", "labels"),
    [
        (
            2,
            "--pipeline-model-parallel-size 2 --mtp-num-layers 1 --untie-embeddings-and-output-weights",
            ["layer 1", "layer 2", "prediction 1"],
        ),
        (1, "--hybrid-layer-pattern *-*-/*-/*-", ["layer 1", "layer 3", "prediction 1 layer 1"]),
        (2, " ".join([*ZAYA, "--pipeline-model-parallel-size", "2"]), ["layer 1", "layer 2"]),
    ],
    ids=["predictions on stages", "hybrid", "zaya on stages"],
)
def test_every_kind_of_model_is_logged(processes, arguments, labels, dataset, tmp_path):
    _, logged = train(processes, arguments.split(), dataset, tmp_path)
    for tag in OF_ATTENTION:
        found = {name.partition("/")[2] for name in logged if name.startswith(f"{tag}/")}
        assert found - {"largest"} >= set(labels), tag
        assert all(value > 0 for label in labels for value in logged[f"{tag}/{label}"].values())
    if "--zaya" in arguments:
        assert sorted(logged["expert load/skipped"]) == [2, 4]
