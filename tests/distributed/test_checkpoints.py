"""Distributed checkpoints: saved in one layout, a run goes on in another, optimizer state included."""

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from support.comparison import Model, forward_backward, reference
from support.megatron import MOE, Layout, load, new_directory, parallel, shared_directory

from cca_megatron.training import megatron_fixes

STEPS, SAVED = 4, 2
"""Two steps after the checkpoint: the gradient of the second depends on the optimizer state in the first."""
# A large eps: AdamW's first step is the sign of a gradient, and rounding decides the sign of a zero.
OPTIMIZER = OptimizerConfig(
    optimizer="adam", lr=0.01, adam_eps=1e-3, clip_grad=0.3, use_distributed_optimizer=True
)
MODELS = {
    "two groups": Model(),
    "one group": Model({"num_query_groups": 1}),
    "experts": Model(MOE),
}


def metadata():
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def train(model, layout, weights=None, resume=None, keep=None, steps=STEPS):
    """Train from weights, or go on from a checkpoint and keep another; the gradient norms of the steps."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    with parallel(layout):
        chunks = model.build(layout, torch.float32)
        if weights:
            load(chunks, weights)
        ddps = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
        optimizer = get_megatron_optimizer(OPTIMIZER, ddps)

        def state(is_loading=False):
            names = {f"model{i}": c.sharded_state_dict(metadata=metadata()) for i, c in enumerate(chunks)}
            return names | {"optimizer": optimizer.sharded_state_dict(names, is_loading, metadata=metadata())}

        if resume:
            loaded = dist_checkpointing.load(state(is_loading=True), resume)
            for i, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded[f"model{i}"])
            optimizer.load_state_dict(loaded["optimizer"])
        norms = []
        for _ in range(steps):
            for ddp in ddps:
                ddp.zero_grad_buffer()
            optimizer.zero_grad()
            forward_backward(model, layout, ddps)
            norms.append(optimizer.step()[1])
        if keep:
            new_directory(keep)
            dist_checkpointing.save(state(), keep)
    return norms


@pytest.fixture(autouse=True)
def fixes():
    """What our entry applies to Megatron, too."""
    megatron_fixes.apply()


LAYOUTS = [
    ("two groups", Layout(tp=4, sp=True)),
    ("experts", Layout(ep=2)),
    *(
        pytest.param(name, layout, marks=pytest.mark.long)
        for name, layout in [
            ("two groups", Layout(tp=4)),
            ("one group", Layout(tp=2, cp=2)),
            ("two groups", Layout(pp=2, tp=2)),
            ("two groups", Layout(cp=4)),
            ("experts", Layout(tp=2, sp=True, ep=4)),
            ("experts", Layout(pp=2, cp=2, ep=2)),
        ]
    ),
]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_a_run_goes_on_in_another_layout(name, layout):
    model = MODELS[name]
    weights = f"{reference(model)[0]}/weights"
    with shared_directory() as directory:
        expected = train(model, Layout(), weights)
        norms = train(model, layout, weights, keep=f"{directory}/there", steps=SAVED)
        norms += train(model, Layout(), resume=f"{directory}/there", steps=STEPS - SAVED)
        assert norms == pytest.approx(expected, rel=1e-4), f"from {layout} to one rank"
        norms = train(model, Layout(), weights, keep=f"{directory}/here", steps=SAVED)
        norms += train(model, layout, resume=f"{directory}/here", steps=STEPS - SAVED)
        assert norms == pytest.approx(expected, rel=1e-4), f"from one rank to {layout}"


@pytest.mark.long
@pytest.mark.ranks(8)
def test_eight_ranks_of_two_groups():
    """From one rank to eight, from there to four, and back to one."""
    model = Model({"num_attention_heads": 8})
    weights = f"{reference(model)[0]}/weights"
    with shared_directory() as directory:
        expected = train(model, Layout(), weights)
        norms = train(model, Layout(), weights, keep=f"{directory}/1", steps=1)
        for step, size in enumerate((8, 4, 1), start=1):
            layout = Layout(tp=size, sp=size > 1)
            resume, keep = f"{directory}/{step}", f"{directory}/{step + 1}"
            norms += train(model, layout, resume=resume, keep=keep, steps=1)
    assert norms == pytest.approx(expected, rel=1e-4)
