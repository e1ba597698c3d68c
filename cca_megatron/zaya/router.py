"""ZAYA's router: an MLP on a narrow state that is averaged over the depth of the model.

Everything around the choice (auxiliary losses, z-loss, their logging) is Megatron's ``TopKRouter``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_megatron._compat import (
    ProcessGroupCollection,
    TopKRouter,
    TransformerConfig,
    compute_routing_scores_for_aux_loss,
)
from cca_megatron.zaya.residual import channel_parameter
from cca_megatron.zaya.settings import ZayaSettings

SKIP_BIAS = -1.0
"""Initial balancing bias of the class that skips: probabilities are at most 1, so at first none is chosen."""


class ZayaRouter(TopKRouter):
    """Chooses among the experts and, if there is one, the class that skips them.

    For a token's normalised hidden state x, with r = ``router_hidden_size`` and C classes::

        u = down_proj(x) [+ previous u * router_states_scale]         [r], handed to the next MoE layer
        p = softmax(out_proj(gelu(fc2(gelu(fc1(norm(u)))))))          [C]
        chosen = top-k of p + balancing_biases;  weight = p[chosen], not renormalised

    ``balancing_biases`` [C] are trained beside the loss (:mod:`cca_megatron.zaya.balancing`) and stay fp32,
    whatever the model is cast to. All parameters are whole on every tensor-parallel rank.

    Args:
        zaya: the settings.
        averages: an earlier layer has a router whose state this one adds.
        config, pg_collection, is_mtp_layer: as Megatron's routers take them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        zaya: ZayaSettings,
        averages: bool,
    ):
        super().__init__(config, pg_collection, is_mtp_layer)
        del self.weight  # of Megatron's linear router
        self.bias = None
        self.zaya = zaya
        experts, width = config.num_moe_experts, zaya.router_hidden_size
        classes = experts + zaya.skip_class
        self.down_proj = self._linear(config.hidden_size, width)
        self.fc1, self.fc2 = self._linear(width, width), self._linear(width, width)
        self.out_proj = self._linear(width, classes, bias=False)
        self.norm_weight = channel_parameter(config, width, 1.0)
        self.router_states_scale = channel_parameter(config, width, 1.0) if averages else None

        biases = torch.zeros(classes, dtype=torch.float32)
        if zaya.skip_class:
            biases[-1] = SKIP_BIAS
        self.register_buffer("balancing_biases", biases)
        # AdamW's state of the experts' biases; checkpoints keep it.
        self.register_buffer("balancing_exp_avg", torch.zeros(experts, dtype=torch.float32))
        self.register_buffer("balancing_exp_avg_sq", torch.zeros(experts, dtype=torch.float32))
        self.register_buffer("balancing_step", torch.zeros((), dtype=torch.float32))
        self.register_buffer("class_counts", torch.zeros(classes, dtype=torch.int64), persistent=False)

        self.class_share: Tensor | None = None
        """[classes], the share of the tokens of the last step that each class got."""
        self.state: Tensor | None = None
        """[s, b, r], set to the previous layer's before a forward pass; afterwards this layer's own."""
        self.skip_weight: Tensor | None = None
        """[tokens], the weight of the class that skips, 0 where another is chosen."""

    def _linear(self, inputs: int, outputs: int, bias: bool = True) -> torch.nn.Linear:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        linear = torch.nn.Linear(inputs, outputs, bias, device=device, dtype=self.config.params_dtype)
        if self.config.perform_initialization:
            # Logits of about 1 from the start: were all classes alike, one step of the balancing biases would
            # send every token to another expert.
            torch.nn.init.normal_(linear.weight, std=inputs**-0.5)
            if bias:
                torch.nn.init.zeros_(linear.bias)
        for parameter in linear.parameters():
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return linear

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, hidden] -> logits [s, b, classes], in ``moe_router_dtype``; moves the state on."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        state = _project(self.down_proj, input.to(dtype))
        if self.router_states_scale is not None:
            if self.state is None:
                raise RuntimeError(
                    f"layer {self.layer_number}: the router state of the layer before is missing; ZAYA's "
                    "layers run inside Megatron's TransformerBlock, which hands it on"
                )
            state = state + self.state.to(dtype) * self.router_states_scale.to(dtype)
        self.state = state if self.zaya.depth_averaging else None
        weight = self.norm_weight.to(dtype)
        hidden = F.rms_norm(state, weight.shape, weight, self.config.layernorm_epsilon)
        for linear in (self.fc1, self.fc2):
            hidden = F.gelu(_project(linear, hidden))
        return _project(self.out_proj, hidden)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [s, b, classes] -> weights and choice of the experts, both [s * b, experts].

        A token that skips has a row of zeros in both.
        """
        length, batch, _ = logits.shape
        logits = logits.flatten(0, 1)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding)
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        with torch.no_grad():
            chosen = (scores + self.balancing_biases).topk(self.topk, dim=-1).indices
            routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        probs = scores * routing_map
        self._count(routing_map, padding)
        if self.zaya.skip_class:
            self.skip_weight = probs[:, -1]
            probs, routing_map = probs[:, :-1].contiguous(), routing_map[:, :-1].contiguous()
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs = self._balance(probs, logits, padding, length, batch)
        return probs, routing_map

    def _balance(
        self, probs: Tensor, logits: Tensor, padding: Tensor | None, length: int, batch: int
    ) -> Tensor:
        """Attach Megatron's auxiliary losses, over the experts alone."""
        logits = logits[:, : self.num_experts].contiguous()
        likely, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, padding_mask=padding
        )
        masked = padding is not None
        probs = self._apply_aux_loss(probs, scores, likely, with_padding_mask=masked)
        probs = self._apply_seq_aux_loss(probs, scores, likely, length, batch, with_padding_mask=masked)
        return self._apply_global_aux_loss(probs, scores, likely, with_padding_mask=masked)

    def _count(self, routing_map: Tensor, padding: Tensor | None) -> None:
        # Once per token: neither in evaluation nor in the first of two passes of recomputation.
        if self.training and torch.is_grad_enabled():
            if padding is not None:
                routing_map = routing_map & ~padding[:, None]
            self.class_counts += routing_map.sum(0)

    def _apply(self, fn: Any, recurse: bool = True) -> "ZayaRouter":
        """As in ``torch.nn.Module``, but moving the balancing biases and their state only, never casting."""
        kept = {name: x for name, x in self._buffers.items() if name.startswith("balancing_")}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            self._buffers[name] = x.to(self._buffers[name].device)
        return self


def _project(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    """The linear in the dtype of x."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)
