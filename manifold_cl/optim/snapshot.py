"""A copy of an optimizer's parameters, state and groups, to undo a step that went wrong."""

from __future__ import annotations

import copy
from typing import Any


class Snapshot:
    """What a step may change: parameters, their states, options of groups, and plain numbers of the optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.parameters = [
            (p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
        self.groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self.numbers = {key: value for key, value in vars(optimizer).items() if isinstance(value, int | float | str)}

    def restore(self, optimizer: Any) -> None:
        """Put everything back."""
        for p, before in self.parameters:
            p.detach().copy_(before)
        optimizer.state.clear()
        optimizer.state.update(self.state)
        for group, before in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(before)
            for key in group.keys() - before.keys() - {"params"}:
                del group[key]
        vars(optimizer).update(self.numbers)
