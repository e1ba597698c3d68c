"""A model from a distributed checkpoint of any layout, on the tensor-parallel ranks that are here."""

from argparse import Namespace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from cca_megatron._compat import HAVE_TE, GPTModel, ProcessGroupCollection, parallel_state
from cca_megatron.training.model import CCAModelBuilder, model_config_from_args
from cca_megatron.vocabulary import remember_vocabulary

# How a run was made fast, which another machine may lack and generation has no use for.
_OFF = (
    "sequence_parallel", "tp_comm_overlap", "fp8", "fp4", "gradient_accumulation_fusion",
    "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "cpu_offloading", "moe_permute_fusion",
    "fine_grained_activation_offloading", "overlap_p2p_comm", "defer_embedding_wgrad_compute",
)  # fmt: skip
_ONE = (
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def load_model(directory: Path, args: Namespace, tensor_parallel: int, dtype: torch.dtype) -> GPTModel:
    """Build the model of a checkpoint and load its weights; the process group must be there.

    Args:
        directory: of one iteration.
        args: of the run that saved it; changed.
        tensor_parallel: ranks that share the model, all that there are.
        dtype: of the weights.

    Raises:
        ValueError: the model is a hybrid one or has no CCA, or cannot be cut into so many parts.
    """
    if args.attention != "cca":
        raise ValueError(
            f"attention={args.attention!r}: models with CCA are generated with here; Megatron's own tools "
            "generate with the others"
        )
    if args.hybrid_layer_pattern is not None:
        raise ValueError("hybrid models are not generated with here; GPT models are")
    vocab = args.padded_vocab_size or args.vocab_size
    if vocab % tensor_parallel:
        raise ValueError(
            f"tensor-parallel={tensor_parallel}: the embeddings have {vocab} rows, which it must divide"
        )
    for name in _ONE:
        setattr(args, name, 1)
    args.tensor_model_parallel_size = args.expert_tensor_parallel_size = tensor_parallel
    args.virtual_pipeline_model_parallel_size = args.pipeline_model_parallel_layout = None
    args.tensor_parallel_num_weight_shards = args.expert_tensor_parallel_num_weight_shards = None
    for name in _OFF:
        setattr(args, name, False)
    args.transformer_impl = (
        "transformer_engine" if HAVE_TE and torch.cuda.get_device_name() != "cpu" else "local"
    )
    args.cuda_graph_impl, args.moe_token_dispatcher_type = "none", "alltoall"
    args.padded_vocab_size, args.params_dtype = vocab, dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    args.recompute_granularity, args.perform_initialization = None, False
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, expert_tensor_parallel_size=tensor_parallel
    )
    model_parallel_cuda_manual_seed(1)
    builder = CCAModelBuilder(model_config_from_args(args))
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    model = model.to(dtype).cuda().eval()
    weights = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory))["model"]
    model.load_state_dict(weights)
    remember_vocabulary(model, args.vocab_size or vocab)
    return model
