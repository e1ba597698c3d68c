"""Every way into a Megatron model gives CCA in every attention layer, says so, and never falls back."""

import functools
import logging
import re
import subprocess
import sys

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module, import_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from support.megatron import (
    HIDDEN,
    MOE,
    SEQUENCE,
    VOCAB,
    Layout,
    batch_of_tokens,
    gpt_model,
    microbatches,
    parallel,
    tiny_config,
)

from cca_megatron import CCAConfig, CCASelfAttention, specs
from cca_megatron.local_backend import LocalNorm
from cca_megatron.parallel.core_attention import LocalCoreAttention


@pytest.fixture(autouse=True)
def one_rank():
    with parallel(Layout()), microbatches():
        yield


def is_moe(layer):
    return isinstance(layer.mlp, MoELayer)


def assert_all_cca(model, layers):
    attentions = [m for m in model.modules() if isinstance(m, SelfAttention)]
    assert len(attentions) == layers
    assert all(isinstance(a, CCASelfAttention) for a in attentions)
    assert all(isinstance(a.core_attention, LocalCoreAttention) for a in attentions)
    return attentions


def train_a_step(model, **inputs):
    """One forward, backward and update: the loss falls and every parameter takes part."""
    tokens = batch_of_tokens(2)
    positions = torch.arange(SEQUENCE).cuda().expand(2, -1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        labels = tokens[:, 1:].contiguous()
        loss = model(tokens[:, :-1].contiguous(), positions, None, labels=labels, **inputs).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def stock_model(config, spec):
    """A model built as Megatron's own training script builds it from ``--spec``."""
    model_config = GPTModelConfig(
        transformer=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(model_config).build_model(groups).cuda()


@pytest.mark.parametrize("name", ["cca_decoder_block_spec", "cca_layer_spec", "cca_layer_spec_local"])
@pytest.mark.parametrize("moe", [False, True])
def test_the_stock_flow_trains_cca(name, moe, caplog):
    """``--spec cca_megatron.specs NAME`` in Megatron's own training script."""
    settings = {**MOE, "moe_router_topk": 4} if moe else {}
    if moe and name == "cca_layer_spec":
        settings["moe_layer_freq"] = 1  # it is one layer for the whole model
    config = tiny_config(params_dtype=torch.float32, **settings)
    with caplog.at_level(logging.WARNING):
        model = stock_model(config, import_module(("cca_megatron.specs", name)))
    assert_all_cca(model, layers=2)
    first_is_moe = moe and name == "cca_layer_spec"
    assert [is_moe(layer) for layer in model.decoder.layers] == [first_is_moe, moe]
    if name == "cca_layer_spec_local":
        assert isinstance(model.decoder.final_layernorm, torch.nn.RMSNorm)
    assert "CCA attention: 2 layers" in caplog.text
    train_a_step(model)


def test_one_layer_for_a_model_of_two_kinds_is_refused():
    with pytest.raises(ValueError, match=r"moe_layer_freq=\[0, 1\]: .*cca_decoder_block_spec works"):
        specs.cca_layer_spec(tiny_config(**MOE))


def test_a_default_transformer_config_works():
    """Nothing set but the sizes: LayerNorm, biases, GELU, no groups."""
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, transformer_impl="local"
    )
    model = stock_model(config, specs.cca_decoder_block_spec)
    assert_all_cca(model, layers=1)
    train_a_step(model)


def test_settings_are_bound_with_partial():
    cca = CCAConfig(temperature="exp", conv_kernel_sizes=(3, 1))
    bound = functools.partial(specs.cca_decoder_block_spec, cca=cca)
    for attention in assert_all_cca(stock_model(tiny_config(), bound), layers=2):
        assert attention.cca == cca
        assert attention.conv0_weight.shape[-1] == 3


@pytest.mark.parametrize(
    ("freq", "kinds"), [(1, "MMMM"), (2, "MDMD"), ([0, 1, 1, 0], "DMMD"), ([0, 0, 0, 0], "DDDD")]
)
def test_moe_layer_freq_mixes_dense_and_moe(freq, kinds):
    config = tiny_config(**(MOE | {"moe_layer_freq": freq, "num_layers": 4}))
    model = gpt_model(config, specs.cca_decoder_block_spec(config))
    assert_all_cca(model, layers=4)
    assert "".join("DM"[is_moe(layer)] for layer in model.decoder.layers) == kinds


@pytest.mark.parametrize("stages", [1, 2])
def test_pipeline_stages_slice_the_layers(stages):
    """PP=2, with and without two virtual stages: each gets its own layers, in order."""
    pattern = [0, 1, 1, 0, 0, 0, 1, 1]
    config = tiny_config(
        **(MOE | {"moe_layer_freq": pattern, "num_layers": 8}),
    )
    config.pipeline_model_parallel_size = 2
    if stages > 1:
        config.virtual_pipeline_model_parallel_size = stages
    seen = []
    for stage in range(stages):
        for rank in range(2):
            block = specs.cca_decoder_block_spec(config, vp_stage=stage if stages > 1 else None, pp_rank=rank)
            seen += [getattr(s.submodules.mlp, "func", None) is MoELayer for s in block.layer_specs]
    assert seen == [bool(kind) for kind in pattern]


def test_multi_token_prediction_keeps_cca():
    config = tiny_config(mtp_num_layers=1, params_dtype=torch.float32)
    model = gpt_model(
        config,
        specs.cca_decoder_block_spec(config),
        mtp_block_spec=specs.cca_mtp_block_spec(config, cca=CCAConfig(temperature="exp")),
    )
    attentions = assert_all_cca(model, layers=3)
    assert [a.cca.temperature for a in attentions] == ["linear", "linear", "exp"]
    train_a_step(model)
    assert specs.cca_mtp_block_spec(tiny_config()) is None


def hybrid_model(pattern, spec=specs.hybrid_cca_stack_spec_local, **settings):
    config = tiny_config(
        **(MOE | {"num_layers": 4, "moe_layer_freq": 1, "moe_router_topk": 4}),
        params_dtype=torch.float32,
        is_hybrid_model=True,
        **settings,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return HybridModel(
        config,
        spec,
        VOCAB,
        SEQUENCE,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        pg_collection=groups,
    ).cuda()


def test_the_hybrid_stack_trains_cca(caplog):
    """Attention, MLP and MoE layers in a pattern, without Transformer Engine."""
    with caplog.at_level(logging.WARNING):
        model = hybrid_model("*-*E")
    assert "CCA attention: 2 layers" in caplog.text
    assert_all_cca(model, layers=2)
    assert isinstance(model.decoder.final_norm, LocalNorm)
    train_a_step(model)


def test_multi_token_prediction_of_a_hybrid_model_keeps_cca():
    model = hybrid_model("*-*E/*-", mtp_num_layers=1)
    assert_all_cca(model, layers=3)
    train_a_step(model)


@pytest.mark.parametrize("kind", "MGD+")
def test_hybrid_layers_that_the_local_backend_lacks_are_refused(kind):
    """Megatron would build an identity in their place."""
    message = f"hybrid_layer_pattern with '{re.escape(kind)}': .*hybrid_cca_stack_spec"
    with pytest.raises(ValueError, match=message):
        hybrid_model(f"-{kind}E-")


def test_a_layer_takes_everything_that_megatron_may_pass():
    config = tiny_config()
    spec = specs.cca_layer_spec(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = TransformerLayer(
        config, spec.submodules, pg_collection=groups, pp_layer_offset=0, name="decoder.layers.0"
    )
    assert isinstance(layer.self_attention, CCASelfAttention)
    attention = specs.CCASelfAttention(
        config,
        spec.submodules.self_attention.submodules,
        layer_number=1,
        cp_comm_type="p2p",
        pg_collection=groups,
    )
    assert attention.linear_qkv is not None


def test_checkpoints_name_norms_as_transformer_engine_does():
    """What the local backend saves, a Transformer Engine model finds under its own names."""
    config = tiny_config(**MOE)
    model = gpt_model(config, specs.cca_decoder_block_spec(config))
    keys = {t.key for t in model.sharded_state_dict().values()}
    for key in (
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.0.self_attention.conv0_weight",
        "decoder.layers.1.self_attention.temperature",
    ):
        assert key in keys


@pytest.mark.skipif(specs.HAVE_TE, reason="Transformer Engine is installed")
class TestWithoutTransformerEngine:
    """Names for it exist, and using one says what to install."""

    def test_a_configuration_that_wants_it(self):
        config = tiny_config(transformer_impl="transformer_engine")
        with pytest.raises(RuntimeError, match=r"pip install 'transformer-engine.*--transformer-impl local"):
            specs.cca_decoder_block_spec(config)

    def test_the_ready_layer(self):
        with pytest.raises(RuntimeError, match=r"pip install 'transformer-engine.*cca_layer_spec_local"):
            gpt_model(tiny_config(), specs.cca_layer_spec_te)

    def test_the_hybrid_stack(self):
        message = r"pip install 'transformer-engine.*hybrid_cca_stack_spec_local"
        with pytest.raises(RuntimeError, match=message):
            hybrid_model("*-", specs.hybrid_cca_stack_spec)


@pytest.mark.parametrize("missing", ["cca_kernels", "megatron.core.ssm.mlp_layer"])
def test_a_missing_dependency_never_becomes_ordinary_attention(missing):
    """Megatron swallows an ImportError of a --spec module and goes on without it."""
    program = f"""
import sys
sys.modules[{missing!r}] = None
from megatron.core.transformer.spec_utils import import_module
try:
    print("imported", import_module(("cca_megatron.specs", "cca_decoder_block_spec")))
except RuntimeError as error:
    print("refused:", error)
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert out.stdout.startswith("refused: cca_megatron.specs cannot be used"), out.stdout + out.stderr


def test_settings_that_do_not_fit_are_refused_when_the_spec_is_built():
    with pytest.raises(ValueError, match="attention_dropout=0.1 with context_parallel_size=2"):
        specs.cca_decoder_block_spec(tiny_config(context_parallel_size=2, attention_dropout=0.1))
    other = tiny_config()
    other.transformer_impl = "inference_optimized"
    with pytest.raises(ValueError, match="transformer_impl='inference_optimized'"):
        specs.cca_decoder_block_spec(other)
    with pytest.raises(ValueError, match="conv_kernel_sizes"):
        specs.cca_layer_spec(tiny_config(), CCAConfig(conv_kernel_sizes=(0, 2)))


def test_our_builder_gives_multi_token_prediction_cca():
    from cca_megatron.training.model import CCAModelBuilder, CCAModelConfig

    with parallel(Layout()):
        config = tiny_config(mtp_num_layers=1)
        settings = CCAModelConfig(transformer=config, vocab_size=VOCAB, seq_length=SEQUENCE)
        settings.transformer_layer_spec = specs.cca_decoder_block_spec
        settings.position_embedding_type = "rope"
        model = CCAModelBuilder(settings).build_model(ProcessGroupCollection.use_mpu_process_groups())
    attentions = [m for m in model.modules() if isinstance(m, SelfAttention)]
    assert len(attentions) == 3
    assert all(isinstance(m, CCASelfAttention) for m in attentions)


def test_the_stock_builder_is_warned_about_multi_token_prediction(caplog):
    with parallel(Layout()):
        specs.cca_decoder_block_spec(tiny_config(mtp_num_layers=1))
    assert "those layers have ordinary attention" in caplog.text


def test_a_ready_object_survives_the_choice_of_a_core_attention(monkeypatch):
    """Megatron's ``--attention-backend local`` writes into the spec."""
    spec = specs.cca_layer_spec_local
    monkeypatch.setattr(spec.submodules.self_attention.submodules, "core_attention", object)
    with parallel(Layout()):
        layer = build_module(spec, config=tiny_config(), layer_number=1)
    assert isinstance(layer.self_attention.core_attention, LocalCoreAttention)
