"""Data and loss of one training step, as Megatron's loop asks for them."""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from cca_megatron._compat import PackedSeqParams, TransformerConfig
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.packed import context_shard, host_document_starts
from cca_megatron.training import heartbeat
from cca_megatron.training.arguments import cca_config_from_args, is_packed
from cca_megatron.training.loss import chunked_loss

_SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_BATCH_KEYS = (
    *_SEQUENCE_KEYS,
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)
_SPIKE_FACTOR = 10
"""A loss this many times the largest seen is reported, if ``check_for_spiky_loss`` is on."""

_straggler = StragglerDetector()


def build_datasets(num_samples: list[int | None], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Megatron's training, validation and test datasets: pretraining text, conversations, or mock data.

    Args:
        num_samples: samples to draw for each; None means one pass.
        vp_stage: virtual pipeline stage.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    dataset_type = _dataset_type(args)
    is_built_here = partial(_reads_data, vp_stage)
    builder = BlendedMegatronDatasetBuilder(dataset_type, num_samples, is_built_here, config)
    return builder.build()


# Megatron then builds the datasets on the ranks that need them, instead of on rank 0 alone.
build_datasets.is_distributed = True  # type: ignore[attr-defined]


def _dataset_type(args: Namespace) -> type[Any]:
    if args.sft:
        return SFTDataset
    return MockGPTDataset if args.mock_data else GPTDataset


def _reads_data(vp_stage: int | None) -> bool:
    """Only one rank of a tensor-parallel group reads, and only stages that use tokens or documents."""
    args = get_args()
    uses_tokens = is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(
        core_transformer_config_from_args(args), vp_stage
    )
    needed = uses_tokens or is_packed(args)
    return needed and mpu.get_tensor_model_parallel_rank() == 0


def _has_mtp(config: TransformerConfig, vp_stage: int | None) -> bool:
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, partial[Any]]:
    """One micro-batch through the model: its output, and the loss as a function of the output."""
    heartbeat.beat()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        args = get_args()
        samples = args.micro_batch_size if model.training else args.eval_micro_batch_size
        batch, packed_seq_params = _next_batch(data_iterator, get_model_config(model), vp_stage, samples)
    timers("batch-generator").stop()
    tokens, labels, loss_mask, positions, mask = (batch[key] for key in _SEQUENCE_KEYS)
    # Megatron overlaps expert communication by running a plan of the model instead of the model.
    run: Any = model.build_schedule_plan if return_schedule_plan else model
    in_chunks: dict[str, Any] = {}
    if args.loss_chunk_size is not None:
        in_chunks = {"output_processor": chunked_loss, "output_processor_context": args.loss_chunk_size}
    with _straggler:
        output = run(
            tokens,
            positions,
            mask,
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=packed_seq_params,
            **in_chunks,
        )
    return output, partial(loss_function, loss_mask)


def loss_function(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What Megatron's schedule divides, what it divides it by, and this rank's loss and tokens for the log.

    Under context parallelism the ranks hold unequal numbers of tokens that count: prompts and padding do
    not. Megatron averages the means of the ranks; here each rank divides by the tokens of all, so that a
    loss and its gradient do not depend on the layout. (``--calculate-per-token-loss`` sums anyway.)

    Args:
        loss_mask: 1 where a token counts, this rank's tokens.
        output: loss of each of them.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().to(torch.int)
    machine = get_rerun_state_machine()
    checks: list[tuple[bool, Any, str, bool]] = [
        (args.check_for_nan_in_loss_and_grad, torch.isnan, "NaN in the loss", True),
        (args.check_for_nan_in_loss_and_grad, torch.isinf, "infinity in the loss", True),
        (
            args.check_for_spiky_loss,
            partial(machine.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss"),
            "spike in the loss",
            False,
        ),
    ]
    for wanted, is_bad, message, fatal in checks:
        if wanted:
            machine.validate_result(
                result=loss, rejection_func=is_bad, message=message, tolerance=0.0, fatal=fatal
            )
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    group = mpu.get_context_parallel_group()
    if args.sft and not torch.is_grad_enabled() and group.size() > 1:
        # Evaluating conversations, Megatron averages the means of ranks: let each report that of all.
        torch.distributed.all_reduce(report, group=group)
    if group.size() > 1 and not args.calculate_per_token_loss:
        num_tokens = num_tokens.clone()
        torch.distributed.all_reduce(num_tokens, group=group)
        loss = loss * group.size()  # gradients are averaged over these ranks, and are to be summed
    return loss, num_tokens, {"lm loss": report}


def _next_batch(
    data_iterator: Iterator[dict[str, Tensor]],
    config: TransformerConfig,
    vp_stage: int | None,
    samples: int,
) -> tuple[dict[str, Any], PackedSeqParams | None]:
    """This rank's share of the next micro-batch; None for what its pipeline stage does not need.

    Args:
        samples: samples in it; the rank that reads it tells the others nothing of its size.
    """
    args = get_args()
    packed = is_packed(args)
    has_mtp = _has_mtp(config, vp_stage)
    uses_tokens = is_first_or_last_pipeline_stage(vp_stage) or has_mtp
    if not uses_tokens and not packed:
        return dict.fromkeys(_BATCH_KEYS), None

    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {
            key: None if sample.get(key) is None else sample[key].cuda(non_blocking=True)
            for key in _BATCH_KEYS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=samples,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    packed_seq_params = _packed_seq_params(batch) if packed else None
    shard = None if packed_seq_params is None else _plan(packed_seq_params, samples)
    if not uses_tokens:
        return dict.fromkeys(_BATCH_KEYS), packed_seq_params
    if packed_seq_params is None:
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )
    elif shard is not None:
        for key in _SEQUENCE_KEYS:
            if batch.get(key) is not None:
                batch[key] = batch[key].index_select(1, shard.own_tokens)
    return batch, packed_seq_params


def _packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams:
    args, cu_seqlens = get_args(), batch["cu_seqlens"].squeeze(0)
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)
    longest = int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        # Megatron's balancing losses per sample take the samples apart again, where a rank has all of them.
        tokens_per_sample=args.seq_length if _has_whole_samples(args) else None,
    )


def _has_whole_samples(args: Namespace) -> bool:
    return args.context_parallel_size == 1 and not args.sequence_parallel


def _plan(packed_seq_params: PackedSeqParams, samples: int) -> ContextShard | None:
    """How the documents lie on the context-parallel ranks; None where there is one rank.

    Planned here, where the host waits for the batch anyway, so that no layer reads cu_seqlens.
    """
    args = get_args()
    host_document_starts(packed_seq_params)
    return context_shard(
        samples * args.seq_length // args.context_parallel_size,
        mpu.get_context_parallel_group(),
        packed_seq_params.cu_seqlens_q.device,
        packed_seq_params,
        cca_config_from_args(args).packed_zigzag,
    )
