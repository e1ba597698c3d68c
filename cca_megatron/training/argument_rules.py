"""What keeps arguments from training, said before any process starts.

Megatron checks much of this too, but some of it only in its workers, and some without naming the setting.
"""

import argparse
import re
from argparse import Namespace
from dataclasses import fields

from cca_megatron._compat import HAVE_TE
from cca_megatron.config import CCAConfig, config_problems
from cca_megatron.parallel.rules import core_attention_problems
from cca_megatron.training.arguments import cca_config_from_args, is_packed, zaya_settings_from_args
from cca_megatron.zaya.settings import zaya_problems

_Rules = list[tuple[object, str]]
"""(whether it is broken, message)"""


def argument_problems(args: Namespace) -> list[str]:
    """One message for each rule that these parsed arguments break; empty if they can train CCA.

    Args:
        args: as parsed, with ``world_size``; not yet completed by Megatron.
    """
    settings = argparse.Namespace(**vars(args))
    if not args.group_query_attention:
        settings.num_query_groups = None  # as Megatron ignores it
    problems = [
        f"{name}={getattr(args, name)!r}: must be a whole number of at least 1"
        for name in _counts(args)
        if type(getattr(args, name)) is not int or getattr(args, name) < 1
    ]
    # The other rules calculate with these.
    if not problems:
        problems = (
            config_problems(settings, cca_config_from_args(args))
            if args.attention == "cca"
            else _baseline_problems(settings)
        )
        zaya = zaya_settings_from_args(args)
        if zaya is not None:
            problems += [f"zaya: {problem}" for problem in zaya_problems(settings, zaya)]
        rules = [
            *_entry_rules(args),
            *_packing_rules(args),
            *_schedule_rules(args),
            *_expert_rules(args),
            *_loss_rules(args),
            *_rotary_rules(args),
        ]
        problems += [message for is_broken, message in rules if is_broken]
    return problems


def _counts(args: Namespace) -> list[str]:
    names = ["hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"]
    if args.hybrid_layer_pattern is None:
        names.append("num_layers")
    if args.train_samples is None and not args.skip_train:
        names.append("train_iters")
    if args.num_experts is not None:
        names += ["num_experts", "moe_router_topk"]
    if args.loss_chunk_size is not None:
        names.append("loss_chunk_size")
    return [*names, "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"]


def _entry_rules(args: Namespace) -> _Rules:
    cp, tp, length = args.context_parallel_size, args.tensor_model_parallel_size, args.seq_length
    return [
        (
            not args.group_query_attention and args.num_query_groups != 1,
            f"num_query_groups={args.num_query_groups}: Megatron ignores it without --group-query-attention; "
            "add that flag",
        ),
        (
            args.transformer_impl == "transformer_engine" and not HAVE_TE,
            "transformer_impl='transformer_engine': Transformer Engine is not installed; "
            "transformer_impl=local works",
        ),
        (
            args.spec is not None,
            f"spec={args.spec}: this entry builds CCA by itself; drop --spec, or pass it to Megatron's "
            "own pretrain_gpt.py",
        ),
        (
            args.zaya and args.hybrid_layer_pattern is not None,
            f"zaya with hybrid_layer_pattern={args.hybrid_layer_pattern!r}: Megatron's hybrid stack hands no "
            "router state from layer to layer; num-layers instead of the pattern works",
        ),
        (
            args.padded_vocab_size and args.padded_vocab_size % tp,
            f"padded_vocab_size={args.padded_vocab_size}: must be a multiple of "
            f"tensor_model_parallel_size={tp}; "
            f"padded_vocab_size={_next_multiple(args.padded_vocab_size or 1, tp)} works",
        ),
        (
            args.fim_data,
            "fim_data: this entry reads text or conversations; use Megatron's own pretrain_gpt.py "
            "with --spec cca_megatron.specs cca_decoder_block_spec",
        ),
        (
            args.reset_attention_mask or args.reset_position_ids,
            "reset_attention_mask, reset_position_ids: Megatron carries them in a mask that causal "
            "attention ignores; --dataloader-inter-document-masking keeps documents apart",
        ),
        (
            cp > 1 and length % (2 * cp),
            f"seq_length={length} with context_parallel_size={cp}: every sequence is cut in {2 * cp} chunks; "
            f"seq_length={_next_multiple(length, 2 * cp)} works",
        ),
        (
            args.sequence_parallel and length % (cp * tp),
            f"seq_length={length} with sequence_parallel: must be a multiple of {cp * tp}, "
            f"context_parallel_size={cp} * tensor_model_parallel_size={tp}; "
            f"seq_length={_next_multiple(length, 2 * cp * tp)} works",
        ),
        (
            args.mtp_num_layers and cp > 1 and (args.sft or args.eod_mask_loss),
            f"mtp_num_layers={args.mtp_num_layers} with context_parallel_size={cp} and masked tokens (sft, "
            "eod_mask_loss): Megatron averages the losses of multi-token prediction by rank, whatever number "
            "of tokens each has; context_parallel_size=1 works",
        ),
        (
            args.use_megatron_fsdp and args.save and not HAVE_TE,
            "use_megatron_fsdp with save: without Transformer Engine a rank that holds no part of a weight "
            "has no optimizer state for it, and Megatron's save would wait for that state for ever; install "
            "Transformer Engine, or use_megatron_fsdp=false works",
        ),
        (
            args.mtp_num_layers
            and args.pipeline_model_parallel_size > 1
            and (args.save or args.load)
            and not args.untie_embeddings_and_output_weights,
            f"mtp_num_layers={args.mtp_num_layers} with pipeline_model_parallel_size="
            f"{args.pipeline_model_parallel_size} and checkpoints: Megatron cannot write tied embeddings "
            "there; untie_embeddings_and_output_weights=true works",
        ),
        (
            args.bf16 and args.fp16,
            "bf16 and fp16: choose one; fp16=false works",
        ),
        (
            args.split is not None and not re.fullmatch(r"\s*[\d.]+\s*([,/]\s*[\d.]+\s*){0,2}", args.split),
            f"split={args.split!r}: must be up to three weights for training, validation and test; "
            "split=95,5,0 works",
        ),
    ]


