"""FLOPs in the log are those of the model that is built, and the MFU is their share of the GPU's peak."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from megatron import training as megatron_training
from megatron.training import training
from support.megatron import Layout, gpt_model, microbatches, parallel, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from cca_megatron.attention import CCASelfAttention
from cca_megatron.plan.shapes import model_from_args
from cca_megatron.training import flops, utilization
from cca_megatron.training.command import build_command
from cca_megatron.training.recipe import load_recipe
from cca_megatron.zaya.router import ZayaRouter
from cca_megatron.zaya.settings import ZayaSettings
from cca_megatron.zaya.specs import zaya_decoder_block_spec

MEGATRON = training.num_floating_point_operations
LINE = " iteration 10/20 | throughput per GPU (TFLOP/s/GPU): 300.5 | lm loss: 2.1E+00 |"


@pytest.fixture(autouse=True)
def megatron_as_it_comes(monkeypatch):
    """What a test replaces in the module that trains is put back."""
    for name in ("num_floating_point_operations", "print_rank_last"):
        monkeypatch.setattr(training, name, getattr(training, name))


def arguments(recipe, *overrides):
    args = build_command(load_recipe(f"configs/{recipe}.yaml", list(overrides)), "cpu").args
    args.padded_vocab_size = args.padded_vocab_size or 258
    return args


def corrected(args, batch, **stats):
    flops.correct_flops()
    return training.num_floating_point_operations(args, batch, **stats)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("recipes/quickstart", []),
        ("recipes/quickstart", ["cca.conv0=false", "cca.conv_kernel_sizes=[2,3]"]),
        ("models/zaya1_tiny", []),  # windows, ZAYA's router
        ("models/zaya1_tiny", ["zaya.router=linear", "zaya.skip_class=false"]),
        ("recipes/zaya1_8b_4k_8gpu", []),
    ],
)
def test_the_count_is_that_of_every_part_of_the_model(recipe, overrides):
    """Three times the forward pass; the planner's count of it is compared with PyTorch's own elsewhere."""
    args = arguments(recipe, *overrides)
    expected = 3 * 6 * args.seq_length * sum(model_from_args(args).flops(args.seq_length).values())
    assert corrected(args, 6) == pytest.approx(expected, rel=1e-12)
    assert MEGATRON(args, 6) != pytest.approx(expected, rel=1e-3), "Megatron's own count is as good"


def test_what_is_added_is_what_convs_and_router_compute():
    """Counted by PyTorch on the modules: the first conv also runs on the rows that pad the second."""
    args = arguments("models/zaya1_tiny", "model.window-size=null", "cca.window_rotary_base=null")
    heads = {"num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 16, "hidden_size": 256}
    moe = {
        "num_moe_experts": 8,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": 256,
        "moe_router_load_balancing_type": "none",
    }
    tokens, counts = 16, {}
    with parallel(Layout()), microbatches():
        config = tiny_config(num_layers=1, params_dtype=torch.float32, **heads, **moe)
        zaya = ZayaSettings(router_hidden_size=64)
        model = gpt_model(config, zaya_decoder_block_spec(config, zaya=zaya))
        with FlopCounterMode(model, display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.int64), torch.arange(tokens)[None], None)
        paths = {module: name for name, module in model.named_modules()}
        for kind in (CCASelfAttention, ZayaRouter):
            path = next(name for module, name in paths.items() if isinstance(module, kind))
            counts[kind] = counter.get_flop_counts()[f"GPTModel.{path}"]
    convs = counts[CCASelfAttention][torch.ops.aten.convolution]
    padding = 2 * (8 + 2) * 16 * 2  # one more row of the depthwise conv
    routers = sum(counts[ZayaRouter].values())
    expected = 3 * args.num_layers * (convs - padding + routers) / tokens
    assert flops.uncounted_flops(args, sequence=512) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "documents"),
    [
        ("recipes/quickstart", [100, 28, 300]),
        ("models/zaya1_tiny", [200, 200]),  # longer than the window
        ("models/zaya1_tiny", [100, 100, 100]),
    ],
)
def test_packed_documents_are_counted_by_their_tokens_and_lengths(recipe, documents):
    args = arguments(recipe)
    tokens, squares = sum(documents), sum(n * n for n in documents)
    got = corrected(args, 1, seqlen_squared_sum_in_batch=squares, total_real_tokens_in_batch=tokens)
    model = model_from_args(args)
    expected = 3 * sum(n * sum(model.flops(n).values()) for n in documents)
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "attention_layers", "routers"),
    [
        (["model.mtp-num-layers=1", "model.untie-embeddings-and-output-weights=true"], 5, 3),
        (["model.num-layers=null", 'model.hybrid-layer-pattern="*E*-*E"', "model.moe-layer-freq=1"], 3, 2),
    ],
    ids=["predictions", "hybrid"],
)
def test_every_attention_layer_and_router_is_counted(overrides, attention_layers, routers):
    args = arguments("recipes/quickstart", *overrides)
    convs = 2 * (8 + 2) * 16 * (2 + 16 * 2)
    expected = 3 * (attention_layers * convs + routers * 2 * 256 * 4)
    assert flops.uncounted_flops(args, sequence=512) == expected


def test_another_signature_is_left_alone(monkeypatch, capsys):
    def other(args, batch_size, new):
        raise AssertionError

    monkeypatch.setattr(training, "num_floating_point_operations", other)
    flops.correct_flops()
    assert training.num_floating_point_operations is other
    assert "num_floating_point_operations takes (args, batch_size, new), not" in capsys.readouterr().out


def test_megatron_calls_it_as_we_replace_it():
    """Both callers name the two sums, and take it from the module that trains."""
    source = inspect.getsource(training)
    calls = source.split("= num_floating_point_operations(")[1:]
    assert len(calls) == 2
    for call in calls:
        assert "seqlen_squared_sum_in_batch=" in call[:300]
        assert "total_real_tokens_in_batch=" in call[:300]


def test_the_count_is_announced_once(capsys):
    args = arguments("recipes/quickstart")
    corrected(args, 2)
    training.num_floating_point_operations(args, 2)
    said = capsys.readouterr().out
    per_token = 3 * sum(model_from_args(args).flops(args.seq_length).values())
    assert said.count(f"FLOPs: {per_token:.4g} per token") == 1


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_that_pytorch_gives(name, peak):
    assert utilization.peak_tflops(name) == peak


def shown(line, peak, monkeypatch):
    """What comes of a line, and what is written."""
    lines, written = [], []
    monkeypatch.setattr(megatron_training, "get_args", lambda: SimpleNamespace(curr_iteration=9))
    monkeypatch.setattr(utilization, "write_scalars", lambda *values: written.append(values))
    utilization.with_mfu(lines.append, lambda: peak)(line)
    return lines, written


def test_the_mfu_stands_after_the_throughput(monkeypatch):
    lines, written = shown(LINE, 601.0, monkeypatch)
    assert lines == [LINE.replace("300.5 |", "300.5 | MFU (% of 601 TFLOP/s): 50.0 |")]
    assert written == [({"MFU (%)": 50.0}, 10)]


@pytest.mark.parametrize(("line", "peak"), [(LINE, None), ("validation loss at iteration 10", 601.0)])
def test_other_lines_are_as_they_were(line, peak, monkeypatch):
    assert shown(line, peak, monkeypatch) == ([line], [])


def test_the_log_of_this_megatron_has_the_throughput_that_is_looked_for():
    source = inspect.getsource(training.training_log)
    assert "throughput per GPU (TFLOP/s/GPU): {throughput:.1f} |" in source
    assert "print_rank_last(log_string)" in source
