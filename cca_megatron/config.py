"""``CCAConfig``, its presets, and the rules that it and the Megatron settings must meet together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from cca_megatron.parallel.rules import core_attention_problems

TemperatureForm = Literal["linear", "exp"]
PackedZigzag = Literal["document", "stream"]


@dataclass(frozen=True)
class CCAConfig:
    """What Compressed Convolutional Attention adds to Megatron's own attention settings.

    The latent heads are Megatron's: ``num_attention_heads``, ``num_query_groups`` and ``kv_channels``
    count and size them. Whether both fit each other is checked by :func:`check_config`.
    Source: arXiv 2510.04476, section 3; the switches make its ablation ladder.
    """

    conv_kernel_sizes: tuple[int, int] = (2, 2)
    """Taps of the depthwise conv (conv0) and of the conv within each head (conv1)."""
    conv0: bool = True
    """Run the depthwise conv; off, it passes its input through."""
    conv1: bool = True
    """Run the conv within each head; off, it passes its input through."""
    conv_bias: bool = True
    """Give the convs a bias."""
    qk_mean: bool = True
    """Add the mean of the pre-conv query and key latents to the conv outputs."""
    value_shift: bool = True
    """Take the second half of the value channels from the previous token."""
    temperature: TemperatureForm = "linear"
    """tau = temperature ("linear", every release) or exp(temperature) ("exp", the paper's listing)."""
    temperature_init: float | None = None
    """Initial temperature parameter; None gives tau = 1 (1 for "linear", 0 for "exp")."""
    reset_at_document_start: bool = True
    """Start convs and value shift afresh at every packed document; off mixes across documents."""
    recompute_mix: bool = False
    """Recompute convs, norm and RoPE in the backward pass instead of keeping q, k and v."""
    window_rotary_base: float | None = None
    """RoPE base of the layers that Megatron's ``window_size`` and ``window_attn_skip_freq`` give a sliding
    window; None: that of the others."""
    packed_zigzag: PackedZigzag = "document"
    """How the data loader cuts packed documents over context-parallel ranks: each document for itself
    (Megatron's ``thd`` layout), or the whole stream, so that documents cross ranks anywhere. The latter
    is what ``--dataloader-inter-document-masking`` does, and is taken by itself where that is given."""

    def __post_init__(self) -> None:
        if isinstance(self.conv_kernel_sizes, list):  # as YAML and argparse give it
            object.__setattr__(self, "conv_kernel_sizes", tuple(self.conv_kernel_sizes))

    @property
    def initial_temperature(self) -> float:
        """The value that the temperature parameter starts from."""
        if self.temperature_init is not None:
            return self.temperature_init
        return 0.0 if self.temperature == "exp" else 1.0

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "CCAConfig":
        """Build from names and values, as a recipe gives them.

        Raises:
            ValueError: a name is unknown; the message has the nearest known one.
        """
        check_names("CCA setting", settings, cls)
        return cls(**settings)


def check_names(kind: str, settings: Mapping[str, Any], of: Any) -> None:
    """Raise ValueError if a name is no field of the dataclass ``of``."""
    known = [field.name for field in fields(of)]
    for name in settings:
        if name not in known:
            raise ValueError(unknown_name(kind, name, known))


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Message for a name that does not exist, with the nearest one that does."""
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(known))}"
    return f"unknown {kind} {name!r}; {hint}"


@dataclass(frozen=True)
class _Compression:
    queries: int
    """C1 = hidden_size / (query heads * head_dim)"""
    keys: int
    """C2 = hidden_size / (key/value heads * head_dim)"""


_PRESETS = {
    "zaya1_8b": _Compression(2, 8),
    "ccgqa_2x8x": _Compression(2, 8),
    "ccgqa_1x4x": _Compression(1, 4),
    "cca_4x": _Compression(4, 4),
    "cca_8x": _Compression(8, 8),
}


PRESET_HIDDEN_SIZE, PRESET_HEAD_DIM = 2048, 128
"""The sizes of ZAYA1-8B."""


def preset_names() -> tuple[str, ...]:
    """Names that :func:`preset` accepts."""
    return tuple(_PRESETS)


def preset(name: str, hidden_size: int = 2048, head_dim: int = 128) -> tuple[dict[str, int], CCAConfig]:
    """Latent heads of a published shape, for any hidden size.

    Args:
        name: one of :func:`preset_names`. ``ccgqa_2x8x`` compresses queries twofold and keys and values
            eightfold; ``cca_4x`` both fourfold. ``zaya1_8b`` is ``ccgqa_2x8x`` at the size released.
        hidden_size: width of the residual stream.
        head_dim: width of a latent head (Megatron's ``kv_channels``).

    Returns:
        Megatron's ``num_attention_heads``, ``num_query_groups`` and ``kv_channels``, and the CCAConfig.

    Raises:
        ValueError: the name is unknown, or the sizes do not give whole heads.
    """
    if name not in _PRESETS:
        raise ValueError(unknown_name("preset", name, list(_PRESETS)))
    compression = _PRESETS[name]
    unit = compression.keys * head_dim
    if type(hidden_size) is not int or type(head_dim) is not int:
        raise ValueError(f"hidden_size={hidden_size!r} with head_dim={head_dim!r}: must be whole numbers")
    if hidden_size < 1 or head_dim < 1 or hidden_size % unit:
        works = max(1, round(hidden_size / max(unit, 1))) * max(unit, 1)
        raise ValueError(
            f"hidden_size={hidden_size} with head_dim={head_dim}: preset {name} needs a positive "
            f"multiple of {compression.keys} * head_dim = {unit}; hidden_size={works} works"
        )
    heads = {
        "num_attention_heads": hidden_size // (compression.queries * head_dim),
        "num_query_groups": hidden_size // unit,
        "kv_channels": head_dim,
    }
    return heads, CCAConfig()


def config_problems(config: Any, cca: CCAConfig) -> list[str]:
    """Everything that keeps ``cca`` from running under Megatron's settings.

    Args:
        config: a TransformerConfig, or anything with its attribute names.
        cca: the CCA settings.

    Returns:
        One message per problem: setting, value, rule, and a value that works. Empty if all is well.
    """
    if not isinstance(cca, CCAConfig):
        return [f"cca={cca!r}: must be a CCAConfig; CCAConfig.from_mapping makes one of a mapping"]
    heads = _head_problems(config, cca)
    # Rules about heads per rank make sense once there are whole heads.
    attention = [] if heads else core_attention_problems(config, cca.packed_zigzag)
    return [*own_problems(cca), *heads, *_conflicts(config, cca), *attention]


def check_config(config: Any, cca: CCAConfig) -> None:
    """Raise one ValueError with every message of :func:`config_problems`, if there is any."""
    problems = config_problems(config, cca)
    if problems:
        raise ValueError("CCA cannot run with these settings:\n  - " + "\n  - ".join(problems))


def own_problems(cca: CCAConfig) -> list[str]:
    """What is wrong with the CCA settings by themselves: one message per problem."""
    problems = []
    sizes = cca.conv_kernel_sizes
    if not isinstance(sizes, tuple) or len(sizes) != 2:
        problems.append(f"conv_kernel_sizes={sizes!r}: must be two sizes, conv0's and conv1's; (2, 2) works")
    elif not all(type(size) is int and size >= 1 for size in sizes):
        problems.append(
            f"conv_kernel_sizes={sizes!r}: each must be a whole number of at least 1; (2, 2) works "
            "(conv0=False or conv1=False turns one off)"
        )
    if cca.packed_zigzag not in get_args(PackedZigzag):
        problems.append(
            f"packed_zigzag={cca.packed_zigzag!r}: must be 'document' or 'stream'; 'document' works"
        )
    if cca.temperature not in get_args(TemperatureForm):
        problems.append(f"temperature={cca.temperature!r}: must be 'linear' or 'exp'; 'linear' works")
    init = cca.temperature_init
    if init is not None and not (isinstance(init, int | float) and math.isfinite(init)):
        problems.append(f"temperature_init={init!r}: must be a finite number; None works")
    elif init == 0 and cca.temperature == "linear":
        problems.append(
            "temperature_init=0 with temperature='linear': the keys would vanish and the convs get no "
            "gradient; 1.0 works"
        )
    base = cca.window_rotary_base
    if base is not None and (isinstance(base, bool) or not isinstance(base, int | float) or base <= 1):
        problems.append(f"window_rotary_base={base!r}: must be a number above 1; 10000 works, or None")
    for name in ("conv0", "conv1", "conv_bias", "qk_mean", "value_shift"):
        problems += _must_be_bool(name, getattr(cca, name))
    for name in ("reset_at_document_start", "recompute_mix"):
        problems += _must_be_bool(name, getattr(cca, name))
    return problems


def _must_be_bool(name: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{name}={value!r}: must be true or false"]


def _head_problems(config: Any, cca: CCAConfig) -> list[str]:
    problems = []
    heads = config.num_attention_heads
    groups = heads if config.num_query_groups is None else config.num_query_groups
    dim = config.kv_channels
    if dim is None and heads and config.hidden_size % heads == 0:
        dim = config.hidden_size // heads  # Megatron's own default
    tp = config.tensor_model_parallel_size
    for name, value in (
        ("num_attention_heads", heads),
        ("num_query_groups", groups),
        ("kv_channels", dim),
        ("tensor_model_parallel_size", tp),
        ("context_parallel_size", getattr(config, "context_parallel_size", 1)),
    ):
        if type(value) is not int or value < 1:
            problems.append(f"{name}={value!r}: must be a whole number of at least 1")
    if problems:
        return problems
    assert isinstance(dim, int)
    if heads % groups:
        problems.append(
            f"num_attention_heads={heads}: must be a multiple of num_query_groups={groups}; "
            f"num_attention_heads={_next_multiple(heads, groups)} works"
        )
    if groups % tp and tp % groups:
        problems.append(
            f"num_query_groups={groups}: must be a multiple or a divisor of tensor_model_parallel_size={tp}, "
            "so that each rank holds whole key/value groups or a part of one; "
            f"tensor_model_parallel_size={math.gcd(groups, tp)} works"
        )
    if tp > groups and getattr(config, "qk_clip", False):
        problems.append(
            f"qk_clip=True with num_query_groups={groups} and tensor_model_parallel_size={tp}: the largest "
            "logit of a group would be known to a part of its ranks only; "
            f"tensor_model_parallel_size={groups} works"
        )
    if heads % tp:
        problems.append(
            f"num_attention_heads={heads}: must be a multiple of tensor_model_parallel_size={tp}; "
            f"tensor_model_parallel_size={math.gcd(heads, tp)} works"
        )
    if cca.value_shift and groups * dim % 2:
        problems.append(
            f"num_query_groups={groups} * kv_channels={dim} is odd: value_shift delays half of these "
            f"channels; kv_channels={dim + 1} or value_shift=False works"
        )
    return problems


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


_CONFLICTS = {
    "multi_latent_attention": "CCA replaces attention, and so does MLA",
    "qk_layernorm": "CCA normalises queries and keys itself",
    "qk_l2_norm": "CCA normalises queries and keys itself",
    "attention_output_gate": "CCA has no output gate",
    "fused_single_qkv_rope": "CCA applies RoPE after its own norm",
    "heterogeneous_block_specs": "CCA layers are all of one kind",
}


def _conflicts(config: Any, cca: CCAConfig) -> list[str]:
    problems = [
        f"{name}={getattr(config, name)!r}: {reason}; {name}=False works"
        for name, reason in _CONFLICTS.items()
        if getattr(config, name, False)
    ]
    variant = getattr(config, "experimental_attention_variant", None)
    if variant is not None:
        problems.append(f"experimental_attention_variant={variant!r}: CCA is chosen by its spec; None works")
    if cca.window_rotary_base is not None and not getattr(config, "window_size", None):
        problems.append(
            f"window_rotary_base={cca.window_rotary_base} with window_size=None: no layer has a window; "
            "window_size=(511, 0) works, or window_rotary_base=None"
        )
    predicted = getattr(config, "mtp_num_layers", None)
    if predicted and cca.packed_zigzag == "stream" and getattr(config, "context_parallel_size", 1) > 1:
        problems.append(
            f"mtp_num_layers={predicted} with packed documents that cross context-parallel ranks "
            "(packed_zigzag='stream', --dataloader-inter-document-masking): Megatron shifts the targets of "
            "multi-token prediction within documents that are cut one by one; context_parallel_size=1 works"
        )
    return problems
