"""A converted model trains through the entry, and comes back as it was where nothing is learned."""

import pytest
import torch
from safetensors.torch import load_file
from training.conftest import losses, pretrain
from typer.testing import CliRunner

zaya = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")

from cca_megatron.cli import app  # noqa: E402
from cca_megatron.training.command import build_command  # noqa: E402
from cca_megatron.training.recipe import load_recipe  # noqa: E402

VOCAB = 258


def run(*words):
    result = CliRunner().invoke(app, ["convert", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def expected_loss(model, tokens):
    logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_a_converted_model_starts_where_transformers_is_and_comes_back(dataset, tmp_path):
    """Without learning: the loss of the first step is transformers', and the export is the source."""
    settings = {"vocab_size": VOCAB, "layer_types": None, "sliding_window": None}
    model = zaya.random_zaya(torch.float32, skips=False, **settings)
    model.save_pretrained(tmp_path / "hf")
    run("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", "--verify")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"extends: megatron/model.yaml\n"
        f"zaya: {{balancing_rate: 0}}\n"
        f"megatron: {{pretrained-checkpoint: {tmp_path}/megatron, expert-model-parallel-size: 2,"
        f" moe-token-dispatcher-type: alltoall, use-distributed-optimizer: true, seq-length: 32,"
        f" micro-batch-size: 2, global-batch-size: 4, train-iters: 2, lr: 0, weight-decay: 0, eval-iters: 1,"
        f" log-interval: 1, num-workers: 0, split: '90,10,0', tensorboard-log-interval: 1,"
        f" save-interval: 2}}\n"
        f"data: {{prefix: {dataset}}}\n"
        f"output: {tmp_path}/run\n"
        f"launch: {{gpus_per_node: 2}}\n"
    )
    command = build_command(load_recipe(recipe, []), "cpu")
    out = pretrain(2, *command.argv, model=[])
    assert "attempting to finetune with checkpoint in" in out
    curve = losses(tmp_path / "run" / "tensorboard")
    assert sorted(curve) == [1, 2]
    fresh = torch.log(torch.tensor(float(VOCAB))).item()
    assert abs(curve[1] - fresh) > 0.1, "looks like a model with fresh weights"

    run("megatron-to-hf", tmp_path / "run" / "checkpoints", tmp_path / "back", "--verify")
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    got = load_file(tmp_path / "back" / "model-00001-of-00001.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
