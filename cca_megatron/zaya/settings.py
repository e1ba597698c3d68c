"""``ZayaSettings``, and the rules that it and the Megatron settings must meet together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cca_megatron.config import check_names

RouterKind = Literal["mlp", "linear"]
SkipOutput = Literal["zero", "input"]


@dataclass(frozen=True)
class ZayaSettings:
    """What ZAYA1 adds to a Megatron model with CCA; each part can be switched off.

    Its fp32 residual stream is Megatron's ``fp32_residual_connection``, its layers with a sliding window are
    ``window_size`` and ``window_attn_skip_freq``, with ``CCAConfig.window_rotary_base``.
    Source: the ZAYA1-8B release, as ``transformers.models.zaya`` runs it.
    """

    residual_scaling: bool = True
    """Scale and shift both terms of every residual sum, and the embeddings, per channel."""
    router: RouterKind = "mlp"
    """``mlp``: down-projection, depth averaging, MLP. ``linear``: Megatron's own."""
    router_hidden_size: int = 256
    """Width that the router works in."""
    depth_averaging: bool = True
    """Add the router state of the MoE layer before, scaled per channel."""
    skip_class: bool = True
    """Give the router one more class, whose tokens visit no expert."""
    skip_output: SkipOutput = "zero"
    """What a token that skips the experts gets instead: nothing (``transformers``), or the layer's normalised
    input times the probability (the first release)."""
    padding_token: int | None = None
    """Token whose embedding gets no gradient from the input, as ``padding_idx`` of ``torch.nn.Embedding``."""
    balancing_rate: float = 1e-3
    """Step size of the balancing biases, which are trained beside the loss; 0 keeps them as they are."""

    @property
    def has_mlp_router(self) -> bool:
        """Whether the router is ZAYA's."""
        return self.router == "mlp"

    @property
    def carries_state(self) -> bool:
        """Whether a layer hands the next one its router state."""
        return self.has_mlp_router and self.depth_averaging

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "ZayaSettings":
        """Build from names and values, as a recipe gives them.

        Raises:
            ValueError: a name is unknown; the message has the nearest known one.
        """
        check_names("ZAYA setting", settings, cls)
        return cls(**settings)


def check_zaya(config: Any, zaya: ZayaSettings) -> None:
    """Raise one ValueError with every message of :func:`zaya_problems`, if there is any."""
    problems = zaya_problems(config, zaya)
    if problems:
        raise ValueError("ZAYA's parts cannot run with these settings:\n  - " + "\n  - ".join(problems))


def zaya_problems(config: Any, zaya: ZayaSettings) -> list[str]:
    """Everything that keeps ``zaya`` from running under Megatron's settings.

    Args:
        config: a TransformerConfig, or anything with its attribute names.
        zaya: the settings.

    Returns:
        One message per problem: setting, value, rule, and a value that works.
    """
    problems = _own_problems(zaya)
    if getattr(config, "fused_residual_rmsnorm", False):
        problems.append(
            "fused_residual_rmsnorm=True: the norm then hands its cast input on as the residual stream; "
            "fused_residual_rmsnorm=False works"
        )
    if problems or not zaya.has_mlp_router:
        return problems
    problems = [
        f"{name}={getattr(config, name)!r}: {reason}; {works} works"
        for name, broken, reason, works in _router_rules(config)
        if broken
    ]
    if zaya.depth_averaging:
        problems += [
            f"{name}={getattr(config, name)!r} with depth_averaging: {reason}; {works} works"
            for name, broken, reason, works in _averaging_rules(config)
            if broken
        ]
    return problems


def _own_problems(zaya: ZayaSettings) -> list[str]:
    problems = []
    for name, kind, works in (("router", RouterKind, "mlp"), ("skip_output", SkipOutput, "zero")):
        if getattr(zaya, name) not in get_args(kind):
            choices = " or ".join(map(repr, get_args(kind)))
            problems.append(f"{name}={getattr(zaya, name)!r}: must be {choices}; {works!r} works")
    for name in ("residual_scaling", "depth_averaging", "skip_class"):
        if not isinstance(getattr(zaya, name), bool):
            problems.append(f"{name}={getattr(zaya, name)!r}: must be true or false")
    if type(zaya.router_hidden_size) is not int or zaya.router_hidden_size < 1:
        problems.append(f"router_hidden_size={zaya.router_hidden_size!r}: must be a whole number; 256 works")
    token = zaya.padding_token
    if token is not None and (type(token) is not int or token < 0):
        problems.append(f"padding_token={token!r}: must be the number of a token, or None")
    rate = zaya.balancing_rate
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        problems.append(f"balancing_rate={rate!r}: must be a number from 0 to 1; 0.001 works")
    return problems


