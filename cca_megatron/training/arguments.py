"""Arguments of our entry: Megatron's own, the CCA settings, and defaults that fit the machine."""

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import Field, fields, replace
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory

from cca_megatron._compat import HAVE_TE
from cca_megatron.config import CCAConfig, config_problems
from cca_megatron.training.device import Device

_PREFIX = "cca_"

# What runs without Transformer Engine and Apex: no fused kernels, the local modules.
_LOCAL_DEFAULTS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}
# What runs without a GPU. The fusions left are torch.compile's, which the CPU backend turns off.
_CPU_DEFAULTS = {
    **_LOCAL_DEFAULTS,
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
}


def add_arguments(device: Device) -> Callable[[ArgumentParser], ArgumentParser]:
    """Megatron's ``extra_args_provider``: the CCA settings, and defaults for this device.

    An argument that is given always wins over a default.
    """

    def provider(parser: ArgumentParser) -> ArgumentParser:
        _CCAArguments(CCAConfig).build_group(parser, "compressed convolutional attention")
        # CCA is causal: a mask would be built, moved and ignored for every sample.
        # Megatron 0.19 divides by the evaluation interval and has no default for it; it was 1000 before.
        parser.set_defaults(create_attention_mask_in_dataloader=False, eval_interval=1000)
        if device == "cpu":
            parser.set_defaults(**_CPU_DEFAULTS)
        elif not HAVE_TE:
            parser.set_defaults(**_LOCAL_DEFAULTS)
        return parser

    return provider


class _CCAArguments(ArgumentGroupFactory):
    """Megatron's own generator of arguments from a dataclass, with a prefix: ``--cca-temperature``."""

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        return super()._format_arg_name(_PREFIX + config_attr_name, prefix)

    def _extract_type(self, config_type: Any) -> dict[str, Any]:
        if config_type == tuple[int, int]:
            return {"type": int, "nargs": 2}
        return super()._extract_type(config_type)

    def _build_argparse_kwargs_from_field(self, attribute: Field[Any]) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        kwargs["dest"] = _PREFIX + attribute.name
        return kwargs


def cca_config_from_args(args: Namespace) -> CCAConfig:
    """The CCA settings among parsed arguments.

    How packed documents are cut over context-parallel ranks follows from where they come from: ``--sft``
    pads each for a cut of its own, and documents in pretraining data end anywhere.
    """
    cca = CCAConfig(**{f.name: getattr(args, _PREFIX + f.name) for f in fields(CCAConfig)})
    if args.context_parallel_size > 1 and is_packed(args):
        return replace(cca, packed_zigzag="document" if args.sft else "stream")
    return cca


def is_packed(args: Namespace) -> bool:
    """Whether samples are several documents that must not see each other."""
    return bool(args.dataloader_inter_document_masking or args.sft)


def argument_problems(args: Namespace) -> list[str]:
    """What keeps these parsed arguments from training CCA: one message each, empty if nothing does."""
    problems = []
    if not args.group_query_attention and args.num_query_groups != 1:
        problems.append(
            f"num_query_groups={args.num_query_groups}: Megatron ignores it without "
            "--group-query-attention; add that flag"
        )
    settings = argparse.Namespace(**vars(args))
    if not args.group_query_attention:
        settings.num_query_groups = None
    problems += config_problems(settings, cca_config_from_args(args))
    problems += [message for condition, message in _entry_rules(args) if condition]
    return problems


def _entry_rules(args: Namespace) -> list[tuple[bool, str]]:
    cp, length = args.context_parallel_size, args.seq_length
    return [
        (
            args.spec is not None,
            f"spec={args.spec}: this entry builds CCA by itself; drop --spec, or pass it to Megatron's "
            "own pretrain_gpt.py",
        ),
        (
            args.fim_data,
            "fim_data: this entry reads text or conversations; use Megatron's own pretrain_gpt.py "
            "with --spec cca_megatron.specs cca_decoder_block_spec",
        ),
        (
            args.sft and args.dataloader_inter_document_masking,
            "sft with dataloader_inter_document_masking: conversations are kept apart already; drop the "
            "latter",
        ),
        (
            args.reset_attention_mask or args.reset_position_ids,
            "reset_attention_mask, reset_position_ids: Megatron carries them in a mask that causal "
            "attention ignores; --dataloader-inter-document-masking keeps documents apart",
        ),
        (
            not 0 <= _warmup(args) < _decay(args),
            f"learning-rate warm-up of {_warmup(args):g} and decay over {_decay(args):g}: the warm-up must "
            "end before the decay does; lr-warmup-fraction=0.05 works for any length",
        ),
        (
            is_packed(args) and args.pipeline_model_parallel_size > 1 and args.micro_batch_size > 1,
            f"micro_batch_size={args.micro_batch_size} with packed documents: Megatron's pipeline sends "
            "packed micro-batches in the wrong shape; micro_batch_size=1 works",
        ),
        (
            bool(cp > 1 and length and length % (2 * cp)),
            f"seq_length={length} with context_parallel_size={cp}: every sequence is cut in {2 * cp} chunks; "
            f"seq_length={-(-(length or 0) // (2 * cp)) * 2 * cp} works",
        ),
    ]


def _decay(args: Namespace) -> float:
    """Length of the learning-rate schedule, in iterations or samples."""
    if args.train_samples is not None:
        return args.lr_decay_samples or args.train_samples
    return args.lr_decay_iters or args.train_iters or float("inf")


def _warmup(args: Namespace) -> float:
    if args.lr_warmup_fraction is not None:
        return args.lr_warmup_fraction * _decay(args)
    return args.lr_warmup_samples if args.train_samples is not None else args.lr_warmup_iters
