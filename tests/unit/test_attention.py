"""CCASelfAttention in one process: wiring, documents, recomputation, checkpoints, clipping."""

import dataclasses
import math
from unittest.mock import Mock

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from support.closeness import assert_close
from support.megatron import HIDDEN, Layout, parallel, randomize, tiny_config
from support.naive_cca import naive_mix

from cca_kernels import MixOptions, MixWeights
from cca_megatron import CCAConfig
from cca_megatron import attention as attention_module
from cca_megatron.doctor import missing_build_tools
from cca_megatron.specs import cca_layer_spec

TOKENS = 9
ANGLES = torch.randn(TOKENS, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ANGLES = ANGLES.repeat(1, 1, 1, 2)


@pytest.fixture(autouse=True)
def one_rank():
    with parallel(Layout()):
        yield


def attention(cca: CCAConfig | None = None, **settings):
    """One CCA self-attention module in fp64 with random parameters."""
    config = tiny_config(**settings)
    spec = cca_layer_spec(config, cca).submodules.self_attention
    module = build_module(spec, config=config, layer_number=1).to(config.params_dtype).cuda()
    randomize(module)
    return module


def hidden_states(batch=2, tokens=TOKENS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, batch, HIDDEN, dtype=torch.float64, generator=generator)
    return x.cuda().requires_grad_()


def packed(*ends: int) -> PackedSeqParams:
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32).cuda()
    longest = max(b - a for a, b in zip((0, *ends[:-1]), ends, strict=True))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def run(module, x, **inputs):
    """Output, and gradients of the input and of every parameter."""
    out, _ = module(x, None, rotary_pos_emb=ANGLES.cuda(), **inputs)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(4))
    module.zero_grad()
    x.grad = None
    out.backward(weights.cuda())
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    return out.detach(), gradients | {"input": x.grad.clone()}


def recorded_qkv(module, x, **inputs):
    """What the module hands to core attention."""
    seen = []

    class Recorder(torch.nn.Module):
        current_max_attn_logits = None

        def forward(self, query, key, value, *args, **kwargs):
            seen.extend([query, key, value])
            return query.flatten(-2)

    module.core_attention = Recorder()
    module(x, None, rotary_pos_emb=ANGLES.cuda(), **inputs)
    return seen


