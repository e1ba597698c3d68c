"""What the planner adds up to memory and time follows from the layout, by hand-reckoned rules."""

from dataclasses import replace

import pytest
from support.planned import DENSE, MOE, SEQUENCE, arguments

from cca_megatron.plan.communication import Group, communication
from cca_megatron.plan.hardware import GPUS, NETWORK_SHARE
from cca_megatron.plan.memory import memory, memory_per_gpu
from cca_megatron.plan.shapes import model_from_args, parallel_from_args, run_from_args
from cca_megatron.plan.step import _transfer, step_time
from cca_megatron.training.recipe import RecipeError

GPU = GPUS["h100"]
HIDDEN, FFN, VOCABULARY, TOKENS = 256, 352, 384, 2 * SEQUENCE
EIGHT = {
    "gpus": 8,
    "global_batch_size": 8,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "context_parallel_size": 2,
    "expert_model_parallel_size": 4,
    "expert_tensor_parallel_size": 1,
    "use_distributed_optimizer": True,
}


def shapes(folder, model, **settings):
    args = arguments(folder, model, {}, **settings)
    return model_from_args(args), parallel_from_args(args), run_from_args(args)


def test_the_optimizer_of_experts_has_fewer_shards_than_that_of_dense_weights(tmp_path):
    """8 GPUs, TP 2, CP 2, DP 2: four hold the same dense weights, and with EP 4 two the same experts."""
    model, parallel, run = shapes(tmp_path, MOE, **EIGHT)
    dense = sum(part.on_rank(parallel) for part in model.parts() if part.cut != "expert")
    routed = 2 * 4 * 3 * HIDDEN * 160 / 4  # two layers of four experts
    found = memory(model, parallel, run)
    assert found.weights == 2 * (dense + routed)
    assert found.gradients == 4 * (dense + routed)
    assert found.optimizer == 12 * (dense / 4 + routed / 2)


@pytest.mark.parametrize(
    ("settings", "gradient", "weight"),
    [
        ({}, 4, 2),
        ({"grad_reduce_in_bf16": True}, 2, 2),
        ({"bf16": False, "fp16": True}, 2, 2),
        ({"bf16": False}, 4, 4),
    ],
    ids=["bf16", "bf16 gradients", "fp16", "fp32"],
)
def test_gradients_and_weights_have_the_bytes_of_their_dtypes(settings, gradient, weight, tmp_path):
    """Held by a GPU, and sent by it: summed and cut over four ranks, and gathered again."""
    common = {"gpus": 4, "global_batch_size": 8, "use_distributed_optimizer": True}
    model, parallel, run = shapes(tmp_path, DENSE, **common, **settings)
    count = sum(part.count for part in model.parts())
    found = memory(model, parallel, run)
    assert (found.gradients, found.weights) == (gradient * count, weight * count)
    (message,) = communication(model, parallel, run)
    assert (message.backward, message.forward) == (0.75 * gradient * count, 0.75 * weight * count)


def test_an_optimizer_that_is_aware_of_precision_keeps_the_dtypes_that_it_is_told(tmp_path):
    """Moments in bf16, and of fp32 weights the 16 bits that bf16 ones lack."""
    import torch

    args = arguments(tmp_path, DENSE, {})
    args.use_precision_aware_optimizer, args.main_params_dtype = True, torch.float32
    args.exp_avg_dtype = args.exp_avg_sq_dtype = torch.bfloat16
    assert run_from_args(args).optimizer_bytes == 2 + 2 + 2


def test_a_layer_in_its_backward_pass_holds_gradients_and_what_is_recomputed(tmp_path):
    plain = memory_per_gpu(arguments(tmp_path, DENSE, {}))
    # Gradients of the MLP's input, of what SwiGLU takes and of what it gives, in bf16.
    assert plain.working == TOKENS * 2 * (HIDDEN + 2 * FFN + FFN)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    recomputed = memory_per_gpu(arguments(tmp_path, DENSE, {}, **full))
    assert recomputed.working == plain.layers[0] + plain.working
    assert recomputed.layers == (TOKENS * 2 * HIDDEN,) * 3


def test_buffers_are_those_of_each_axis(tmp_path):
    def buffers(**settings):
        settings |= {"gpus": 2, "global_batch_size": 4}
        return memory(*shapes(tmp_path, DENSE | {"num-layers": 4}, **settings)).communication

    hidden = TOKENS * HIDDEN * 2
    assert buffers() == 0
    assert buffers(tensor_model_parallel_size=2, sequence_parallel=True) == hidden
    assert buffers(pipeline_model_parallel_size=2) == 2 * hidden
    # Keys and values of 2 heads of 16 from one other rank in bf16, and their gradients in fp32.
    ring = TOKENS / 2 * 2 * 2 * 16 * (2 + 4)
    assert buffers(context_parallel_size=2, cp_comm_type="p2p") == ring
    assert buffers(context_parallel_size=2, cp_comm_type="all_gather") == 2 * ring


def test_the_utilization_is_that_of_the_models_flops(tmp_path):
    model, parallel, run = shapes(tmp_path, DENSE, gpus=4, global_batch_size=8)
    step = step_time(model, parallel, run, GPU)
    assert step.flops == pytest.approx(3 * sum(model.flops(SEQUENCE).values()) * 8 * SEQUENCE)
    assert step.mfu == pytest.approx(step.flops / step.seconds / (4 * 989.4e12))
    assert step.tokens_per_second == pytest.approx(8 * SEQUENCE / step.seconds)


def test_products_in_fp32_take_twice_as_long(tmp_path):
    half, whole = (
        step_time(*shapes(tmp_path, DENSE, bf16=bf16), GPU).parts["matrix products"] for bf16 in (True, False)
    )
    assert whole == pytest.approx(2 * half)


def test_a_loss_in_chunks_takes_one_more_product(tmp_path):
    model, parallel, run = shapes(tmp_path, DENSE)
    whole, chunked = (
        step_time(model, parallel, replace(run, loss_chunk=size), GPU).parts["output and loss"]
        for size in (None, 16)
    )
    assert chunked - whole == pytest.approx(2 * HIDDEN * VOCABULARY * TOKENS / (GPU.peak * GPU.gemm))


def test_what_leaves_a_node_goes_over_its_network():
    """Ranks on two nodes of eight: of the 15 others of each, 8 are away."""
    card = GPU.network * NETWORK_SHARE
    assert _transfer(Group(8, 1), 1e9, "ring", GPU) == 1e9 / GPU.nvlink
    assert _transfer(Group(16, 1), 15e9, "all-to-all", GPU) == pytest.approx(8e9 / card)
    assert _transfer(Group(2, 8), 1e9, "neighbours", GPU) == pytest.approx(1e9 / card)
    assert _transfer(Group(4, 8), 1e9, "ring", GPU) == pytest.approx(1e9 / card)
    assert _transfer(Group(16, 1), 1e9, "ring", GPU) == pytest.approx(1e9 / (8 * card))


def test_tokens_that_do_not_go_to_experts_one_by_one_are_refused(tmp_path):
    gathers = MOE | {"moe-token-dispatcher-type": "allgather"}
    parallel_from_args(arguments(tmp_path, gathers, {}))
    with pytest.raises(RecipeError, match="moe_token_dispatcher_type=alltoall works"):
        shapes(tmp_path, gathers, **EIGHT)
