"""CCAConfig, presets, and one message for every setting that does not fit."""

import dataclasses
from types import SimpleNamespace

import pytest

from cca_megatron import CCAConfig
from cca_megatron.config import check_config, config_problems, preset, preset_names

FITS = SimpleNamespace(
    hidden_size=256,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    tensor_model_parallel_size=1,
)


def changed(**settings):
    return SimpleNamespace(**(vars(FITS) | settings))


def test_the_default_fits():
    assert config_problems(FITS, CCAConfig()) == []
    check_config(FITS, CCAConfig())


CP2 = {"context_parallel_size": 2}

# setting to change, what the message must say: setting and value, rule, a value that works
PROBLEMS = [
    ({"num_attention_heads": 9}, {}, "num_attention_heads=9: .* num_query_groups=2; .*=10 works"),
    (
        {"num_attention_heads": 12, "num_query_groups": 6, "tensor_model_parallel_size": 4},
        {},
        "num_query_groups=6: .* multiple or a divisor of tensor_model_parallel_size=4.*=2 works",
    ),
    (
        {"tensor_model_parallel_size": 4, "qk_clip": True},
        {},
        "qk_clip=True with num_query_groups=2 and .*=4: .*tensor_model_parallel_size=2 works",
    ),
    ({"num_query_groups": 1, "kv_channels": 5, "num_attention_heads": 1}, {}, "kv_channels=5 is odd.*=6"),
    ({"num_attention_heads": 0}, {}, "num_attention_heads=0: .* at least 1"),
    ({"kv_channels": -8}, {}, "kv_channels=-8: .* at least 1"),
    ({"num_query_groups": "2"}, {}, "num_query_groups='2': .*whole number"),
    ({"qk_layernorm": True}, {}, "qk_layernorm=True: CCA normalises .*; qk_layernorm=False works"),
    ({"multi_latent_attention": True}, {}, "multi_latent_attention=True.*=False works"),
    ({"attention_output_gate": True}, {}, "attention_output_gate=True"),
    ({"experimental_attention_variant": "dsa"}, {}, "experimental_attention_variant='dsa'.*None works"),
    (CP2 | {"hybrid_context_parallel": True}, {}, "hybrid_context_parallel=True.*=False works"),
    (CP2 | {"cp_comm_type": "a2a+p2p"}, {}, "cp_comm_type='a2a\\+p2p': .*'p2p' works"),
    (CP2 | {"attention_dropout": 0.1}, {}, "attention_dropout=0.1 .*attention_dropout=0 works"),
    (
        CP2 | {"window_size": (8, 0), "transformer_impl": "transformer_engine"},
        {},
        "window_size=.*cp_comm_type='p2p'.*cp_comm_type='all_gather' works",
    ),
    ({"context_parallel_size": 0}, {}, "context_parallel_size=0: .* at least 1"),
    (
        CP2 | {"cp_comm_type": "a2a", "num_attention_heads": 3, "num_query_groups": 3},
        {},
        "cp_comm_type='a2a' with 3 query heads .* 6; cp_comm_type='p2p' works",
    ),
    (
        CP2
        | {"cp_comm_type": ["p2p", "a2a"], "num_query_groups": 1, "transformer_impl": "transformer_engine"},
        {},
        "cp_comm_type='a2a' with 1 KV heads .*'p2p' works",
    ),
    (
        CP2 | {"mtp_num_layers": 1},
        {"packed_zigzag": "stream"},
        "mtp_num_layers=1 with packed .*--dataloader-inter-document-masking.*context_parallel_size=1 works",
    ),
    ({"softmax_type": "learnable"}, {}, "softmax_type='learnable': .*'vanilla' only"),
    ({}, {"packed_zigzag": "batch"}, "packed_zigzag='batch': must be 'document' or 'stream'"),
    ({}, {"conv_kernel_sizes": (0, 2)}, r"conv_kernel_sizes=\(0, 2\): .* at least 1; \(2, 2\) works"),
    ({}, {"conv_kernel_sizes": (2, 1.5)}, r"conv_kernel_sizes=\(2, 1.5\)"),
    ({}, {"conv_kernel_sizes": (2,)}, r"conv_kernel_sizes=\(2,\): must be two sizes"),
    ({}, {"conv_kernel_sizes": 2}, "conv_kernel_sizes=2: must be two sizes"),
    ({}, {"temperature": "log"}, "temperature='log': must be 'linear' or 'exp'"),
    ({}, {"temperature_init": float("nan")}, "temperature_init=nan: must be a finite number"),
    ({}, {"temperature_init": 0}, "temperature_init=0 .*keys would vanish.*1.0 works"),
    ({}, {"qk_mean": 1}, "qk_mean=1: must be true or false"),
]


