"""``CCASelfAttention``: Compressed Convolutional Attention as a Megatron self-attention module.

CCA is self-attention over latent heads, so ``linear_qkv`` (down-projection), ``core_attention`` and
``linear_proj`` (up-projection) are Megatron's own. What is added is the mix between them: two causal
convs, the query-key mean, the value shift, L2 norm with temperature, RoPE (arXiv 2510.04476, section 3).
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from cca_kernels import MixOptions, MixWeights, cca_mix
from cca_megatron._compat import (
    AttnMaskType,
    BaseInferenceContext,
    PackedSeqParams,
    ProcessGroupCollection,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    deprecate_inference_params,
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    nvtx_range_pop,
    nvtx_range_push,
    off_interface,
    tensor_parallel,
)
from cca_megatron.cached_attention import cached_attention, check_context
from cca_megatron.config import CCAConfig, check_config
from cca_megatron.generation_cache import LayerCache, step_of
from cca_megatron.mix_parameters import GroupShare, gradients_summed, new_parameter, sharded_parameters
from cca_megatron.parallel.context import ContextShard
from cca_megatron.parallel.core_attention import LocalCoreAttention
from cca_megatron.parallel.packed import context_shard, document_starts
from cca_megatron.rotary import rotary_tables


class CCASelfAttention(SelfAttention):
    """Self-attention with the CCA mix between projection and core attention.

    Parameters beside ``linear_qkv`` and ``linear_proj`` (C = latent query and key channels, Hk = KV
    heads, both of this tensor-parallel rank)::

        conv0_weight [C, 1, K0]   conv1_weight [C, D, K1]   temperature [Hk]
        conv0_bias   [C]          conv1_bias   [C]

    Channels are group-interleaved, for each KV group its query heads and then its key head, as in
    ``linear_qkv``; so tensor parallelism cuts all of them along axis 0. The names are an on-disk contract.

    Args:
        cca: the CCA settings; None means ``CCAConfig()``. The others are Megatron's.

    Raises:
        ValueError: the settings do not fit together; the message lists every problem.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        cca: CCAConfig | None = None,
    ):
        self.cca = cca or CCAConfig()
        check_config(config, self.cca)
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        self._build_mix()

    def _build_mix(self) -> None:
        dim, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        share = self.group_share = GroupShare(self.config.num_query_groups, self.tp_group)
        self.query_heads_per_group = self.num_attention_heads_per_partition // groups
        has_window = is_layer_window_attention(
            self.config.window_size, self.config.window_attn_skip_freq, self.layer_number
        )
        self.window: int | None = None
        self.rotary_base: float | None = None
        if has_window and self.config.window_size and self.config.window_size[0] >= 0:
            self.window, self.rotary_base = self.config.window_size[0], self.cca.window_rotary_base
        channels = groups * (self.query_heads_per_group + 1) * dim
        k0, k1 = self.cca.conv_kernel_sizes
        initial = self.cca.initial_temperature
        zeros = torch.nn.init.zeros_
        bias0, bias1 = (self.cca.conv_bias and on for on in (self.cca.conv0, self.cca.conv1))
        for name, shape, init, present in (
            ("conv0_weight", (channels, 1, k0), _uniform(k0), self.cca.conv0),
            ("conv0_bias", (channels,), zeros, bias0),
            ("conv1_weight", (channels, dim, k1), _uniform(dim * k1), self.cca.conv1),
            ("conv1_bias", (channels,), zeros, bias1),
            ("temperature", (groups,), lambda t: torch.nn.init.constant_(t, initial), True),
        ):
            parameter = new_parameter(shape, init, self.config, share) if present else None
            self.register_parameter(name, parameter)

        delay_from = None
        if self.cca.value_shift:
            # The delayed half is counted over the value channels of all ranks.
            first = share.part * groups * dim
            half = self.config.num_query_groups * dim // 2
            delay_from = min(max(half - first, 0), groups * dim)
        query_heads = None
        if share.sharers > 1:
            count = self.query_heads_per_group // share.sharers
            query_heads = (share.place * count, count)
        self._mix_options = MixOptions(
            qk_mean=self.cca.qk_mean,
            value_delay_from=delay_from,
            temperature_form=self.cca.temperature,
            rotary_interleaved=self.config.rotary_interleaved,
            query_heads=query_heads,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | int | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] -> ([s, b, hidden], bias or None); s is this rank's share under SP.

        With an inference context the tokens continue those of the calls before.
        Arguments are those of Megatron's ``Attention.forward``. With ``packed_seq_params`` in ``thd``
        format b is 1, and convs, value shift, RoPE positions and attention respect the documents.

        Raises:
            NotImplementedError: an inference context with dynamic batching or a split sequence, or packed
                documents with mrope.
            ValueError: packed documents with a batch, or longer than the table of RoPE angles.
        """
        context = deprecate_inference_params(inference_context, inference_params)
        if context is not None:
            check_context(self.config, context, packed_seq_params)
        if self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]:
            rotary_pos_emb = None
        # Self-attention has one table for queries and keys; Megatron may pass it twice.
        angles = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        if packed_seq_params is not None:
            self._check_packed(packed_seq_params, angles, batch=hidden_states.shape[1])

        nvtx_range_push(suffix="qkv")
        qkv_manager = off_interface(self.offload_qkv_linear, hidden_states, "qkv_linear")
        with qkv_manager as hidden_states:
            mixed = self._project(hidden_states)
        mixed = qkv_manager.group_offload(mixed, forced_released_tensors=[])
        nvtx_range_pop(suffix="qkv")
        if context is not None:
            return self.linear_proj(self._attend_cached(mixed, context, angles))

        nvtx_range_push(suffix="cca_mix")
        mix = self._mix_function(angles, packed_seq_params, tokens=mixed.shape[0])
        recompute = None
        # A checkpoint whose input needs no gradient (a frozen projection) would give the convs none either.
        if self.cca.recompute_mix and self.training and mixed.requires_grad:
            recompute = tensor_parallel.CheckpointWithoutOutput(fp8=self.config.fp8 or self.config.fp4)
            query, key, value = recompute.checkpoint(mix, mixed)
        else:
            query, key, value = mix(mixed)
        if packed_seq_params is not None:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        nvtx_range_pop(suffix="cca_mix")

        nvtx_range_push(suffix="core_attention")
        core_out = self._attend(query, key, value, attention_mask, attention_bias, packed_seq_params)
        if recompute is not None:
            recompute.discard_output_and_register_recompute(core_out)
        nvtx_range_pop(suffix="core_attention")

        nvtx_range_push(suffix="linear_proj")
        proj_manager = off_interface(self.offload_attn_proj, core_out, "attn_proj")
        with proj_manager as core_out:
            output, bias = self.linear_proj(core_out)
        output = proj_manager.group_offload(output, forced_released_tensors=[core_out])
        nvtx_range_pop(suffix="linear_proj")
        return output, bias

    def _project(self, hidden_states: Tensor) -> Tensor:
        """Latents of this rank's groups, [S, B, G, R+2, D]: R queries, key and value per group."""
        mixed, _ = self.linear_qkv(hidden_states)
        share = self.group_share
        if share.sharers > 1:
            # linear_qkv cuts through the groups, so the ranks put them together again, as Megatron does.
            mixed = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(
                mixed, group=self.tp_group
            )
            mixed = mixed.chunk(share.parts, -1)[share.part]
        return mixed.unflatten(
            -1,
            (
                self.num_query_groups_per_partition,
                self.query_heads_per_group + 2,
                self.hidden_size_per_attention_head,
            ),
        )

    def _attend_cached(self, mixed: Tensor, context: BaseInferenceContext, angles: Tensor | None) -> Tensor:
        step = step_of(context, mixed.shape[0], mixed.device)
        return cached_attention(
            mixed,
            self._own_weights(),
            self._mix_options,
            None if angles is None else self._rotary(angles, step, lambda: step.positions),
            step,
            LayerCache(context, self.layer_number),
            self.window,
            self.config.softmax_scale,
        )

    def _own_weights(self) -> MixWeights:
        return MixWeights._make(getattr(self, name) for name in MixWeights._fields)

    def _rotary(
        self, angles: Tensor, owner: Any, positions: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        scale, interleaved = self._yarn_concentration_factor, self.config.rotary_interleaved
        return rotary_tables(angles, scale, owner, positions, self.rotary_base, interleaved)

    def _mix_function(
        self,
        angles: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        tokens: int,
    ) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """The mix as a function of the latents alone, as recomputation needs it."""
        shard = context_shard(
            tokens, self.pg_collection.cp, self.temperature.device, packed_seq_params, self.cca.packed_zigzag
        )
        if shard is not None and packed_seq_params is not None:
            self._check_cut(shard)
        cu_seqlens = None if packed_seq_params is None else document_starts(packed_seq_params)

        def positions() -> Tensor:
            assert cu_seqlens is not None
            return _positions(cu_seqlens, tokens) if shard is None else shard.positions

        def mix(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rotary = None
            if angles is not None:
                counted = None if cu_seqlens is None else positions
                rotary = self._rotary(angles, packed_seq_params, counted)
            weights = gradients_summed(self._own_weights(), self.group_share)
            resets = self.cca.reset_at_document_start
            if shard is None:
                starts = cu_seqlens if resets else None
                return cca_mix(mixed, weights, self._mix_options, rotary=rotary, cu_seqlens=starts)
            stream = shard if resets else shard.undivided
            return stream.mix(mixed, weights, self._mix_options, rotary)

        return mix

    def _check_packed(self, packed_seq_params: PackedSeqParams, angles: Tensor | None, batch: int) -> None:
        document_starts(packed_seq_params)  # refuses other formats
        if batch != 1:
            raise ValueError(
                f"hidden_states has batch {batch} with packed_seq_params: packed documents are one stream; "
                "batch 1 works (Megatron's flatten_batch_for_packed_sequences makes it)"
            )
        if self.config.mrope_section is not None:
            raise NotImplementedError(
                f"mrope_section={self.config.mrope_section} with packed documents: the positions of "
                "mrope are given per token, not counted in each document; mrope_section=None works"
            )
        longest = packed_seq_params.max_seqlen_q
        if angles is not None and longest is not None and longest > angles.shape[0]:
            raise ValueError(
                f"packed_seq_params.max_seqlen_q={longest}: the table of RoPE angles has "
                f"{angles.shape[0]} positions; give rotary_pos_emb of at least {longest}"
            )

    def _check_cut(self, shard: ContextShard) -> None:
        if not shard.layout.by_document and not isinstance(self.core_attention, LocalCoreAttention):
            raise ValueError(
                "packed documents that cross context-parallel ranks with "
                f"{type(self.core_attention).__name__}, which takes them for cut one by one; "
                "CCAConfig(packed_zigzag='stream') works"
            )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Core attention with Megatron's recomputation and offloading; [S, B, query heads * D]."""
        recomputed = self.checkpoint_core_attention and self.training
        offloaded = self.offload_core_attention and self.training and not recomputed
        attend = self._checkpointed_attention_forward if recomputed else self._run_core_attention
        manager = off_interface(offloaded, query, "core_attn")
        with manager as query:
            out = attend(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
            )
        out = manager.group_offload(out, forced_released_tensors=[query, key, value])
        if packed_seq_params is not None:
            out = out.reshape(out.shape[0], 1, -1)
        return out

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: without documents and positions, queries and keys are not defined in CCA."""
        raise NotImplementedError("CCASelfAttention makes q, k and v in forward; call the module")

    def clip_qk(self) -> None:
        """Scale the temperature of groups whose logits exceeded ``qk_clip_threshold``.

        Logits are proportional to tau, so scaling tau bounds them exactly and nothing else changes
        (Megatron scales the rows of ``linear_qkv`` instead, which the norm of CCA would undo).

        Raises:
            ValueError: ``qk_clip`` is off, or no logits were recorded.
            RuntimeError: the optimizer's main copy of the temperature is split over ranks.
        """
        if not self.config.qk_clip:
            raise ValueError("qk_clip=False: enable qk_clip before calling clip_qk")
        logits = self.core_attention.current_max_attn_logits
        if logits is None:
            raise ValueError("no attention logits were recorded: run a forward pass first")
        group_max = logits.view(self.num_query_groups_per_partition, -1).amax(1)
        threshold = self.config.qk_clip_threshold
        shrink = torch.where(group_max > threshold, threshold / group_max, 1.0)
        copies = [self.temperature.data]
        main = getattr(self.temperature, "main_param", None)
        if main is not None:
            if main.numel() != self.temperature.numel():
                raise RuntimeError(
                    "qk_clip with a distributed optimizer that splits the temperature of "
                    f"layer {self.layer_number}: its main copy has {main.numel()} of "
                    f"{self.temperature.numel()} values here. Run without --use-distributed-optimizer."
                )
            copies.append(main.data)
        for copy in copies:
            factor = shrink.to(copy.dtype).view_as(copy)
            if self.cca.temperature == "exp":
                copy.add_(factor.log())
            else:
                copy.mul_(factor)
        self.core_attention.current_max_attn_logits = None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's sharded state dict, with the mix's parameters cut along axis 0 over TP."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = dict(self.named_parameters(recurse=False))
        sharded |= sharded_parameters(own, prefix, sharded_offsets, self.group_share, metadata["dp_cp_group"])
        return sharded


def _uniform(fan_in: int) -> Callable[[Tensor], Any]:
    """PyTorch's default for convs, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): keeps the scale of the latents."""
    bound = 1 / math.sqrt(fan_in)
    return lambda weight: torch.nn.init.uniform_(weight, -bound, bound)


def _positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[tokens], the position of each token in its document."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return token - cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
