"""The quality benchmark compares what it says, with equal parameters, and reads its results right."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from quality_report import Estimate, compare_with_paper, difference, final_losses, tables
from quality_runs import TOLERANCE, matched_ffn, parameters, plan_runs, write_recipe
from quality_variants import REFERENCE, TABLES, VARIANTS, Row, sections
from support.megatron import Layout, microbatches, parallel
from support.planned import DENSE, TRAINING, built

from cca_megatron import CCASelfAttention
from cca_megatron.inference.load import load_model
from cca_megatron.parallel.core_attention import LocalCoreAttention
from cca_megatron.plan.shapes import model_from_args
from cca_megatron.training.command import Command, build_command
from cca_megatron.training.recipe import RecipeError, load_recipe

ROOT = Path(__file__).parents[2]
HIDDEN, DIM, SEQUENCE = 128, 16, 32
BASE = {
    "model": {name: value for name, value in DENSE.items() if name != "padded-vocab-size"}
    | {"hidden-size": HIDDEN, "kv-channels": DIM, "num-layers": 2, "max-position-embeddings": SEQUENCE},
    "megatron": TRAINING | {"seq-length": SEQUENCE},
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


def test_variants_have_the_parts_that_their_names_say(tmp_path):
    def attentions(name):
        with parallel(Layout()):
            return [layer.self_attention for layer in built(command_of(name, tmp_path).args).decoder.layers]

    on = {
        "no-conv": set(),
        "1-conv": {"conv0"},
        "2-convs": {"conv0", "conv1"},
        "value-shift": {"conv0", "conv1", "value_shift"},
        "ccgqa": {"conv0", "conv1", "value_shift", "qk_mean"},
        "cca": {"conv0", "conv1", "value_shift", "qk_mean"},
        "exp": {"conv0", "conv1", "value_shift", "qk_mean"},
    }
    for name, parts in on.items():
        for attention in attentions(name):
            assert isinstance(attention, CCASelfAttention)
            options = attention._mix_options
            found = {conv for conv in ("conv0", "conv1") if getattr(attention, f"{conv}_weight") is not None}
            found |= {"value_shift"} if options.value_delay_from is not None else set()
            found |= {"qk_mean"} if options.qk_mean else set()
            assert found == parts
            assert options.temperature_form == ("exp" if name == "exp" else "linear")
    for name in VARIANTS.keys() - on.keys():
        for attention in attentions(name):
            assert isinstance(attention, MLASelfAttention) == (name == "mla")
            assert not isinstance(attention, CCASelfAttention)
            assert isinstance(attention.core_attention, LocalCoreAttention)


def test_all_but_mha_keep_a_quarter_of_its_cache(tmp_path):
    def cached(name):
        return model_from_args(command_of(name, tmp_path).args).layers[0].attention.cache_elements()

    assert cached("mha") == 2 * HIDDEN
    assert {cached(name) for name in VARIANTS if name != "mha"} == {HIDDEN // 2}


def test_mlps_are_as_wide_as_equal_parameters_need(tmp_path):
    target = parameters(command_of(REFERENCE, tmp_path, ffn=96))
    base = BASE | {"model": BASE["model"] | {"ffn-hidden-size": 96}}
    for name in ("ccgqa", "mha", "gqa", "mla", "cca", "no-conv"):
        ffn = matched_ffn(base, VARIANTS[name], target, tmp_path, "cpu")
        assert (ffn == 96) == (name == REFERENCE)
        assert ffn % 2 == 0  # Megatron's warm-up of SwiGLU
        assert abs(parameters(command_of(name, tmp_path, ffn)) - target) <= TOLERANCE * target


def test_variants_and_seeds_are_what_a_recipe_says(tmp_path):
    content = sections(BASE, VARIANTS["gqa"], 7, 96)
    assert (content["megatron"]["seed"], content["model"]["ffn-hidden-size"]) == (7, 96)
    assert "seed" not in BASE["megatron"]


def test_a_run_that_is_named_twice_is_one_run(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE | {"model": BASE["model"] | {"ffn-hidden-size": 96}}))
    runs, _ = plan_runs(path, [], ["gqa", "ccgqa", "gqa"], [2, 1, 2], tmp_path / "runs")
    assert [(run.seed, run.variant) for run in runs] == [(2, "gqa"), (2, "ccgqa"), (1, "gqa"), (1, "ccgqa")]


def test_a_model_that_no_width_brings_to_the_target_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"model.ffn-hidden-size=352: no width .* mha the 1,000 parameters"):
        matched_ffn(BASE, VARIANTS["mha"], 1000, tmp_path, "cpu")


def test_heads_that_do_not_fill_the_width_are_refused():
    base = BASE | {"model": BASE["model"] | {"hidden-size": 160}}
    with pytest.raises(RecipeError, match="hidden-size=160 .* multiple of 64; hidden-size=128 works"):
        sections(base, VARIANTS["ccgqa"], 1, 64)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cca.qk_mean=false", "attention='megatron' with cca.qk_mean: .* leave them out"),
        ("zaya.router_hidden_size=24", "attention='megatron' with zaya"),
        ("model.mtp-num-layers=1", "attention='megatron' with .*mtp_num_layers"),
        ("megatron.context-parallel-size=2", "context_parallel_size=2 and packed documents or multi_latent"),
    ],
)
def test_a_baseline_refuses_what_needs_cca(setting, message, tmp_path):
    command_of("mla", tmp_path)
    with pytest.raises(RecipeError, match=message):
        build_command(load_recipe(tmp_path / "recipe.yaml", [setting, "launch.gpus_per_node=2"]), "cpu")


def runs_of(**losses: list[float]) -> list[dict]:
    return [
        {"variant": name, "seed": seed, "parameters": 100, "validation": [[1, 9.0], [2, loss]]}
        for name, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]


def test_mean_and_standard_error_are_those_of_the_seeds():
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / 3**0.5), 3)
    assert Estimate.of([1.5]) == Estimate(1.5, None, 1)


def test_differences_are_taken_seed_by_seed():
    """Seeds differ much more than variants here, and the difference is sharp all the same."""
    losses = final_losses(runs_of(mha=[2.0, 3.0, 4.0], gqa=[2.1, 3.1]))
    found = difference(losses, "gqa", "mha")
    assert (found.mean, found.count) == (pytest.approx(0.1), 2)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert difference(losses, "gqa", "mla") is None


@pytest.mark.parametrize(
    ("gqa", "verdict"),
    [
        ([2.1, 3.11, 4.1], "same"),
        ([1.9, 2.9, 3.91], "opposite"),
        ([2.2, 2.9, 4.1], "undecided"),
        ([2.1], "undecided"),
    ],
)
def test_the_papers_order_is_met_only_beyond_the_error(gqa, verdict):
    rows = (Row("MHA", "mha", 1.0), Row("GQA", "gqa", 2.0))
    losses = final_losses(runs_of(mha=[2.0, 3.0, 4.0], gqa=gqa))
    assert compare_with_paper(losses, rows) == [("MHA < GQA", verdict)]


def test_two_seeds_decide_only_what_is_far_beyond_their_error():
    assert not Estimate.of([0.1, 0.2]).differs_from_zero
    assert Estimate.of([0.1, 0.2, 0.15, 0.12]).differs_from_zero


def test_the_tables_show_every_variant_and_the_paper():
    runs = runs_of(**{name: [2.0 + 0.01 * number, 2.5] for number, name in enumerate(VARIANTS)})
    text = tables(runs)
    for row in (row for rows in TABLES.values() for row in rows):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row.label} |")]
        assert "| 100 | 2 |" in line
        assert row.paper is None or line.endswith(f"| {row.paper:g} |")


def test_the_documentation_has_the_tables_of_the_stored_losses():
    found = json.loads((ROOT / "benchmarks/results/quality/0.7m.json").read_text())
    assert tables(found["runs"]) in (ROOT / "docs/quality.md").read_text()
    (target,) = {run["parameters"] for run in found["runs"] if run["variant"] == REFERENCE}
    assert all(run["parameters"] == pytest.approx(target, rel=0.01) for run in found["runs"])


def test_the_ablation_ladder_falls_in_the_paper_as_parts_are_added():
    losses = [row.paper for row in TABLES["ablation"]]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 5


def test_generation_refuses_a_baseline(tmp_path):
    with pytest.raises(ValueError, match="attention='megatron': models with CCA are generated with here"):
        load_model(tmp_path, command_of("mha", tmp_path).args, 1, torch.float32)
