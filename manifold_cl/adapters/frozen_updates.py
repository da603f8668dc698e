"""Frozen updates that act beside a layer's weight, for bases that are quantised or must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import named_linears, unwrapped
from manifold_cl.adapters.low_rank import Factors


class KeptUpdates:
    """A forward hook that adds ``Σ ΔW x`` of frozen updates to a layer's output, in the input's precision.

    The columns of all updates lie side by side, so that T updates of rank r cost one product of rank T r.
    """

    def __init__(self) -> None:
        self.updates: list[Factors] = []
        self._side_by_side: tuple[Tensor, Tensor] | None = None

    def add(self, factors: Factors) -> None:
        """Let one more update act."""
        self.updates.append(factors.detach().clone())
        self._side_by_side = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        """The output with the updates' part."""
        x = args[0] if args else next(iter(named.values()))
        left, right = self._factors(x)
        total: Tensor = output + ((x @ right) @ left.mT).to(output.dtype)
        return total

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Left (m, T r) and right (n, T r) in precision and device of ``x``."""
        if self._side_by_side is None or self._side_by_side[0].dtype != x.dtype:
            with torch.inference_mode(False), torch.no_grad():  # kept for training too, whoever calls first
                left = torch.cat([update.weighted_left() for update in self.updates], dim=1)
                right = torch.cat([update.right for update in self.updates], dim=1)
                self._side_by_side = left.to(x.device, x.dtype), right.to(x.device, x.dtype)
        left, right = (factor.to(x.device) for factor in self._side_by_side)
        return left, right


@torch.no_grad()
def keep_factors(model: nn.Module, updates: Mapping[str, Factors]) -> None:
    """Let low-rank updates act beside the linear layers they are named after; no weight is read or changed.

    Quantised weights are allowed. The updates are not in the model's ``state_dict``: keep the adapters' files.

    Raises:
        ValueError: for a name that is no linear layer of this model, or a shape that differs; nothing is added then.
    """
    layers = named_linears(unwrapped(model))
    for name, factors in updates.items():
        shape = (factors.left.shape[0], factors.right.shape[0])
        if name not in layers:
            raise ValueError(f"the update names {name!r}, which is no linear layer of this model")
        if shape != sides(layers[name]):
            raise ValueError(f"{name}: the update is {shape}, the weight {sides(layers[name])}")
    for name, factors in updates.items():
        hook = _hook_of(layers[name])
        if hook is None:
            hook = KeptUpdates()
            layers[name].register_forward_hook(hook, with_kwargs=True)
        hook.add(factors)


def kept_updates(model: nn.Module) -> dict[str, list[Factors]]:
    """Layer → the updates that act beside it, in the order in which they came; layers without any are left out."""
    return {name: list(hook.updates) for name, hook in _hooks(model)}


def _hooks(model: nn.Module) -> Iterator[tuple[str, KeptUpdates]]:
    for name, layer in named_linears(unwrapped(model)).items():
        if (hook := _hook_of(layer)) is not None:
            yield name, hook


def _hook_of(layer: nn.Module) -> KeptUpdates | None:
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, KeptUpdates)), None)
