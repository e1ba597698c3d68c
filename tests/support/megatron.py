"""Build small Megatron models in any parallel layout, and carry their weights from one to another."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

VOCAB, HIDDEN, SEQUENCE = 96, 32, 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes; what is left of the world is data parallel."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    """Chunks of the model on each pipeline stage."""
    ep: int = 1
    etp: int = 1

    def settings(self) -> dict[str, Any]:
        """As a TransformerConfig names them."""
        return {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.sp,
            "context_parallel_size": self.cp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }

    def __str__(self) -> str:
        sizes = {name: size for name, size in dataclasses.asdict(self).items() if name != "sp" and size > 1}
        return "-".join([f"{name}{size}" for name, size in sizes.items()] + ["sp"] * self.sp) or "single"


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
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
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
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
    }
    return TransformerConfig(**(defaults | layout.settings() | settings))


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
    at = {"ignore_virtual": False, "vp_stage": settings.get("vp_stage")}
    defaults = {
        "vocab_size": VOCAB,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "share_embeddings_and_output_weights": False,
        "pre_process": parallel_state.is_pipeline_first_stage(**at),
        "post_process": parallel_state.is_pipeline_last_stage(**at),
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


def new_directory(path: str) -> None:
    """Make a directory that all ranks can then write to."""
    if dist.get_rank() == 0:
        os.makedirs(path)
    dist.barrier()


def save(chunks: list[torch.nn.Module], directory: str) -> None:
    """Write the weights of a model, or of its chunks, as a distributed checkpoint."""
    new_directory(directory)
    dist_checkpointing.save(_sharded(chunks), directory)


def load(chunks: list[torch.nn.Module], directory: str) -> None:
    """Read weights that any layout has saved."""
    state = dist_checkpointing.load(_sharded(chunks), directory)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[str(number)])


def _sharded(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    return {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


@contextlib.contextmanager
def microbatches(count: int = 1) -> Iterator[None]:
    """Megatron's global count of micro-batches, which its MoE layers ask for."""
    init_num_microbatches_calculator(0, None, count, 1, 1)
    try:
        yield
    finally:
        unset_num_microbatches_calculator()
