"""The balancing biases of ZAYA's routers: trained beside the loss, once per step.

AdamW with the gradient ``share of the tokens - mean share of the experts``, over the tokens of the whole
global batch (ZAYA1 report). An expert with more than its share becomes less likely to be chosen, and the
weights of the chosen, which are the probabilities without the biases, are not touched. The class that skips
keeps its bias.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from cca_megatron._compat import TransformerConfig, finalize_model_grads
from cca_megatron.zaya.router import ZayaRouter

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def balance_at_every_step(config: TransformerConfig) -> None:
    """Let Megatron's training step update the biases, where it finishes the gradients.

    Megatron takes ``finalize_model_grads_func`` from the configuration, and its own if there is none.
    """
    if config.finalize_model_grads_func in (None, finalize_model_grads):
        config.finalize_model_grads_func = finalize_and_balance


def finalize_and_balance(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Megatron's ``finalize_model_grads``, then :func:`update_biases`."""
    finalize_model_grads(model, *args, **kwargs)
    update_biases(routers_of(model))


def routers_of(model: list[torch.nn.Module]) -> list[ZayaRouter]:
    """The routers of the chunks of this pipeline stage, in the order of their layers."""
    return [module for chunk in model for module in chunk.modules() if isinstance(module, ZayaRouter)]


@torch.no_grad()
def update_biases(routers: list[ZayaRouter]) -> None:
    """One step of AdamW from the tokens counted since the last, and start counting anew.

    All ranks that share these layers must call it together: the counts are summed over them, in one
    all-reduce. Afterwards ``class_share`` of a router is [classes], the share of the tokens of each.
    """
    if not routers:
        return
    counts = torch.stack([router.class_counts for router in routers])
    dist.all_reduce(counts, group=routers[0].tp_dp_cp_group)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    experts = routers[0].num_experts
    gradients = (shares[:, :experts] - shares[:, :experts].mean(-1, keepdim=True)).float()
    for router, share in zip(routers, shares, strict=True):
        router.class_counts.zero_()
        router.class_share = share.float()
    rate = routers[0].zaya.balancing_rate
    if rate == 0:
        return
    adamw(
        [router.balancing_biases[:experts] for router in routers],
        list(gradients),
        [router.balancing_exp_avg for router in routers],
        [router.balancing_exp_avg_sq for router in routers],
        [],
        [router.balancing_step for router in routers],
        capturable=counts.device.type == "cuda",  # else it waits for the device to read each step
        amsgrad=False,
        beta1=_BETAS[0],
        beta2=_BETAS[1],
        lr=rate,
        weight_decay=0.0,
        eps=_EPSILON,
        maximize=False,
    )
