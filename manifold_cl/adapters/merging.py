"""Updates added to base weights, and the share of an update that rounding to a narrow weight loses."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import is_conv1d, plain_weight
from manifold_cl.adapters.frames import Points, validate_frames
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.linalg import is_finite

WORTH_A_WARNING = 0.01
"""Share of an update lost to rounding from which a merge warns; float32 weights lose about 1e-6."""

_losses: ContextVar[dict[str, float] | None] = ContextVar("losses", default=None)


@torch.no_grad()
def merge_into(
    base: nn.Module,
    updates: Sequence[Factors],
    *,
    layer: str,
    merged_dtype: torch.dtype | None = None,
    what: str = "the update",
) -> None:
    """Add the sum of updates to the layer's weight, rounded once, in place; warn about what the rounding loses.

    Weight and bias take the precision ``merged_dtype``, if given. ``layer`` and ``what`` name the layer and the updates
    in messages. TypeError for a quantised or computed weight, ValueError for a sum that is not finite; nothing is
    changed then.
    """
    weight = plain_weight(base, to="merge into")
    dtype = merged_dtype or weight.dtype
    before = weight.to(torch.promote_types(torch.promote_types(weight.dtype, torch.float32), dtype))
    delta = updates[0].delta_weight().to(before)
    for factors in updates[1:]:
        delta = delta + factors.delta_weight().to(before)
    total = before + delta
    rounded = total.to(dtype)
    if not is_finite(rounded) and is_finite(before):
        raise ValueError(f"{layer}: merging {what} gives NaN or infinite weights: the adapter is damaged")
    if dtype.itemsize < 4:
        size = float(delta.norm())
        with losses_together() as losses:
            losses[f"{layer} ({dtype})"] = float((rounded.to(total.dtype) - total).norm()) / size if size else 0.0
    _set_weight(base, rounded, dtype)


@dataclass(frozen=True, eq=False)
class Backup:
    """A base weight (m, n) as it was before a merge, on the CPU, and the precision of its bias."""

    weight: Tensor
    bias_dtype: torch.dtype | None

    @torch.no_grad()
    def restore(self, base: nn.Module) -> None:
        """Put the weight back, to the last bit, and both tensors into their own precision."""
        _set_weight(base, self.weight, self.bias_dtype)


@torch.no_grad()
def merge_reversibly(
    base: nn.Module,
    updates: Sequence[Factors],
    *,
    points: Points,
    layer: str,
    merged_dtype: torch.dtype | None = None,
    what: str = "the update",
) -> Backup:
    """Validate the frames ``points``, then `merge_into`; returns the weight as it was.

    A copy is kept because subtracting the update would leave a bfloat16 weight off by 1e-3. On an error nothing is
    changed.
    """
    weight = plain_weight(base, to="merge into")
    validate_frames(points, to="merge")
    bias = cast(Tensor | None, base.bias)
    backup = Backup(weight.detach().cpu().clone(), None if bias is None else bias.dtype)
    merge_into(base, updates, layer=layer, merged_dtype=merged_dtype, what=what)
    return backup


@contextmanager
def losses_together() -> Iterator[dict[str, float]]:
    """Collects the losses of merges, by layer; the outermost warns once at the end, with their median."""
    if (outer := _losses.get()) is not None:
        yield outer
        return
    losses: dict[str, float] = {}
    token = _losses.set(losses)
    try:
        yield losses
    finally:
        _losses.reset(token)
        _warn(losses)


def _set_weight(base: nn.Module, weight: Tensor, bias_dtype: torch.dtype | None) -> None:
    """Overwrite the weight (m, n), in place where the precision stays, else together with the bias."""
    present = plain_weight(base, to="write")
    if present.dtype == weight.dtype:
        present.copy_(weight)
        return
    parameter = cast(Tensor, base.weight)
    parameter.data = (weight.T if is_conv1d(base) else weight).contiguous().to(parameter.device)
    if isinstance(bias := base.bias, Tensor) and bias_dtype is not None:
        bias.data = bias.data.to(bias_dtype)


def _warn(losses: dict[str, float]) -> None:
    if losses and (median := statistics.median(losses.values())) >= WORTH_A_WARNING:
        worst = max(losses, key=lambda layer: losses[layer])
        warnings.warn(
            f"rounding to the base weight's precision loses a median of {median:.0%} of the merged update over "
            f'{len(losses)} layers, most in {worst}: {losses[worst]:.0%}. Pass merged_dtype="float32" (EBLoraConfig) '
            "or merged_dtype=torch.float32 (merge_adapters) and run the merged model under torch.autocast, load the "
            "base in float32, or keep the adapter unmerged",
            UserWarning,
            stacklevel=4,
        )