def _baseline_problems(args: Namespace) -> list[str]:
    """What keeps Megatron's own attention from standing where CCA would."""
    cca = cca_config_from_args(args)
    given = [f.name for f in fields(CCAConfig) if getattr(cca, f.name) != f.default]
    rules: _Rules = [
        (
            given,
            f"attention='megatron' with cca.{', cca.'.join(given)}: Megatron's attention has none; leave "
            "them out",
        ),
        (
            args.zaya or args.hybrid_layer_pattern is not None or args.mtp_num_layers,
            "attention='megatron' with zaya, hybrid_layer_pattern or mtp_num_layers: those layers are built "
            "with CCA; attention='cca' works",
        ),
        (
            (is_packed(args) or args.multi_latent_attention) and args.context_parallel_size > 1,
            f"attention='megatron' with context_parallel_size={args.context_parallel_size} and packed "
            "documents or multi_latent_attention: sequences are cut for CCA; context_parallel_size=1 works",
        ),
    ]
    problems = [message for is_broken, message in rules if is_broken]
    return problems + core_attention_problems(args, cca.packed_zigzag)


def _packing_rules(args: Namespace) -> _Rules:
    if not is_packed(args):
        return []
    largest = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
    balancing = args.moe_router_load_balancing_type
    per_sample = "seq_aux_loss" in (balancing if isinstance(balancing, list) else [balancing])
    cut_samples = args.context_parallel_size > 1 or args.sequence_parallel
    comm_types = args.cp_comm_type if isinstance(args.cp_comm_type, list) else [args.cp_comm_type]
    return [
        (
            args.sft and args.dataloader_inter_document_masking,
            "sft with dataloader_inter_document_masking: conversations are kept apart already; drop the "
            "latter",
        ),
        (
            args.pipeline_model_parallel_size > 1 and largest > 1,
            f"micro_batch_size={largest} (or eval_micro_batch_size) with packed documents: Megatron's "
            "pipeline sends packed micro-batches in the wrong shape; micro_batch_size=1 works",
        ),
        (
            args.num_experts is not None and per_sample and cut_samples and args.micro_batch_size > 1,
            f"seq_aux_loss with packed documents, micro_batch_size={args.micro_batch_size} and context or "
            "sequence parallelism: ranks hold parts of samples, which Megatron cannot tell apart; "
            "micro_batch_size=1 works",
        ),
        (
            args.sft and args.transformer_impl == "transformer_engine" and "a2a+p2p" in comm_types,
            "cp_comm_type='a2a+p2p' with sft: Transformer Engine has it for plain batches only; 'p2p' works",
        ),
        (
            getattr(args, "cuda_graph_impl", "none") != "none",
            f"cuda_graph_impl={getattr(args, 'cuda_graph_impl', None)!r} with packed documents: where they "
            "start differs from batch to batch, and is read on the host; cuda_graph_impl=none works",
        ),
    ]


def _schedule_rules(args: Namespace) -> _Rules:
    model_size = (
        args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size
    )
    replicas, rest = divmod(args.world_size, model_size)
    step = args.micro_batch_size * max(replicas, 1)
    batch = args.global_batch_size
    is_elastic = args.rampup_batch_size is not None or args.decrease_batch_size_if_needed
    return [
        (
            args.lr is None and not args.skip_train,
            "lr=None: the learning rate must be set; lr=1e-3 works",
        ),
        (
            not 0 <= _warmup(args) < _decay(args),
            f"learning-rate warm-up of {_warmup(args):g} and decay over {_decay(args):g}: the warm-up must "
            "end before the decay does; lr-warmup-fraction=0.05 works for any length",
        ),
        (
            rest,
            f"{_world(args)}: must be a multiple of {model_size}, tensor_model_parallel_size="
            f"{args.tensor_model_parallel_size} * context_parallel_size={args.context_parallel_size} * "
            f"pipeline_model_parallel_size={args.pipeline_model_parallel_size}; {model_size} works",
        ),
        (
            not rest and batch is not None and not is_elastic and batch % step,
            f"global_batch_size={batch}: must be a multiple of micro_batch_size={args.micro_batch_size} * "
            f"{replicas} data-parallel ranks; global_batch_size={_next_multiple(batch or 1, step)} works",
        ),
    ]


