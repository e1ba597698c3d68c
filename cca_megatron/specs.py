"""Layer specs: how CCA gets into a Megatron model.

Three ways in, one implementation:

* ``cca_decoder_block_spec``, a function. ``--spec cca_megatron.specs cca_decoder_block_spec`` in a
  Megatron training script; dense and MoE layers by ``moe_layer_freq``, pipeline slicing included.
* ``cca_layer_spec_local``, ``cca_layer_spec_te``: ready objects, for scripts that take no function.
* ``hybrid_cca_stack_spec``, ``hybrid_cca_stack_spec_local``: ready objects for ``HybridModel``, where the
  layer pattern puts CCA wherever it says ``*``.

Settings other than the default are bound in a module of your own::

    cca_exp = functools.partial(cca_decoder_block_spec, cca=CCAConfig(temperature="exp"))
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

try:
    from cca_megatron._compat import (
        HAVE_TE,
        AttnMaskType,
        HybridStack,
        HybridStackSubmodules,
        IdentityFuncOp,
        IdentityOp,
        MLPLayer,
        ModuleSpec,
        MoELayer,
        MoETransformerLayer,
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        MultiTokenPredictionLayer,
        MultiTokenPredictionLayerSubmodules,
        ProcessGroupCollection,
        SelfAttentionSubmodules,
        TESpecProvider,
        TransformerBlockSubmodules,
        TransformerConfig,
        TransformerLayer,
        TransformerLayerSubmodules,
        cuts_whole_stream,
        get_gpt_decoder_block_spec,
        get_gpt_decoder_layer_specs,
        get_gpt_layer_local_submodules,
        get_gpt_mtp_block_spec_for_backend,
        get_num_layers_to_build,
        get_pg_rank,
        get_transformer_layer_offset,
        hybrid_stack_spec,
        log_single_rank,
    )
    from cca_megatron.attention import CCASelfAttention
    from cca_megatron.local_backend import CCALocalSpecProvider, LocalNorm
    from cca_megatron.parallel.core_attention import LocalCoreAttention
except ImportError as error:
    # Megatron swallows an ImportError from a --spec module and then trains ordinary attention.
    raise RuntimeError(
        f"cca_megatron.specs cannot be used: {error}. cca-megatron doctor says what is missing"
    ) from error

from cca_megatron.config import CCAConfig, check_config

logger = logging.getLogger(__name__)

_STOCK_MTP = (
    "mtp_num_layers={}: Megatron's own model builder takes no spec for multi-token prediction, so those "
    "layers have ordinary attention; cca-megatron train gives them CCA"
)


def cca_layer_spec(config: Any, cca: CCAConfig | None = None) -> ModuleSpec:
    """One transformer layer with CCA, for models whose layers are all of one kind (dense or MoE).

    Args:
        config: a TransformerConfig, or Megatron's GPTModelConfig around one.
        cca: the CCA settings; None means ``CCAConfig()``.

    Raises:
        ValueError: the settings do not fit together, or ``moe_layer_freq`` mixes dense and MoE layers.
        RuntimeError: the configuration wants Transformer Engine and it is not installed.
    """
    config = transformer_config(config)
    use_te = _wants_te(config)
    layers = _layer_specs(config, use_te, cca)
    if len({is_moe(layer.submodules) for layer in layers}) > 1:
        raise ValueError(
            f"moe_layer_freq={config.moe_layer_freq}: cca_layer_spec is one layer for the whole model, and "
            "these are dense and MoE layers; cca_decoder_block_spec works"
        )
    _announce(len(layers), use_te)
    return layers[-1]


def cca_decoder_block_spec(
    config: Any,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    cca: CCAConfig | None = None,
    keeps_mtp: bool = False,
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage, all with CCA, and the final norm.

    Args:
        config: a TransformerConfig, or Megatron's GPTModelConfig around one.
        vp_stage: virtual pipeline stage; None without interleaving.
        pp_rank: pipeline rank; None takes the current one.
        cca: the CCA settings; None means ``CCAConfig()``.
        keeps_mtp: the caller gives multi-token prediction CCA too (:func:`cca_mtp_block_spec`); otherwise
            a warning says that Megatron will not.

    Raises:
        ValueError: the settings do not fit together.
        RuntimeError: the configuration wants Transformer Engine and it is not installed.
    """
    config = transformer_config(config)
    use_te = _wants_te(config)
    cca = _checked(config, cca)
    block = get_gpt_decoder_block_spec(
        config, use_te, config.normalization, vp_stage=vp_stage, pp_rank=pp_rank
    )
    layers = [_with_cca(layer, use_te, cca) for layer in block.layer_specs]
    _announce(len(layers), use_te)
    if config.mtp_num_layers and not keeps_mtp:
        log_single_rank(logger, logging.WARNING, _STOCK_MTP.format(config.mtp_num_layers))
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=block.layer_norm if use_te else LocalNorm
    )


