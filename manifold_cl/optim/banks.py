"""The base optimizer's state of a whole bucket as one tensor a kind: it then takes one step instead of B.

Each parameter's own state, which is what ``state_dict`` shows, is a view into the bank.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_cl.optim.layout import Layout

ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Optimizers of torch.optim whose step treats every entry of a parameter alike, so that B parameters may be one."""
VECTORS = ("exp_avg", "momentum_buffer")
"""Names under which optimizers keep averages of gradients: vectors at the point, which a transport moves along (not the
``grad_avg`` of a centred RMSprop, which belongs to a variance)."""

SCALED = ("RMSprop",)
"""Optimizers that average gradients after the element-wise scaling, which takes them off the complement's plane."""

State = dict[str, Any]


class Bank:
    """The state of B parameters, stacked. ``state`` is what the base optimizer sees."""

    def __init__(self, states: Sequence[State], layout: Layout, parameters: Sequence[Tensor]) -> None:
        self.parameters, self.layout = parameters, layout
        self.state: State = {
            key: _stacked([layout.local(state[key]) for state in states]) if isinstance(value, Tensor) else value
            for key, value in states[0].items()
        }
        self.views: list[State] = list(states)
        self._handed = [dict(view) for view in self.views]
        self._seen: State = {}

    def outdated(self) -> bool:
        """Whether the base optimizer has put something new into the state since the views were made."""
        return len(self.state) != len(self._seen) or any(self.state[k] is not v for k, v in self._seen.items())

    def share(self) -> list[State]:
        """The state of each parameter, views into the bank; a new list whenever the base optimizer made new tensors."""
        self._seen = dict(self.state)
        self.views = [
            {key: self._view(value, i) for key, value in self.state.items()} for i in range(len(self.parameters))
        ]
        self._handed = [dict(view) for view in self.views]
        return self.views

    def still_holds(self, states: Mapping[Tensor, State]) -> bool:
        """Whether these are the states that were handed out: none loaded, dropped, cleared or replaced in part."""
        for p, view, handed in zip(self.parameters, self.views, self._handed, strict=True):
            held = states.get(p)
            if held is not view and (held or view):
                return False
            if len(view) != len(handed) or any(view.get(key) is not value for key, value in handed.items()):
                return False
        return True

    def vectors(self) -> list[Tensor]:
        """The averages of gradients, (B, …)."""
        return [self.state[key] for key in VECTORS if isinstance(self.state.get(key), Tensor)]

    def _view(self, value: Any, i: int) -> Any:
        if not _is_stack(value, self.parameters):
            return value
        view, p = value[i], self.parameters[i]
        return self.layout.like(p, view) if view.shape == self.layout.local(p).shape else view


def state_key(state: Mapping[str, Any] | None) -> Hashable:
    """What must agree for states to share a bank: the kinds they hold and the numbers that are one for a parameter."""
    return tuple(sorted((str(key), _kind(value)) for key, value in (state or {}).items()))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"{value.dtype} {tuple(value.shape)}"
    if value is None or isinstance(value, Tensor | int | float):
        return str(value if value is None else float(value))
    return f"object {id(value)}"  # shared by no other parameter


def _is_stack(value: Any, parameters: Sequence[Tensor]) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == len(parameters)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """One tensor of all; of a number that is one for all, a copy of its own, which other banks do not advance."""
    return torch.stack(list(values)) if values[0].ndim else values[0].clone()
