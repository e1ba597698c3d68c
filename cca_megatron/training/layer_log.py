"""What TensorBoard gets of every layer: temperatures, the logits that they allow, conv norms, expert load.

All of it is read where a training step finishes the gradients: the parameters are then whole on their ranks
and still those that the loss of this step came from. Steps that TensorBoard does not see cost nothing; at
others one all-reduce brings the values of all stages and tensor-parallel ranks to the rank that writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cca_megatron._compat import (
    MultiTokenPredictionLayer,
    TopKRouter,
    TransformerConfig,
    get_model_config,
    parallel_state,
)
from cca_megatron.attention import CCASelfAttention
from cca_megatron.training import expert_load
from cca_megatron.training.tensorboard import logged_iteration, write_scalars
from cca_megatron.zaya.balancing import finalize_and_balance


def finalize_and_log(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Megatron's ``finalize_model_grads`` with ZAYA's update of balancing biases, and the values for the log.

    Every rank must call it, as Megatron's schedules do with ``finalize_model_grads_func``.
    """
    from megatron.training import get_args

    finalize_and_balance(model, *args, **kwargs)
    settings = get_args()
    iteration = logged_iteration(settings)
    if iteration is None:
        return
    values = layer_values(model, settings)
    write_scalars(values.scalars(), iteration)
    if iteration % settings.log_interval == 0:
        expert_load.write_shares(values.shares[: values.decoder_layers], iteration)


@dataclass(frozen=True)
class LayerValues:
    """Values of all layers of the model, those of multi-token prediction last. All tensors are fp32."""

    decoder_layers: int
    labels: list[str]
    """[layers]"""
    bound_per_temperature: Tensor
    """[layers], the largest attention logit at temperature 1; 0 where a layer has no CCA."""
    temperatures: Tensor
    """[layers, KV heads], tau."""
    conv_norms: Tensor
    """[layers, 2], L2 norms of the weights of both convs; 0 where one is off."""
    shares: Tensor
    """[layers, classes], the share of the tokens that each expert got, and last the class that skips if there
    is one; 0 where a layer has no experts."""
    num_experts: int

    def scalars(self) -> dict[str, float]:
        """By TensorBoard tag, as floats on the host."""
        sizes = self.temperatures.abs().amax(-1)
        bounds = sizes * self.bound_per_temperature
        columns = {
            "temperature mean": self.temperatures.mean(-1),
            "temperature max": sizes,
            "logit bound": bounds,
            "conv0 norm": self.conv_norms[:, 0],
            "conv1 norm": self.conv_norms[:, 1],
        }
        values: dict[str, float] = {}
        has_cca = self.bound_per_temperature > 0
        if has_cca.any():
            values["logit bound/largest"] = bounds.max().item()
        for name, column in columns.items():
            if name.startswith("conv") and not column.any():
                continue
            values |= self._of_layers(name, column, has_cca)
        return values | self._expert_load()

    def _expert_load(self) -> dict[str, float]:
        experts = self.shares[:, : self.num_experts]
        has_experts = experts.sum(-1) > 0
        if not has_experts.any():
            return {}
        loads = experts.amax(-1) * self.num_experts
        values = {"expert load/largest": loads.max().item()}
        if self.shares.shape[-1] > self.num_experts:
            values["expert load/skipped"] = 1 - experts[has_experts].sum(-1).mean().item()
        return values | self._of_layers("expert load", loads, has_experts)

    def _of_layers(self, name: str, column: Tensor, present: Tensor) -> dict[str, float]:
        rows = zip(self.labels, column.tolist(), present.tolist(), strict=True)
        return {f"{name}/{label}": value for label, value, is_there in rows if is_there}


