"""ZAYA's configuration in ``transformers`` and in Megatron.

Nothing here needs ``transformers``: a configuration is its ``config.json``, or anything with those names.
"""

from collections.abc import Mapping
from typing import Any

from cca_megatron._compat import is_layer_window_attention
from cca_megatron.config import CCAConfig
from cca_megatron.zaya.settings import ZayaSettings

FULL, SLIDING = "hybrid", "hybrid_sliding"
"""The two types of layers."""
_ARCHITECTURE = "ZayaForCausalLM"


class ConversionError(ValueError):
    """Weights or a configuration that cannot be converted; the message says which and why."""


def config_from_hf(hf_config: Any) -> tuple[dict[str, Any], CCAConfig]:
    """Megatron's settings for a ZAYA configuration.

    Args:
        hf_config: a ``transformers.ZayaConfig``, or the mapping in its ``config.json``.

    Returns:
        Megatron's settings under the names of its arguments (``num_layers``, ``kv_channels``...), with
        ZAYA's parts as ``zaya`` and ``zaya_*``, and the CCA settings. Both together are what a recipe's
        sections ``model``, ``zaya`` and ``cca`` say; :func:`cca_megatron.hf.zaya_model` builds from them.

    Raises:
        ConversionError: the configuration asks for something that Megatron's model does not have.
    """
    config = _values(hf_config)
    _refuse(config)
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [FULL] * layers
    ropes = _rope_parameters(config, kinds)
    window = config.get("sliding_window") if SLIDING in kinds else None
    main = ropes.get(FULL) or ropes[SLIDING]
    settings: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["moe_intermediate_size"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "num_experts": config["num_experts"],
        "moe_layer_freq": 1,
        "moe_router_topk": config.get("num_experts_per_tok", 1),
        "moe_router_pre_softmax": True,  # Megatron asks for it with one expert per token
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "swiglu": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "add_bias_linear": False,
        "fp32_residual_connection": True,
        "position_embedding_type": "rope",
        "rotary_percent": main.get("partial_rotary_factor", 1.0),
        "rotary_base": int(main["rope_theta"]),
        "max_position_embeddings": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "attention_dropout": float(config.get("attention_dropout", 0.0)),
        "hidden_dropout": 0.0,
        "init_method_std": config.get("initializer_range", 0.02),
        "zaya": True,
        "zaya_router_hidden_size": config["router_hidden_size"],
        "zaya_padding_token": config.get("pad_token_id"),
    }
    own_base = None
    if window is not None:
        # transformers counts the token itself, Megatron the tokens before it.
        settings["window_size"] = (window - 1, 0)
        settings["window_attn_skip_freq"] = [int(kind == SLIDING) for kind in kinds]
        base = ropes[SLIDING]["rope_theta"]
        own_base = base if base != settings["rotary_base"] else None
    cca = CCAConfig(
        conv_kernel_sizes=(config.get("cca_time0", 2), config.get("cca_time1", 2)),
        window_rotary_base=own_base,
    )
    return settings, cca


def zaya_settings(settings: Mapping[str, Any]) -> ZayaSettings:
    """ZAYA's parts among settings, or parsed arguments as a mapping, with the prefix ``zaya_``."""
    prefix = "zaya_"
    named = {name.removeprefix(prefix): v for name, v in settings.items() if name.startswith(prefix)}
    return ZayaSettings.from_mapping(named)


def config_to_hf(settings: Mapping[str, Any], cca: CCAConfig) -> dict[str, Any]:
    """The ``config.json`` of a model with these settings; the inverse of :func:`config_from_hf`.

    Args:
        settings: by the names of Megatron's arguments, or its parsed arguments as a mapping.
        cca: the CCA settings.

    Raises:
        ConversionError: the model has something that ``transformers``' ZAYA has not.
    """
    zaya = zaya_settings(settings)
    _refuse_megatron(settings, cca, zaya)
    layers, base = settings["num_layers"], settings["rotary_base"]
    window, pattern = settings.get("window_size"), settings.get("window_attn_skip_freq")
    kinds = [
        SLIDING if is_layer_window_attention(window, pattern, number) else FULL
        for number in range(1, layers + 1)
    ]
    bases = {FULL: base, SLIDING: cca.window_rotary_base or base}
    ropes = {
        kind: {
            "rope_type": "default",
            "rope_theta": float(bases[kind]),
            "partial_rotary_factor": settings["rotary_percent"],
        }
        for kind in (FULL, SLIDING)
    }
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "zaya",
        "vocab_size": settings.get("vocab_size") or settings["padded_vocab_size"],
        "hidden_size": settings["hidden_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": settings["num_attention_heads"],
        "num_key_value_heads": settings.get("num_query_groups") or settings["num_attention_heads"],
        "head_dim": settings["kv_channels"],
        "hidden_act": "silu",
        "max_position_embeddings": settings["max_position_embeddings"],
        "initializer_range": settings.get("init_method_std", 0.02),
        "rms_norm_eps": settings["layernorm_epsilon"],
        "tie_word_embeddings": not settings.get("untie_embeddings_and_output_weights", False),
        "rope_parameters": ropes,
        "sliding_window": window[0] + 1 if window else None,
        "attention_dropout": settings.get("attention_dropout", 0.0),
        "moe_intermediate_size": settings.get("moe_ffn_hidden_size") or settings["ffn_hidden_size"],
        "num_experts_per_tok": 1,
        "num_experts": settings["num_experts"],
        "layer_types": kinds,
        "attention_bias": False,
        "lm_head_bias": False,
        "router_hidden_size": zaya.router_hidden_size,
        "pad_token_id": zaya.padding_token,
        # The tokenizer's; transformers' defaults are those of ZAYA1-8B.
        "bos_token_id": None,
        "eos_token_id": None,
        "cca_time0": cca.conv_kernel_sizes[0],
        "cca_time1": cca.conv_kernel_sizes[1],
    }


