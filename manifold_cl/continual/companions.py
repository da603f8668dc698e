"""Plain parameters that train beside the adapters, such as the projector of a vision-language model.

Nothing protects them from later tasks, so they are frozen unless a stream names them, and a run that trains them says
so in its record.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from manifold_cl.continual.checks import check_number
from manifold_cl.files import VERSION, FileError, read_tensors, write_tensors

COMPANIONS_FORMAT = "manifold_cl.companions"


@dataclass(frozen=True)
class Companions:
    """Which parameters train beside the adapters, and how.

    Args:
        pattern: regular expression for whole parameter names.
        lr: peak learning rate, one for all tasks or one for each.
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
        for lr in self.lr if isinstance(self.lr, tuple) else (self.lr,):
            check_number("lr", lr, least=0.0)
        check_number("weight_decay", self.weight_decay, least=0.0)

    def check(self, tasks: int) -> None:
        """Refuse rates by task for another number of tasks.

        Raises:
            ValueError: with both numbers.
        """
        if isinstance(self.lr, tuple) and len(self.lr) != tasks:
            raise ValueError(f"companions have {len(self.lr)} rates for {tasks} tasks: give one, or one for each")

    def find(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters by name.

        Raises:
            ValueError: when the pattern matches none.
            TypeError: for one in half precision, which small steps would not move.
        """
        found = {name: p for name, p in model.named_parameters() if re.fullmatch(self.pattern, name)}
        if not found:
            raise ValueError(f"no parameter matches {self.pattern!r}, which should train beside the adapters")
        for name, p in found.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} is {p.dtype}: train it in float32, half precision loses small steps")
        return found

    def join(self, optimizer: Optimizer, model: nn.Module, task: int) -> None:
        """Unfreeze the parameters and add them to the optimizer of task number ``task``."""
        lr = self.lr if isinstance(self.lr, float | int) else self.lr[task]
        found = list(self.find(model).values())
        for p in found:
            p.requires_grad_(True)
        for role, decay in (("companions", self.weight_decay), ("companions_no_decay", 0.0)):
            if same := [p for p in found if (p.ndim > 1) == (role == "companions")]:
                optimizer.add_param_group({"params": same, "lr": lr, "weight_decay": decay, "role": role})

    def freeze(self, model: nn.Module) -> None:
        """Freeze the parameters again."""
        for p in self.find(model).values():
            p.requires_grad_(False)
            p.grad = None

    def save(self, model: nn.Module, folder: Path, *, task: str) -> None:
        """Write ``companions.safetensors`` and its manifest: the values after this task."""
        manifest = {"format": COMPANIONS_FORMAT, "version": VERSION, "task": task, "pattern": self.pattern}
        write_tensors(folder / "companions", dict(self.find(model)), manifest)

    @torch.no_grad()
    def load(self, model: nn.Module, folder: Path) -> None:
        """Set the parameters to what `save` wrote.

        Raises:
            FileError: when the file is damaged or its parameters are not the model's.
        """
        tensors, _ = read_tensors(folder / "companions", expected=COMPANIONS_FORMAT)
        found = self.find(model)
        differing = sorted(found.keys() ^ tensors.keys())
        if differing := differing or [n for n in found if found[n].shape != tensors[n].shape]:
            raise FileError(f"{folder / 'companions.safetensors'} does not fit the model: {', '.join(differing[:5])}")
        for name, p in found.items():
            p.copy_(tensors[name])

    def plain(self, model: nn.Module) -> dict[str, Any]:
        """What the record says of them."""
        found = self.find(model)
        return {
            "pattern": self.pattern,
            "parameters": sum(p.numel() for p in found.values()),
            "names": list(found),
        }
