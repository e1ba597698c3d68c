"""Import ``megatron.bridge`` where Transformer Engine is not installed: 0.6.2 imports it unguarded."""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import megatron.training.utils.common_utils  # noqa: F401  Megatron decides here that there is none


def import_bridge() -> None:
    """Stand in for Transformer Engine for the length of one import, which needs it for annotations only."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    names = ("transformer_engine", "transformer_engine.pytorch")
    package, pytorch = map(ModuleType, names)
    package.__version__, package.pytorch = "0.0.0", pytorch
    pytorch.ops = SimpleNamespace(Sequential=object)
    sys.modules |= dict(zip(names, (package, pytorch), strict=True))
    try:
        importlib.import_module("megatron.bridge.peft.lora_layers")
    finally:
        for name in names:
            del sys.modules[name]
