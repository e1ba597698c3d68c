"""Any layout computes what one rank computes: logits and every gradient, in fp64."""

import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import build_module
from support.closeness import assert_close
from support.megatron import (
    HIDDEN,
    MOE,
    SEQUENCE,
    VOCAB,
    Layout,
    batch_of_tokens,
    gpt_model,
    gradients_as_weights,
    load,
    logits_and_gradients,
    parallel,
    randomize,
    save,
    shared_directory,
    tiny_config,
)

from cca_megatron import CCAConfig
from cca_megatron.parallel.layout import ContextLayout
from cca_megatron.specs import cca_decoder_block_spec, cca_layer_spec

BOUND = 1e-10


def compare_models(
    layout: Layout, settings: dict, cca: CCAConfig | None = None, documents: list[int] | None = None
):
    """A whole GPT model in this layout against the same model in the layout of one rank.

    With ``documents``, one packed sample of these lengths, else four plain samples.
    """
    tokens = batch_of_tokens(4)
    ends = np.cumsum([0, *(documents or [])])
    zigzag = (cca or CCAConfig()).packed_zigzag

    def batch(layout):
        """Arguments of the forward pass; under context parallelism also how the tokens are cut."""
        if documents is None:
            return {}
        longest = max(documents)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=torch.tensor(ends, dtype=torch.int32),
            cu_seqlens_kv=torch.tensor(ends, dtype=torch.int32),
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        cut = ContextLayout.zigzag if zigzag == "stream" else ContextLayout.zigzag_documents
        return {"packed_seq_params": packed, "layout": cut(tokens.shape[1] - 1, layout.cp, ends)}

    if documents is not None:
        generator = torch.Generator().manual_seed(4)
        tokens = torch.randint(0, VOCAB, (1, int(ends[-1]) + 1), generator=generator).cuda()

    def build(layout):
        config = tiny_config(layout, **settings)
        return config, gpt_model(config, cca_decoder_block_spec(config, cca=cca))

    with shared_directory() as directory:
        with parallel(Layout()):
            config, model = build(Layout())
            randomize(model)
            save(model, f"{directory}/weights")
            expected, ddp = logits_and_gradients(config, model, tokens, **batch(Layout()))
            gradients = {n: p.main_grad.clone() for n, p in model.named_parameters()}
        with parallel(layout):
            config, model = build(layout)
            load(model, f"{directory}/weights")
            logits, ddp = logits_and_gradients(config, model, tokens, **batch(layout))
            with gradients_as_weights(ddp):
                save(model, f"{directory}/gradients")
        with parallel(Layout()):
            _, model = build(Layout())
            load(model, f"{directory}/gradients")
    assert_close("logits", expected[: len(logits)], logits[: len(expected)], BOUND)
    for name, parameter in model.named_parameters():
        assert gradients[name].any(), f"gradient of {name} is zero: nothing is compared"
        assert_close(f"gradient of {name}", gradients[name], parameter.data, BOUND)


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
    compare_models(layout, settings)


@pytest.mark.parametrize("groups", [2, 1])
def test_a_fresh_model_is_the_same_in_every_layout(groups):
    """With ``use_cpu_initialization``, as without a GPU: every rank keeps its own part of one drawing."""
    with shared_directory() as directory:
        for layout in (Layout(tp=2), Layout()):
            with parallel(layout):
                config = tiny_config(layout, num_query_groups=groups)
                model = gpt_model(config, cca_decoder_block_spec(config))
                if layout != Layout():
                    save(model, f"{directory}/weights")
                    continue
                expected = {n: p.detach().clone() for n, p in model.named_parameters() if "conv" in n}
                load(model, f"{directory}/weights")
    got = dict(model.named_parameters())
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("layout", TENSOR, ids=str)
def test_odd_groups_split_the_delayed_half_inside_a_rank(layout):
    """Six groups over two ranks: the first rank holds current values only, the other delayed ones."""
    heads = {"num_attention_heads": 6, "num_query_groups": 6}
    compare_models(layout, heads, cca=CCAConfig(conv_kernel_sizes=(3, 2), temperature="exp"))


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize(
    ("zigzag", "documents"),
    [("document", None), ("document", [4, 8, 12]), ("stream", [1, 2, 3, 7, 11])],
    ids=["batch", "documents", "stream"],
)
def test_context_parallelism(comm_type, zigzag, documents):
    cca = CCAConfig(conv_kernel_sizes=(3, 2), packed_zigzag=zigzag)
    compare_models(Layout(cp=2), {"cp_comm_type": comm_type}, cca, documents)


@pytest.mark.parametrize("layout", TENSOR, ids=str)
def test_more_tensor_parallel_ranks_than_groups(layout):
    compare_models(layout, {"num_query_groups": 1}, CCAConfig(conv_kernel_sizes=(2, 3)))


