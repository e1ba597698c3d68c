"""Count the bytes of live tensors, on whatever device."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it and still alive: the highest total, and the largest tensor.

    A view counts as its whole storage, but for those of the tensors given as ``made_before``.
    """

    def __init__(self, made_before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._made_before = {tensor.untyped_storage()._cdata for tensor in made_before}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        # A storage may be resized or freed behind another tensor's back; its identity stays.
        key = storage._cdata
        if key not in self._sizes and key not in self._made_before:
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, key)
            self.peak = max(self.peak, sum(self._sizes.values()))
            self.largest = max(self.largest, storage.nbytes())
