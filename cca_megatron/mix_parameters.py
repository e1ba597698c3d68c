"""The parameters of the mix: how tensor parallelism cuts, initialises, sums and saves them.

All are cut along axis 0 by KV group. With more tensor-parallel ranks than groups, several ranks work on
one group: each holds the whole group's parameters and finds a part of their gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cca_kernels import MixWeights
from cca_megatron._compat import (
    ShardedTensor,
    TransformerConfig,
    get_pg_rank,
    get_pg_size,
    set_tensor_model_parallel_attributes,
    tensor_parallel,
)


@dataclass(frozen=True)
class GroupShare:
    """Which KV groups a tensor-parallel rank works on, and with how many others.

    Args:
        num_groups: KV groups of the model; a multiple or a divisor of the number of ranks.
        tp_group: the tensor-parallel group.
    """

    num_groups: int
    tp_group: dist.ProcessGroup | None

    @property
    def parts(self) -> int:
        """Into how many parts the groups are cut."""
        return min(self.num_groups, get_pg_size(self.tp_group))

    @property
    def sharers(self) -> int:
        """Ranks that work on the same part."""
        return get_pg_size(self.tp_group) // self.parts

    @property
    def part(self) -> int:
        """This rank's part."""
        return get_pg_rank(self.tp_group) // self.sharers

    @property
    def place(self) -> int:
        """This rank's place among those that share its part."""
        return get_pg_rank(self.tp_group) % self.sharers


def new_parameter(
    shape: tuple[int, ...], init: Callable[[Tensor], Any], config: TransformerConfig, share: GroupShare
) -> torch.nn.Parameter:
    """A parameter whose axis 0 holds this rank's part, initialised as Megatron's linears are.

    Args:
        shape: of this rank's part.
        init: fills a tensor in place.
    """
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    # Gradient norms count it once.
    parameter.shared = share.place > 0  # type: ignore[attr-defined]
    if not config.perform_initialization:
        return parameter
    if config.use_cpu_initialization or share.sharers > 1:
        # Every rank draws the whole tensor and keeps its part: alike for all that share it, and on a CPU
        # the same model for every number of ranks.
        whole = torch.empty(shape[0] * share.parts, *shape[1:], dtype=torch.float, device=device)
        init(whole)
        parameter.data.copy_(whole.chunk(share.parts)[share.part])
    else:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            init(parameter)
    return parameter


def gradients_summed(weights: MixWeights, share: GroupShare) -> MixWeights:
    """The weights, their gradients summed over the ranks that share them; as they are where none do."""
    if share.sharers == 1:
        return weights
    present = {name: weight for name, weight in weights._asdict().items() if weight is not None}
    summed = _SumGradients.apply(share, *present.values())
    return weights._replace(**dict(zip(present, summed, strict=True)))


class _SumGradients(torch.autograd.Function):
    """Identity forward; backward is one all-reduce for all weights of a layer."""

    @staticmethod
    def forward(ctx: Any, share: GroupShare, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.share = share
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        share = ctx.share
        own = torch.cat([gradient.flatten() for gradient in gradients])
        # One row for each part: no further process groups, and the other rows add zeros.
        rows = own.new_zeros(share.parts, own.numel())
        rows[share.part] = own
        dist.all_reduce(rows, group=share.tp_group)
        parts = rows[share.part].split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(g) for part, g in zip(parts, gradients, strict=True))


def sharded_parameters(
    parameters: dict[str, Tensor],
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    share: GroupShare,
    dp_cp_group: dist.ProcessGroup,
) -> dict[str, ShardedTensor]:
    """The parameters as distributed checkpoints store them: each part once, whoever holds copies."""
    axis = len(sharded_offsets)
    replica = (0, share.place, get_pg_rank(dp_cp_group))
    return {
        prefix + name: ShardedTensor.from_rank_offsets(
            prefix + name,
            parameter,
            *sharded_offsets,
            (axis, share.part, share.parts),
            replica_id=replica,
            prepend_axis_num=axis,
            allow_shape_mismatch=False,
        )
        for name, parameter in parameters.items()
    }
