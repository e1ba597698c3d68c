"""The recipes for H100 clusters: each is what its name says, can run there, fits, and saves often enough."""

import functools
import re
from itertools import product
from pathlib import Path

import pytest

from cca_megatron.plan.hardware import GPUS
from cca_megatron.plan.memory import memory_per_gpu
from cca_megatron.plan.recipes import table
from cca_megatron.plan.shapes import model_from_args, parallel_from_args, run_from_args
from cca_megatron.plan.step import step_time
from cca_megatron.training.command import build_command
from cca_megatron.training.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = ("ccgqa_1b", "ccgqa_moe_1.5b", "ccgqa_7b", "zaya1_8b")
LENGTHS = {"4k": 2**12, "32k": 2**15, "128k": 2**17, "1m": 2**20}
TOKENS_PER_STEP = {8: 2**20, 16: 2**20, 64: 2**22, 512: 2**23}
# One node has no room for it (docs/recipes.md); two have.
NAMES = {f"{model}_{length}_{gpus}gpu" for model, length, gpus in product(MODELS, LENGTHS, (8, 64, 512))}
NAMES = sorted(NAMES - {"ccgqa_7b_1m_8gpu"} | {"ccgqa_7b_1m_16gpu"})
DOCUMENT = (CONFIGS.parent / "docs" / "recipes.md").read_text()
TABLE = r"<!-- python -m cca_megatron.plan.recipes configs/recipes/(\S+)_\*gpu.yaml -->\n((?:\|.*\n)+)"


@functools.cache
def recipe(name):
    return load_recipe(CONFIGS / "recipes" / f"{name}.yaml", [])


@functools.cache
def arguments(name):
    """As Megatron's own checks leave them: divisibility of batches, heads, sequences, experts, ranks."""
    return build_command(recipe(name), "cpu").args


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_there_is_one_for_every_combination():
    assert sorted(path.stem for path in (CONFIGS / "recipes").glob("*gpu.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_what_its_name_says(name):
    args = arguments(name)
    model, length, gpus = re.fullmatch(r"(.*)_(\d+[km])_(\d+)gpu", name).groups()
    assert args.seq_length == LENGTHS[length] <= args.max_position_embeddings
    assert args.world_size == int(gpus)
    assert args.global_batch_size * args.seq_length == TOKENS_PER_STEP[int(gpus)]
    assert recipe(name).output == Path(f"runs/{model}_{length}")
    # Tensor parallelism never leaves the NVLink of a node, and experts neither.
    assert recipe(name).launch.gpus_per_node == 8
    assert 8 % (args.tensor_model_parallel_size * args.expert_model_parallel_size) == 0


@pytest.mark.parametrize("name", NAMES)
def test_each_fits_into_the_memory_of_an_h100(name):
    assert memory_per_gpu(arguments(name)).total < GPUS["h100"].memory


@pytest.mark.parametrize("name", NAMES)
def test_each_saves_every_half_an_hour(name):
    """At the speed that the planner gives it; a slower run loses as much more."""
    args = arguments(name)
    step = step_time(model_from_args(args), parallel_from_args(args), run_from_args(args), GPUS["h100"])
    assert args.save_interval * step.seconds < 30 * 60
    assert args.save_interval <= args.train_iters


@pytest.mark.parametrize("name", NAMES)
def test_each_longer_context_starts_from_the_shorter(name):
    model, length = name.rsplit("_", 2)[:2]
    start = arguments(name).pretrained_checkpoint
    if model == "zaya1_8b" and length in ("4k", "32k"):
        assert start == "converted/zaya1_8b"  # the released weights
    elif length == "4k":
        assert start is None
    else:
        shorter = list(LENGTHS)[list(LENGTHS).index(length) - 1]
        assert start == f"{recipe(f'{model}_{shorter}_8gpu').checkpoints}"


@pytest.mark.parametrize("model", MODELS[:3])
def test_models_have_the_parameters_that_they_state(model):
    text = (CONFIGS / "models" / f"{model}.yaml").read_text()
    (stated,) = re.findall(r"(\d\.\d+) billion parameters", text)
    parts = model_from_args(arguments(f"{model}_4k_8gpu")).parts()
    assert sum(part.count for part in parts) == pytest.approx(float(stated) * 1e9, rel=0.005)


def test_the_mixture_uses_the_parameters_that_it_states():
    text = (CONFIGS / "models" / "ccgqa_moe_1.5b.yaml").read_text()
    (stated,) = re.findall(r"uses (\d\.\d+) billion", text)
    parts = model_from_args(arguments("ccgqa_moe_1.5b_4k_8gpu")).parts()
    assert sum(part.count * part.used for part in parts) == pytest.approx(float(stated) * 1e9, rel=0.01)


def test_the_largest_model_has_no_room_on_one_node_for_1m_tokens():
    """Why there is no ``ccgqa_7b_1m_8gpu``."""
    layout = ["megatron.tensor-model-parallel-size=4", "megatron.context-parallel-size=2"]
    path = CONFIGS / "recipes" / "ccgqa_7b_1m_16gpu.yaml"
    args = build_command(load_recipe(path, ["launch.nodes=1", *layout]), "cpu").args
    assert memory_per_gpu(args).total > GPUS["h100"].memory


@pytest.mark.parametrize("model", MODELS)
def test_the_document_shows_what_the_planner_says(model):
    shown = dict(re.findall(TABLE, DOCUMENT))
    assert set(shown) == set(MODELS)
    names = [name for name in NAMES if name.rsplit("_", 2)[0] == model]
    assert shown[model].strip() == table({name: arguments(name) for name in names})
