"""The quality benchmark compares what it says, with equal parameters, and reads its results right."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from quality_report import Estimate, compare_with_paper, difference, final_losses, tables
from quality_variants import REFERENCE, TABLES, TOLERANCE, VARIANTS, Row, matched_ffn, parameters, sections, write_recipe
from support.megatron import Layout, microbatches, parallel
from support.planned import DENSE, built

from cca_megatron import CCASelfAttention
from cca_megatron.plan.shapes import model_from_args
from cca_megatron.training.command import Command
from cca_megatron.training.recipe import RecipeError, load_recipe

HIDDEN, DIM, SEQUENCE = 128, 16, 32
BASE = {
    "model": {name: value for name, value in DENSE.items() if name != "padded-vocab-size"}
    | {"hidden-size": HIDDEN, "kv-channels": DIM, "num-layers": 2, "max-position-embeddings": SEQUENCE},
    "megatron": {
        "seq-length": SEQUENCE,
        "micro-batch-size": 2,
        "global-batch-size": 2,
        "train-iters": 4,
        "lr": 1e-3,
        "mock-data": True,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": 300,
    },
}


def command_of(name: str, folder: Path, ffn: int = 64) -> Command:
    return write_recipe(sections(BASE, VARIANTS[name], 1, ffn), folder / "recipe.yaml", "cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_built_as_planned_and_has_a_loss(name, tmp_path):
    command = command_of(name, tmp_path)
    with parallel(Layout()), microbatches():
        torch.manual_seed(0)
        model = built(command.args)
        assert sum(p.numel() for p in model.parameters()) == parameters(command)
        tokens = torch.randint(0, 300, (2, SEQUENCE))
        positions = torch.arange(SEQUENCE)[None].expand_as(tokens)
        loss = model(tokens, positions, None, labels=tokens).float().mean()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
