"""The share of the tokens that each expert gets, counted and logged while training."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cca_megatron._compat import TopKRouter
from cca_megatron.training.arguments import zaya_settings_from_args
from cca_megatron.training.expert_shares import TENSOR
from cca_megatron.training.tensorboard import logged_iteration
from cca_megatron.zaya.router import ZayaRouter


def num_classes(settings: Any) -> int:
    """What the routers of these arguments choose among: the experts, and ZAYA's class that skips them."""
    zaya = zaya_settings_from_args(settings)
    skips = zaya is not None and zaya.has_mlp_router and zaya.skip_class
    return (settings.num_experts or 0) + skips


def count_tokens(model: list[Any]) -> list[Any]:
    """Let Megatron's routers count what they choose at the steps that are logged; ZAYA's count by themselves.

    A hook for Megatron's ``pre_wrap_hooks``: it takes the chunks of a stage, and returns them. With CUDA
    graphs nothing is counted: this would run when they are captured, and not when they are replayed.
    """
    for chunk in model:
        if chunk.config.cuda_graph_impl != "none":
            continue
        for router in chunk.modules():
            if isinstance(router, TopKRouter) and not isinstance(router, ZayaRouter):
                router.register_forward_hook(_count)
    return model


def _count(router: Any, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
    from megatron.training import get_args

    # Once per token: neither in evaluation nor in the first of two passes of recomputation.
    if router.training and torch.is_grad_enabled() and logged_iteration(get_args()) is not None:
        counts = outputs[1].sum(0)
        earlier = getattr(router, "counts_for_log", None)
        router.counts_for_log = counts if earlier is None else earlier + counts


def shares_of(routers: list[TopKRouter]) -> list[Tensor]:
    """For each router [classes], the share of the tokens of the global batch that each class got.

    Where a token visits several experts, of its visits. All ranks that hold these layers must call it
    together: the counts of Megatron's routers are summed over them, in one all-reduce.
    """
    counted = iter(_counted([router for router in routers if not isinstance(router, ZayaRouter)]))
    shares = [router.class_share if isinstance(router, ZayaRouter) else next(counted) for router in routers]
    return [share for share in shares if share is not None]


def _counted(routers: list[Any]) -> Tensor:
    """[routers, experts]; starts counting anew."""
    device = torch.cuda.current_device()
    counts = torch.zeros(len(routers), routers[0].num_experts if routers else 0, device=device)
    for row, router in zip(counts, routers, strict=True):
        if getattr(router, "counts_for_log", None) is not None:
            row += router.counts_for_log
            router.counts_for_log = None
    if routers:
        dist.all_reduce(counts, group=routers[0].tp_dp_cp_group)
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def write_shares(shares: Tensor, iteration: int) -> None:
    """Write [layers, classes] for ``expert_shares`` to read, if this rank writes and there are any."""
    from megatron.training import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is not None and shares.any():
        writer.add_tensor(TENSOR, shares, iteration)