SWITCHES = {
    "default": {},
    "three and two taps": {"conv_kernel_sizes": (3, 2)},
    "no depthwise conv": {"conv0": False},
    "no conv within heads": {"conv1": False},
    "no convs": {"conv0": False, "conv1": False},
    "no conv bias": {"conv_bias": False},
    "no query-key mean": {"qk_mean": False},
    "no value shift": {"value_shift": False},
    "exponential temperature": {"temperature": "exp"},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_changes_what_it_says(name):
    """q, k and v equal the step-by-step definition with that part, and that part only, changed."""
    cca = CCAConfig(**SWITCHES[name])
    module, x = attention(cca), hidden_states()
    present = {n for n, _ in module.named_parameters(recurse=False)}
    convs = [f"conv{i}_{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    expected = {c for c in convs if getattr(cca, c[:5]) and (cca.conv_bias or "bias" not in c)}
    assert present == expected | {"temperature"}

    mixed = module.linear_qkv(x)[0].view(TOKENS, 2, 2, 4, 8)
    weights = MixWeights(*(getattr(module, c) for c in convs), module.temperature)
    options = MixOptions(
        qk_mean=cca.qk_mean,
        value_delay_from=8 if cca.value_shift else None,
        temperature_form=cca.temperature,
    )
    rotary = (ANGLES.cos().cuda(), ANGLES.sin().cuda())
    expected_qkv = naive_mix(mixed, weights, options, rotary=rotary)
    for tensor, a, b in zip("qkv", expected_qkv, recorded_qkv(module, x), strict=True):
        assert_close(tensor, a, b, 1e-12)


def test_every_switch_matters():
    """No two variants of the ladder give the same output on the same weights and input."""
    x, outputs = hidden_states(), []
    for changes in SWITCHES.values():
        out, _ = attention(CCAConfig(**changes))(x, None, rotary_pos_emb=ANGLES.cuda())
        assert not any(torch.allclose(out, other) for other in outputs)
        outputs.append(out)


@pytest.mark.parametrize(("form", "initial"), [("linear", 1.0), ("exp", 0.0)])
def test_initial_values(form, initial):
    config = tiny_config()
    spec = cca_layer_spec(config, CCAConfig(temperature=form)).submodules.self_attention
    module = build_module(spec, config=config, layer_number=1)
    assert (module.temperature == initial).all()
    assert not module.conv0_bias.any()
    assert not module.conv1_bias.any()
    assert 0.3 < module.conv0_weight.abs().max() <= 2**-0.5
    assert 0.2 < module.conv1_weight.abs().max() <= 16**-0.5
    for parameter in module.parameters(recurse=False):
        assert parameter.tensor_model_parallel
        assert (parameter.partition_dim, parameter.partition_stride) == (0, 1)
    assert module.conv0_weight.dim() == module.conv1_weight.dim() == 3  # Muon takes 2-D ones


def test_initialization_can_be_left_out():
    """As for a model that a checkpoint is about to fill: nothing is drawn."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    config = tiny_config(perform_initialization=False)
    spec = cca_layer_spec(config).submodules.self_attention
    build_module(spec, config=config, layer_number=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_past_does_not_see_the_future():
    module, x = attention(), hidden_states()
    out, _ = module(x, None, rotary_pos_emb=ANGLES.cuda())
    changed = x.detach().clone()
    changed[5:] += 1
    out2, _ = module(changed, None, rotary_pos_emb=ANGLES.cuda())
    assert torch.equal(out[:5], out2[:5])
    assert (out[5:] - out2[5:]).abs().amin(-1).min() > 0


@pytest.mark.parametrize("ends", [(9,), (1, 3, 9), (2, 2, 5, 9), (4, 7)])
def test_packed_documents_equal_documents_alone(ends):
    """Outputs and gradients; after the last document comes padding."""
    module, x = attention(), hidden_states(batch=1)
    together, gradients = run(module, x, packed_seq_params=packed(*ends))

    alone = torch.zeros_like(together)
    sums = {name: torch.zeros_like(g) for name, g in gradients.items()}
    weights = torch.randn(together.shape, dtype=together.dtype, generator=torch.Generator().manual_seed(4))
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        if start == end:
            continue
        piece = x[start:end].detach().requires_grad_()
        module.zero_grad()
        out, _ = module(piece, None, rotary_pos_emb=ANGLES[: end - start].cuda())
        out.backward(weights[start:end].cuda())
        alone[start:end] = out.detach()
        sums["input"][start:end] = piece.grad
        for name, parameter in module.named_parameters():
            sums[name] += parameter.grad
    assert not together[ends[-1] :].any()
    assert_close("output", alone, together, 1e-12)
    for name, gradient in gradients.items():
        assert_close(f"gradient of {name}", sums[name], gradient, 1e-12)


def test_padded_documents_start_where_the_padded_ones_do():
    """Documents of 3 and 2 tokens, padded to 4 each: the second starts at token 4."""
    module, x = attention(), hidden_states(batch=1, tokens=8)
    padded = packed(4, 8)
    both = dataclasses.replace(
        packed(3, 5), cu_seqlens_q_padded=padded.cu_seqlens_q, cu_seqlens_kv_padded=padded.cu_seqlens_kv
    )
    expected, got = (recorded_qkv(module, x, packed_seq_params=p) for p in (padded, both))
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a[:4][:3], b[:4][:3])
        assert torch.equal(a[4:6], b[4:6])
    module = attention()
    out = [module(x, None, rotary_pos_emb=ANGLES.cuda(), packed_seq_params=p)[0] for p in (padded, both)]
    assert torch.equal(out[0][4:6], out[1][4:6])


def test_reset_off_mixes_across_documents_as_a_plain_stream_does():
    module, x = attention(CCAConfig(reset_at_document_start=False)), hidden_states(batch=1)
    no_positions = dataclasses.replace(packed(4, 9))
    q, k, v = recorded_qkv(module, x, packed_seq_params=no_positions)
    plain = [t.squeeze(1) for t in recorded_qkv(module, x)]
    assert torch.equal(v, plain[2])  # the delayed half crosses the boundary
    norm = lambda t: t.norm(dim=-1)  # noqa: E731  positions differ, and RoPE keeps norms
    assert_close("q", norm(plain[0]), norm(q), 1e-12)
    assert_close("k before the boundary", plain[1][:4], k[:4], 1e-12)
    kept_apart = recorded_qkv(attention(), x, packed_seq_params=packed(4, 9))
    assert not torch.allclose(q[4:], kept_apart[0][4:])


def test_selective_recompute_of_core_attention_changes_nothing():
    x = hidden_states()
    plain = run(attention(), x)
    again = run(attention(recompute_granularity="selective", recompute_modules=["core_attn"]), x)
    assert torch.equal(plain[0], again[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][name]), name


@pytest.mark.skipif(bool(missing_build_tools()), reason="Megatron compiles a helper for it")
@pytest.mark.parametrize("core", [False, True])
def test_recomputing_the_mix_changes_nothing(core, monkeypatch):
    settings = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]} if core else {}
    x = hidden_states()
    calls = Mock(wraps=attention_module.cca_mix)
    monkeypatch.setattr(attention_module, "cca_mix", calls)
    plain = run(attention(), x)
    assert calls.call_count == 1
    again = run(attention(CCAConfig(recompute_mix=True), **settings), x)
    assert calls.call_count == 1 + 2  # forward, and once more in the backward pass
    assert torch.equal(plain[0], again[0])
    for name, gradient in plain[1].items():
        assert_close(name, gradient, again[1][name], 1e-14)


@pytest.mark.skipif(bool(missing_build_tools()), reason="Megatron compiles a helper for it")
def test_convs_learn_behind_a_frozen_projection_with_recomputation():
    x = hidden_states().detach()
    gradients = []
    for recompute in (False, True):
        module = attention(CCAConfig(recompute_mix=recompute))
        module.linear_qkv.weight.requires_grad_(False)
        out, _ = module(x, None, rotary_pos_emb=ANGLES.cuda())
        out.sum().backward()
        gradients.append([p.grad for p in module.parameters(recurse=False)])
    for plain, again in zip(*gradients, strict=True):
        assert plain.any()
        assert torch.equal(plain, again)


def test_checkpoint_holds_every_parameter_under_its_name():
    module = attention()
    state = module.sharded_state_dict(prefix="attention.")
    for name, parameter in module.named_parameters():
        shard = state[f"attention.{name}"]
        assert shard.key == f"attention.{name}"
        assert shard.global_shape == shard.local_shape == tuple(parameter.shape)


def clipping_attention(cca: CCAConfig | None = None):
    """With ``qk_clip`` on; the local core attention records no logits, so tests give them to it."""
    module = attention(cca)
    module.config.qk_clip = True
    return module


@pytest.mark.parametrize("form", ["linear", "exp"])
def test_clip_qk_leaves_negative_maxima_alone(form):
    module = clipping_attention(CCAConfig(temperature=form))
    module.config.qk_clip_threshold = 10.0
    before = module.temperature.detach().clone()
    module.core_attention.current_max_attn_logits = torch.tensor([-1.0, -2.0, -3.0, -4.0]).cuda()
    module.clip_qk()
    assert torch.equal(module.temperature, before)


@pytest.mark.parametrize("form", ["linear", "exp"])
def test_clip_qk_bounds_the_logits_by_scaling_the_temperature(form):
    module, x = clipping_attention(CCAConfig(temperature=form)), hidden_states()

    def largest_logit():
        q, k, _ = recorded_qkv(module, x)
        logits = torch.einsum("sbhd,tbhd->hst", q[:, :1], k.repeat_interleave(2, 2)[:, :1])
        return logits.abs().amax((1, 2)) / 8**0.5

    before = largest_logit()
    threshold = before.view(2, 2).amax(1).mean().item()  # between the two groups
    module.config.qk_clip_threshold = threshold
    module.temperature.main_param = module.temperature.data.float().clone()
    others = {n: p.clone() for n, p in module.named_parameters() if n != "temperature"}
    module.core_attention.current_max_attn_logits = before
    module.clip_qk()
    after = largest_logit()
    assert after.max().item() == pytest.approx(threshold)
    unclipped = before.view(2, 2).amax(1).argmin()
    assert torch.equal(before.view(2, 2)[unclipped], after.view(2, 2)[unclipped])
    assert torch.allclose(module.temperature.main_param, module.temperature.float())
    assert all(torch.equal(p, others[n]) for n, p in module.named_parameters() if n in others)
    assert module.core_attention.current_max_attn_logits is None


def test_clip_qk_refuses_what_it_cannot_do():
    module = attention()
    with pytest.raises(ValueError, match="qk_clip=False"):
        module.clip_qk()
    module = clipping_attention()
    module.core_attention.current_max_attn_logits = None
    with pytest.raises(ValueError, match="no attention logits"):
        module.clip_qk()
    module.core_attention.current_max_attn_logits = torch.full((4,), 1e3)
    module.temperature.main_param = torch.zeros(1)
    with pytest.raises(RuntimeError, match="distributed optimizer"):
        module.clip_qk()


def test_what_it_does_not_do_is_refused_by_name():
    module, x = attention(), hidden_states()
    context = StaticInferenceContext(2, 16)
    with pytest.raises(NotImplementedError, match="no packed documents"):
        module(x, None, inference_context=context, packed_seq_params=PackedSeqParams(qkv_format="thd"))
    context.batch_size_offset = 1
    with pytest.raises(NotImplementedError, match="no batch_size_offset; a batch at once works"):
        module(x, None, inference_context=context)
    context.is_static_batching = lambda: False
    with pytest.raises(NotImplementedError, match="dynamic batching; StaticInferenceContext works"):
        module(x, None, inference_context=context)
    with pytest.raises(ValueError, match="holds 2 sequences of 4 tokens; .* are wanted: make it larger"):
        run(module, x, inference_context=StaticInferenceContext(2, 4))
    with pytest.raises(NotImplementedError, match="call the module"):
        module.get_query_key_value_tensors(x)
    with pytest.raises(ValueError, match="qkv_format='sbhd'"):
        module(x, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
    with pytest.raises(ValueError, match="batch 2 with packed_seq_params: .* batch 1 works"):
        run(module, x, packed_seq_params=packed(4, 9))
    x = hidden_states(batch=1)
    with pytest.raises(ValueError, match=r"max_seqlen_q=12: .* 9 positions; give .* at least 12"):
        run(module, x, packed_seq_params=dataclasses.replace(packed(4, 9), max_seqlen_q=12))
    with pytest.raises(ValueError, match=r"max_seqlen_q=4: .* has 5 tokens; max_seqlen_q=5 works"):
        run(module, x, packed_seq_params=dataclasses.replace(packed(4, 9), max_seqlen_q=4))
    with pytest.raises(NotImplementedError, match="mrope_section"):
        run(attention(mrope_section=[1, 1, 0]), hidden_states(batch=1), packed_seq_params=packed(4, 9))


@pytest.mark.parametrize("settings", [{"rotary_interleaved": True}, {"no_rope_freq": [1, 0]}, "yarn"])
def test_megatron_rope_options_are_kept(settings, monkeypatch):
    scale = 1.0
    if settings == "yarn":  # Megatron's model builder sets this on the configuration
        monkeypatch.setattr(TransformerConfig, "yarn_rotary_scaling_factor", 8.0, raising=False)
        settings, scale = {}, 0.1 * math.log(8.0) + 1
    module, x = attention(**settings), hidden_states()
    table = None if "no_rope_freq" in settings else (ANGLES.cos() * scale, ANGLES.sin() * scale)
    mixed = module.linear_qkv(x)[0].view(TOKENS, 2, 2, 4, 8)
    options = MixOptions(value_delay_from=8, rotary_interleaved=module.config.rotary_interleaved)
    convs = [f"conv{i}_{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    weights = MixWeights(*(getattr(module, c) for c in convs), module.temperature)
    rotary = None if table is None else tuple(t.cuda() for t in table)
    for a, b in zip(naive_mix(mixed, weights, options, rotary=rotary), recorded_qkv(module, x), strict=True):
        assert_close("q, k or v", a, b, 1e-12)


def test_projection_bias_is_kept():
    """The layer adds ``linear_proj``'s bias itself, later, as it does for Megatron's own attention."""
    module, x = attention(add_bias_linear=True), hidden_states()
    out, bias = module(x, None)
    out.sum().backward()
    assert module.linear_qkv.bias.grad.any()
    assert bias is module.linear_proj.bias
