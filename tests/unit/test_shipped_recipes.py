"""What is shipped under configs can run, and recipes can build on each other and on ZAYA1's parts."""

from pathlib import Path

import pytest
import yaml

from cca_megatron.training.arguments import zaya_settings_from_args
from cca_megatron.training.command import build_command
from cca_megatron.training.recipe import RecipeError, load_recipe
from cca_megatron.zaya.settings import ZayaSettings

CONFIGS = Path(__file__).parents[2] / "configs"
# Those for clusters are in test_cluster_recipes.py.
RECIPES = [CONFIGS / "recipes" / "quickstart.yaml", CONFIGS / "models" / "zaya1_tiny.yaml"]
BASE = """
model: {preset: ccgqa_1x4x, hidden-size: 32, kv-channels: 4, num-layers: 2, max_position_embeddings: 16}
megatron: {seq-length: 16, micro-batch-size: 1, train-iters: 4, lr: 1.0e-3, mock-data: true,
           tokenizer-type: NullTokenizer, vocab-size: 64, num-experts: 4, moe-router-topk: 1,
           moe-router-pre-softmax: true, moe-router-load-balancing-type: none}
"""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_can_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = build_command(load_recipe(path, []), "cpu").args
    assert args.world_size == args.data_parallel_size * (
        args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size
    )


def test_zaya1_8b_has_the_released_sizes():
    from cca_megatron.hf.tensors import Sizes, tensor_maps

    args = build_command(load_recipe(CONFIGS / "recipes" / "zaya1_8b_4k_8gpu.yaml", []), "cpu").args
    assert (args.num_layers, args.hidden_size, args.num_experts) == (40, 2048, 16)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (8, 2, 128)
    sizes = Sizes(
        layers=args.num_layers,
        hidden=args.hidden_size,
        query_heads=args.num_attention_heads,
        groups=args.num_query_groups,
        head_dim=args.kv_channels,
        kernel_sizes=args.cca_conv_kernel_sizes,
        experts=args.num_experts,
        expert_hidden=args.moe_ffn_hidden_size,
        router_hidden=args.zaya_router_hidden_size,
        vocab=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
    )
    import math

    parameters = sum(math.prod(m.shape) for m in tensor_maps(sizes))
    assert parameters == pytest.approx(8.84e9, rel=0.001)  # as counted from the published shapes


def written(path, text):
    path.write_text(text)
    return path


def test_a_recipe_extends_another(tmp_path):
    written(tmp_path / "base.yaml", BASE)
    top = "extends: base.yaml\nmegatron: {train_iters: 9, seq-length: null}\noutput: runs/top\nzaya:\n"
    recipe = load_recipe(written(tmp_path / "top.yaml", top), ["megatron.lr=0.5"])
    assert recipe.arguments["train_iters".replace("_", "-")] == 9
    assert recipe.arguments["seq-length"] is None
    assert recipe.arguments["micro-batch-size"] == 1
    assert recipe.arguments["lr"] == 0.5
    assert recipe.output == Path("runs/top")
    assert recipe.zaya is None


def test_of_several_that_a_recipe_extends_a_later_one_wins(tmp_path):
    written(tmp_path / "base.yaml", BASE)
    written(tmp_path / "longer.yaml", "megatron: {train-iters: 8, lr: 0.5}\nlaunch: {nodes: 2}\n")
    top = "extends: [base.yaml, longer.yaml]\nmegatron: {train_iters: 9}\n"
    recipe = load_recipe(written(tmp_path / "top.yaml", top), [])
    assert (recipe.arguments["train-iters"], recipe.arguments["lr"]) == (9, 0.5)
    assert (recipe.arguments["micro-batch-size"], recipe.launch.nodes) == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: missing.yaml", "cannot read recipe .*missing.yaml"),
        ("extends: top.yaml", "must be another recipe's path"),
        ("extends: [top.yaml]", "must be another recipe's path"),
        ("extends: 3", "must be another recipe's path"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path / "top.yaml", text), [])


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("zaya: {}", ZayaSettings()),
        ("zaya: true", ZayaSettings()),
        ("zaya: false", None),
        (
            "zaya: {router-hidden-size: 8, skip_class: false, padding_token: 3, balancing_rate: 0}",
            ZayaSettings(router_hidden_size=8, skip_class=False, padding_token=3, balancing_rate=0),
        ),
        ("zaya: {router: linear}", ZayaSettings(router="linear")),
    ],
    ids=str,
)
def test_zaya_settings_survive_the_command_line(tmp_path, section, expected):
    recipe = load_recipe(written(tmp_path / "r.yaml", BASE + section), [])
    assert zaya_settings_from_args(build_command(recipe, "cpu").args) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zaya": {"router_width": 3}}, "unknown ZAYA setting 'router_width'; did you mean"),
        ({"zaya": {"router_hidden_size": 0}}, "zaya: router_hidden_size=0"),
        ({"zaya": {}, "megatron": {"hybrid-layer-pattern": "*-*-", "num-experts": None}}, "zaya with hybrid"),
        ({"megatron": {"zaya-skip-class": True}}, "zaya-skip-class: is a setting of the section zaya"),
        ({"cca": {"window_rotary_base": 100}}, "no layer has a window"),
        (
            {
                "zaya": {},
                "megatron": {
                    "pipeline-model-parallel-size": 2,
                    "pipeline-model-parallel-layout": "Ett|L",
                },
                "launch": {"gpus_per_node": 2},
            },
            "a layout with a 't' in every part works",
        ),
        (
            {
                "zaya": {},
                "megatron": {
                    "pipeline-model-parallel-size": 4,
                    "pipeline-model-parallel-layout": "E|(t|)*2L",
                },
                "launch": {"gpus_per_node": 4},
            },
            "a layout with a 't' in every part works",
        ),
        (
            {
                "megatron": {
                    "padded-vocab-size": 65,
                    "tensor-model-parallel-size": 2,
                    "sequence-parallel": True,
                },
                "launch": {"gpus_per_node": 2},
            },
            "padded_vocab_size=66 works",
        ),
    ],
    ids=str,
)
def test_mistakes_are_named(tmp_path, change, message):
    content = yaml.safe_load(BASE)
    for section, settings in change.items():
        content.setdefault(section, {}).update(settings)
    with pytest.raises(RecipeError, match=message):
        build_command(load_recipe(written(tmp_path / "r.yaml", yaml.safe_dump(content)), []), "cpu")


def test_a_layout_with_layers_in_every_stage_can_run(tmp_path):
    settings = ["pipeline-model-parallel-size=4", "pipeline-model-parallel-layout=Et|(t|)*2tL"]
    overrides = [f"megatron.{setting}" for setting in settings]
    overrides += ["model.num-layers=4", "launch.gpus_per_node=4"]
    recipe = load_recipe(written(tmp_path / "r.yaml", BASE + "zaya: {}\n"), overrides)
    assert build_command(recipe, "cpu").args.pipeline_model_parallel_size == 4


def test_fp32_weights_need_no_fp32_residual(tmp_path):
    """``bf16: auto`` may turn out fp32, where Megatron refuses to be told."""
    text = BASE + "zaya: {}\n"
    overrides = ["megatron.fp32-residual-connection=true", "megatron.bf16=false"]
    recipe = load_recipe(written(tmp_path / "r.yaml", text), overrides)
    assert not build_command(recipe, "cpu").args.fp32_residual_connection
    recipe = load_recipe(tmp_path / "r.yaml", [overrides[0], "megatron.bf16=true"])
    assert build_command(recipe, "cpu").args.fp32_residual_connection