FOUR = [
    (Layout(cp=4), {"cp_comm_type": "p2p"}),
    (Layout(cp=4), {"cp_comm_type": "a2a"}),  # more ranks than KV heads
    (Layout(tp=2, cp=2), {}),
    (Layout(tp=2, sp=True, cp=2), {"cp_comm_type": "all_gather"}),
    (Layout(tp=4), {}),  # more ranks than KV heads
    (Layout(tp=4, sp=True), {"num_query_groups": 1}),
    (Layout(tp=2, cp=2), {"num_query_groups": 1, "cp_comm_type": "a2a"}),
    (Layout(cp=2, ep=2), MOE),
]


@pytest.mark.skipif(int(os.environ.get("WORLD_SIZE", "1")) < 4, reason="needs 4 processes")
@pytest.mark.parametrize("documents", [None, [1, 2, 3, 0, 7, 11]], ids=["batch", "stream"])
@pytest.mark.parametrize(("layout", "settings"), FOUR, ids=str)
def test_axes_together(layout, settings, documents):
    # Four samples of 16 tokens: two zigzag chunks for each of four ranks.
    compare_models(layout, settings, CCAConfig(packed_zigzag="stream"), documents)


def test_a_missing_halo_is_noticed(monkeypatch):
    from cca_megatron.parallel.halo import HaloExchange

    right = HaloExchange.boundary
    monkeypatch.setattr(
        HaloExchange, "boundary", lambda self: type(b := right(self))(b.latents * 0, b.value * 0)
    )
    with pytest.raises(AssertionError, match="relative error"):
        compare_models(Layout(cp=2), {})


def test_a_gradient_that_is_not_sent_back_is_noticed(monkeypatch):
    from cca_megatron.parallel.halo import HaloExchange

    right = HaloExchange.boundary
    monkeypatch.setattr(
        HaloExchange,
        "boundary",
        lambda self: type(b := right(self))(
            b.latents - (b.latents * 0.5 - b.latents.detach() * 0.5), b.value
        ),
    )
    with pytest.raises(AssertionError, match=r"gradient of .*relative error"):
        compare_models(Layout(cp=2), {})


def test_a_group_gradient_that_is_not_summed_is_noticed(monkeypatch):
    from cca_megatron import attention

    monkeypatch.setattr(attention, "gradients_summed", lambda weights, share: weights)
    with pytest.raises(AssertionError, match=r"gradient of .*conv.*relative error"):
        compare_models(Layout(tp=2), {"num_query_groups": 1})


# Megatron trains MoE with tensor parallelism only under sequence parallelism.
EXPERT = [Layout(ep=2), Layout(tp=2, sp=True), Layout(tp=2, sp=True, ep=2), Layout(tp=2, sp=True, etp=2)]


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("layout", EXPERT, ids=str)
def test_mixture_of_experts(layout, dispatcher):
    if layout.etp > 1 and dispatcher == "alltoall" and dist.get_backend() == "gloo":
        pytest.skip("gloo has no all-gather of uneven parts")
    compare_models(layout, MOE | {"moe_token_dispatcher_type": dispatcher})


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
    randomize(layer) if layout == Layout() else load(layer, weights_path)
    if layout == Layout():
        save(layer, weights_path)
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
        save(layer, gradients_path)
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
            load(whole, paths[1])
    assert_close("output", expected, out, BOUND)
    assert_close("gradient of the input", input_gradient, got_input_gradient, BOUND)
    for name, parameter in whole.named_parameters():
        assert_close(f"gradient of {name}", expected_gradients[name], parameter.data, BOUND)


def test_a_rank_that_halves_its_own_values_is_noticed(monkeypatch):
    """The mistake of building the module from local head counts: another model."""
    from cca_megatron import attention

    right = attention.CCASelfAttention._build_mix

    def halve_own(self):
        right(self)
        half = self.num_query_groups_per_partition * self.hidden_size_per_attention_head // 2
        self._mix_options = dataclasses.replace(self._mix_options, value_delay_from=half)

    monkeypatch.setattr(attention.CCASelfAttention, "_build_mix", halve_own)
    with pytest.raises(AssertionError, match="relative error"):
        compare_models(Layout(tp=2), {})


def test_a_forgotten_sequence_parallel_mark_is_noticed(monkeypatch):
    """Without the mark each rank keeps the norm's gradient of its own tokens."""
    from cca_megatron import local_backend

    right = local_backend.LocalNorm.__init__

    def unmarked(self, *args, **kwargs):
        right(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.sequence_parallel = False

    monkeypatch.setattr(local_backend.LocalNorm, "__init__", unmarked)
    with pytest.raises(AssertionError, match=r"gradient of .*norm.*relative error"):
        compare_models(Layout(tp=2, sp=True), {})
