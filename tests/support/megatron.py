"""Build Megatron models in any parallel layout, run them, and compare them parameter by parameter.

Two layouts are compared through distributed checkpoints: one layout saves its weights, the other loads
them; after the backward pass the gradients take the same way back under the names of the weights. So a
comparison needs to know nothing about how a parameter is cut.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from cca_megatron.parallel.layout import ContextLayout

VOCAB, HIDDEN, SEQUENCE = 96, 32, 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes; what is left of the world is data parallel."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __str__(self) -> str:
        names = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "ep": self.ep, "etp": self.etp}
        axes = [f"{name}{size}" for name, size in names.items() if size > 1]
        return "-".join([*axes, *(["sp"] if self.sp else [])]) or "single"


def start_distributed() -> None:
    """Join torchrun's process group, or make one of this process alone."""
    if dist.is_initialized():
        return
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    store = None
    if os.environ["WORLD_SIZE"] == "1":
        store = dist.HashStore()
    backend = "gloo" if torch.cuda.get_device_name() == "cpu" else "nccl"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        backend, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), store=store
    )


@contextlib.contextmanager
def parallel(layout: Layout) -> Iterator[None]:
    """Megatron's process groups in this layout, for the length of the block."""
    start_distributed()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    torch.manual_seed(11)
    try:
        yield
    finally:
        # Megatron forgets its groups without ending them, and each keeps threads of its own.
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()


def tiny_config(layout: Layout | None = None, **settings: Any) -> TransformerConfig:
    """A model that runs in milliseconds: 2 layers, 4 query heads in 2 groups, hidden size 32, fp64."""
    layout = layout or Layout()
    dtype = settings.pop("params_dtype", torch.float64)
    defaults = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
    }
    return TransformerConfig(**(defaults | settings))


MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1],
    "moe_aux_loss_coeff": 0.0,
    "moe_router_dtype": "fp64",
}
"""Settings of a model whose second layer is a mixture of experts."""


def gpt_model(config: TransformerConfig, spec: Any, **settings: Any) -> GPTModel:
    """A GPT model of this config and spec on the current layout."""
    defaults = {
        "vocab_size": VOCAB,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "share_embeddings_and_output_weights": False,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    model = GPTModel(config, spec, **(defaults | settings)).to(config.params_dtype)
    return model.cuda()


def randomize(module: torch.nn.Module, seed: int = 5) -> None:
    """Give every parameter random values, so that none hides behind its initial zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.2 if parameter.dim() > 1 else 0.5
            offset = 1.0 if "norm" in name or "temperature" in name else 0.0
            parameter.copy_(offset + scale * value)


def batch_of_tokens(samples: int, seed: int = 3) -> Tensor:
    """[samples, SEQUENCE + 1] random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (samples, SEQUENCE + 1), generator=generator).cuda()


def logits_and_gradients(
    config: TransformerConfig,
    model: GPTModel,
    tokens: Tensor,
    layout: ContextLayout | None = None,
    **inputs: Any,
) -> tuple[Tensor, DistributedDataParallel]:
    """Logits of all samples of the global batch, and the model with its reduced ``main_grad``.

    The loss is a cross-entropy in the model's dtype over gathered logits: Megatron's own computes in
    fp32. Each data-parallel rank takes its share of the samples, each context-parallel rank its share of
    the tokens (``layout``; a plain batch by default).
    """
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=False), model)
    ddp.zero_grad_buffer()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if len(tokens) < size:
        tokens = tokens.expand(size, -1)  # one packed sample, the same for all
    mine = tokens.chunk(size)[rank]
    positions = torch.arange(mine.shape[1] - 1).cuda().expand(mine.shape[0], -1)
    group = parallel_state.get_context_parallel_group()
    layout = layout or ContextLayout.zigzag(mine.shape[1] - 1, group.size())
    here = torch.from_numpy(layout.token_indices(group.rank()))
    out = ddp(mine[:, :-1][:, here].contiguous(), positions[:, here], None, **inputs)
    logits = gather_from_tensor_model_parallel_region(out)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:][:, here].flatten())
    loss.backward()
    finalize_model_grads([ddp])
    chunks = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(chunks, logits.detach().contiguous(), group=group)
    order = [layout.token_indices(rank) for rank in range(group.size())]
    logits = torch.cat(chunks, 1)[:, np.argsort(np.concatenate(order))]
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.detach().contiguous(), group=parallel_state.get_data_parallel_group())
    return torch.cat(parts), ddp


@contextlib.contextmanager
def shared_directory() -> Iterator[str]:
    """One temporary directory for all ranks."""
    start_distributed()
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path, 0)
    try:
        yield path[0]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path[0])


def save(model: torch.nn.Module, directory: str) -> None:
    """Write the model's weights as a distributed checkpoint."""
    if dist.get_rank() == 0:
        os.makedirs(directory)
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), directory)


def load(model: torch.nn.Module, directory: str) -> None:
    """Read weights that any layout has saved."""
    state = dist_checkpointing.load(model.sharded_state_dict(), directory)
    model.load_state_dict(state)


@contextlib.contextmanager
def gradients_as_weights(ddp: DistributedDataParallel) -> Iterator[None]:
    """Let checkpoints see the gradients under the names of the weights."""
    weights = {p: p.data for p in ddp.module.parameters()}
    for parameter in weights:
        parameter.data = parameter.main_grad.to(parameter.dtype).clone()
    try:
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data


@contextlib.contextmanager
def microbatches(count: int = 1) -> Iterator[None]:
    """Megatron's global count of micro-batches, which its MoE layers ask for."""
    init_num_microbatches_calculator(0, None, count, 1, 1)
    try:
        yield
    finally:
        unset_num_microbatches_calculator()
