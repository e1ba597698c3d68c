"""Parameters, FLOPs and kept bytes of MLPs, experts, layers and the whole model."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cca_megatron.plan.attention import Attention
from cca_megatron.plan.parts import Parallel, Part

ROUTER, EXPERTS, DENSE, SHARED = "router", "experts", "dense MLP", "shared experts"
Kept = dict[str, float]
"""Bytes per token, by Megatron's names of what can be recomputed or offloaded."""


@dataclass(frozen=True)
class Mlp:
    """Two linears with an activation between them; with a gate the first is twice as wide."""

    hidden_size: int
    ffn: int
    gated: bool
    bias: bool = False

    @property
    def widened(self) -> int:
        """Channels that the first linear gives."""
        return self.ffn * (1 + self.gated)

    @property
    def weights(self) -> int:
        """Of both linears, biases aside."""
        return self.hidden_size * (self.widened + self.ffn)

    def parts(self) -> tuple[Part, ...]:
        """Its parameters."""
        parts = (Part(DENSE, self.weights),)
        biases = (Part("biases", self.widened), Part("biases", self.hidden_size, "whole"))
        return parts + biases if self.bias else parts

    def flops(self) -> dict[str, float]:
        """Forward FLOPs per token, by part."""
        return {DENSE: 2 * self.weights}

    def kept(self, parallel: Parallel, element: int) -> Kept:
        """Beside the normalised input: what stands before and after the activation."""
        return {
            "mlp": self.widened / parallel.tensor * element,
            "mlp_act": self.ffn / parallel.tensor * element,
        }


@dataclass(frozen=True)
class Router:
    """Chooses experts: Megatron's linear one, or ZAYA's MLP on a narrow state."""

    hidden_size: int
    classes: int
    width: int | None = None
    """Of ZAYA's state; None for a linear router."""
    averages: bool = False
    """Adds the state of the layer before."""
    element: int = 2
    """Bytes of a number in it: ``moe_router_dtype``."""

    def parts(self) -> tuple[Part, ...]:
        """Its parameters, whole on every tensor-parallel rank."""
        if self.width is None:
            return (Part(ROUTER, self.hidden_size * self.classes, "whole"),)
        biases_and_norm = 4 * self.width + self.averages * self.width
        return (Part(ROUTER, self._weights() + biases_and_norm, "whole"),)

    def _weights(self) -> int:
        if self.width is None:
            return self.hidden_size * self.classes
        return self.width * (self.hidden_size + 2 * self.width + self.classes)

    def flops(self) -> float:
        """Forward, per token."""
        return 2 * self._weights()

    def kept(self) -> float:
        """Bytes per token: scores and choice, and ZAYA's state on its way through norm and MLP."""
        chosen = self.classes * (4 + 1)
        return chosen if self.width is None else chosen + 6 * self.width * self.element

    def copied(self, element: int) -> float:
        """Bytes per token of the input, where it is cast for the router."""
        return 0 if self.width is None or self.element == element else self.hidden_size * self.element


@dataclass(frozen=True)
class Experts:
    """A mixture of experts; a token visits ``chosen`` of them, and all are taken to have equally many."""

    expert: Mlp
    count: int
    chosen: int
    router: Router
    shared: Mlp | None = None
    shared_gate: bool = False

    def parts(self) -> tuple[Part, ...]:
        """Their parameters."""
        each = sum(part.count for part in self.expert.parts())
        routed = Part(EXPERTS, self.count * each, "expert", self.chosen / self.count)
        parts = (*self.router.parts(), routed)
        if self.shared is not None:
            parts += (Part(SHARED, self.shared.weights),)
        if self.shared_gate:
            parts += (Part(SHARED, self.expert.hidden_size, "whole"),)
        return parts

    def flops(self) -> dict[str, float]:
        """Forward FLOPs per token, by part."""
        flops = {ROUTER: self.router.flops(), EXPERTS: 2.0 * self.chosen * self.expert.weights}
        return flops if self.shared is None else flops | {SHARED: 2.0 * self.shared.weights}

    def visits(self, parallel: Parallel) -> float:
        """Tokens that a rank's experts see, per token that its tensor-parallel group has."""
        return self.chosen * parallel.expert_tensor / parallel.tensor

    def kept(self, parallel: Parallel, element: int) -> Kept:
        """Beside the normalised input: dispatched tokens, what stands before and after the activation."""
        visits, ways = self.visits(parallel), parallel.expert_tensor
        own = 1 / parallel.sequence_parts
        indices = 8 * (self.count + self.chosen) * own
        kept = {
            "router": (self.router.kept() + self.router.copied(element)) * own,
            "expert_fc1": self.expert.hidden_size * element * visits + indices,
            "moe_act": (self.expert.widened / ways * element + 4) * visits,
            "moe_act_out": self.expert.ffn / ways * element * visits,
        }
        if self.shared is not None:
            kept["shared_experts"] = sum(self.shared.kept(parallel, element).values())
        return kept


