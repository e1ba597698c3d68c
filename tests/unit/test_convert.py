"""Checkpoints in and out of Hugging Face's format: bit for bit, in both releases, and refused when wrong."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

zaya = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")

from cca_megatron.cli import app  # noqa: E402
from cca_megatron.hf import ConversionError, config_from_hf, config_to_hf  # noqa: E402
from cca_megatron.hf.convert import hf_to_megatron  # noqa: E402
from cca_megatron.hf.distributed_checkpoint import DistributedCheckpoint  # noqa: E402
from cca_megatron.training.checkpoint import open_checkpoint  # noqa: E402

ATTENTION = {
    "qkv_proj.q_proj.weight": "qkv.linear_q.weight",
    "qkv_proj.k_proj.weight": "qkv.linear_k.weight",
    "qkv_proj.v_proj_current.weight": "qkv.val_proj1.weight",
    "qkv_proj.v_proj_delayed.weight": "qkv.val_proj2.weight",
    "qkv_proj.conv_qk_depthwise.weight": "qkv.conv_qk.0.weight",
    "qkv_proj.conv_qk_depthwise.bias": "qkv.conv_qk.0.bias",
    "qkv_proj.conv_qk_grouped.weight": "qkv.conv_qk.1.weight",
    "qkv_proj.conv_qk_grouped.bias": "qkv.conv_qk.1.bias",
    "qk_norm.temp": "qkv.temp",
    "o_proj.weight": "o_proj.weight",
}
ROUTER = {
    "down_proj.weight": "down_proj.weight",
    "down_proj.bias": "down_proj.bias",
    "router_mlp.norm.weight": "rmsnorm_eda.weight",
    "router_mlp.fc1.weight": "router_mlp.0.weight",
    "router_mlp.fc1.bias": "router_mlp.0.bias",
    "router_mlp.fc2.weight": "router_mlp.2.weight",
    "router_mlp.fc2.bias": "router_mlp.2.bias",
    "router_mlp.out_proj.weight": "router_mlp.4.weight",
    "balancing_biases": "balancing_biases",
}
SCALES = ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")


def first_release(state_dict, layers):
    """The same tensors under the names of the first release, written out from the published files."""
    old = {"model.embed_tokens.weight": state_dict["model.embed_tokens.weight"]}
    old["model.final_norm.weight"] = state_dict["model.norm.weight"]
    for kind in ("scale", "bias"):
        old[f"model.layers.0.res_scale.hidden_states_{kind}"] = state_dict[
            f"model.input_hidden_states_{kind}"
        ]
    for layer in range(layers):
        theirs = f"model.layers.{layer}."
        attention, moe = f"model.layers.{2 * layer}.", f"model.layers.{2 * layer + 1}."
        after = "model." if layer == layers - 1 else f"model.layers.{2 * layer + 2}."
        old[attention + "input_norm.weight"] = state_dict[theirs + "input_layernorm.weight"]
        old[moe + "input_norm.weight"] = state_dict[theirs + "post_attention_layernorm.weight"]
        for name, other in ATTENTION.items():
            old[f"{attention}self_attn.{other}"] = state_dict[f"{theirs}self_attn.{name}"]
        for name in SCALES:
            old[f"{moe}res_scale.{name}"] = state_dict[f"{theirs}post_attention_residual_scale.{name}"]
            old[f"{after}res_scale.{name}"] = state_dict[f"{theirs}post_mlp_residual_scale.{name}"]
        router = dict(ROUTER)
        if layer:
            router["router_states_scale"] = "router_states_scale"
        for name, other in router.items():
            old[f"{moe}zaya_block.router.{other}"] = state_dict[f"{theirs}mlp.gate.{name}"]
        for name, other in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
            for expert, weight in enumerate(state_dict[f"{theirs}mlp.experts.{name}"]):
                old[f"{moe}zaya_block.experts.local_experts.{expert}.{other}.weight"] = weight.clone()
    return old


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    zaya.random_zaya(torch.bfloat16, skips=False).save_pretrained(folder, max_shard_size="40kB")
    assert (folder / "model.safetensors.index.json").is_file(), "several shards are wanted"
    return folder


def tensors_of(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def run(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)], catch_exceptions=False)


def test_there_and_back_is_the_identity(hf_folder, tmp_path):
    there = run("hf-to-megatron", hf_folder, tmp_path / "megatron", "--verify")
    assert there.exit_code == 0, there.output
    back = run("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--verify")
    assert back.exit_code == 0, back.output
    expected, got = tensors_of(hf_folder), tensors_of(tmp_path / "back")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    for folder in ("megatron", "back"):
        manifest = json.loads((tmp_path / folder / "conversion.json").read_text())
        assert manifest["parameters"] == sum(x.numel() for x in expected.values())
        assert manifest["bytes"] == sum(x.nbytes for x in expected.values())
    again = run("hf-to-megatron", tmp_path / "back", tmp_path / "again")
    assert again.exit_code == 0, again.output
    one, other = (DistributedCheckpoint(open_checkpoint(tmp_path / n)[0]) for n in ("megatron", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_from_before_a_setting_has_its_default(hf_folder, tmp_path):
    saved = Namespace(cca_conv_kernel_sizes=[3, 2], cca_temperature="exp")
    hf_to_megatron(hf_folder, tmp_path / "megatron", lambda *_: saved)
    args = open_checkpoint(tmp_path / "megatron")[1]
    assert (args.cca_conv_kernel_sizes, args.cca_temperature) == ([3, 2], "exp")
    assert args.cca_window_rotary_base is None
    assert args.zaya_balancing_rate == 1e-3
    assert args.zaya is False


def test_transformers_loads_what_was_exported(hf_folder, tmp_path):
    run("hf-to-megatron", hf_folder, tmp_path / "megatron")
    run("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    # In a process of its own, as it is served; in bf16 the alignment of a weight can turn a router's choice.
    compare = (
        "import sys, torch, transformers as t; tokens = torch.arange(1, 13)[None];"
        "a, b = (t.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(tokens).logits"
        " for f in sys.argv[1:]);"
        "print('worst', (a - b).abs().max().item() / a.abs().max().item())"
    )
    command = [sys.executable, "-W", "ignore", "-c", compare, str(hf_folder), str(tmp_path / "back")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("worst")[1]) < 1e-6


def test_both_releases_give_the_same_checkpoint(hf_folder, tmp_path):
    settings = {"layer_types": None, "sliding_window": None}
    model = zaya.random_zaya(torch.bfloat16, skips=False, **settings)
    model.save_pretrained(tmp_path / "merged")
    old = tmp_path / "old"
    old.mkdir()
    save_file(first_release(tensors_of(tmp_path / "merged"), 4), old / "model.safetensors")
    config = {
        "model_type": "zaya",
        "num_hidden_layers": 8,
        "num_attention_heads": 8,  # the published files say twice the true count
        "cca_num_q_heads": 4,
        "norm_epsilon": 1e-5,
        "rope_theta": 5000000,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    (old / "config.json").write_text(json.dumps(config))
    for name in ("merged", "old"):
        result = run("hf-to-megatron", tmp_path / name, tmp_path / f"{name}_megatron", "--verify")
        assert result.exit_code == 0, result.output
    (one, one_args), (other, other_args) = (
        open_checkpoint(tmp_path / f"{name}_megatron") for name in ("merged", "old")
    )
    one, other = DistributedCheckpoint(one), DistributedCheckpoint(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert vars(one_args) == vars(other_args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.gate.balancing_biases"), "balancing_biases: is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra: is not known"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            "model.norm.weight: has shape [31], and must have [32]",
        ),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_wrong_tensors_are_named_and_nothing_is_written(hf_folder, tmp_path, change, message):
    source = tmp_path / "wrong"
    source.mkdir()
    tensors = tensors_of(hf_folder)
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text((hf_folder / "config.json").read_text())
    result = run("hf-to-megatron", source, tmp_path / "megatron")
    assert result.exit_code == 1
    assert message in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wrong"]


def test_a_damaged_file_is_named(hf_folder, tmp_path):
    source = tmp_path / "wrong"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"not safetensors at all")
    (source / "config.json").write_text((hf_folder / "config.json").read_text())
    result = run("hf-to-megatron", source, tmp_path / "megatron")
    assert result.exit_code == 1
    assert "model.safetensors: cannot be read" in result.output


def test_an_interrupt_leaves_nothing(hf_folder, tmp_path, monkeypatch):
    from cca_megatron.hf import convert

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert._Counter, "add", interrupted)
    result = run("hf-to-megatron", hf_folder, tmp_path / "megatron")
    assert result.exit_code == 130
    assert "stopped; nothing was written" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hf-to-megatron", "nowhere"), "nowhere: is no folder"),
        (("megatron-to-hf", "nowhere"), "no checkpoint in"),
    ],
)
def test_a_source_that_is_not_there(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = run(*words, "out")
    assert result.exit_code == 1
    assert message in result.output


def test_special_tokens_come_back(hf_folder, tmp_path):
    run("hf-to-megatron", hf_folder, tmp_path / "megatron")
    run("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, None, 0)


def test_a_folder_with_something_in_it_is_kept(hf_folder, tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = run("hf-to-megatron", hf_folder, tmp_path)
    assert result.exit_code == 1
    assert "is there already" in result.output
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"layer_types": ["hybrid", "linear"] * 2}, "layer_types"),
        (
            {"rope_parameters": {"hybrid": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}},
            "rope_type='default' works",
        ),
        ({"head_dim": None}, "lacks head_dim"),
        ({"num_experts": "4"}, "num_experts='4': must be numbers above 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_configurations_that_megatron_has_not_are_refused(change, message):
    config = zaya.zaya_config().to_dict() | change
    with pytest.raises(ConversionError, match=message.replace("[", r"\[")):
        config_from_hf(config)


def test_the_configuration_comes_back():
    config = zaya.zaya_config()
    settings, cca = config_from_hf(config)
    back = zaya.ZayaConfig(**config_to_hf(settings, cca))
    ours, theirs = back.to_dict(), config.to_dict()
    tokens = {"bos_token_id", "eos_token_id", "architectures"}  # no part of the weights
    assert {k: v for k, v in ours.items() if k not in tokens} == {
        k: v for k, v in theirs.items() if k not in tokens
    }


def test_a_model_that_transformers_cannot_hold_is_refused():
    settings, cca = config_from_hf(zaya.zaya_config())
    with pytest.raises(ConversionError, match="zaya_skip_output"):
        config_to_hf(settings | {"zaya_skip_output": "input"}, cca)
