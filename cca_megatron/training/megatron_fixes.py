"""Places where megatron-core 0.19 does not run as its wheel comes, and what our entry does about them.

They concern installations without Transformer Engine and Apex or without Megatron's source tree; elsewhere
these functions change nothing.
"""

import functools
import importlib.util
from typing import Any

import torch


def apply() -> None:
    """All fixes that this installation needs; before Megatron's training loop starts."""
    _use_shipped_dataset_helpers()
    _let_torch_adam_resume()
    _let_modules_recompute_without_fp8()


def _use_shipped_dataset_helpers() -> None:
    """Do not compile the dataset helpers if the wheel has brought them compiled.

    Megatron runs ``make`` at every start, and the wheel has no Makefile.
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _let_torch_adam_resume() -> None:
    """Let the distributed optimizer resume with PyTorch's AdamW.

    PyTorch's AdamW counts steps in a tensor for each parameter. Megatron asks for the count before a
    checkpoint is read, when there is none yet; gives all parameters one tensor, which every
    parameter's update then increments; and overwrites it with its value from before, or misses it in
    the checkpoint, when it copies the moments. With fp32 weights that copy also meets autograd.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    sharded_state_dict, load_state_dict = cls.sharded_state_dict, cls.load_state_dict
    copy_states = cls._set_main_param_and_optimizer_states

    @functools.wraps(sharded_state_dict)
    def with_state(
        self: Any, model_state: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        if is_loading and not self.optimizer.state:
            _initialize_adam(self.optimizer)
        return sharded_state_dict(self, model_state, is_loading, **kwargs)

    @functools.wraps(load_state_dict)
    def with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(copy_states)
    @torch.no_grad()
    def without_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        copy_states(self, model_param, {**tensors, "step": None})  # what is no tensor is not copied

    cls.sharded_state_dict, cls.load_state_dict = with_state, with_own_steps
    cls._set_main_param_and_optimizer_states = without_step


def _let_modules_recompute_without_fp8() -> None:
    """Let ``--recompute-modules layernorm`` and others run without Transformer Engine.

    The class behind them takes its own default, False, for a wish for FP8, and then misses the package.
    """
    from megatron.core.tensor_parallel import CheckpointWithoutOutput

    cls: Any = CheckpointWithoutOutput
    init = cls.__init__

    @functools.wraps(init)
    def without_fp8(self: Any, fp8: Any = None) -> None:
        init(self, fp8 or None)

    cls.__init__ = without_fp8


def _initialize_adam(optimizer: torch.optim.Optimizer) -> None:
    """The state that AdamW's first step would make; a checkpoint is about to overwrite it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
