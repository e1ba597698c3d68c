"""Weights by part of the model, and how the parallel axes cut them."""

from dataclasses import dataclass
from typing import Literal

Cut = Literal["tensor", "group", "whole", "expert"]
"""Over tensor-parallel ranks; over them, but in whole KV groups; not at all; over expert-parallel ranks."""


@dataclass(frozen=True)
class Parallel:
    """Sizes of the parallel axes, in Megatron's sense; experts aside, their product is the number of GPUs."""

    tensor: int = 1
    sequence: bool = False
    context: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Of the model on each pipeline stage (interleaved schedule)."""
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the run."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.pipeline * self.expert * self.expert_tensor)

    @property
    def sequence_parts(self) -> int:
        """Into how many parts tensor-parallel ranks cut tokens outside of attention and MLP."""
        return self.tensor if self.sequence else 1


@dataclass(frozen=True)
class Part:
    """A part of a layer or model, in parameters.

    Multiplying by ``used`` gives those that a token meets, which is less for experts.
    """

    name: str
    count: int
    cut: Cut = "tensor"
    used: float = 1.0
    groups: int = 1
    """KV groups, for what is cut in whole groups."""

    def on_rank(self, parallel: Parallel) -> float:
        """Parameters that one rank holds."""
        ways = {
            "tensor": parallel.tensor,
            "group": min(parallel.tensor, self.groups),
            "whole": 1,
            "expert": parallel.expert * parallel.expert_tensor,
        }
        return self.count / ways[self.cut]
