"""Recipes: every setting arrives at Megatron, and a mistake is one message before anything starts."""

import re
from pathlib import Path

import pytest
import yaml

from cca_megatron import CCAConfig
from cca_megatron.training.arguments import cca_config_from_args
from cca_megatron.training.command import build_command, check_data
from cca_megatron.training.model import model_config_from_args
from cca_megatron.training.recipe import RecipeError, load_recipe
from cca_megatron.training.session import check_machine, prepare_command

QUICKSTART = Path(__file__).parents[2] / "configs" / "recipes" / "quickstart.yaml"
SMALL = {
    "model": {
        "preset": "ccgqa_1x4x",
        "hidden-size": 32,
        "kv-channels": 4,
        "num_layers": 2,
        "max-position-embeddings": 16,
    },
    "megatron": {
        "seq-length": 16,
        "micro-batch-size": 1,
        "train-iters": 4,
        "lr": 1e-3,
        "mock-data": True,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": 64,
        "eval-iters": 0,
    },
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(content, path="recipe.yaml") -> Path:
    Path(path).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return Path(path)


def small(**sections):
    """The small recipe with settings added to its sections."""
    content = {name: dict(settings) for name, settings in SMALL.items()}
    for name, settings in sections.items():
        if isinstance(settings, dict):
            content.setdefault(name, {}).update(settings)
        else:
            content[name] = settings
    return content


def command(*overrides, **sections):
    return build_command(load_recipe(written(small(**sections)), list(overrides)), "cpu")


def test_settings_arrive_at_megatron():
    args = command("megatron.lr=0.002", megatron={"adam_beta2": 0.9}).args
    assert (args.lr, args.adam_beta2, args.num_layers) == (0.002, 0.9, 2)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (8, 2, 4)
    assert args.group_query_attention
    assert args.transformer_impl == "local"
    assert args.distributed_backend == "gloo"
    assert args.eval_interval  # Megatron divides by it


def test_flags_lists_and_nothing():
    settings = {
        "swiglu": True,
        "bf16": False,
        "add_bias_linear": False,  # as the attribute that --disable-bias-linear turns off
        "num-experts": 4,
        "moe-layer-freq": [0, 1],
        "window-size": [-1, 0],
        "moe-router-load-balancing-type": ["aux_loss", "seq_aux_loss"],
        "moe-aux-loss-coeff": [0.1, 0.2],
        "save": None,
    }
    args = command(megatron=settings).args
    assert args.swiglu
    assert not args.bf16
    assert not args.add_bias_linear
    assert args.moe_layer_freq == [0, 1]
    assert args.window_size == (-1, 0)
    assert args.moe_aux_loss_coeff == [0.1, 0.2]
    assert args.save is None


@pytest.mark.parametrize(
    "cca",
    [
        {},
        {"conv_kernel_sizes": [3, 1], "temperature": "exp", "temperature_init": 0.5},
        {"conv0": False, "conv-bias": False, "reset_at_document_start": False, "recompute_mix": True},
    ],
)
def test_cca_settings_survive_the_command_line(cca):
    expected = CCAConfig.from_mapping({k.replace("-", "_"): v for k, v in cca.items()})
    args = command(cca=cca).args
    assert cca_config_from_args(args) == expected
    args.padded_vocab_size, args.mtp_num_layers = args.vocab_size, 1  # as a started run has them
    model = model_config_from_args(args)
    block = model.transformer_layer_spec(model, pp_rank=0)
    assert [layer.submodules.self_attention.params["cca"] for layer in block.layer_specs] == [expected] * 2
    assert model.cca == expected
    args.hybrid_layer_pattern = "*-"
    stack = model_config_from_args(args).hybrid_stack_spec.submodules
    assert stack.attention_layer.submodules.self_attention.params["cca"] == expected


def test_output_and_data_become_arguments():
    made = command(
        output="runs/x", data={"prefix": "data/c", "tokenizer": "bytes"}, megatron={"mock-data": False}
    )
    args = made.args
    assert (args.save, args.load) == ("runs/x/checkpoints", "runs/x/checkpoints")
    assert args.tensorboard_dir == "runs/x/tensorboard"
    assert args.data_path == ["data/c"]
    assert args.vocab_size == 64  # an explicit argument wins over what the tokenizer implies


def test_the_printed_command_is_the_one_that_runs():
    made = command(launch={"gpus_per_node": 2}, megatron={"moe-layer-freq": [0, 1], "num-experts": 2})
    text = made.text().replace("\\\n", "")
    assert text.startswith("torchrun --nproc-per-node=2 -m cca_megatron.training.pretrain ")
    import shlex

    assert shlex.split(text)[4:] == made.argv
    assert made.torchrun()[-len(made.argv) :] == made.argv
    assert made.args.world_size == 2


def test_overrides_replace_either_spelling():
    recipe = load_recipe(
        written(small()), ["model.num-layers=3", "output=elsewhere", "cca.temperature=exp", "launch.nodes=2"]
    )
    assert recipe.arguments["num-layers"] == 3
    assert recipe.output == Path("elsewhere")
    assert recipe.cca.temperature == "exp"
    assert recipe.world_size == 2


def test_a_preset_alone_has_zaya1s_sizes():
    recipe = load_recipe(written({"model": {"preset": "zaya1_8b"}}), [])
    assert recipe.arguments == {
        "hidden-size": 2048,
        "num-attention-heads": 8,
        "num-query-groups": 2,
        "kv-channels": 128,
    }


REFUSED = {
    "not valid YAML": "model: [1, 2",
    "must be a mapping with the sections": "just text",
    "unknown section 'modl'; did you mean 'model'": {"modl": {}},
    "unknown CCA setting 'temprature'; did you mean 'temperature'": {"cca": {"temprature": "exp"}},
    "unknown launch setting 'gpu_per_node'; did you mean 'gpus_per_node'": {"launch": {"gpu_per_node": 2}},
    "launch.nodes=0: must be a whole number": {"launch": {"nodes": 0}},
    "data.prefix=5: must be text": {"data": {"prefix": 5}},
    "unknown preset 'zaya': did|unknown preset 'zaya'; did you mean 'zaya1_8b'": {
        "model": {"preset": "zaya"}
    },
    "hidden_size=100 with head_dim=128: .* hidden_size=1024 works": {
        "model": {"preset": "cca_8x", "hidden-size": 100}
    },
    "cca.packed_zigzag: follows from how": {"cca": {"packed_zigzag": "stream"}},
    "cca-temperature: is a CCA setting; set cca.temperature": {"megatron": {"cca-temperature": "exp"}},
    "data.inputs=5: must be a path or a list of paths": {"data": {"inputs": 5}},
    "lr is set twice": {"model": {"lr": 1}, "megatron": {"lr": 2}},
    "megatron: must be a mapping": {"megatron": [1]},
    "output=5: must be a folder": {"output": 5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_malformed_recipe_is_refused(message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(REFUSED[message]), [])


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model:\n  hidden-size: 32\n  num-layers: 2\n  hidden-size: 64\n")
    with pytest.raises(RecipeError, match="hidden-size is set twice, line 2 and after"):
        load_recipe(path, [])


def test_text_that_yaml_would_read_otherwise_needs_quotes():
    with pytest.raises(RecipeError, match="needs quotes of its own: 'model.hybrid-layer-pattern=\"\\*E\"'"):
        load_recipe(written(small()), ["model.hybrid-layer-pattern=*E"])


def test_nothing_means_the_default():
    recipe = load_recipe(
        written(small()), ["data.inputs=null", "data.prefix=null", "model.num-query-groups=null"]
    )
    assert (recipe.data.inputs, recipe.data.prefix) == ([], None)
    assert "group-query-attention" not in recipe.all_arguments()


def test_mock_data_replaces_the_dataset():
    assert command("megatron.mock-data=true", data={"prefix": "d"}).args.data_path is None


def test_values_may_begin_with_a_minus():
    made = command(megatron={"wandb-exp-name": "-x"}, cca={"temperature_init": -1e-5})
    assert made.args.wandb_exp_name == "-x"
    assert made.args.cca_temperature_init == -1e-5
    assert "--cca-temperature-init=-1e-05" in made.text()


def test_a_missing_recipe_is_named():
    with pytest.raises(RecipeError, match=r"cannot read recipe /.*nothere.yaml: No such file"):
        load_recipe("nothere.yaml", [])


@pytest.mark.parametrize("override", ["lr=1", "megatron.lr", ".lr=1", "megatron.=1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(RecipeError, match="must be section.key=value"):
        load_recipe(written(small()), [override])


ROPE = {"position-embedding-type": "rope"}
CONTEXT = {"context-parallel-size": 2, "attention-dropout": 0}
WRONG = {
    "unknown Megatron argument 'seq-lenth'; did you mean 'seq-length'": {"megatron": {"seq-lenth": 1}},
    "swiglu='yes': is a flag; use true or false": {"megatron": {"swiglu": "yes"}},
    "invalid int value: 'many'": {"megatron": {"num-workers": "many"}},
    "invalid choice: 'tanh'": {"megatron": {"lr-decay-style": "tanh"}},
    "num_attention_heads=9: must be a multiple of num_query_groups=2": {"model": {"num-attention-heads": 9}},
    "num_query_groups=2: must be a multiple or a divisor of tensor_model_parallel_size=3": {
        "megatron": {"tensor-model-parallel-size": 3},
        "launch": {"gpus_per_node": 3},
    },
    "conv_kernel_sizes=\\(0, 2\\)": {"cca": {"conv_kernel_sizes": [0, 2]}},
    "cp_comm_type='a2a\\+p2p': .*'p2p' works": {
        "megatron": {"context-parallel-size": 2, "cp-comm-type": ["a2a+p2p"]},
        "launch": {"gpus_per_node": 2},
    },
    "spec=.*this entry builds CCA by itself": {"megatron": {"spec": ["a", "b"]}},
    "reset_attention_mask.*--dataloader-inter-document-masking": {"megatron": {"reset-attention-mask": True}},
    "fim_data: this entry reads": {"megatron": {"fim-data": True}},
    "sft with dataloader_inter_document_masking": {
        "megatron": {"sft": True, "dataloader-inter-document-masking": True}
    },
    "seq_length=16 with context_parallel_size=3: .* 6 chunks; seq_length=18 works": {
        "megatron": {"context-parallel-size": 3}
    },
    "warm-up of 10 and decay over 4": {"megatron": {"lr-warmup-iters": 10}},
    "world size 1 .* must be a multiple of 2, .*pipeline_model_parallel_size=2; 2 works": {
        "megatron": {"pipeline-model-parallel-size": 2}
    },
    "micro_batch_size=0: must be a whole number of at least 1": {"megatron": {"micro-batch-size": 0}},
    "train_iters=None: must be a whole number": {"megatron": {"train-iters": None}},
    "seq_length=0: must be a whole number": {"megatron": {"seq-length": 0}},
    "num_layers=-1: must be a whole number": {"model": {"num_layers": -1}},
    "lr=None: the learning rate must be set": {"megatron": {"lr": None}},
    "split='foo': must be up to three weights.* split=95,5,0 works": {"megatron": {"split": "foo"}},
    "bf16 and fp16: choose one": {"megatron": {"bf16": True, "fp16": True}},
    "global_batch_size=6: must be a multiple of micro_batch_size=4 \\* 1 data-parallel ranks; .*=8 works": {
        "megatron": {"micro-batch-size": 4, "global-batch-size": 6}
    },
    r"moe_layer_freq=\[0, 1, 1\]: .*for each of the 2 layers": {
        "megatron": {"num-experts": 4, "moe-layer-freq": [0, 1, 1]}
    },
    r"moe_layer_freq=\[0, 2\]: ": {"megatron": {"num-experts": 4, "moe-layer-freq": [0, 2]}},
    "moe_layer_freq=0: ": {"megatron": {"num-experts": 4, "moe-layer-freq": 0}},
    "moe_router_topk=5: a token cannot visit more than num_experts=4": {
        "megatron": {"num-experts": 4, "moe-router-topk": 5}
    },
    "moe_router_topk=0: must be a whole number": {"megatron": {"num-experts": 4, "moe-router-topk": 0}},
    "world size 1 .* must be a multiple of 2, expert_model_parallel_size=2": {
        "megatron": {"num-experts": 4, "expert-model-parallel-size": 2}
    },
    "num_experts=3: must be a multiple of expert_model_parallel_size=2": {
        "megatron": {"num-experts": 3, "expert-model-parallel-size": 2},
        "launch": {"gpus_per_node": 2},
    },
    "kv_channels=5: RoPE turns channels in pairs; kv_channels=6 works": {
        "model": {"preset": None, "num-attention-heads": 4, "num-query-groups": 2, "kv-channels": 5} | ROPE
    },
    "rotary_percent=0.0 with kv_channels=4: RoPE would turn no channel": {
        "model": {"rotary-percent": 0} | ROPE
    },
    "softmax_type='off-by-one': the local core attention": {"megatron": {"softmax-type": "off-by-one"}},
    r"cca.conv_kernel_sizes=\(2, 2, 2\): must be two sizes": {"cca": {"conv_kernel_sizes": [2, 2, 2]}},
    "cca.conv_kernel_sizes=2: must be two sizes": {"cca": {"conv_kernel_sizes": 2}},
    "cca.conv0=0: must be true or false": {"cca": {"conv0": 0}},
    "cca.temperature=None: must be 'linear' or 'exp'": {"cca": {"temperature": None}},
    "output=.*: is a file; choose a folder": {"output": __file__},
    "seq_length=15 with sequence_parallel: must be a multiple of 2, .*seq_length=16 works": {
        "megatron": {"seq-length": 15, "tensor-model-parallel-size": 2, "sequence-parallel": True},
        "launch": {"gpus_per_node": 2},
    },
    "num_experts=4 with tensor_model_parallel_size=2: .*sequence_parallel=true works": {
        "megatron": {"num-experts": 4, "tensor-model-parallel-size": 2},
        "launch": {"gpus_per_node": 2},
    },
    "mtp_num_layers=1 with context_parallel_size=2 and masked tokens": {
        "megatron": {"mtp-num-layers": 1, "sft": True} | CONTEXT,
        "launch": {"gpus_per_node": 2},
    },
    "mtp_num_layers=1 with packed documents that cross": {
        "megatron": {"mtp-num-layers": 1, "dataloader-inter-document-masking": True} | CONTEXT,
        "launch": {"gpus_per_node": 2},
    },
    "seq_aux_loss with packed documents, micro_batch_size=2 and context": {
        "megatron": {
            "num-experts": 4,
            "moe-router-load-balancing-type": "seq_aux_loss",
            "micro-batch-size": 2,
        }
        | {"sft": True}
        | CONTEXT,
        "launch": {"gpus_per_node": 2},
    },
    "mtp_num_layers=1 with pipeline_model_parallel_size=2 and checkpoints: .*untie": {
        "megatron": {"mtp-num-layers": 1, "pipeline-model-parallel-size": 2, "save": "x"}
    },
    "use_megatron_fsdp with save: .*install Transformer Engine": {
        "megatron": {"use-megatron-fsdp": True, "save": "x"}
    },
    "cuda_graph_impl='local' with packed documents": {"megatron": {"cuda-graph-impl": "local", "sft": True}},
    # Megatron's own rules, with and without a message of their own
    "Megatron says: max_position_embeddings": {"megatron": {"seq-length": 64}},
    "Megatron says: the rule `assert args.global_batch_size > 0` does not hold": {
        "megatron": {"global-batch-size": 0}
    },
    "Megatron says: Please use --moe-router-pre-softmax": {
        "megatron": {"num-experts": 2, "moe-router-topk": 1}
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_a_recipe_that_cannot_run_is_refused(message, capsys):
    with pytest.raises(RecipeError, match=message):
        command(**WRONG[message])
    assert capsys.readouterr().out == ""  # not buried in Megatron's listing of arguments


def test_groups_need_megatrons_flag():
    """In our entry as well as in a recipe: Megatron ignores --num-query-groups without it."""
    with pytest.raises(RecipeError, match="Megatron ignores it without --group-query-attention"):
        command(megatron={"group-query-attention": False})


@pytest.mark.parametrize("name", ["micro-batch-size", "eval-micro-batch-size"])
def test_packed_pipelines_need_single_samples(name):
    settings = {
        "dataloader-inter-document-masking": True,
        "pipeline-model-parallel-size": 2,
        name: 2,
    }
    with pytest.raises(RecipeError, match="micro_batch_size=2 .*with packed documents"):
        command(megatron=settings, launch={"gpus_per_node": 2})


def test_all_problems_come_in_one_message():
    with pytest.raises(RecipeError) as error:
        command(model={"num-attention-heads": 9}, megatron={"reset-attention-mask": True})
    assert str(error.value).count("\n  - ") == 2


def test_missing_data_is_named():
    real = {"mock-data": False}
    with pytest.raises(RecipeError, match="no data: set data.prefix"):
        check_data(command(megatron=real))
    with pytest.raises(
        RecipeError, match=r"no dataset at data/c: /.*c.bin and /.*c.idx missing.*data prepare"
    ):
        check_data(command(megatron=real, data={"prefix": "data/c"}))
    check_data(command())  # mock data needs none


def test_a_train_command_runs_on_one_machine():
    """And ``--print-args``, which the message recommends, shows the others' part."""
    made, device = prepare_command(written(small(launch={"nodes": 2})), [])
    with pytest.raises(RecipeError, match=r"launch.nodes=2: .*--print-args"):
        check_machine(made.recipe, device)
    assert "--nnodes" in made.text()


@pytest.mark.parametrize("choice", ["gpu", "cuda"])
def test_a_wrong_device_is_named(monkeypatch, choice):
    monkeypatch.setenv("CCA_DEVICE", choice)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"CCA_DEVICE={choice}: .*cpu"):
        prepare_command(written(small()), [])


def test_the_quickstart_recipe_is_valid():
    """And means what its comments say."""
    made = build_command(load_recipe(QUICKSTART, []), "cpu")
    args = made.args
    assert (args.num_attention_heads, args.num_query_groups) == (8, 2)
    assert args.seq_length >= 512
    assert (args.world_size, args.expert_model_parallel_size) == (2, 2)
    assert sorted(set(args.moe_layer_freq)) == [0, 1]
    comment = re.search(r"cca-megatron train (\S+)", QUICKSTART.read_text())
    assert comment is not None
    assert (QUICKSTART.parents[2] / comment[1]) == QUICKSTART