def _expert_rules(args: Namespace) -> _Rules:
    if args.num_experts is None:
        return []
    frequency, layers = args.moe_layer_freq, args.num_layers
    if isinstance(frequency, list):
        is_pattern = len(frequency) == layers and set(frequency) <= {0, 1}
    else:
        is_pattern = type(frequency) is int and frequency >= 1
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    size = args.expert_model_parallel_size * expert_tensor * args.pipeline_model_parallel_size
    return [
        (
            args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
            f"num_experts={args.num_experts} with tensor_model_parallel_size="
            f"{args.tensor_model_parallel_size}: Megatron trains experts under tensor parallelism with "
            "sequence_parallel only; sequence_parallel=true works",
        ),
        (
            args.hybrid_layer_pattern is None and not is_pattern,
            f"moe_layer_freq={frequency}: must be a whole number of at least 1 (every n-th layer), or a 0 or "
            f"1 for each of the {layers} layers; moe_layer_freq=2 works",
        ),
        (
            args.moe_router_topk > args.num_experts,
            f"moe_router_topk={args.moe_router_topk}: a token cannot visit more than num_experts="
            f"{args.num_experts}; moe_router_topk={args.num_experts} works",
        ),
        (
            args.num_experts % args.expert_model_parallel_size,
            f"num_experts={args.num_experts}: must be a multiple of expert_model_parallel_size="
            f"{args.expert_model_parallel_size}; expert_model_parallel_size=1 works",
        ),
        (
            args.world_size % size,
            f"{_world(args)}: must be a multiple of {size}, expert_model_parallel_size="
            f"{args.expert_model_parallel_size} * expert tensor parallel {expert_tensor} * "
            f"pipeline_model_parallel_size={args.pipeline_model_parallel_size}; {size} works",
        ),
    ]


def _loss_rules(args: Namespace) -> _Rules:
    """Where the logits would be in memory all the same, or the output layer is not called as usual."""
    if args.loss_chunk_size is None:
        return []
    setting = f"loss_chunk_size={args.loss_chunk_size}"
    return [
        (
            args.hybrid_layer_pattern is not None,
            f"{setting} with hybrid_layer_pattern={args.hybrid_layer_pattern!r}: Megatron's hybrid model "
            "computes the loss of all tokens at once; num-layers instead of the pattern works",
        ),
        (
            args.mtp_num_layers,
            f"{setting} with mtp_num_layers={args.mtp_num_layers}: multi-token prediction counts hits in the "
            "logits of all tokens; mtp_num_layers=null works",
        ),
        (
            args.use_megatron_fsdp or args.use_torch_fsdp2 or args.tensor_parallel_num_weight_shards,
            f"{setting} with use_megatron_fsdp, use_torch_fsdp2 or tensor_parallel_num_weight_shards: they "
            "expect one gradient of the output weight in a backward pass, not one of each chunk; "
            "use_distributed_optimizer=true works",
        ),
        (
            args.defer_embedding_wgrad_compute,
            f"{setting} with defer_embedding_wgrad_compute: that keeps what every call of the output layer "
            "saw; defer_embedding_wgrad_compute=false works",
        ),
        (
            args.fp8_output_proj,
            f"{setting} with fp8_output_proj: chunks go through Megatron's own output layer; "
            "fp8_output_proj=false works",
        ),
    ]


def _rotary_rules(args: Namespace) -> _Rules:
    """Megatron's table of angles has an even width."""
    if args.position_embedding_type not in ("rope", "yarn"):
        return []
    dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    turned = int(dim * args.rotary_percent)
    return [
        (
            turned < 1,
            f"rotary_percent={args.rotary_percent} with kv_channels={dim}: RoPE would turn no channel; "
            "rotary_percent=0.5 works, or position_embedding_type=none",
        ),
        (
            turned % 2 and turned == dim,
            f"kv_channels={dim}: RoPE turns channels in pairs; kv_channels={dim + 1} works, or "
            "rotary_percent=0.5",
        ),
    ]


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _world(args: Namespace) -> str:
    return f"world size {args.world_size} (nodes * processes on each)"


def _decay(args: Namespace) -> float:
    """Length of the learning-rate schedule, in iterations or samples."""
    if args.train_samples is not None:
        return args.lr_decay_samples or args.train_samples
    return args.lr_decay_iters or args.train_iters or float("inf")


def _warmup(args: Namespace) -> float:
    if args.lr_warmup_fraction is not None:
        return args.lr_warmup_fraction * _decay(args)
    return args.lr_warmup_samples if args.train_samples is not None else args.lr_warmup_iters
