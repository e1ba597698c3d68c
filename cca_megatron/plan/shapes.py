"""From Megatron's parsed arguments to the shapes that everything else here is reckoned from."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Literal

from cca_megatron.plan.attention import Attention, CompressedAttention, HeadAttention, LatentAttention
from cca_megatron.plan.layers import Experts, Layer, Mlp, Model, Router
from cca_megatron.plan.parts import Parallel
from cca_megatron.training.arguments import cca_config_from_args, zaya_settings_from_args
from cca_megatron.training.recipe import RecipeError


@dataclass(frozen=True)
class Run:
    """How the model is trained, as far as it costs memory or time."""

    sequence: int
    micro_batch: int
    global_batch: int
    distributed_optimizer: bool = True
    optimizer_instances: int = 1
    gradient_bytes: int = 4
    optimizer_bytes: int = 12
    """Per parameter: moments, and the fp32 copy of bf16 weights."""
    optimizer_on_gpu: float = 1.0
    """The share of it that is not offloaded to the host."""
    recompute: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_layers: int = 1
    recompute_modules: frozenset[str] = frozenset()
    distribute_saved: bool = False
    offload_modules: frozenset[str] = frozenset()
    offload_fraction: float = 1.0
    cp_comm_type: str = "p2p"
    loss_chunk: int | None = None
    """Tokens whose logits are alive at once; None: all."""
    in_place_loss: bool = False
    """Transformer Engine's cross entropy, which writes the gradient over the logits."""
    first_layers: int | None = None
    last_layers: int | None = None
    embedding_counts: bool = False
    loss_counts: bool = False
    """Whether embedding and loss count as a layer where stages are cut."""
    overlap_gradients: bool = True
    overlap_weights: bool = True

    def micro_batches(self, parallel: Parallel) -> int:
        """Of each data-parallel rank in a step."""
        return max(1, self.global_batch // (self.micro_batch * parallel.data))

    def tokens(self, parallel: Parallel) -> float:
        """Of a micro-batch on one context-parallel rank."""
        return self.micro_batch * self.sequence / parallel.context


def model_from_args(args: Namespace) -> Model:
    """The model that these arguments train.

    Args:
        args: parsed, and completed by Megatron (:func:`cca_megatron.training.command.build_command`).

    Raises:
        RecipeError: a setting that is not reckoned; the message names it.
    """
    refuse(args)
    zaya = zaya_settings_from_args(args)
    is_moe = moe_layers(args)
    routed = [number for number, moe in enumerate(is_moe) if moe]
    layers = tuple(
        Layer(
            attention=attention_from_args(args),
            mlp=_experts(args, averages=number > routed[0]) if is_moe[number] else _mlp(args),
            window=window_of(args, number + 1),
            norm_parameters=args.hidden_size * (1 + (args.normalization == "LayerNorm")),
            scaled=zaya is not None and zaya.residual_scaling,
            scaled_input=zaya is not None and zaya.residual_scaling and number == 0,
            dropout=args.hidden_dropout > 0,
        )
        for number in range(args.num_layers)
    )
    element = 2 if args.bf16 or args.fp16 else 4
    learned = args.position_embedding_type == "learned_absolute"
    return Model(
        layers,
        vocabulary=_vocabulary(args),
        tied=not args.untie_embeddings_and_output_weights,
        positions=args.max_position_embeddings if learned else 0,
        element=element,
        residual=4 if args.fp32_residual_connection else element,
    )


def parallel_from_args(args: Namespace) -> Parallel:
    """The layout that these arguments ask for.

    Raises:
        RecipeError: tokens go to experts in a way that is not reckoned.
    """
    if args.num_experts and args.world_size > 1 and args.moe_token_dispatcher_type != "alltoall":
        raise RecipeError(
            f"moe_token_dispatcher_type={args.moe_token_dispatcher_type!r}: the planner does not reckon it "
            "on several GPUs; moe_token_dispatcher_type=alltoall works"
        )
    return Parallel(
        tensor=args.tensor_model_parallel_size,
        sequence=args.sequence_parallel,
        context=args.context_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        chunks=args.virtual_pipeline_model_parallel_size or 1,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        data=args.data_parallel_size,
    )


def run_from_args(args: Namespace) -> Run:
    """How these arguments train."""
    comm = args.cp_comm_type
    selective = args.recompute_granularity == "selective"
    offloads = getattr(args, "fine_grained_activation_offloading", False)
    return Run(
        sequence=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        distributed_optimizer=args.use_distributed_optimizer,
        optimizer_instances=args.num_distributed_optimizer_instances,
        gradient_bytes=args.params_dtype.itemsize if not args.accumulate_allreduce_grads_in_fp32 else 4,
        optimizer_bytes=_optimizer_bytes(args),
        optimizer_on_gpu=1 - args.optimizer_offload_fraction if args.optimizer_cpu_offload else 1.0,
        recompute=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_layers=args.recompute_num_layers or 1,
        recompute_modules=frozenset(args.recompute_modules or ["core_attn"]) if selective else frozenset(),
        distribute_saved=args.distribute_saved_activations,
        offload_modules=frozenset(args.offload_modules or ()) if offloads else frozenset(),
        offload_fraction=getattr(args, "activation_offload_fraction", 1.0),
        cp_comm_type=(comm[0] if isinstance(comm, list) else comm) or "p2p",
        loss_chunk=getattr(args, "loss_chunk_size", None),
        in_place_loss=args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te",
        first_layers=args.decoder_first_pipeline_num_layers,
        last_layers=args.decoder_last_pipeline_num_layers,
        embedding_counts=args.account_for_embedding_in_pipeline_split,
        loss_counts=args.account_for_loss_in_pipeline_split,
        overlap_gradients=args.overlap_grad_reduce,
        overlap_weights=args.overlap_param_gather,
    )


def _optimizer_bytes(args: Namespace) -> int:
    if not args.use_precision_aware_optimizer:
        return 12 if args.bf16 or args.fp16 else 8
    moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    # Of fp32 weights beside bf16 ones only the other 16 bits are kept.
    keeps_the_rest = getattr(args, "store_param_remainders", True)  # no argument in Megatron 0.19, and on
    shared = 2 if args.bf16 and keeps_the_rest and args.main_params_dtype.itemsize == 4 else 0
    return moments + args.main_params_dtype.itemsize - shared


def refuse(args: Namespace) -> None:
    """Raise RecipeError for a setting that changes the figures and that they would not show."""
    for name, plain in _NOT_RECKONED.items():
        value = getattr(args, name, plain)
        if value not in (plain, None, False):
            works = str(plain).lower() if isinstance(plain, bool) else plain
            raise RecipeError(f"{name}={value!r}: the planner does not reckon it; {name}={works} works")
    if args.add_qkv_bias and not args.add_bias_linear:  # with the latter Megatron sets the former
        raise RecipeError("add_qkv_bias=True: the planner does not reckon it alone; add_qkv_bias=false works")
    if args.multi_latent_attention and not (args.qk_layernorm and args.v_head_dim == args.qk_head_dim):
        raise RecipeError(
            f"qk_layernorm={args.qk_layernorm}, v_head_dim={args.v_head_dim} with multi_latent_attention: "
            "the planner reckons latents with norms, and values as wide as keys; qk_layernorm=true and "
            f"v_head_dim={args.qk_head_dim} work"
        )


_NOT_RECKONED: dict[str, Any] = {
    "hybrid_layer_pattern": None,
    "mtp_num_layers": None,
    "fp8": None,
    "fp4": None,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "cpu_offloading": False,
    "moe_latent_size": None,
    "moe_expert_capacity_factor": None,
    "optimizer": "adam",
    "pipeline_model_parallel_layout": None,
    "hybrid_context_parallel": False,
    "hierarchical_context_parallel_sizes": None,
    "cuda_graph_impl": "none",
}


def attention_from_args(args: Namespace) -> Attention:
    """The attention of every layer: CCA, or Megatron's own where ``attention`` says so."""
    if args.multi_latent_attention:
        return LatentAttention(
            args.hidden_size,
            args.num_attention_heads,
            args.kv_lora_rank,
            args.q_lora_rank,
            args.qk_head_dim,
            args.qk_pos_emb_head_dim,
        )
    heads = HeadAttention(
        hidden_size=args.hidden_size,
        query_heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        bias=args.add_bias_linear,
    )
    if args.attention == "megatron":
        return heads
    cca = cca_config_from_args(args)
    return CompressedAttention(
        **vars(heads),
        conv_kernel_sizes=cca.conv_kernel_sizes,
        conv0=cca.conv0,
        conv1=cca.conv1,
        conv_bias=cca.conv_bias,
        recompute_mix=cca.recompute_mix,
    )


def _mlp(args: Namespace, ffn: int | None = None) -> Mlp:
    return Mlp(args.hidden_size, ffn or args.ffn_hidden_size, args.swiglu, args.add_bias_linear)


def _experts(args: Namespace, averages: bool) -> Experts:
    shared = args.moe_shared_expert_intermediate_size
    return Experts(
        expert=_mlp(args, args.moe_ffn_hidden_size),
        count=args.num_experts,
        chosen=args.moe_router_topk,
        router=router_from_args(args, averages),
        shared=None if shared is None else _mlp(args, shared),
        shared_gate=bool(shared and getattr(args, "moe_shared_expert_gate", False)),
    )


def router_from_args(args: Namespace, averages: bool = False) -> Router:
    """The router of the layers with experts.

    Args:
        args: parsed, with experts.
        averages: a layer before has a router whose state this one may add.
    """
    zaya = zaya_settings_from_args(args)
    width, classes = None, args.num_experts
    if zaya is not None and zaya.has_mlp_router:
        width, classes = zaya.router_hidden_size, args.num_experts + zaya.skip_class
        averages = averages and zaya.depth_averaging
    element = 2 if args.bf16 or args.fp16 else 4
    return Router(
        args.hidden_size,
        classes,
        width,
        averages,
        element={"fp32": 4, "fp64": 8}.get(args.moe_router_dtype, element),
    )


def moe_layers(args: Namespace) -> list[bool]:
    """For every layer, whether it is a mixture of experts; Megatron's rule."""
    if args.num_experts is None:
        return [False] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [number % args.moe_layer_freq == 0 for number in range(args.num_layers)]
    return [bool(one) for one in args.moe_layer_freq]


def window_of(args: Namespace, layer_number: int) -> int | None:
    """Tokens before a query that a layer sees, counted from 1; None: all."""
    from megatron.core.transformer.utils import is_layer_window_attention

    window = args.window_size
    has_one = is_layer_window_attention(window, args.window_attn_skip_freq, layer_number)
    return window[0] if has_one and window and window[0] >= 0 else None


def _vocabulary(args: Namespace) -> int:
    if args.padded_vocab_size:
        return args.padded_vocab_size
    if args.vocab_size is None:
        raise RecipeError(
            "padded_vocab_size=None: the planner opens no tokenizer; model.padded-vocab-size=50304 works, or "
            "what Megatron prints as the padded size of yours"
        )
    unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-args.vocab_size // unit) * unit