@pytest.mark.parametrize(("settings", "cca", "message"), PROBLEMS, ids=lambda x: str(x)[:40])
def test_each_problem_has_one_message(settings, cca, message):
    problems = config_problems(changed(**settings), CCAConfig(**cca))
    assert len(problems) == 1
    with pytest.raises(ValueError, match=message):
        check_config(changed(**settings), CCAConfig(**cca))


def test_all_problems_are_named_at_once():
    problems = config_problems(
        changed(num_attention_heads=9, qk_layernorm=True), CCAConfig(conv_kernel_sizes=(0, 0))
    )
    assert [p.split("=")[0] for p in problems] == ["conv_kernel_sizes", "num_attention_heads", "qk_layernorm"]


def test_heads_and_groups_must_both_divide_over_tensor_parallel_ranks():
    groups, heads = config_problems(changed(tensor_model_parallel_size=3), CCAConfig())
    assert groups.startswith(
        "num_query_groups=2: must be a multiple or a divisor of tensor_model_parallel_size=3"
    )
    assert heads.startswith("num_attention_heads=8: must be a multiple of tensor_model_parallel_size=3")


@pytest.mark.parametrize(
    "bad",
    [
        {"num_attention_heads": 9},
        {"num_query_groups": 4, "tensor_model_parallel_size": 6},
        {"qk_layernorm": True},
    ],
)
def test_the_value_in_the_message_works(bad):
    """Take the last word of each message at its word."""
    for message in config_problems(changed(**bad), CCAConfig()):
        name, value = message.split("; ")[-1].removesuffix(" works").split(", so ")[0].split("=")
        bad = bad | {name: {"False": False}.get(value) if value == "False" else int(value)}
    assert not config_problems(changed(**bad), CCAConfig())


def test_a_window_that_is_none_is_no_window():
    assert not config_problems(changed(**CP2, window_size=(-1, 0)), CCAConfig())


def test_odd_sizes_fit_without_the_value_shift():
    odd = changed(num_query_groups=1, kv_channels=5)
    assert not config_problems(odd, CCAConfig(value_shift=False))


def test_an_exponential_temperature_may_start_at_zero():
    assert CCAConfig(temperature="exp").initial_temperature == 0.0
    assert not config_problems(FITS, CCAConfig(temperature="exp", temperature_init=0.0))
    assert CCAConfig().initial_temperature == 1.0


def test_it_is_frozen_and_hashable():
    cca = CCAConfig(conv_kernel_sizes=[3, 2])
    assert cca.conv_kernel_sizes == (3, 2)
    assert hash(cca) == hash(CCAConfig(conv_kernel_sizes=(3, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cca.qk_mean = False


def test_an_unknown_setting_names_the_nearest():
    assert CCAConfig.from_mapping({"temperature": "exp"}) == CCAConfig(temperature="exp")
    with pytest.raises(ValueError, match=r"unknown CCA setting 'temprature'; did you mean 'temperature'"):
        CCAConfig.from_mapping({"temprature": "exp"})


# C1 = hidden / (heads * dim), C2 = hidden / (groups * dim), from the papers
COMPRESSION = {
    "zaya1_8b": (2, 8),
    "ccgqa_2x8x": (2, 8),
    "ccgqa_1x4x": (1, 4),
    "cca_4x": (4, 4),
    "cca_8x": (8, 8),
}


@pytest.mark.parametrize(("hidden", "dim"), [(2048, 128), (4096, 64), (256, 16)])
@pytest.mark.parametrize("name", COMPRESSION)
def test_presets_compress_as_their_names_say(name, hidden, dim):
    heads, cca = preset(name, hidden, dim)
    queries, keys = COMPRESSION[name]
    assert hidden == queries * heads["num_attention_heads"] * dim
    assert hidden == keys * heads["num_query_groups"] * dim
    assert not config_problems(changed(hidden_size=hidden, **heads), cca)


def test_zaya1_has_its_released_size_by_default():
    heads, _ = preset("zaya1_8b")
    assert heads == {"num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 128}


def test_presets_refuse_by_name():
    assert set(preset_names()) == set(COMPRESSION)
    with pytest.raises(ValueError, match="unknown preset 'ccgqa_2x8'; did you mean 'ccgqa_2x8x'"):
        preset("ccgqa_2x8")
    with pytest.raises(ValueError, match=r"hidden_size=2000 with head_dim=128.*hidden_size=2048 works"):
        preset("zaya1_8b", 2000)
