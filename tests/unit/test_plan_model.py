"""What the planner reckons of a model is what Megatron builds, computes and keeps."""

import weakref
from collections import Counter

import pytest
import torch
from support.megatron import Layout, microbatches, parallel
from support.planned import DENSE, MODELS, MOE, SEQUENCE, ZAYA, ZAYA_PARTS, arguments, built, norms_of_a_gpu
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cca_megatron.bench.live_bytes import LiveBytes
from cca_megatron.plan.compare import with_attention
from cca_megatron.plan.layers import mean_keys
from cca_megatron.plan.memory import memory_per_gpu
from cca_megatron.plan.parts import Parallel
from cca_megatron.plan.shapes import model_from_args
from cca_megatron.training.loss import chunked_loss
from cca_megatron.training.recipe import RecipeError

PARTS = {
    "embedding": "embedding.word",
    "positions": "embedding.position",
    "attention mix": ".conv|temperature",
    "attention projections": "linear_qkv.weight|linear_proj.weight",
    "router": ".router.",
    "experts": "local_experts",
    "shared experts": "shared_experts",
    "dense MLP": "mlp.linear_fc1.weight|mlp.linear_fc2.weight",
    "residual scaling": "_bda|input_scale|input_bias",
    "norms": "layernorm|final_norm|norm.weight",
    "output": "output_layer",
    "biases": "bias",
}


def part_of(name: str) -> str:
    return next(part for part, marks in PARTS.items() if any(mark in name for mark in marks.split("|")))


@pytest.mark.parametrize("name", MODELS)
def test_every_part_has_the_parameters_that_are_built(name, tmp_path):
    args = arguments(tmp_path, *MODELS[name])
    expected: Counter[str] = Counter()
    with parallel(Layout()):
        for parameter, tensor in built(args).named_parameters():
            expected[part_of(parameter)] += tensor.numel()
    planned: Counter[str] = Counter()
    for part in model_from_args(args).parts():
        planned[part.name] += part.count
    assert planned == expected


