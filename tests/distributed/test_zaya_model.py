"""ZAYA1 in every layout computes what transformers computes on one device: logits and every gradient."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.closeness import assert_close
from support.comparison import reference, run
from support.megatron import Layout, load, parallel, shared_directory

zaya = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")

from cca_megatron.hf import (  # noqa: E402
    config_from_hf,
    export_hf_state_dict,
    load_hf_state_dict,
    zaya_model,
)
from cca_megatron.hf.convert import hf_to_megatron  # noqa: E402
from cca_megatron.inference.generate import Sampling, generate  # noqa: E402
from cca_megatron.training import megatron_fixes  # noqa: E402
from cca_megatron.zaya.layer import ZayaLayer  # noqa: E402
from cca_megatron.zaya.router import ZayaRouter  # noqa: E402

BOUND = 1e-10
TENSOR = [Layout(tp=2, sp=True), Layout(tp=2, sp=True, ep=2)]
TWO = [
    Layout(tp=2, sp=True),
    Layout(ep=2),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(tp=2, sp=True, ep=2),
    Layout(tp=2, sp=True, etp=2),
]
FOUR = [
    Layout(tp=2, sp=True, pp=2),
    Layout(tp=2, sp=True, cp=2),
    Layout(cp=2, ep=2, pp=2),
    Layout(ep=4),
    Layout(pp=4),
    Layout(tp=2, sp=True, ep=2, etp=2),
]
LAYOUTS = [*TWO, *(pytest.param(layout, marks=pytest.mark.ranks(4)) for layout in FOUR)]


@pytest.fixture(autouse=True, scope="module")
def exact_transformers():
    with zaya.without_float32_casts():
        yield


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_transformers(layout):
    zaya.ZayaPair().compare(layout, torch.float64, BOUND)


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(tp=2, sp=True), Layout(pp=2), Layout(ep=2)], ids=str)
def test_equals_transformers_with_packed_documents(layout):
    zaya.ZayaPair(documents=(8, 12, 4)).compare(layout, torch.float64, BOUND)


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2, sp=True)], ids=str)
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"]},
    ],
    ids=["uniform", "block", "selective"],
)
def test_recomputation_hands_the_router_state_on(layout, recompute):
    megatron_fixes.apply()  # Megatron cannot recompute a norm without Transformer Engine
    zaya.ZayaPair(recompute).compare(layout, torch.float64, BOUND)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_tokens_skip_with_every_dispatcher(dispatcher):
    pair = zaya.ZayaPair({"moe_token_dispatcher_type": dispatcher})
    pair.compare(Layout(tp=2, sp=True, ep=2), torch.float64, BOUND)


@pytest.mark.parametrize("layout", [*TENSOR, Layout(ep=2)], ids=str)
def test_the_first_releases_skip_is_counted_once(layout):
    """A skipped token adds its own normalised input, which every tensor-parallel rank has in full."""
    with zaya.skipped_tokens_add_their_input():
        zaya.ZayaPair(skip_output="input").compare(layout, torch.float64, BOUND)


def detached_state(monkeypatch):
    gating = ZayaRouter.gating

    def broken(self, x):
        self.state = None if self.state is None else self.state.detach()
        return gating(self, x)

    monkeypatch.setattr(ZayaRouter, "gating", broken)


def skip_added_by_every_rank(monkeypatch):
    routing = ZayaRouter.routing

    def broken(self, logits, padding_mask=None):
        result = routing(self, logits, padding_mask)
        self.skip_weight = self.skip_weight * self.tp_group.size()
        return result

    monkeypatch.setattr(ZayaRouter, "routing", broken)


def rounded_between_stages(monkeypatch):
    forward = ZayaLayer.forward

    def broken(self, hidden_states, context=None, **kwargs):
        hidden_states, context = forward(self, hidden_states, context, **kwargs)
        if self.ends_stage:
            width = self.config.hidden_size
            hidden_states = torch.cat([hidden_states[..., :width], hidden_states[..., width:].float()], -1)
        return hidden_states, context

    monkeypatch.setattr(ZayaLayer, "forward", broken)


def biases_ignored(monkeypatch):
    routing = ZayaRouter.routing

    def broken(self, logits, padding_mask=None):
        self.balancing_biases.zero_()
        return routing(self, logits, padding_mask)

    monkeypatch.setattr(ZayaRouter, "routing", broken)


@pytest.mark.parametrize(
    ("layout", "mistake"),
    [
        (Layout(tp=2, sp=True), detached_state),
        (Layout(tp=2, sp=True), skip_added_by_every_rank),
        (Layout(ep=2), biases_ignored),
        (Layout(pp=2), rounded_between_stages),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_mistake_is_noticed(monkeypatch, layout, mistake):
    mistake(monkeypatch)
    with zaya.skipped_tokens_add_their_input(), pytest.raises(AssertionError, match="relative error"):
        zaya.ZayaPair(skip_output="input").compare(layout, torch.float64, BOUND)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, etp=2),
        pytest.param(Layout(tp=2), marks=pytest.mark.long),
        pytest.param(Layout(tp=2, ep=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_generation_under_tensor_parallelism(layout):
    """Greedy tokens are those of one process of transformers, which this one is too."""
    model = zaya.random_zaya(torch.float32).eval()
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1, 96, (length,), generator=generator).tolist() for length in (9, 4)]
    expected = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    with parallel(layout):
        (ours,) = zaya.ZayaPair().build(layout, torch.float32)
        load_hf_state_dict(ours, model.state_dict())
        new, _ = generate(ours.eval(), prompts, 64, chunk_size=5)
    assert new == expected


def test_any_layout_loads_a_converted_checkpoint():
    """What ``convert`` writes is what ``load_hf_state_dict`` puts into the model."""
    theirs = zaya.random_zaya(torch.float32)
    with shared_directory() as directory:
        if dist.get_rank() == 0:
            theirs.save_pretrained(f"{directory}/hf")
            hf_to_megatron(Path(directory, "hf"), Path(directory, "megatron"), lambda *_: None)
        dist.barrier()
        for layout in [Layout(tp=2, sp=True), Layout(ep=2), Layout(pp=2), Layout(pp=2, vpp=2)]:
            with parallel(layout):
                chunks = zaya.ZayaPair().build(layout, torch.float32)
                load(chunks, f"{directory}/megatron/release")
                back = export_hf_state_dict(chunks)
            for name, tensor in back.items():
                assert torch.equal(tensor, theirs.state_dict()[name]), (str(layout), name)
        dist.barrier()


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=2, vpp=2)], ids=str)
def test_stages_before_the_first_router(layout):
    """Dense layers hand on what they get; before the first expert layer that is nothing."""
    model = zaya.ZayaPair({"moe_layer_freq": [0, 0, 1, 1], "ffn_hidden_size": 40})
    weights, expected = reference(model)
    got = run(model, layout, torch.float64, f"{weights}/weights")
    assert_close("logits", expected.logits, got.logits, BOUND)
    for name, gradient in expected.gradients.items():
        assert_close(f"gradient of {name}", gradient, got.gradients[name], BOUND)
    scale = expected.gradients["decoder.layers.3.mlp.router.router_states_scale"]
    assert scale.any(), "the second router does not see the first"


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_a_padded_vocabulary_comes_back_without_padding(layout):
    theirs = zaya.random_zaya(torch.float32, vocab_size=97)
    settings, cca = config_from_hf(theirs.config)
    with parallel(layout):
        local = {"transformer_impl": "local", "use_cpu_initialization": True, "params_dtype": torch.float32}
        local |= {"gradient_accumulation_fusion": False, "pipeline_dtype": torch.float32}
        model = zaya_model(settings, cca, **layout.settings(), **local)
        load_hf_state_dict(model, theirs.state_dict())
        back = export_hf_state_dict(model)
    assert back["model.embed_tokens.weight"].shape[0] == 97
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_rows_that_pad_the_vocabulary_are_never_drawn():
    theirs = zaya.random_zaya(torch.float32, vocab_size=97)
    settings, cca = config_from_hf(theirs.config)
    layout = Layout(tp=2, etp=2)
    with parallel(layout):
        local = {"transformer_impl": "local", "use_cpu_initialization": True, "params_dtype": torch.float32}
        local |= {"gradient_accumulation_fusion": False}
        model = zaya_model(settings, cca, **layout.settings(), **local)
        load_hf_state_dict(model, theirs.state_dict())
        assert model.vocab_size == 98
        tokens, _ = generate(model.eval(), [[5]] * 8, 100, sampling=Sampling(temperature=100.0))
    assert max(map(max, tokens)) == 96  # of 800 nearly even draws
