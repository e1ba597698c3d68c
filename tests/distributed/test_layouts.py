"""Any layout computes what one rank computes: logits and every gradient, in fp64."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import build_module
from support.closeness import assert_close
from support.comparison import BOUND, Model, compare
from support.megatron import (
    HIDDEN,
    MOE,
    SEQUENCE,
    Layout,
    gpt_model,
    load,
    parallel,
    randomize,
    save,
    shared_directory,
    tiny_config,
)

from cca_megatron import CCAConfig
from cca_megatron.specs import cca_decoder_block_spec, cca_layer_spec

TENSOR = [Layout(tp=2), Layout(tp=2, sp=True)]
GELU = {
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
}


@pytest.mark.parametrize("layout", TENSOR, ids=str)
@pytest.mark.parametrize("settings", [{}, GELU], ids=["swiglu", "gelu with biases"])
def test_dense_model_under_tensor_parallelism(layout, settings):
    compare(layout, Model(settings))


@pytest.mark.parametrize("groups", [2, 1])
def test_a_fresh_model_is_the_same_in_every_layout(groups):
    """With ``use_cpu_initialization``, as without a GPU: every rank keeps its own part of one drawing."""
    with shared_directory() as directory:
        for layout in (Layout(tp=2), Layout()):
            with parallel(layout):
                config = tiny_config(layout, num_query_groups=groups)
                model = gpt_model(config, cca_decoder_block_spec(config))
                if layout != Layout():
                    save([model], f"{directory}/weights")
                    continue
                expected = {n: p.detach().clone() for n, p in model.named_parameters() if "conv" in n}
                load([model], f"{directory}/weights")
    got = dict(model.named_parameters())
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("layout", TENSOR, ids=str)
def test_odd_groups_split_the_delayed_half_inside_a_rank(layout):
    """Six groups over two ranks: the first rank holds current values only, the other delayed ones."""
    heads = {"num_attention_heads": 6, "num_query_groups": 6}
    compare(layout, Model(heads, CCAConfig(conv_kernel_sizes=(3, 2), temperature="exp")))


@pytest.mark.parametrize("layout", TENSOR, ids=str)
def test_more_tensor_parallel_ranks_than_groups(layout):
    """Each rank holds the whole group's convs and finds a part of their gradients."""
    compare(layout, Model({"num_query_groups": 1}, CCAConfig(conv_kernel_sizes=(2, 3))))


# Megatron trains MoE with tensor parallelism only under sequence parallelism.
EXPERT = [Layout(ep=2), Layout(tp=2, sp=True), Layout(tp=2, sp=True, ep=2), Layout(tp=2, sp=True, etp=2)]


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("layout", EXPERT, ids=str)
def test_mixture_of_experts(layout, dispatcher):
    compare(layout, Model(MOE | {"moe_token_dispatcher_type": dispatcher}))


def layer_outputs(layout, weights_path, gradients_path, cca):
    """One TransformerLayer, built as TransformerBlock builds it: output and input gradient, whole."""
    config = tiny_config(layout, num_layers=1)
    layer = build_module(cca_layer_spec(config, cca), config=config, layer_number=1)
    layer = layer.double().cuda()
    generator = torch.Generator().manual_seed(8)
    x, upstream = (
        torch.randn(SEQUENCE, 2, HIDDEN, dtype=torch.float64, generator=generator).cuda() for _ in range(2)
    )
    x.requires_grad_()
    angles = torch.randn(SEQUENCE, 1, 1, 4, dtype=torch.float64, generator=generator).cuda()
    randomize(layer) if layout == Layout() else load([layer], weights_path)
    if layout == Layout():
        save([layer], weights_path)
    mine = scatter_to_sequence_parallel_region(x) if layout.sp else x
    out, _ = layer(mine, None, rotary_pos_emb=angles)
    if layout.sp:
        out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)
    out.backward(upstream)
    for parameter in layer.parameters():
        # What Megatron's finalize_model_grads does for parameters outside of a model.
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad)
        parameter.data = parameter.grad
    if layout != Layout():
        save([layer], gradients_path)
    return layer, out.detach(), x.grad


@pytest.mark.parametrize("layout", TENSOR, ids=str)
def test_one_layer_under_tensor_parallelism(layout):
    cca = CCAConfig(conv_kernel_sizes=(2, 3))
    with shared_directory() as directory:
        paths = f"{directory}/weights", f"{directory}/gradients"
        with parallel(Layout()):
            whole, expected, input_gradient = layer_outputs(Layout(), *paths, cca)
            expected_gradients = {n: p.data.clone() for n, p in whole.named_parameters()}
        with parallel(layout):
            _, out, got_input_gradient = layer_outputs(layout, *paths, cca)
        with parallel(Layout()):
            load([whole], paths[1])
    assert_close("output", expected, out, BOUND)
    assert_close("gradient of the input", input_gradient, got_input_gradient, BOUND)
    for name, parameter in whole.named_parameters():
        assert_close(f"gradient of {name}", expected_gradients[name], parameter.data, BOUND)
