"""Every import from megatron-core that the modules and specs need, with its version check.

One place to look at when Megatron moves something. Optional packages have a ``HAVE_`` flag here.
"""

import sys

import megatron.core

_SUPPORTED = (0, 19)
_version = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
if _version < _SUPPORTED:
    raise RuntimeError(
        f"cca-megatron needs megatron-core 0.19; {megatron.core.__version__} is installed. "
        "Run: pip install 'megatron-core>=0.19,<0.20'"
    )

# ruff: noqa: E402  the version comes first, so that an old Megatron gets a message and no traceback
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.distributed import finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.inference.contexts import BaseInferenceContext, StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.jit import jit_fuser
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_submodules,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface as off_interface,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
)
from megatron.core.utils import (
    deprecate_inference_params,
    get_model_config,
    get_pg_rank,
    get_pg_size,
    log_single_rank,
    nvtx_range_pop,
    nvtx_range_push,
    unwrap_model,
)

if HAVE_TE:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
else:
    TESpecProvider = None


def cuts_whole_stream() -> bool:
    """Whether Megatron's arguments, where there are any, let documents cross context-parallel ranks."""
    training = sys.modules.get("megatron.training.global_vars")
    args = getattr(training, "_GLOBAL_ARGS", None)
    return bool(getattr(args, "dataloader_inter_document_masking", False))


__all__ = [
    "HAVE_TE",
    "AttnMaskType",
    "BaseInferenceContext",
    "CheckpointingConfig",
    "GPTModel",
    "HybridStack",
    "HybridStackSubmodules",
    "IdentityFuncOp",
    "IdentityOp",
    "InferenceMode",
    "LocalSpecProvider",
    "MLASelfAttention",
    "MLPLayer",
    "MegatronModule",
    "MoELayer",
    "MoESubmodules",
    "MoETransformerLayer",
    "ModuleSpec",
    "MultiTokenPredictionBlock",
    "MultiTokenPredictionBlockSubmodules",
    "MultiTokenPredictionLayer",
    "MultiTokenPredictionLayerSubmodules",
    "PackedSeqParams",
    "ProcessGroupCollection",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedObject",
    "ShardedTensor",
    "StaticInferenceContext",
    "TESpecProvider",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "apply_factories",
    "compute_routing_scores_for_aux_loss",
    "cuts_whole_stream",
    "deprecate_inference_params",
    "ensure_metadata_has_dp_cp_group",
    "finalize_model_grads",
    "get_gpt_decoder_block_spec",
    "get_gpt_decoder_layer_specs",
    "get_gpt_layer_local_submodules",
    "get_gpt_mtp_block_spec_for_backend",
    "get_model_config",
    "get_num_layers_to_build",
    "get_pg_rank",
    "get_pg_size",
    "get_transformer_layer_offset",
    "hybrid_stack_spec",
    "is_layer_window_attention",
    "jit_fuser",
    "log_single_rank",
    "nested_values",
    "nvtx_range_pop",
    "nvtx_range_push",
    "off_interface",
    "parallel_state",
    "save_config",
    "schedules",
    "set_tensor_model_parallel_attributes",
    "tensor_parallel",
    "unwrap_model",
]