def cca_mtp_block_spec(config: Any, vp_stage: int | None = None, cca: CCAConfig | None = None) -> Any:
    """Multi-token prediction layers with CCA, or None where this stage has none.

    Megatron's own builder gives them ordinary attention, whatever spec the decoder has.
    """
    config = transformer_config(config)
    if config.mtp_num_layers is None:
        return None
    backend = TESpecProvider() if _wants_te(config) else CCALocalSpecProvider()
    layer = _layer_specs(config, _wants_te(config), cca)[-1]
    return get_gpt_mtp_block_spec_for_backend(config, layer, backend, vp_stage=vp_stage)


def cca_hybrid_stack_spec(use_te: bool, cca: CCAConfig | None = None) -> ModuleSpec:
    """Megatron's hybrid stack with CCA wherever the layer pattern says attention (``*``).

    Args:
        use_te: build on Transformer Engine, with all of Megatron's layer kinds; otherwise on the local
            backend, with attention, MLP (``-``) and MoE (``E``) layers.
        cca: the CCA settings; None means ``CCAConfig()``.
    """
    cca = cca or CCAConfig()
    if not use_te:
        return ModuleSpec(module=_LocalHybridStack, submodules=_local_hybrid_submodules(cca))
    if not HAVE_TE:  # the name must exist; building the stack says what is missing
        return ModuleSpec(module=_HybridStack, submodules=HybridStackSubmodules())
    submodules = hybrid_stack_spec.submodules
    attention = submodules.attention_layer
    with_cca = replace(attention, submodules=_replace_attention(attention.submodules, cca))
    return ModuleSpec(module=_HybridStack, submodules=replace(submodules, attention_layer=with_cca))


def transformer_config(config: Any) -> TransformerConfig:
    """Megatron's model builder passes its GPTModelConfig, other callers the TransformerConfig in it."""
    return getattr(config, "transformer", config)


def _checked(config: TransformerConfig, cca: CCAConfig | None) -> CCAConfig:
    cca = cca or CCAConfig()
    if cuts_whole_stream() and config.context_parallel_size > 1:
        cca = replace(cca, packed_zigzag="stream")
    check_config(config, cca)
    return cca


def _wants_te(config: TransformerConfig) -> bool:
    if config.transformer_impl not in ("transformer_engine", "local"):
        raise ValueError(
            f"transformer_impl={config.transformer_impl!r}: CCA has 'transformer_engine' and 'local'"
        )
    use_te = config.transformer_impl == "transformer_engine"
    if use_te:
        _require_te("--transformer-impl local")
    return use_te


def _require_te(alternative: str) -> None:
    if not HAVE_TE:
        raise RuntimeError(
            "Transformer Engine is asked for and not installed. Run: "
            "pip install 'transformer-engine[pytorch]' "
            f"(it needs an NVIDIA GPU), or use {alternative}"
        )


def _layer_specs(config: TransformerConfig, use_te: bool, cca: CCAConfig | None) -> list[ModuleSpec]:
    """All layers of the model, dense and MoE as ``moe_layer_freq`` says."""
    cca = _checked(config, cca)
    layers = get_gpt_decoder_layer_specs(config, use_te, config.normalization)
    return [_with_cca(layer, use_te, cca) for layer in layers]


def _with_cca(layer: ModuleSpec, use_te: bool, cca: CCAConfig) -> ModuleSpec:
    """Megatron's layer with its attention replaced, and on the local backend its norms."""
    submodules = _replace_attention(layer.submodules, cca)
    return replace(layer, submodules=submodules if use_te else _localize(submodules))


def _replace_attention(submodules: TransformerLayerSubmodules, cca: CCAConfig) -> TransformerLayerSubmodules:
    # CCA has a norm of its own, and Megatron refuses one that its settings do not ask for.
    linears = replace(submodules.self_attention.submodules, q_layernorm=None, k_layernorm=None)
    if cca.packed_zigzag == "stream":
        # Transformer Engine knows documents that are cut one by one only.
        linears = replace(linears, core_attention=partial(LocalCoreAttention, packed_zigzag="stream"))
    attention = ModuleSpec(
        module=CCASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "cca": cca},
        submodules=linears,
    )
    return replace(submodules, self_attention=attention)


def is_moe(submodules: TransformerLayerSubmodules) -> bool:
    """Whether a layer of these parts is a mixture of experts."""
    return getattr(submodules.mlp, "func", None) is MoELayer


