"""Layers that receive one input tensor, such as query, key and value: found in a pass, verified in each call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class SharedCall:
    """One input tensor in one forward pass, and the layers that receive it.

    Args:
        layers: their names, in the order of their calls.
        arrived: those whose output gradient has come, in the backward pass.
        x: the input (tokens, n), from the first of them.
        sizes: (tokens,), the sum of their squared gradient norms per token.
    """

    layers: list[str]
    arrived: set[str] = field(default_factory=set)
    x: Tensor | None = None
    sizes: Tensor | None = None

    def add(self, name: str, x: Tensor, squared: Tensor) -> bool:
        """Take over the squared gradient norms (tokens,) of one layer; whether it was the last one."""
        self.x = x if self.x is None else self.x
        self.sizes = squared if self.sizes is None else self.sizes + squared
        self.arrived.add(name)
        return len(self.arrived) == len(self.layers)


class SharedInputs:
    """Groups of layers that receive the same tensor: the same object, not changed in between.

    The first gradient of each layer fixes its group. Every later call must have the same group.

    >>> import torch
    >>> inputs, x = SharedInputs(), torch.ones(2, 3)
    >>> call = [inputs.enter(name, x) for name in ("query", "key")][0]
    >>> inputs.require_same("query", call, batch=0), inputs.leader("key")
    (('query', 'key'), 'query')
    """

    def __init__(self) -> None:
        self.groups: dict[str, tuple[str, ...]] = {}
        self._open: dict[int, tuple[weakref.ref[Tensor], int, SharedCall]] = {}

    def enter(self, name: str, x: Tensor) -> SharedCall:
        """The call that ``x`` belongs to, with the layer ``name`` added."""
        source, version, call = self._open.get(id(x), (None, 0, None))
        if call is None or source is None or source() is not x or version != x._version or name in call.layers:
            call = SharedCall([])
            self._open[id(x)] = (weakref.ref(x), x._version, call)
        call.layers.append(name)
        return call

    def require_same(self, name: str, call: SharedCall, *, batch: int) -> tuple[str, ...]:
        """The group of a layer; ValueError when its call has another group than the first one had."""
        group = tuple(call.layers)
        for member in group:
            if (known := self.groups.setdefault(member, group)) != group:
                raise ValueError(
                    f"batch {batch}: {name} received its input together with {_others(group, name)}, and in an "
                    f"earlier call with {_others(known, name)}: its statistic cannot be shared, set shared_inputs=False"
                )
        return group

    def leader(self, name: str) -> str:
        """The first layer of the group of ``name``, which holds the statistic; itself without a group."""
        return self.groups.get(name, (name,))[0]

    def close(self) -> None:
        """Forget the tensors of the present batch, and keep the groups."""
        self._open.clear()


def _others(group: tuple[str, ...], name: str) -> str:
    return ", ".join(other for other in group if other != name) or "no other layer"
