"""Arguments of our entry: Megatron's own, the CCA and ZAYA settings, and defaults that fit the machine."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory

from cca_megatron._compat import HAVE_TE
from cca_megatron.config import CCAConfig
from cca_megatron.training.device import Device
from cca_megatron.zaya.settings import ZayaSettings

_PREFIX, _ZAYA_PREFIX = "cca_", "zaya_"
_DERIVED = "packed_zigzag"
"""The one setting that is no argument here: it follows from Megatron's."""

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
    """Megatron's ``extra_args_provider``: the CCA and ZAYA settings, and defaults for this device.

    An argument that is given always wins over a default.
    """

    def provider(parser: ArgumentParser) -> ArgumentParser:
        group = "compressed convolutional attention"
        cca = _PrefixedArguments(CCAConfig, _PREFIX, exclude=[_DERIVED]).build_group(parser, group)
        cca.add_argument(
            "--attention",
            choices=["cca", "megatron"],
            default="cca",
            help="'megatron' trains Megatron's own attention instead, all else being equal, to compare with: "
            "MHA, GQA with --group-query-attention, MLA with --multi-latent-attention.",
        )
        zaya = _PrefixedArguments(ZayaSettings, _ZAYA_PREFIX).build_group(parser, "ZAYA1's parts")
        zaya.add_argument("--zaya", action="store_true", help="Build the model with ZAYA1's parts.")
        parser.add_argument_group("loss").add_argument(
            "--loss-chunk-size",
            type=int,
            metavar="TOKENS",
            help="Compute the loss of so many tokens at a time, and their logits again in the backward pass, "
            "so that those of all tokens are never in memory: 137 GB for 128k tokens and a vocabulary of "
            "262k. Loss and gradients stay the same; the output layer takes 4 matrix products instead of 3. "
            "4096 suits long sequences on a GPU; see docs/long-context.md. Off by default.",
        )
        # CCA is causal: a mask would be built, moved and ignored for every sample.
        parser.set_defaults(create_attention_mask_in_dataloader=False)
        # Megatron 0.19 divides by it and has no default for it any more.
        parser.set_defaults(eval_interval=1000)
        if device == "cpu":
            parser.set_defaults(**_CPU_DEFAULTS)
        elif not HAVE_TE:
            parser.set_defaults(**_LOCAL_DEFAULTS)
        return parser

    return provider


class _PrefixedArguments(ArgumentGroupFactory):
    """Megatron's own generator of arguments from a dataclass, with a prefix: ``--cca-temperature``."""

    def __init__(self, settings: type, prefix: str, exclude: list[str] | None = None):
        super().__init__(settings, exclude)
        self.prefix = prefix

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        return super()._format_arg_name(self.prefix + config_attr_name, prefix)

    def _extract_type(self, config_type: Any) -> dict[str, Any]:
        if config_type == tuple[int, int]:
            return {"type": int, "nargs": 2}
        return super()._extract_type(config_type)

    def _build_argparse_kwargs_from_field(self, attribute: Field[Any]) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        kwargs["dest"] = self.prefix + attribute.name
        return kwargs


def cca_config_from_args(args: Namespace) -> CCAConfig:
    """The CCA settings among parsed arguments.

    How packed documents are cut over context-parallel ranks follows from where they come from: ``--sft``
    pads each for a cut of its own, and documents in pretraining data end anywhere.
    """
    given = {f.name: getattr(args, _PREFIX + f.name) for f in fields(CCAConfig) if f.name != _DERIVED}
    crosses_ranks = args.dataloader_inter_document_masking and args.context_parallel_size > 1
    return CCAConfig(**given, packed_zigzag="stream" if crosses_ranks else "document")


def zaya_settings_from_args(args: Namespace) -> ZayaSettings | None:
    """The settings of ZAYA's parts among parsed arguments; None where they are off."""
    if not args.zaya:
        return None
    return ZayaSettings(**{f.name: getattr(args, _ZAYA_PREFIX + f.name) for f in fields(ZayaSettings)})


def is_packed(args: Namespace) -> bool:
    """Whether samples are several documents that must not see each other."""
    return bool(args.dataloader_inter_document_masking or args.sft)