def _values(hf_config: Any) -> dict[str, Any]:
    values = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
    missing = [name for name in _NEEDED if values.get(name) is None]
    if missing:
        raise ConversionError(f"the configuration lacks {', '.join(missing)}")
    wrong = [name for name in _NEEDED if isinstance(values[name], bool | str) or values[name] <= 0]
    if wrong:
        shown = ", ".join(f"{name}={values[name]!r}" for name in wrong)
        raise ConversionError(f"the configuration has {shown}: must be numbers above 0")
    return values


_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "moe_intermediate_size",
    "router_hidden_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
)


def _refuse(config: Mapping[str, Any]) -> None:
    problems = [
        f"{name}={config.get(name)!r}: {reason}"
        for name, broken, reason in (
            ("model_type", config.get("model_type", "zaya") != "zaya", "must be 'zaya'"),
            (
                "attention_bias",
                config.get("attention_bias"),
                "the projections have no bias; False",
            ),
            ("lm_head_bias", config.get("lm_head_bias"), "Megatron's output layer has no bias; False"),
            ("hidden_act", config.get("hidden_act", "silu") != "silu", "the experts are SwiGLU; 'silu'"),
            (
                "num_experts_per_tok",
                config.get("num_experts_per_tok", 1) != 1,
                "ZAYA visits one expert per token; 1",
            ),
            (
                "layer_types",
                set(config.get("layer_types") or [FULL]) - {FULL, SLIDING},
                f"known are {FULL!r} and {SLIDING!r}",
            ),
        )
        if broken
    ]
    if problems:
        raise ConversionError("this ZAYA configuration cannot be converted:\n  - " + "\n  - ".join(problems))


def _rope_parameters(config: Mapping[str, Any], kinds: list[str]) -> dict[str, dict[str, Any]]:
    """RoPE settings by layer type, of the types that there are."""
    given = config.get("rope_parameters") or {}
    defaults = {FULL: {"rope_theta": 5_000_000.0}, SLIDING: {"rope_theta": 10_000.0}}
    ropes = {
        kind: {"partial_rotary_factor": 0.5, **defaults[kind]} | dict(given.get(kind) or {})
        for kind in set(kinds)
    }
    for kind, rope in ropes.items():
        if float(rope["rope_theta"]) != int(rope["rope_theta"]):
            raise ConversionError(
                f"rope_parameters[{kind!r}]={rope}: Megatron's RoPE base is a whole number; "
                f"rope_theta={round(rope['rope_theta'])} works"
            )
        if rope.get("rope_type", "default") != "default":
            raise ConversionError(
                f"rope_parameters[{kind!r}]={rope}: the model has plain RoPE; rope_type='default' works"
            )
    widths = {rope["partial_rotary_factor"] for rope in ropes.values()}
    if len(widths) > 1:
        raise ConversionError(f"rope_parameters: partial_rotary_factor differs between layers: {widths}")
    return ropes


def _refuse_megatron(settings: Mapping[str, Any], cca: CCAConfig, zaya: ZayaSettings) -> None:
    frequency = settings.get("moe_layer_freq", 1)
    every = frequency == 1 or (isinstance(frequency, list) and all(frequency))
    rules = (
        ("zaya", settings.get("zaya"), "ZAYA's parts are off"),
        ("zaya_residual_scaling", zaya.residual_scaling, "transformers scales residuals"),
        ("zaya_router", zaya.has_mlp_router, "transformers has the MLP router"),
        ("zaya_depth_averaging", zaya.depth_averaging, "transformers averages router states over depth"),
        ("zaya_skip_class", zaya.skip_class, "transformers has the class that skips"),
        ("zaya_skip_output", zaya.skip_output == "zero", "in transformers a skipped token adds nothing"),
        ("num_experts", settings.get("num_experts"), "transformers' ZAYA has experts"),
        ("moe_layer_freq", every, "transformers has experts in every layer"),
        ("moe_router_topk", settings.get("moe_router_topk", 1) == 1, "transformers visits one expert"),
        ("normalization", settings.get("normalization") == "RMSNorm", "transformers has RMSNorm"),
        ("swiglu", settings.get("swiglu"), "transformers has SwiGLU"),
        ("add_bias_linear", not settings.get("add_bias_linear", True), "transformers has no biases there"),
        ("cca.temperature", cca.temperature == "linear", "transformers has the linear form"),
        ("cca.conv_bias", cca.conv_bias and cca.conv0 and cca.conv1, "transformers has both convs with bias"),
        ("cca.qk_mean", cca.qk_mean, "transformers has the mean"),
        ("cca.value_shift", cca.value_shift, "transformers has the value shift"),
    )
    broken = [f"{name}: {reason}" for name, holds, reason in rules if not holds]
    if broken:
        raise ConversionError("transformers' ZAYA cannot hold this model:\n  - " + "\n  - ".join(broken))