@dataclass(frozen=True)
class Layer:
    """A transformer layer: attention and an MLP or experts, with norms and residual sums."""

    attention: Attention
    mlp: Mlp | Experts
    window: int | None = None
    """Tokens before a query that it sees; None: all."""
    norm_parameters: int = 0
    """Of one norm."""
    scaled: bool = False
    """ZAYA's residual scaling."""
    scaled_input: bool = False
    """The same for the embeddings, before the first layer."""
    dropout: bool = False

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.attention.hidden_size

    def parts(self) -> tuple[Part, ...]:
        """All parameters."""
        scales = (8 * self.scaled + 2 * self.scaled_input) * self.hidden_size
        norms = Part("norms", 2 * self.norm_parameters, "whole")
        scaling = (Part("residual scaling", scales, "whole"),) if scales else ()
        return (*self.attention.parts(), *self.mlp.parts(), norms, *scaling)

    def flops(self, sequence: int) -> dict[str, float]:
        """Forward FLOPs per token, by part, in sequences of that length."""
        core = self.attention.pair_flops() * mean_keys(sequence, self.window)
        return self.attention.flops() | {"core attention": core} | self.mlp.flops()

    def kept(self, parallel: Parallel, element: int, residual: int) -> Kept:
        """Bytes per token of a context-parallel rank without any recomputation.

        Args:
            parallel: the layout.
            element: bytes of a number in weights and layers.
            residual: bytes of a number in the residual stream.
        """
        own = self.hidden_size / parallel.sequence_parts
        row = 4 / parallel.sequence_parts  # a norm keeps one number
        kept = {
            "attn_norm": own * element + row,
            "qkv_linear": own * element,
            **self.attention.kept(parallel.tensor, element),
            "mlp_norm": own * element + row,
            "mlp_input": own * element,
            **self.mlp.kept(parallel, element),
        }
        if self.scaled:
            kept["residual"] = 2 * own * (element + residual)
        if self.scaled_input:
            kept["input_scale"] = own * element
        if self.dropout:
            kept["dropout"] = 2 * own  # masks of one byte
        return kept


@dataclass(frozen=True)
class Model:
    """All layers, embeddings and the output."""

    layers: tuple[Layer, ...]
    vocabulary: int
    """Padded."""
    tied: bool = True
    positions: int = 0
    """Rows of a table of learned positions."""
    element: int = 2
    """Bytes of a weight."""
    residual: int = 2
    """Bytes of a number in the residual stream."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.layers[0].hidden_size

    @cached_property
    def kinds(self) -> tuple[Layer, ...]:
        """The different ones among the layers; there are few, and reckoning goes by them."""
        return tuple(dict.fromkeys(self.layers))

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """For every layer, its place in ``kinds``."""
        place = {layer: number for number, layer in enumerate(self.kinds)}
        return tuple(place[layer] for layer in self.layers)

    def counted(self, layers: Iterable[int]) -> list[tuple[Layer, int]]:
        """The kinds among the layers of these numbers, each with how often."""
        return [
            (self.kinds[kind], count)
            for kind, count in Counter(map(self.kind_of.__getitem__, layers)).items()
        ]

    @cached_property
    def state_width(self) -> int:
        """Of ZAYA's router state, which layers hand on; 0 without."""
        mlps = (layer.mlp for layer in self.kinds)
        routers = [mlp.router for mlp in mlps if isinstance(mlp, Experts)]
        return max((router.width or 0 for router in routers if router.averages), default=0)

    def embedding_parts(self) -> tuple[Part, ...]:
        """Of the first pipeline stage."""
        table = Part("embedding", self.vocabulary * self.hidden_size)
        learned = (Part("positions", self.positions * self.hidden_size, "whole"),) * bool(self.positions)
        return (table, *learned)

    def output_parts(self, has_embedding: bool) -> tuple[Part, ...]:
        """Of the last pipeline stage; with tied weights it needs none of its own if it has the embedding."""
        norm = Part("norms", self.layers[0].norm_parameters, "whole")
        if self.tied and has_embedding:
            return (norm,)
        return (Part("output", self.vocabulary * self.hidden_size), norm)

    def parts(self) -> tuple[Part, ...]:
        """All parameters, tied ones once."""
        layers = (part for layer in self.layers for part in layer.parts())
        return (*self.embedding_parts(), *layers, *self.output_parts(has_embedding=True))

    def flops(self, sequence: int) -> dict[str, float]:
        """Forward FLOPs per token, by part; a step has three times as many."""
        total = {"output": 2.0 * self.hidden_size * self.vocabulary}
        for layer, count in self.counted(range(len(self.layers))):
            for name, flops in layer.flops(sequence).items():
                total[name] = total.get(name, 0.0) + count * flops
        return total

    def cache_bytes(self) -> float:
        """Of a token in generation, in layers without a window."""
        layers = [layer for layer in self.layers if layer.window is None]
        return sum(layer.attention.cache_elements() for layer in layers) * self.element


def mean_keys(sequence: float, window: int | None) -> float:
    """Keys that a query sees on average, by the usual convention: half of the sequence.

    (Exactly it is half a key more.) With a window of w tokens the first w see fewer.
    """
    if window is None or window + 1 >= sequence:
        return sequence / 2
    seen = window + 1
    return seen - seen * seen / (2 * sequence)
