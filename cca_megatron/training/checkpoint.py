"""What a checkpoint on disk was trained with, read without starting a run."""

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from cca_megatron.config import CCAConfig
from cca_megatron.zaya.settings import ZayaSettings

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the checkpoint to load, written when that is whole."""
_INDEX, RELEASE = ".metadata", "release"

# Settings that give the weights their shapes or their meaning.
# fmt: off
_MODEL_SETTINGS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention",
    "num_query_groups", "kv_channels", "num_experts", "moe_ffn_hidden_size", "moe_layer_freq",
    "moe_router_topk", "mtp_num_layers", "hybrid_layer_pattern", "swiglu", "squared_relu",
    "normalization", "add_bias_linear", "untie_embeddings_and_output_weights",
    "position_embedding_type", "rotary_percent", "rotary_base", "rotary_interleaved", "no_rope_freq",
    "window_size", "window_attn_skip_freq", "layernorm_zero_centered_gamma", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size",
    "vocab_size", "tokenizer_type", "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim",
)
# fmt: on
# Where nothing is set, these parts are absent; of the others None means that Megatron fills it in later.
_OPTIONAL_PARTS = {
    "num_experts",
    "hybrid_layer_pattern",
    "no_rope_freq",
    "window_size",
    "window_attn_skip_freq",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size",
}  # fmt: skip
_NOT_IN_WEIGHTS = {
    "temperature_init", "reset_at_document_start", "recompute_mix", "packed_zigzag",
    "balancing_rate", "padding_token",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {"zaya": False, "attention": "cca"} | {
    f"{prefix}_{f.name}": f.default
    for prefix, settings in (("cca", CCAConfig), ("zaya", ZayaSettings))
    for f in fields(settings)
}
_OWN_SETTINGS = [name for name in _DEFAULTS if name.partition("_")[2] not in _NOT_IN_WEIGHTS]


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration that Megatron would resume from, or None if there is no checkpoint."""
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    return int(text) if text.isdigit() else None


def open_checkpoint(directory: str | Path, step: int | None = None) -> tuple[Path, Namespace]:
    """The folder of the latest checkpoint, or of one iteration, and the arguments of the run that saved it.

    Args:
        directory: where Megatron saves checkpoints, or the folder of one iteration.
        step: the iteration; None takes the latest, or a converted model's release.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no distributed checkpoint, or was saved without arguments.
    """
    from megatron.core import dist_checkpointing

    root = Path(directory)
    path = root
    if (root / _INDEX).is_file() and step is not None:
        raise ValueError(f"step={step}: {root.resolve()} is the folder of one iteration; leave step out")
    if not (root / _INDEX).is_file():
        path = iteration_directory(root, step) if step is not None else _latest(root)
    if not (path / _INDEX).is_file():
        at = "" if step is None else f" of iteration {step}"
        raise FileNotFoundError(f"no checkpoint{at} in {root.resolve()}")
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(f"{path.resolve()}: is no distributed checkpoint of Megatron (torch_dist)")
    args = _saved_arguments(path)
    if args is None:
        raise ValueError(f"{path.resolve()}: was saved without the arguments of its run")
    if not hasattr(args, "cca_conv_kernel_sizes"):
        raise ValueError(
            f"{path.resolve()}: was saved by another script than cca-megatron train, whose arguments say "
            "nothing of CCA; go on from it there (megatron.load=FOLDER) and save it once"
        )
    return path, args


def _latest(root: Path) -> Path:
    iteration = latest_iteration(root)
    return root / RELEASE if iteration is None else iteration_directory(root, iteration)


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of an iteration."""
    return Path(directory) / f"iter_{iteration:07d}"


def checkpoint_problems(args: Namespace) -> list[str]:
    """Why the checkpoint that these parsed arguments would load is of another model; empty if it fits.

    Settings that Megatron has not completed yet are not compared.
    """
    from megatron.core import dist_checkpointing

    if args.load is None or args.use_checkpoint_args or args.finetune:
        return []
    iteration = args.ckpt_step if args.ckpt_step is not None else latest_iteration(args.load)
    if iteration is None:
        return []
    path = iteration_directory(args.load, iteration)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        return []
    saved = _saved_arguments(path)
    if saved is None:
        return []
    problems = []
    for name in (*_MODEL_SETTINGS, *_OWN_SETTINGS):
        ours, theirs = (_setting(given, name) for given in (args, saved))
        is_comparable = name in _OPTIONAL_PARTS or None not in (ours, theirs)
        if is_comparable and ours != theirs:
            problems.append(
                f"{name}={ours!r}, but the checkpoint in {Path(args.load).resolve()} (iteration "
                f"{iteration}) has {theirs!r}; set it to that, or train into another output folder"
            )
    return problems


def _setting(args: Namespace, name: str) -> Any:
    """As it counts: without grouped queries Megatron ignores the groups, and fills in the heads later."""
    if name == "num_query_groups" and not args.group_query_attention:
        return None
    value = getattr(args, name, None)
    # Arguments that hold several values are tuples by default and lists when given.
    return list(value) if isinstance(value, tuple) else value


def _saved_arguments(path: Path) -> Namespace | None:
    """The arguments of the run that saved this distributed checkpoint, or None if it has none.

    Settings of this project that there were not yet have their defaults.
    """
    from megatron.core import dist_checkpointing

    args: Namespace | None = dist_checkpointing.load_common_state_dict(str(path)).get("args")
    if hasattr(args, "cca_conv_kernel_sizes"):
        vars(args).update({**_DEFAULTS, **vars(args)})
    return args


def _is_state(name: str) -> bool:
    """Whether a tensor is an optimizer's, which has a prefix where there are several, or the biases' own."""
    return "optimizer." in name or ".balancing_" in name


def count_parameters(directory: str | Path, iteration: int) -> int:
    """Parameters of the whole model, whatever its parallel layout, from the checkpoint's own index."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = iteration_directory(directory, iteration)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return sum(
        entry.size.numel()
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not _is_state(name)
    )