def layer_values(model: list[torch.nn.Module], settings: Any) -> LayerValues:
    """The values of the whole model, on the host of every rank.

    All ranks must call it together. With fully sharded data parallelism a rank holds no whole parameters,
    and there are only the shares of the experts.

    Args:
        model: the chunks of this pipeline stage.
        settings: Megatron's arguments.
    """
    config = get_model_config(model[0])
    numbering = _Numbering.of(config, settings)
    groups, classes = config.num_query_groups, expert_load.num_classes(settings)
    table = torch.zeros(len(numbering.labels), 3 + groups + classes, device=torch.cuda.current_device())
    bounds, squares, temperatures, shares = table.split([1, 2, groups, classes], -1)
    if not (settings.use_megatron_fsdp or settings.use_torch_fsdp2):
        for row, attention in numbering.rows(model, CCASelfAttention):
            _fill(attention, bounds[row], squares[row], temperatures[row])
    routers = list(numbering.rows(model, TopKRouter))
    measured = expert_load.shares_of([router for _, router in routers])
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # they are alike on the others
        for (row, _), share in zip(routers, measured, strict=True):
            shares[row] = share
    dist.all_reduce(table, group=parallel_state.get_model_parallel_group())
    bounds, squares, temperatures, shares = table.cpu().split([1, 2, groups, classes], -1)
    return LayerValues(
        decoder_layers=config.num_layers,
        labels=numbering.labels,
        bound_per_temperature=bounds.squeeze(-1),
        temperatures=temperatures,
        conv_norms=squares.sqrt(),
        shares=shares,
        num_experts=config.num_moe_experts or 0,
    )


@torch.no_grad()
def _fill(attention: CCASelfAttention, bound: Tensor, squares: Tensor, temperatures: Tensor) -> None:
    """Add what this tensor-parallel rank knows of a layer; of ranks that share a part, the first does."""
    share = attention.group_share
    if share.place > 0:
        return
    tau = attention.temperature.float()
    first = share.part * tau.numel()
    temperatures[first : first + tau.numel()] = tau.exp() if attention.cca.temperature == "exp" else tau
    for square, weight in zip(squares, (attention.conv0_weight, attention.conv1_weight), strict=True):
        if weight is not None:
            square += weight.float().square().sum()
    if share.part == 0:
        bound += _bound_per_temperature(attention)


def _bound_per_temperature(attention: CCASelfAttention) -> float:
    """The largest |q.k| that the softmax can see at temperature 1.

    Queries have the length sqrt(D) and keys tau sqrt(D), which RoPE keeps, except that YaRN scales what it
    turns; so the bound is ``softmax_scale * D``, sqrt(D) unless the scale is set.
    """
    dim, scale = attention.hidden_size_per_attention_head, attention.config.softmax_scale
    stretched = max(1.0, attention._yarn_concentration_factor) ** 2
    return dim * (dim**-0.5 if scale is None else scale) * stretched


@dataclass(frozen=True)
class _Numbering:
    """Which row of the table a module fills: decoder layers as Megatron numbers them, then predictions."""

    num_layers: int
    inner_layers: int
    """Layers in each depth of multi-token prediction, which number their own from 1."""
    labels: list[str]

    @classmethod
    def of(cls, config: TransformerConfig, settings: Any) -> "_Numbering":
        pattern = settings.hybrid_layer_pattern
        inner = 1 if pattern is None else len(pattern.rpartition("/")[2])
        width = len(str(config.num_layers))
        labels = [f"layer {number:0{width}}" for number in range(1, config.num_layers + 1)]
        for depth in range(1, (config.mtp_num_layers or 0) + 1):
            within = [""] if pattern is None else [f" layer {number}" for number in range(1, inner + 1)]
            labels += [f"prediction {depth}{part}" for part in within]
        return cls(config.num_layers, inner, labels)

    def rows[M: torch.nn.Module](
        self, model: list[torch.nn.Module], kind: type[M]
    ) -> Iterator[tuple[int, M]]:
        """The modules of a kind in this stage's chunks, each with its row."""
        for chunk in model:
            depths: dict[torch.nn.Module, int] = {}
            for module in chunk.modules():
                if isinstance(module, MultiTokenPredictionLayer):
                    depths |= dict.fromkeys(module.modules(), module.layer_number)
            for module in chunk.modules():
                if isinstance(module, kind):
                    yield self._row(module, depths.get(module)), module

    def _row(self, module: Any, depth: int | None) -> int:
        if depth is None:
            return module.layer_number - 1
        within = module.layer_number - 1 if self.inner_layers > 1 else 0
        return self.num_layers + (depth - 1) * self.inner_layers + within
