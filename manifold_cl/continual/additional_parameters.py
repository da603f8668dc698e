"""Plain parameters that train beside the adapters, such as the projector of a vision-language model.

Nothing protects them from later tasks, so they are frozen unless a stream names them. The record of a run that trains
them lists them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from manifold_cl.continual.validation import each
from manifold_cl.files import FileError
from manifold_cl.lists import listed
from manifold_cl.rules import validate_number
from manifold_cl.tensor_files import read_tensors, write_tensors

COMPANIONS = "companions.safetensors"
"""The name of the file, and ``companions`` in records, is older than the class."""


@dataclass(frozen=True)
class AdditionalParameters:
    """Parameters that train beside the adapters, and their optimizer options.

    Args:
        pattern: regular expression for complete parameter names.
        lr: peak learning rate, one for all tasks or one per task.
        weight_decay: decoupled, on matrices only.
    """

    pattern: str
    lr: float | tuple[float, ...]
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression ({error})") from None
        each(partial(validate_number, least=0.0))("lr", self.lr)
        validate_number("weight_decay", self.weight_decay, least=0.0)

    def validate_tasks(self, count: int) -> None:
        """Raise ValueError for rates per task of another number of tasks."""
        if isinstance(self.lr, tuple) and len(self.lr) != count:
            raise ValueError(f"additional parameters have {len(self.lr)} rates for {count} tasks: give one per task")

    def find(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters by name.

        Raises:
            ValueError: when the pattern matches none.
            TypeError: for one in half precision, which small steps would not move.
        """
        parameters = {name: p for name, p in model.named_parameters() if re.fullmatch(self.pattern, name)}
        if not parameters:
            raise ValueError(f"no parameter matches {self.pattern!r}, which should train beside the adapters")
        for name, p in parameters.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} is {p.dtype}: train it in float32, half precision loses small steps")
        return parameters

    def add_to(self, optimizer: Optimizer, model: nn.Module, index: int) -> None:
        """Unfreeze the parameters and add them to the optimizer of one task."""
        lr = self.lr[index] if isinstance(self.lr, tuple) else self.lr
        parameters = [p.requires_grad_(True) for p in self.find(model).values()]
        for role, decay in (("additional", self.weight_decay), ("additional_no_decay", 0.0)):
            if group := [p for p in parameters if (p.ndim > 1) == (role == "additional")]:
                optimizer.add_param_group({"params": group, "lr": lr, "weight_decay": decay, "role": role})

    def freeze(self, model: nn.Module) -> None:
        """Freeze the parameters again."""
        for p in self.find(model).values():
            p.requires_grad_(False)
            p.grad = None

    def save(self, model: nn.Module, folder: Path, *, task: str) -> None:
        """Write ``companions.safetensors``: the values after this task."""
        write_tensors(folder / COMPANIONS, self.find(model), {"task": task, "pattern": self.pattern})

    @torch.no_grad()
    def load(self, model: nn.Module, folder: Path) -> None:
        """Set the parameters to the values that `save` wrote.

        Raises:
            FileError: when the file is damaged or its parameters are not those of the model.
        """
        tensors, _ = read_tensors(folder / COMPANIONS)
        parameters = self.find(model)
        differing = sorted(parameters.keys() ^ tensors.keys())
        if differing := differing or [name for name, p in parameters.items() if p.shape != tensors[name].shape]:
            raise FileError(f"{folder / COMPANIONS} does not fit the model: {listed(differing, 5)}")
        for name, p in parameters.items():
            p.copy_(tensors[name])

    def provenance(self, model: nn.Module) -> dict[str, Any]:
        """The entry of a record's provenance: pattern, number and names of the parameters."""
        parameters = self.find(model)
        count = sum(p.numel() for p in parameters.values())
        return {"pattern": self.pattern, "parameters": count, "names": list(parameters)}
