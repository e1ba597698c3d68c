"""Everything that is reckoned of one run, in one object, and as JSON."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from cca_megatron.plan.communication import Message, communication
from cca_megatron.plan.hardware import Gpu
from cca_megatron.plan.layers import Model
from cca_megatron.plan.memory import Memory, memory
from cca_megatron.plan.parts import Parallel
from cca_megatron.plan.shapes import Run
from cca_megatron.plan.step import Step, step_time


@dataclass(frozen=True)
class Plan:
    """A run on a layout and a kind of GPU."""

    name: str
    """Of the attention: cca, or what it is compared with."""
    model: Model
    parallel: Parallel
    run: Run
    gpu: Gpu

    @cached_property
    def memory(self) -> Memory:
        """Of the fullest GPU."""
        return memory(self.model, self.parallel, self.run)

    @cached_property
    def messages(self) -> list[Message]:
        """That the fullest GPU sends."""
        return communication(self.model, self.parallel, self.run, self.memory.stage)

    @cached_property
    def step(self) -> Step:
        """Time of a step."""
        return step_time(self.model, self.parallel, self.run, self.gpu)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """By part."""
        counts: dict[str, int] = {}
        for part in self.model.parts():
            counts[part.name] = counts.get(part.name, 0) + part.count
        return counts

    @cached_property
    def used_parameters(self) -> float:
        """That a token meets; of an embedding table it meets a row, which is counted as the whole table."""
        return sum(part.count * part.used for part in self.model.parts())

    @cached_property
    def flops(self) -> dict[str, float]:
        """Per token, forward, by part."""
        return self.model.flops(self.run.sequence)

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.memory.total <= self.gpu.memory

    def as_json(self) -> dict[str, Any]:
        """All figures: bytes, seconds, FLOPs, numbers."""
        return {
            "attention": self.name,
            "gpu": asdict(self.gpu),
            "parallel": asdict(self.parallel) | {"gpus": self.parallel.gpus},
            "sequence": self.run.sequence,
            "global_batch": self.run.global_batch,
            "micro_batch": self.run.micro_batch,
            "parameters": self.parameters,
            "parameters_total": sum(self.parameters.values()),
            "parameters_used_per_token": self.used_parameters,
            "forward_flops_per_token": self.flops,
            "kv_cache_bytes_per_token": self.model.cache_bytes(),
            "memory": asdict(self.memory) | {"total": self.memory.total, "fits": self.fits},
            "communication_bytes_per_step": [
                {
                    "axis": message.axis,
                    "name": message.name,
                    "ranks": message.group.size,
                    "on_one_node": message.group.on_node(self.gpu.gpus_per_node) >= message.group.size,
                    "forward": message.forward,
                    "backward": message.backward,
                }
                for message in self.messages
            ],
            "step": asdict(self.step),
        }