def counted_flops(model, tokens) -> float:
    """Forward FLOPs, and those of core attention among them."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def core(q, k, v, *_, out_shape=None, **__):
        return sdpa_flop_count(q, k, v)

    with FlopCounterMode(display=False, custom_mapping={flash: core}) as counter:
        model(tokens, torch.arange(tokens.shape[1])[None].expand_as(tokens), None, labels=tokens)
    by_operation = counter.get_flop_counts()["Global"]
    of_core = sum(
        flops for operation, flops in by_operation.items() if "scaled_dot_product" in str(operation)
    )
    return counter.get_total_flops() - of_core, of_core


@pytest.mark.parametrize("name", ["dense", "with biases", "fewer convs", "experts", "shared experts", "zaya"])
def test_flops_are_those_that_pytorch_counts(name, tmp_path, monkeypatch):
    """PyTorch counts the whole square of core attention, the planner its causal half."""
    monkeypatch.setenv("CCA_KERNELS", "reference")
    args = arguments(tmp_path, *MODELS[name])
    model = model_from_args(args)
    planned = model.flops(SEQUENCE)
    core = planned.pop("core attention")
    with parallel(Layout()), microbatches():
        tokens = torch.randint(0, 300, (2, SEQUENCE))
        rest, of_core = counted_flops(built(args), tokens)
    attention = model.layers[0].attention
    # The depthwise conv also runs over the padding that the second one reads, on a CPU.
    k0, k1 = attention.conv_kernel_sizes
    padding = (k1 - 1) * len(tokens) * len(model.layers) * 2 * attention.channels * k0 * attention.conv0
    assert sum(planned.values()) * tokens.numel() + padding == rest
    assert 2 * core * tokens.numel() == of_core


@pytest.mark.parametrize("window", [None, 0, 15, 62, 200])
def test_a_window_leaves_as_many_keys_as_its_mask(window):
    row, column = torch.arange(SEQUENCE)[:, None], torch.arange(SEQUENCE)
    mask = column <= row
    if window is not None:
        mask &= column >= row - window
    # The convention takes a triangle for half of its square.
    seen = SEQUENCE if window is None else min(window + 1, SEQUENCE)
    assert SEQUENCE * mean_keys(SEQUENCE, window) == mask.sum().item() - seen / 2


def kept_bytes(args, monkeypatch) -> float:
    """That the layers of a stage and its final norm keep, each storage once, after a forward pass."""
    packed = []

    def pack(tensor):
        tensor = tensor.view_as(tensor)  # held by the graph alone: what it lets go of is not kept
        packed.append(weakref.ref(tensor))
        return tensor

    model = built(args)
    rotary = model.rotary_pos_emb(SEQUENCE)
    dtype = torch.float32 if args.fp32_residual_connection else torch.bfloat16
    hidden = torch.randn(SEQUENCE, args.micro_batch_size, args.hidden_size, dtype=dtype).requires_grad_()
    with norms_of_a_gpu(monkeypatch), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.decoder(hidden, None, rotary_pos_emb=rotary)
    alive = [tensor for tensor in (reference() for reference in packed) if tensor is not None]
    alive.append(out)  # the output layer's input
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
KEPT = {
    "dense": (DENSE, {}, {}),
    "a long and narrow batch": (DENSE, {}, {"micro_batch_size": 8, "global_batch_size": 8}),
    "experts": (MOE, {}, {}),
    "shared experts": (MOE | {"moe-shared-expert-intermediate-size": 96}, {}, {}),
    "zaya": (ZAYA, {"zaya": ZAYA_PARTS}, {}),
    "zaya, router in fp32": (ZAYA | {"moe-router-dtype": "fp32"}, {"zaya": ZAYA_PARTS}, {}),
    "mix recomputed": (DENSE, {"cca": {"recompute_mix": True}}, {}),
    "MLP recomputed": (DENSE, {}, SELECTIVE | {"recompute_modules": ["mlp"]}),
    "experts recomputed": (ZAYA, {"zaya": ZAYA_PARTS}, SELECTIVE | {"recompute_modules": ["moe"]}),
    "all recomputed": (ZAYA, {"zaya": ZAYA_PARTS}, FULL | {"recompute_method": "uniform"}),
    "two layers recomputed": (DENSE, {}, FULL | {"recompute_num_layers": 2, "recompute_method": "block"}),
}


QUICK = ("dense", "shared experts", "zaya", "experts recomputed", "all recomputed")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in KEPT])
def test_kept_activations_are_what_autograd_saves(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CCA_KERNELS", "triton")
    model, sections, settings = KEPT[name]
    args = arguments(tmp_path, model, sections, **settings)
    with parallel(Layout()), microbatches():
        saved = kept_bytes(args, monkeypatch)
    assert memory_per_gpu(args).activations == pytest.approx(saved, rel=0.05)


def large_vocabulary(hidden):
    """A model beside whose output nothing matters."""
    model = DENSE | {"padded-vocab-size": 131072, "num-layers": 1}
    return model | {"hidden-size": hidden, "kv-channels": hidden // 16}


def test_logits_are_held_as_often_as_reckoned(tmp_path):
    """Before the backward pass, with hidden states so narrow that the output weight's gradient is small."""
    args = arguments(tmp_path, large_vocabulary(hidden=64), {}, micro_batch_size=1)
    tokens = torch.randint(0, 300, (1, SEQUENCE))
    with parallel(Layout()):
        built_model = built(args)
        with LiveBytes() as live:
            built_model(tokens, torch.arange(SEQUENCE)[None], None, labels=tokens)
    table = built_model.shared_embedding_or_output_weight().nbytes  # a view of it is counted too
    memory = memory_per_gpu(args)
    assert memory.logits + memory.activations == pytest.approx(live.peak - table, rel=0.05)


