"""What ``quality.py`` compares: attention variants as settings of a recipe, with the losses of the paper.

The heads follow the paper's: MHA fills the width; all others keep a quarter of its cache of keys and values
(a quarter of the heads, or latents as wide). Everything but attention is the recipe's, except that the width
of the MLPs is chosen so that all have the same number of parameters.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from cca_megatron.training.recipe import RecipeError

REFERENCE = "ccgqa"
"""The variant that the others are matched to and compared with."""
_COMPRESSION = 4
"""Of the cache of keys and values."""
_HEAD_SETTINGS = ("preset", "num-attention-heads", "num-query-groups", "multi-latent-attention")
_ABLATED = {"conv0": False, "conv1": False, "value_shift": False, "qk_mean": False}


@dataclass(frozen=True)
class Variant:
    """An attention, as the settings that make it."""

    kind: str
    """mha, gqa, mla, cca or ccgqa."""
    cca: dict[str, Any] = field(default_factory=dict)
    """CCA settings."""


VARIANTS = {
    "ccgqa": Variant("ccgqa"),
    "mha": Variant("mha"),
    "gqa": Variant("gqa"),
    "mla": Variant("mla"),
    "cca": Variant("cca"),
    "no-conv": Variant("ccgqa", _ABLATED),
    "1-conv": Variant("ccgqa", _ABLATED | {"conv0": True}),
    "2-convs": Variant("ccgqa", {"value_shift": False, "qk_mean": False}),
    "value-shift": Variant("ccgqa", {"qk_mean": False}),
    "exp": Variant("ccgqa", {"temperature": "exp"}),
}


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    label: str
    variant: str
    paper: float | None = None
    """Loss at about 1 billion parameters, arXiv 2510.04476; None where it has none."""


TABLES = {
    "attention": (  # table III: dense, 300 billion tokens, parameters and cache matched
        Row("MHA", "mha", 2.297),
        Row("GQA", "gqa", 2.297),
        Row("MLA", "mla", 2.321),
        Row("CCA", "cca", 2.307),
        Row("CCGQA", "ccgqa", 2.286),
    ),
    "ablation": (  # of tables IV and V the dense model, 300 billion tokens
        Row("no conv", "no-conv", 2.33),
        Row("1 conv", "1-conv", 2.327),
        Row("2 convs", "2-convs", 2.319),
        Row("+ value shift", "value-shift", 2.317),
        Row("+ q-k mean", "ccgqa", 2.315),
    ),
    "temperature": (Row("linear", "ccgqa"), Row("exp", "exp")),
}


def sections(base: dict[str, Any], variant: Variant, seed: int, ffn: int) -> dict[str, Any]:
    """The sections of a recipe that trains this variant.

    Args:
        base: the sections of the recipe that everything else comes from; not changed.
        variant: what takes the place of its attention.
        seed: of weights and of the order of the data.
        ffn: width of the MLPs.

    Raises:
        RecipeError: a size is missing, or heads of the recipe's width do not fill its hidden size.
    """
    content = copy.deepcopy(base)
    model, megatron = content["model"], content["megatron"]
    for name in ("hidden-size", "kv-channels", "ffn-hidden-size"):
        if name not in model:
            raise RecipeError(f"model.{name}: must be set in the recipe; quickstart.yaml sets it")
    hidden, dim = model["hidden-size"], model["kv-channels"]
    heads, rest = divmod(hidden, dim * _COMPRESSION)
    if rest:
        raise RecipeError(
            f"hidden-size={hidden} with kv-channels={dim}: must be a multiple of {_COMPRESSION * dim}; "
            f"hidden-size={max(1, heads) * dim * _COMPRESSION} works"
        )
    for name in _HEAD_SETTINGS:
        model.pop(name, None)
    model |= _heads(variant.kind, _COMPRESSION * heads, heads, dim)
    model["ffn-hidden-size"], megatron["seed"] = ffn, seed
    if variant.kind in ("cca", "ccgqa"):
        content["cca"] = content.get("cca", {}) | variant.cca
    else:
        model["attention"] = "megatron"
        content.pop("cca", None)
    if variant.kind == "mla":
        # Its positions turn channels of their own, half a head, all of them.
        model |= {"rotary-percent": 1.0, "rope-type": "rope", "qk-layernorm": True}
    return content


def _heads(kind: str, full: int, quarter: int, dim: int) -> dict[str, Any]:
    if kind == "mla":
        return {
            "multi-latent-attention": True,
            "num-attention-heads": full,
            "q-lora-rank": 3 * full * dim // 4,
            "kv-lora-rank": 2 * quarter * dim - dim // 2,
            "qk-head-dim": dim,
            "qk-pos-emb-head-dim": dim // 2,
            "v-head-dim": dim,
        }
    queries = quarter if kind == "cca" else full
    groups = full if kind == "mha" else quarter
    return {"num-attention-heads": queries, "num-query-groups": groups}