def _localize(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """Put the local backend's norms and core attention into a layer of Megatron's local backend."""
    attention = submodules.self_attention
    linears = attention.submodules
    if attention.params["cca"].packed_zigzag == "document":
        linears = replace(linears, core_attention=CCALocalSpecProvider().core_attention())
    # In checkpoints a norm is named as Transformer Engine names it, fused into the linear after it, so
    # that what one backend saved the other loads. A MoE layer has no such linear.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not is_moe(submodules):
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return replace(
        submodules,
        input_layernorm=LocalNorm,
        self_attention=replace(attention, submodules=linears),
        pre_mlp_layernorm=LocalNorm,
        sharded_state_dict_keys_map=names,
    )


def _announce(layers: int, use_te: bool) -> None:
    backend = "Transformer Engine" if use_te else "local"
    # Megatron's log shows warnings and worse unless told otherwise, and this line must be seen.
    log_single_rank(logger, logging.WARNING, f"CCA attention: {layers} layers, {backend} backend")


class _ReadyLayer(TransformerLayer):
    """The layer of a ready object: takes its parts from the configuration that it is built with."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        use_te: bool,
        **kwargs: Any,
    ):
        if use_te:
            _require_te("cca_layer_spec_local")
        groups = kwargs.get("pg_collection") or ProcessGroupCollection.use_mpu_process_groups()
        vp_stage, pp_rank = kwargs.get("vp_stage"), get_pg_rank(groups.pp)
        offset = 0
        if kwargs.get("add_layer_offset", True) and not kwargs.get("is_mtp_layer", False):
            offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
            if layer_number == 1:
                _announce(get_num_layers_to_build(config, vp_stage, pp_rank), use_te)
        spec = _layer_specs(config, use_te, cca=None)[offset + layer_number - 1]
        super().__init__(config, spec.submodules, layer_number, **kwargs)


class _HybridStack(HybridStack):
    """Megatron's hybrid stack, saying in the log how many of its layers are CCA."""

    use_te = True

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        if self.use_te:
            _require_te("hybrid_cca_stack_spec_local")
        super().__init__(config, *args, **kwargs)
        attentions = [m for m in self.modules() if isinstance(m, CCASelfAttention)]
        crosses_ranks = cuts_whole_stream() and config.context_parallel_size > 1
        if crosses_ranks and any(m.cca.packed_zigzag != "stream" for m in attentions):
            raise ValueError(
                "--dataloader-inter-document-masking with context parallelism lets documents cross ranks: "
                "cca_hybrid_stack_spec(use_te, CCAConfig(packed_zigzag='stream')) works"
            )
        _announce(len(attentions), self.use_te)


class _LocalHybridStack(_HybridStack):
    """The same with a final norm that needs no Transformer Engine."""

    use_te = False

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        post_layer_norm = kwargs.pop("post_layer_norm", True)
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


class _NeedsTransformerEngine:
    """Stands for a layer kind that the local backend lacks; the default would be an identity."""

    def __init__(self, *, symbol: str, config: TransformerConfig, **_: Any):
        raise ValueError(
            f"hybrid_layer_pattern with {symbol!r}: without Transformer Engine the hybrid stack has "
            "attention (*), MLP (-) and MoE (E) layers; with it, use hybrid_cca_stack_spec"
        )


def _local_hybrid_submodules(cca: CCAConfig) -> HybridStackSubmodules:
    """Attention, MLP and MoE each as a layer of its own, cut from Megatron's local layer."""

    def absent(symbol: str) -> ModuleSpec:
        return ModuleSpec(module=_NeedsTransformerEngine, params={"symbol": symbol})

    def part(*drop: str, num_experts: int | None = None) -> TransformerLayerSubmodules:
        whole = get_gpt_layer_local_submodules(num_experts=num_experts)
        layer = _localize(_replace_attention(whole, cca))
        identities = {name: IdentityFuncOp if "bda" in name else IdentityOp for name in drop}
        return replace(layer, **identities)

    attention = ("input_layernorm", "self_attention", "self_attn_bda")
    mlp = ("pre_mlp_layernorm", "mlp", "mlp_bda")
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=part(*mlp)),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=part(*attention)),
        # The number of experts comes from the configuration; here it only has to be one.
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=part(*attention, num_experts=1)),
        mamba_layer=absent("M"),
        gdn_layer=absent("G"),
        dsa_layer=absent("D"),
        mla_layer=absent("+"),
        mtp_block_spec=_local_hybrid_mtp_block(),
    )


def _local_hybrid_mtp_block() -> ModuleSpec:
    """Norms and projection of a multi-token prediction layer; Megatron builds the rest by the pattern."""
    layer = MultiTokenPredictionLayerSubmodules(
        enorm=LocalNorm,
        hnorm=LocalNorm,
        eh_proj=CCALocalSpecProvider().column_parallel_linear(),
        mtp_model_layer=None,
        layer_norm=LocalNorm,
    )
    layers = [ModuleSpec(module=MultiTokenPredictionLayer, submodules=layer)]
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=layers),
    )


def _ready_layer(use_te: bool) -> ModuleSpec:
    # Megatron's --attention-backend local writes its core attention into the spec: into this one, which
    # nothing reads, for it would materialise an S x S matrix and take no packed documents.
    unread = SelfAttentionSubmodules(IdentityOp, IdentityOp, IdentityOp)
    placeholder = ModuleSpec(module=CCASelfAttention, submodules=unread)
    parts = TransformerLayerSubmodules(self_attention=placeholder)
    return ModuleSpec(module=_ReadyLayer, submodules=parts, params={"use_te": use_te})


cca_layer_spec_te = _ready_layer(use_te=True)
cca_layer_spec_local = _ready_layer(use_te=False)
hybrid_cca_stack_spec = cca_hybrid_stack_spec(use_te=True)
hybrid_cca_stack_spec_local = cca_hybrid_stack_spec(use_te=False)
