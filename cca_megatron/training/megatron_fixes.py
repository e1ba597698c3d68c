"""Places where megatron-core 0.19 does not run as its wheel comes, and what our entry does about them.

Most concern installations without Transformer Engine and Apex or without Megatron's source tree; elsewhere
they change nothing.
"""

import functools
import importlib.util
from typing import Any

import torch


@functools.cache
def apply() -> None:
    """All fixes that this installation needs; before Megatron's training loop starts. Once is enough."""
    _use_shipped_dataset_helpers()
    _let_torch_adam_resume()
    _let_modules_recompute_without_fp8()
    _let_optimizers_reshard_over_experts()


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
    checkpoint is read, when there is none yet, and where a pipeline stage has no experts, when there is never
    one; gives all parameters one tensor, which every parameter's update then increments; and overwrites it
    with its value from before, or misses it in the checkpoint, when it copies the moments. With fp32 weights
    that copy also meets autograd.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    state_dict, sharded_state_dict = cls.state_dict, cls.sharded_state_dict
    load_state_dict = cls.load_state_dict
    copy_states = cls._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def with_or_without_weights(self: Any) -> dict[str, Any]:
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict(self)
        inner = {key: value for key, value in self.optimizer.state_dict().items() if key != "state"}
        # The count of steps is filled in from other optimizers when a checkpoint is read.
        groups = [{**group, "step": 0} for group in inner["param_groups"]]
        for group in groups:
            del group["params"]
        scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {}
        return {"optimizer": {**inner, "param_groups": groups}, **scaler}

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

    cls.state_dict, cls.sharded_state_dict = with_or_without_weights, with_state
    cls.load_state_dict = with_own_steps
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


def _let_optimizers_reshard_over_experts() -> None:
    """Load a checkpoint's optimizer state with more or fewer optimizers than saved it.

    Megatron gives parameters that are cut over expert-parallel ranks an optimizer of their own. The tensors
    of a fully reshardable checkpoint do not care, but the settings beside them (learning rate, step) are
    nested by optimizer.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    load_state_dict = ChainedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def regrouped(self: Any, state_dict: dict[Any, Any]) -> None:
        _fill_in_steps(state_dict)
        load_state_dict(self, _regroup(state_dict, self.chained_optimizers))

    ChainedOptimizer.load_state_dict = regrouped


def _fill_in_steps(state_dict: dict[Any, Any]) -> None:
    """Give optimizers that were saved without weights the step that all optimizers of a run have."""
    parts = [part for part in (state_dict, *state_dict.values()) if isinstance(part, dict)]
    groups = [group for part in parts for group in part.get("optimizer", {}).get("param_groups", ())]
    counted = [group for group in groups if group.get("step") is not None]
    for group in counted:
        group["step"] = max(other["step"] for other in counted)


def _regroup(state_dict: dict[Any, Any], optimizers: list[Any]) -> dict[Any, Any]:
    """The settings of ``state_dict``, as some other number of optimizers saved them, for these.

    A single optimizer's state is not nested, several are numbered. What is loaded has the tensors nested
    for the optimizers here, and the settings as they were saved.
    """
    numbered = {key: value for key, value in state_dict.items() if isinstance(key, int)}
    plain = {key: value for key, value in state_dict.items() if key not in numbered}
    saved = [part for part in (plain, *numbered.values()) if "optimizer" in part]
    if not saved or len(saved) == len(optimizers):
        return state_dict
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    settings = {key: value for key, value in saved[0].items() if key != "param_state"}

    def of(optimizer: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ours = [_matching(group, groups) for group in optimizer.optimizer.param_groups]
        inner = {**settings["optimizer"], "param_groups": ours}
        # Without weights there are no tensors.
        return {**settings, "optimizer": inner, "param_state": tensors.get("param_state", {})}

    if len(optimizers) == 1:
        return of(optimizers[0], plain)
    return {number: of(optimizer, numbered.get(number, {})) for number, optimizer in enumerate(optimizers)}


def _matching(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved group that ``group`` continues: cut over experts alike if there is one, else whole."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as names

    rest = [name for name in names if name != "is_expert_parallel"]
    alike = [other for other in saved if all(other.get(name) == group.get(name) for name in rest)]
    if not alike:
        raise ValueError(f"the checkpoint has no optimizer settings for { {n: group.get(n) for n in names} }")
    expert = group.get("is_expert_parallel")
    best = next((other for other in alike if other.get("is_expert_parallel") == expert), alike[0])
    return {**best, "is_expert_parallel": expert}


def _initialize_adam(optimizer: torch.optim.Optimizer) -> None:
    """The state that AdamW's first step would make; a checkpoint is about to overwrite it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
