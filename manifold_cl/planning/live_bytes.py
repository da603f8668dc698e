"""The bytes of the tensors that are alive while code runs, also of tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors' memory; memory that several of them share counts once."""
    return sum({storage._cdata: storage.nbytes() for storage in map(_storage, tensors)}.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of every tensor that an operation returns, until the tensor is freed.

    Memory inside one operation (workspaces of a kernel) is not counted.

    Args:
        known: tensors that exist already and do not count, such as parameters.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_storage(tensor)._cdata for tensor in known}
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(_storage(leaf))
        return out

    def _enter(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextmanager
def counting_saved(known: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Counts the memory that autograd keeps for the backward pass, ``known`` tensors left out."""
    saved = SavedBytes(known)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved


class SavedBytes:
    """The memory that autograd keeps, each piece once."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {_storage(tensor)._cdata for tensor in known}
        self._kept: dict[int, Any] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved, and return it."""
        storage = _storage(tensor)
        if storage._cdata not in self._known:
            self._kept[storage._cdata] = storage  # held: a freed address would be used again
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes so far."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def clear(self) -> None:
        """Let the counted memory go."""
        self._kept.clear()


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
