"""A transformer layer that scales its residuals and hands a router state to the next one.

Inside a pipeline stage the state is what Megatron's ``TransformerBlock`` calls ``context``: it goes from
layer to layer, through full recomputation too. Between stages it travels at the end of the hidden states.
"""

from typing import Any

import torch
from torch import Tensor

from cca_megatron._compat import (
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_num_layers_to_build,
    get_pg_rank,
)
from cca_megatron.zaya.moe_layer import ZayaMoELayer
from cca_megatron.zaya.residual import channel_parameter
from cca_megatron.zaya.settings import ZayaSettings


class ZayaLayer(TransformerLayer):
    """Megatron's layer; the first one of the model also has ``input_scale`` and ``input_bias`` [hidden].

    Args:
        zaya: the settings. The others are Megatron's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        zaya: ZayaSettings,
        **kwargs: Any,
    ):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.zaya = zaya
        stage_layers = get_num_layers_to_build(
            config, kwargs.get("vp_stage"), get_pg_rank(self.pg_collection.pp)
        )
        carries = zaya.carries_state
        self.starts_stage = carries and layer_number == 1 and self.layer_number > 1
        self.ends_stage = carries and layer_number == stage_layers and self.layer_number < config.num_layers
        scales_input = zaya.residual_scaling and self.layer_number == 1
        for name, value in (("input_scale", 1.0), ("input_bias", 0.0)):
            parameter = channel_parameter(config, config.hidden_size, value) if scales_input else None
            self.register_parameter(name, parameter)

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's layer: hidden states [s, b, hidden] and router state [s, b, r], if there is one.

        The first layer of a stage takes, and the last one gives, both side by side: [s, b, hidden + r].
        """
        sizes = [self.config.hidden_size, self.zaya.router_hidden_size]
        if self.starts_stage:
            hidden_states, context = (part.contiguous() for part in hidden_states.split(sizes, -1))
        if self.input_scale is not None:
            embedded = hidden_states.to(self.input_scale.dtype)
            hidden_states = ((embedded + self.input_bias) * self.input_scale).to(hidden_states.dtype)

        mlp = self.mlp if isinstance(self.mlp, ZayaMoELayer) else None
        if mlp is not None:
            mlp.router_state = context
        hidden_states, _ = super().forward(hidden_states=hidden_states, **kwargs)
        if mlp is not None:
            context, mlp.router_state = mlp.router_state, None
        if self.ends_stage:
            if context is None:  # no expert layer yet
                context = hidden_states.new_zeros(*hidden_states.shape[:-1], sizes[1])
            hidden_states = torch.cat([hidden_states, context.to(hidden_states.dtype)], -1)
        return hidden_states, context

    def _maybe_unflatten_for_moe(
        self, hidden_states: Tensor, padding_mask: Tensor | None, packed_seq_params: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        """Leave packed samples flat, as the router state is; auxiliary losses are then over all of them."""
        return hidden_states, padding_mask, None