_Rules = list[tuple[str, object, str, str]]
"""(setting, whether it is broken, reason, what works)"""


def _router_rules(config: Any) -> _Rules:
    def given(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    experts = "num_moe_experts" if hasattr(config, "num_moe_experts") else "num_experts"
    balancing = given("moe_router_load_balancing_type", "none")
    kinds = balancing if isinstance(balancing, list) else [balancing]
    return [
        (experts, not given(experts), "the router chooses among experts", "router='linear', or 16,"),
        (
            "moe_router_load_balancing_type",
            {"sinkhorn", "quantile_balancing"} & set(kinds),
            "ZAYA's router is balanced by its biases or an auxiliary loss",
            "'none' or 'aux_loss'",
        ),
        (
            "moe_router_enable_expert_bias",
            given("moe_router_enable_expert_bias"),
            "ZAYA's router has balancing biases of its own (balancing_rate)",
            "False",
        ),
        (
            "moe_router_score_function",
            given("moe_router_score_function", "softmax") != "softmax",
            "ZAYA's router has a softmax",
            "'softmax'",
        ),
        (
            "moe_expert_capacity_factor",
            given("moe_expert_capacity_factor") is not None,
            "ZAYA's router drops no tokens",
            "None",
        ),
        ("mtp_num_layers", given("mtp_num_layers"), "ZAYA's layers have no multi-token prediction", "None"),
        *(
            (name, given(name), "ZAYA's router does not have it", works)
            for name, works in (
                ("moe_router_num_groups", "None"),
                ("moe_router_topk_scaling_factor", "None"),
                ("moe_enable_routing_replay", "False"),
                ("moe_router_force_load_balancing", "False"),
                ("moe_router_force_biased", "None"),
            )
        ),
        (
            "cuda_graph_impl",
            given("cuda_graph_impl", "none") != "none",
            "the router hands its state on outside of what Megatron captures",
            "'none'",
        ),
        (
            "recompute_modules",
            "moe" in (given("recompute_modules") or []) and (given("fp8") or given("fp4")),
            "recomputation of the experts in FP8 misses the router state",
            "recompute_granularity='full'",
        ),
    ]


def _stages(layout: str) -> list[str]:
    """The parts of Megatron's notation, such as ``Ett|(tt|)*2L``, one for each stage and chunk."""
    written_out = re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m[1] * int(m[2]), layout)
    return written_out.split("|")


def _averaging_rules(config: Any) -> _Rules:
    def given(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    stages = given("pipeline_model_parallel_size", 1)
    layout = given("pipeline_model_parallel_layout")
    is_given = isinstance(layout, str)  # later Megatron has made something else of it
    empty = is_given and any("t" not in stage for stage in _stages(layout))
    splits = [
        name
        for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
        if given(name)
        and given("num_layers") + 2 <= stages * (given("virtual_pipeline_model_parallel_size") or 1)
    ]
    return [
        (
            "pipeline_model_parallel_layout",
            empty,
            "every stage needs a decoder layer, which takes the router state and hands it on",
            "a layout with a 't' in every part",
        ),
        *((name, True, "a stage would have no decoder layer", "False") for name in splits),
        ("mlp_chunks_for_training", given("mlp_chunks_for_training", 1) > 1, "tokens are not cut", "1"),
        ("mlp_chunks_for_prefill", given("mlp_chunks_for_prefill", 1) > 1, "tokens are not cut", "1"),
        (
            "overlap_moe_expert_parallel_comm",
            given("overlap_moe_expert_parallel_comm"),
            "Megatron then runs a layer in pieces, which hand on no state",
            "False",
        ),
        (
            "moe_router_dtype",
            stages > 1 and given("moe_router_dtype") == "fp32" and not given("fp32_residual_connection"),
            f"with pipeline_model_parallel_size={stages} the router state would be rounded between stages",
            "fp32_residual_connection=True",
        ),
    ]
