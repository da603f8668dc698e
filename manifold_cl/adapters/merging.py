"""Updates added to base weights, and the share of an update that a narrow weight loses to rounding."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import is_conv1d, plain_weight
from manifold_cl.adapters.low_rank import Factors

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
    """Add updates to the layer's weight, rounded once, in place; warn about what the rounding loses.

    Args:
        base: a linear layer.
        updates: their sum is added.
        layer: its name, for messages.
        what: name of what is merged, for messages.
        merged_dtype: what weight and bias become; the weight's own by default. The layer then needs inputs of that
            precision: run the model under ``torch.autocast``.

    Raises:
        TypeError: for a quantised or computed weight.
        ValueError: for a sum that is not finite; nothing is changed then.
    """
    weight = plain_weight(base, to="merge into")
    dtype = merged_dtype or weight.dtype
    before = weight.to(torch.promote_types(torch.promote_types(weight.dtype, torch.float32), dtype))
    delta = updates[0].delta_weight().to(before)
    for factors in updates[1:]:
        delta = delta + factors.delta_weight().to(before)
    total = before + delta
    rounded = total.to(dtype)
    if not bool(rounded.isfinite().all()) and bool(before.isfinite().all()):
        raise ValueError(f"{layer}: merging {what} gives NaN or infinite weights: the adapter is damaged")
    if dtype.itemsize < 4:
        size = float(delta.norm())
        _note(layer, float((rounded.to(total.dtype) - total).norm()) / size if size else 0.0, dtype)
    if dtype == weight.dtype:
        weight.copy_(rounded)
        return
    parameter = cast(Tensor, base.weight)
    parameter.data = (rounded.T if is_conv1d(base) else rounded).contiguous()
    if isinstance(bias := base.bias, Tensor):
        bias.data = bias.data.to(dtype)


@torch.no_grad()
def restore(base: nn.Module, weight: Tensor, bias_dtype: torch.dtype | None) -> None:
    """Put a weight (m, n) back that `merge_into` changed, in its own precision, and the bias in its own."""
    present = plain_weight(base, to="restore")
    if present.dtype == weight.dtype:
        present.copy_(weight)
    else:
        parameter = cast(Tensor, base.weight)
        parameter.data = (weight.T if is_conv1d(base) else weight).contiguous().to(parameter.device)
    if isinstance(bias := base.bias, Tensor) and bias_dtype is not None:
        bias.data = bias.data.to(bias_dtype)


@contextmanager
def losses_together() -> Iterator[None]:
    """Inside, merges do not warn one by one: one warning at the end gives the median over the layers."""
    if _losses.get() is not None:
        yield
        return
    found: dict[str, float] = {}
    token = _losses.set(found)
    try:
        yield
    finally:
        _losses.reset(token)
        _warn(found)


def _note(layer: str, share: float, dtype: torch.dtype) -> None:
    found = _losses.get()
    if found is None:
        _warn({f"{layer} ({dtype})": share})
    else:
        found[f"{layer} ({dtype})"] = share


def _warn(found: dict[str, float]) -> None:
    if found and (median := statistics.median(found.values())) >= WORTH_A_WARNING:
        worst = max(found, key=lambda layer: found[layer])
        warnings.warn(
            f"rounding to the base weight's precision loses a median of {median:.0%} of the merged update over "
            f'{len(found)} layers, most in {worst}: {found[worst]:.0%}. Pass merged_dtype="float32" (EBLoraConfig) or '
            "merged_dtype=torch.float32 (merge_adapters) and run the merged model under torch.autocast, load the base "
            "in float32, or keep the adapter unmerged",
            UserWarning,
            stacklevel=4,
        )
