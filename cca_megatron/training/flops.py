"""FLOPs of a training step as the model is built: Megatron's own count, corrected for what it does not know.

Megatron counts a CCA layer's projections and core attention right, because the latent heads are its own
settings. It knows nothing of the convs, counts no routers, and takes layers with a sliding window for full
ones. FLOPs are the model's, not the hardware's: 2 per multiply-add, three times the forward pass, none for
recomputation, norms and RoPE, and core attention by the usual convention that a causal mask leaves half of
the pairs.
"""

import functools
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator

from cca_megatron.plan.attention import MIX
from cca_megatron.plan.layers import mean_keys
from cca_megatron.plan.shapes import attention_from_args, moe_layers, router_from_args, window_of

_BACKWARD = 3
"""A step is its forward pass three times: the backward pass computes two gradients for each product."""
_SIGNATURE = ("args", "batch_size", "seqlen_squared_sum_in_batch", "total_real_tokens_in_batch")


def correct_flops() -> None:
    """Let Megatron's log, progress log and checkpoints count the FLOPs of the model that is built.

    Replaces ``num_floating_point_operations`` in the module that trains, and says so when it counts first. A
    function that takes other arguments than that of megatron-core 0.19 is left alone, with a line about it.
    """
    from megatron.training import training
    from megatron.training.utils import print_rank_0

    original = training.num_floating_point_operations
    signature = tuple(inspect.signature(original).parameters)
    if signature == _SIGNATURE:
        training.num_floating_point_operations = _corrected(original, print_rank_0)
    else:
        print_rank_0(
            f"FLOPs are Megatron's own count, without convs and routers: num_floating_point_operations takes "
            f"({', '.join(signature)}), not ({', '.join(_SIGNATURE)}) as in megatron-core 0.19"
        )


def _corrected(original: Callable[..., float], say: Callable[[str], None]) -> Callable[..., float]:
    said = False

    @functools.wraps(original)
    def count(
        args: Namespace,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        nonlocal said
        megatron = original(args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)
        tokens, squares = total_real_tokens_in_batch, seqlen_squared_sum_in_batch
        if tokens is None or squares is None:
            tokens, squares = batch_size * args.seq_length, batch_size * args.seq_length**2
        if not tokens:
            return megatron
        corrected = megatron + tokens * uncounted_flops(args, squares / tokens)
        if not said:
            said = True
            say(
                f"FLOPs: {corrected / tokens:.4g} per token, forward and backward; Megatron's own count, "
                f"without convs, routers and windows, is {megatron / tokens:.4g}"
            )
        return corrected

    return count


def uncounted_flops(args: Namespace, sequence: float) -> float:
    """FLOPs per token, forward and backward, that Megatron's count lacks; below 0 where windows save more.

    Args:
        args: Megatron's arguments, completed.
        sequence: tokens of a sequence or packed document; of documents of several lengths the mean over
            tokens, which is exact but for windows.
    """
    attention = attention_from_args(args)
    layers = list(_attention_layers(args))
    saved = sum(sequence / 2 - mean_keys(sequence, window_of(args, number)) for number in layers)
    forward = len(layers) * attention.flops().get(MIX, 0) - saved * attention.pair_flops()
    if args.num_experts is not None:
        forward += _count_routers(args) * router_from_args(args).flops()
    return _BACKWARD * forward


def _attention_layers(args: Namespace) -> Iterator[int]:
    """The layers with attention by their numbers, those of multi-token prediction after the others."""
    if args.hybrid_layer_pattern is None:
        yield from range(1, args.num_layers + 1)
        yield from range(1, (args.mtp_num_layers or 0) + 1)
        return
    main, *predictions = args.hybrid_layer_pattern.split("/")
    for pattern in (main.replace("|", ""), *predictions):
        yield from (number for number, kind in enumerate(pattern, 1) if kind == "*")


def _count_routers(args: Namespace) -> int:
    if args.hybrid_layer_pattern is not None:
        return args.hybrid_layer_pattern.count("E")
    has_experts = moe_layers(args)
    return sum(has_experts) + has_experts[-1] * (args.mtp_num_layers or 0)