@pytest.mark.parametrize(("chunk", "hidden"), [(16, 256), (64, 64)])
def test_a_loss_in_chunks_holds_what_is_reckoned(chunk, hidden, tmp_path):
    """Few tokens beside many hidden channels: the weight's gradient; the other way round: the logits."""
    args = arguments(tmp_path, large_vocabulary(hidden), {}, micro_batch_size=1, loss_chunk_size=chunk)
    x = torch.randn(SEQUENCE, 1, hidden).to(torch.bfloat16).requires_grad_()
    with parallel(Layout()):
        built_model = built(args)
        weight = built_model.shared_embedding_or_output_weight()
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        with LiveBytes(made_before=[x, weight, weight.main_grad]) as live:
            losses = chunked_loss(
                hidden_states=x,
                output_layer=built_model.output_layer,
                output_weight=weight,
                labels=torch.randint(0, 300, (1, SEQUENCE)),
                context=chunk,
                compute_language_model_loss=built_model.compute_language_model_loss,
                scale_logits=lambda logits: logits,
            )
            torch.autograd.grad(losses.sum(), [x, weight])
    assert memory_per_gpu(args).logits == pytest.approx(live.peak, rel=0.05)


def test_weights_gradients_and_optimizer_are_shared_as_megatron_says(tmp_path):
    args = arguments(tmp_path, DENSE, {}, gpus=4, global_batch_size=8, use_distributed_optimizer=True)
    parameters = sum(part.count for part in model_from_args(args).parts())
    memory = memory_per_gpu(args)
    per_parameter = (memory.weights + memory.gradients + memory.optimizer) / parameters
    assert per_parameter == 6 + 12 / 4  # docs of Megatron's distributed optimizer, bf16 with fp32 gradients


@pytest.mark.parametrize(
    ("stages", "chunks", "samples", "expected"), [(1, 1, 8, 1), (4, 1, 8, 4), (4, 1, 2, 2), (4, 2, 8, 5.5)]
)
def test_the_first_stage_keeps_as_many_micro_batches_as_the_schedule_starts(
    stages, chunks, samples, expected, tmp_path
):
    """4 stages of 2 chunks: 2 * 3 + 4 warm-up passes and one more, of half the layers each."""
    from cca_megatron.plan.memory import micro_batches_under_way
    from cca_megatron.plan.shapes import run_from_args

    settings = {"global_batch_size": samples, "micro_batch_size": 1}
    run = run_from_args(arguments(tmp_path, DENSE, {}, **settings))
    assert micro_batches_under_way(0, Parallel(pipeline=stages, chunks=chunks), run) == expected


@pytest.mark.parametrize("kind", ["mha", "gqa", "mla"])
def test_compared_attention_has_the_parameters_of_megatrons(kind, tmp_path):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import build_module

    planned = with_attention(model_from_args(arguments(tmp_path, DENSE, {})), kind).layers[0].attention
    common = {
        "num_layers": 1,
        "hidden_size": 256,
        "num_attention_heads": 16,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "use_cpu_initialization": True,
    }
    with parallel(Layout()):
        if kind == "mla":
            mla = {"q_lora_rank": None, "kv_lora_rank": 64, "qk_head_dim": 16, "v_head_dim": 16}
            config = MLATransformerConfig(**common, **mla, qk_pos_emb_head_dim=8, rope_type="rope")
        else:
            config = TransformerConfig(**common, num_query_groups=16 if kind == "mha" else 4)
        spec = get_gpt_layer_local_spec(multi_latent_attention=kind == "mla", normalization="RMSNorm")
        spec = spec.submodules.self_attention
        spec.submodules.core_attention = IdentityOp  # it has no parameters
        attention = build_module(spec, config=config, layer_number=1)
    # Megatron's local MLA spec leaves the latents' norm out.
    norm = 64 if kind == "mla" else 0
    assert sum(part.count for part in planned.parts()) == norm + sum(
        p.numel() for p in attention.parameters()
    )


@pytest.mark.parametrize(
    ("setting", "value"), [("mtp-num-layers", 1), ("use-megatron-fsdp", True), ("optimizer", "sgd")]
)
def test_what_is_not_reckoned_is_refused_by_name(setting, value, tmp_path):
    args = arguments(tmp_path, DENSE, {})
    setattr(args, setting.replace("-", "_"), value)
    with pytest.raises(RecipeError, match=setting.replace("-", "_")):
        memory_per_gpu(args)
