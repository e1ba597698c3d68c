"""The quickstart model trains the same curve in every layout, from one checkpoint, in fp32."""

from pathlib import Path

import pytest
from training.conftest import CommonStart

from cca_megatron.training.command import build_command
from cca_megatron.training.recipe import load_recipe

STEPS, BOUND = 20, 1e-4
RECIPE = Path(__file__).parents[2] / "configs/recipes/quickstart.yaml"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
CONTEXT, PIPELINE = "--context-parallel-size 2", "--pipeline-model-parallel-size 2"
EXPERT = "--expert-model-parallel-size 2"
# processes, arguments
LAYOUTS = {
    "context": (2, CONTEXT),
    "tensor": (2, TENSOR),
    "pipeline": (2, PIPELINE),
    "expert": (2, EXPERT),
    "tensor, context": (4, f"{TENSOR} {CONTEXT} --cp-comm-type all_gather"),
    "tensor beyond the groups": (4, "--tensor-model-parallel-size 4 --sequence-parallel"),
    "pipeline, context, expert": (4, f"{PIPELINE} {CONTEXT} {EXPERT} --cp-comm-type a2a"),
    "tensor, pipeline": (4, f"{TENSOR} {PIPELINE}"),
}


@pytest.fixture(scope="module")
def start(dataset, tmp_path_factory):
    overrides = [
        f"data.prefix={dataset}",
        "data.inputs=[]",
        "output=null",
        "megatron.bf16=false",
        "megatron.use-distributed-optimizer=false",
        "megatron.expert-model-parallel-size=1",
        f"megatron.train-iters={STEPS}",
        "megatron.log-interval=1",
        "megatron.micro-batch-size=1",
        "megatron.global-batch-size=2",
        "megatron.eval-iters=0",
        "launch.gpus_per_node=1",
    ]
    argv = build_command(load_recipe(RECIPE, overrides), "cpu").argv
    return CommonStart(tmp_path_factory.mktemp("start"), argv)


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_curve(name, start, tmp_path, record_property):
    processes, arguments = LAYOUTS[name]
    got, _ = start.train(processes, arguments.split(), tmp_path)
    assert sorted(got) == sorted(start.curve) == list(range(1, STEPS + 1))
    assert start.curve[STEPS] < start.curve[1] - 1
    difference = max(abs(got[step] - loss) / loss for step, loss in start.curve.items())
    record_property("largest relative difference", difference)
    assert difference <= BOUND
