"""Megatron's MoE layer with a router state that comes in and goes out, and tokens that skip the experts."""

import copy
from typing import Any

from torch import Tensor

from cca_megatron._compat import (
    MoELayer,
    MoESubmodules,
    ProcessGroupCollection,
    TransformerConfig,
    tensor_parallel,
)
from cca_megatron.zaya.settings import ZayaSettings


class ZayaMoELayer(MoELayer):
    """Dispatchers, experts and grouped GEMM are Megatron's; see :class:`cca_megatron.zaya.router.ZayaRouter`.

    Megatron's transformer layer hands its MLP one tensor, so the router state takes its way through
    ``router_state``: the previous layer's before a forward pass, this layer's own after it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        zaya: ZayaSettings,
    ):
        if zaya.skip_class:
            config = _with_dynamic_counts(config)
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.zaya = zaya
        # Here recomputation must include the router state.
        self.recomputes = config.recompute_granularity == "selective" and "moe" in config.recompute_modules
        self.moe_layer_recompute = False
        self.router_state: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """[s, b, hidden] -> ([s, b, hidden], None)."""
        if intermediate_tensors is not None:
            raise NotImplementedError("ZAYA's MoE layer runs whole; cuda_graph_impl='none' works")
        state, self.router_state = self.router_state, None
        if self.recomputes and self.training:
            output, self.router_state = tensor_parallel.checkpoint(
                self._run, False, hidden_states, state, padding_mask
            )
        else:
            output, self.router_state = self._run(hidden_states, state, padding_mask)
        return output, None

    def _run(
        self, hidden_states: Tensor, state: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        self.router.state = state
        output, _ = super().forward(hidden_states, padding_mask=padding_mask)
        state, self.router.state = self.router.state, None
        weight, self.router.skip_weight = self.router.skip_weight, None
        if self.zaya.skip_class and self.zaya.skip_output == "input":
            # After the ranks' parts are summed: every tensor-parallel rank has all of this term.
            weight = weight.view(*hidden_states.shape[:-1], 1).to(hidden_states.dtype)
            output = output + weight * hidden_states
        return output, state


def _with_dynamic_counts(config: TransformerConfig) -> TransformerConfig:
    """A copy with which dispatchers count the tokens instead of assuming top-k of each.

    They do so where a capacity drops tokens; the dropping is the router's part, and ours does none.
    """
    config = copy.copy(config)
    config.moe_expert_capacity_factor = 1.0
    return config
