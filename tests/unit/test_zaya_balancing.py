"""The balancing biases: their update, what is counted, and that they stay in fp32."""

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support.closeness import assert_close
from support.megatron import Layout, gpt_model, microbatches, parallel, tiny_config

from cca_megatron.zaya.balancing import finalize_and_balance, routers_of, update_biases
from cca_megatron.zaya.settings import ZayaSettings
from cca_megatron.zaya.specs import zaya_decoder_block_spec

EXPERTS = 4
MOE = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}


@pytest.fixture(autouse=True)
def one_rank():
    with parallel(Layout()), microbatches():
        yield


def build(zaya=None, **settings):
    config = tiny_config(**(MOE | {"params_dtype": torch.float32} | settings))
    zaya = zaya or ZayaSettings(router_hidden_size=12)
    model = gpt_model(config, zaya_decoder_block_spec(config, zaya=zaya))
    return model.train()


def run(model, samples=2):
    tokens = torch.randint(0, 96, (samples, 16))
    return model(tokens, torch.arange(16).expand(samples, -1), None)


def test_the_update_is_adamw_on_the_share_of_the_tokens():
    model = build(ZayaSettings(router_hidden_size=12, balancing_rate=0.01))
    router = routers_of([model])[0]
    biases = torch.nn.Parameter(torch.zeros(EXPERTS))
    optimizer = torch.optim.AdamW([biases], lr=0.01, weight_decay=0)
    for counts in ([10, 0, 30, 20, 4], [1, 2, 3, 4, 0], [0, 0, 0, 64, 64]):
        router.class_counts.copy_(torch.tensor(counts))
        update_biases([router])
        shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        biases.grad = (shares[:EXPERTS] - shares[:EXPERTS].mean()).float()
        optimizer.step()
        assert_close("biases", biases.data, router.balancing_biases[:EXPERTS], 1e-6)
        assert_close("shares", shares.float(), router.class_share, 1e-6)
        assert router.balancing_biases[-1] == -1, "the class that skips keeps its bias"
        assert not router.class_counts.any()


def test_an_expert_with_too_many_tokens_becomes_less_likely():
    router = routers_of([build()])[0]
    router.class_counts.copy_(torch.tensor([9, 1, 1, 1, 0]))
    update_biases([router])
    assert router.balancing_biases[0] < 0 < router.balancing_biases[1]


def test_the_schedule_updates_the_biases_of_the_model_it_trains():
    model = build()
    assert model.config.finalize_model_grads_func is finalize_and_balance


def test_a_rate_of_zero_leaves_them(monkeypatch):
    model = build(ZayaSettings(router_hidden_size=12, balancing_rate=0.0))
    run(model)
    before = [router.balancing_biases.clone() for router in routers_of([model])]
    update_biases(routers_of([model]))
    for old, router in zip(before, routers_of([model]), strict=True):
        assert torch.equal(old, router.balancing_biases)
        assert router.class_share.sum() == 1


@pytest.mark.parametrize(
    "recompute",
    [{}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}],
    ids=["kept", "recomputed"],
)
def test_every_token_is_counted_once(recompute):
    model = build(**recompute)
    run(model).sum().backward()
    for router in routers_of([model]):
        assert router.class_counts.sum() == 32


def test_evaluation_is_not_counted():
    model = build().eval()
    run(model)
    with torch.no_grad():
        run(model.train())
    for router in routers_of([model]):
        assert not router.class_counts.any()


def test_biases_stay_fp32_in_a_model_of_bf16():
    model = build(bf16=True, params_dtype=torch.bfloat16)
    router = routers_of([model])[0]
    router.balancing_biases.fill_(1 / 3)
    wrapped = Float16Module(model.config, model)
    assert router.down_proj.weight.dtype == torch.bfloat16
    for name in ("biases", "exp_avg", "exp_avg_sq", "step"):
        assert getattr(router, f"balancing_{name}").dtype == torch.float32, name
    assert router.balancing_biases[0] == torch.tensor(1 / 3)
    assert routers_of([wrapped]) == routers_of([model])


def test_an_auxiliary_loss_balances_instead(monkeypatch):
    """Megatron's own, over the experts alone: it gives the router a gradient where the output gives none."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)  # a global that a run leaves
    settings = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    model = build(**settings)
    (run(model) * 0).sum().backward()
    *_, last = routers_of([model])  # the loss of a later router reaches those before it
    assert last.out_proj.weight.grad[:EXPERTS].any()
    assert not last.out_proj.weight.grad[EXPERTS:].any()
    plain = build()
    (run(plain) * 0).sum().backward()
    assert not any(router.out_proj.weight.grad.any() for router in routers_of([plain]))


PARTS = {
    "residual_scaling": ZayaSettings(router_hidden_size=12, residual_scaling=False),
    "linear router": ZayaSettings(router="linear"),
    "depth_averaging": ZayaSettings(router_hidden_size=12, depth_averaging=False),
    "skip_class": ZayaSettings(router_hidden_size=12, skip_class=False),
}


@pytest.mark.parametrize("off", PARTS)
def test_every_part_can_be_off(off):
    model = build(PARTS[off])
    names = {name for name, _ in model.named_parameters()}
    run(model).sum().backward()
    routers = routers_of([model])
    assert any("_bda." in name for name in names) == (off != "residual_scaling")
    assert ("decoder.layers.0.input_scale" in names) == (off != "residual_scaling")
    assert bool(routers) == (off != "linear router")
    assert any("router_states_scale" in n for n in names) == (off not in ("linear router", "depth_averaging"))
    for router in routers:
        assert router.out_proj.weight.shape[0] == EXPERTS + (off != "skip_class")


@pytest.mark.parametrize(
    ("settings", "zaya", "message"),
    [
        ({"num_moe_experts": None, "moe_ffn_hidden_size": None}, {}, "num_moe_experts=None"),
        ({}, {"router": "tree"}, "router='tree': must be 'mlp' or 'linear'"),
        ({}, {"skip_output": "half"}, "skip_output='half'"),
        ({}, {"router_hidden_size": 0}, "router_hidden_size=0"),
        ({}, {"balancing_rate": -1.0}, "balancing_rate=-1.0"),
        ({}, {"skip_class": 1}, "skip_class=1: must be true or false"),
        (
            {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
            {},
            "expert_bias=True",
        ),
        ({"moe_expert_capacity_factor": 1.0}, {}, "moe_expert_capacity_factor=1.0"),
        ({"fused_residual_rmsnorm": True}, {}, "fused_residual_rmsnorm=True"),
        ({"mlp_chunks_for_training": 2}, {}, "mlp_chunks_for_training=2 with depth_averaging"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else str(x)[:30],
)
def test_settings_that_do_not_fit_are_named(settings, zaya, message):
    with pytest.raises(ValueError, match=message):
        build(ZayaSettings(**({"router_hidden_size": 12} | zaya)), **settings)


def test_the_state_must_come_from_the_block():
    layer = build().decoder.layers[1]
    with pytest.raises(RuntimeError, match="router state of the layer before is missing"):
        layer(hidden_states=torch.randn(16, 1, 32), attention_mask=None)
