"""Weights of a model in memory, from and to the names and order of ``transformers``, in any parallel layout.

How a parameter is cut, Megatron's own sharded state dict says: it names the whole tensor of which a rank
holds a part, and where in it the part lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cca_megatron._compat import ShardedTensor, apply_factories, nested_values, unwrap_model
from cca_megatron.hf.config import ConversionError
from cca_megatron.hf.tensors import Shape, Sizes, TensorMap, tensor_maps
from cca_megatron.vocabulary import known_vocabulary, remember_vocabulary
from cca_megatron.zaya.layer import ZayaLayer

Model = torch.nn.Module | Sequence[torch.nn.Module]


@torch.no_grad()
def load_hf_state_dict(model: Model, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of a ``ZayaForCausalLM`` into a Megatron model.

    Before the optimizer is built, which has copies of its own.

    Args:
        model: the GPT model of this rank, or its chunks with virtual pipeline stages; wrapped or not.
        state_dict: by the names of ``transformers``, whole tensors. A tied
            ``lm_head.weight`` may be there. With fewer tokens than the model's padded vocabulary the rest of
            the embeddings becomes zero.

    Raises:
        ConversionError: names are unknown or missing, or shapes do not fit; nothing is copied then.
    """
    sizes, embedding = sizes_of(model), state_dict.get("model.embed_tokens.weight")
    if embedding is not None and _is_padded(model, embedding.shape[0], sizes.vocab):
        sizes = replace(sizes, vocab=embedding.shape[0])
    maps = {m.megatron: m for m in tensor_maps(sizes)}
    check_names({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, list(maps.values()))
    for chunk in _chunks(model):
        remember_vocabulary(chunk, sizes.vocab)
    for shard in _shards(model):
        if shard.key not in maps:
            shard.data.zero_()  # state of the balancing biases' optimizer
            continue
        tensor_map = maps[shard.key]
        whole = tensor_map.join([state_dict[name] for name in tensor_map.hf])
        part = whole[_Part.of(shard).place].to(shard.data.device)
        shard.data[: part.shape[0]].copy_(part)
        shard.data[part.shape[0] :].zero_()


@torch.no_grad()
def export_hf_state_dict(model: Model) -> dict[str, Tensor]:
    """The weights of a Megatron model as those of a ``ZayaForCausalLM``, whole, in memory on every rank.

    All ranks must call it together. For a model that does not fit into the memory of one machine, save a
    checkpoint and use ``cca-megatron convert megatron-to-hf``.

    Args:
        model: the GPT model of this rank, or its chunks with virtual pipeline stages; wrapped or not.

    Returns:
        By the names of ``transformers``, on the CPU, without the rows that pad the vocabulary.
    """
    own = {_Part.of(shard): shard for shard in _shards(model)}
    owners: dict[str, list[tuple[_Part, int]]] = {}
    for part, rank in _owners(list(own)).items():
        owners.setdefault(part.key, []).append((part, rank))
    exported: dict[str, Tensor] = {}
    for tensor_map in tensor_maps(sizes_of(model)):
        if tensor_map.megatron not in owners:
            raise ConversionError(f"no rank has {tensor_map.megatron}: is this a whole model?")
        whole = torch.empty(tensor_map.shape, dtype=owners[tensor_map.megatron][0][0].dtype)
        for part, rank in owners[tensor_map.megatron]:
            whole[part.place] = _broadcast(own.get(part), part, rank)
        if tensor_map.megatron in VOCABULARY:
            whole = whole[: known_vocabulary(_chunks(model)[0])]
        exported |= dict(zip(tensor_map.hf, tensor_map.split(whole), strict=True))
    return {name: tensor.contiguous() for name, tensor in exported.items()}


def sizes_of(model: Model) -> Sizes:
    """The sizes of a Megatron model with ZAYA's parts.

    Raises:
        ConversionError: it has none.
    """
    chunk, *_ = chunks = _chunks(model)
    layers = (module for one in chunks for module in one.modules() if isinstance(module, ZayaLayer))
    layer = next(layers, None)
    if layer is None:
        raise ConversionError(
            f"{type(chunk).__name__} has no layers of ZAYA here: zaya_decoder_block_spec makes them, and "
            "every pipeline stage needs one"
        )
    config, zaya, cca = layer.config, layer.zaya, layer.self_attention.cca
    return Sizes(
        layers=config.num_layers,
        hidden=config.hidden_size,
        query_heads=config.num_attention_heads,
        groups=config.num_query_groups,
        head_dim=config.kv_channels,
        kernel_sizes=cca.conv_kernel_sizes,
        experts=config.num_moe_experts,
        expert_hidden=config.moe_ffn_hidden_size,
        router_hidden=zaya.router_hidden_size,
        vocab=chunk.vocab_size,
        tied=chunk.share_embeddings_and_output_weights,
    )


def check_names(found: Mapping[str, Shape], maps: list[TensorMap]) -> None:
    """Raise ConversionError unless the names and shapes are those of the model.

    Args:
        found: shapes by the names of ``transformers``.
        maps: every tensor of the model.
    """
    wanted = {name: shape for m in maps for name, shape in m.hf.items()}
    check_shapes(found, wanted, tied="lm_head.weight" not in wanted)


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], tied: bool) -> None:
    """Raise ConversionError unless names and shapes agree; a tied ``lm_head.weight`` may be there or not."""
    unknown = [n for n in found if n not in wanted and not (tied and n == "lm_head.weight")]
    problems = [f"{name}: is missing" for name in wanted if name not in found]
    problems += [f"{name}: is not known" for name in unknown]
    problems += [
        f"{name}: has shape {list(found[name])}, and must have {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ConversionError("the weights are not those of this model:\n  - " + "\n  - ".join(shown))


def _is_padded(model: Model, tokens: int, rows: int) -> bool:
    """Whether a model with so many rows of embeddings is one of so many tokens."""
    chunk, *_ = _chunks(model)
    true, unit = known_vocabulary(chunk), chunk.config.tensor_model_parallel_size * _PADDING_UNIT
    return tokens == true if true is not None else rows - unit < tokens < rows


_PADDING_UNIT = 128
"""Megatron pads to a multiple of this and the tensor-parallel size, unless told otherwise."""
VOCABULARY = {"embedding.word_embeddings.weight", "output_layer.weight"}
"""Megatron's names of the tensors whose rows are tokens."""


@dataclass(frozen=True)
class _Part:
    """A part of a whole tensor, which several ranks may hold."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    prepended: int
    """Leading axes of the whole that the part has not: layers of experts."""

    @classmethod
    def of(cls, shard: ShardedTensor) -> "_Part":
        return cls(shard.key, shard.dtype, shard.local_shape, shard.global_offset, shard.prepend_axis_num)

    @property
    def place(self) -> tuple[int | slice, ...]:
        """Where it lies in the whole."""
        lengths = zip(self.offset[self.prepended :], self.shape, strict=True)
        slices = [slice(start, start + length) for start, length in lengths]
        return (*self.offset[: self.prepended], *slices)


def _chunks(model: Model) -> list[Any]:
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    return [unwrap_model(chunk) for chunk in chunks]


def _shards(model: Model) -> Iterator[ShardedTensor]:
    """The parts that this rank holds; their ``data`` is the parameter's own memory."""
    for chunk in _chunks(model):
        state_dict = chunk.sharded_state_dict()
        apply_factories(state_dict)
        yield from (x for x in nested_values(state_dict) if isinstance(x, ShardedTensor))


def _owners(parts: list[_Part]) -> dict[_Part, int]:
    """The lowest rank that holds each part, in an order that is the same on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, parts)
    owners: dict[_Part, int] = {}
    for rank, theirs in enumerate(gathered):
        for part in theirs:
            owners.setdefault(part, rank)
    return owners


def _broadcast(shard: ShardedTensor | None, part: _Part, owner: int) -> Tensor:
    device = torch.device("cuda", torch.cuda.current_device())
    if shard is not None and dist.get_rank() == owner:
        data = shard.data.detach().to(device).contiguous()
    else:
        data = torch.empty(part.shape, dtype=part.dtype, device=device)
    dist.broadcast(data, owner)
    return data.cpu()
