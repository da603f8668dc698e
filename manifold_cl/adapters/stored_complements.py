"""Protected bases in the files of PEFT adapters: equal ones once, and compact ones in six bits per entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from manifold_cl.adapters.layers import plain_name
from manifold_cl.adapters.named_adapters import FRAMES, PREFIX
from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.compact_bases import unpack

COMPLEMENT, PACKED, SHARED = "complement", "packed", "shared"
"""Ends of keys: a basis (n, k), its packed columns, or the stem of the key of an equal basis, as bytes of UTF-8."""
ROOT = "base_model.model."


def stored_once(
    state: Mapping[str, Tensor], manifolds: Mapping[str, RestrictedStiefel], *, adapter: str
) -> dict[str, Tensor]:
    """The state of an adapter with its complements in the form of a file.

    Args:
        state: keys with the adapter's name, as in the model.
        manifolds: key of a complement → its manifold.
        adapter: the adapter's name.
    """
    result, owners = dict(state), list[tuple[str, Tensor]]()
    for key, manifold in manifolds.items():
        stem = key.removesuffix(COMPLEMENT)
        result.pop(f"{stem}{PACKED}", None)  # columns of another basis, where that was replaced
        basis = state.get(key)
        if basis is None or not basis.numel():
            continue
        owner = next((name for name, other in owners if _equal(other, basis)), None)
        if owner is not None:
            text = plain_name(owner.removesuffix(f".{adapter}.")).encode()
            result[f"{stem}{SHARED}"] = torch.tensor(list(text), dtype=torch.uint8)
            del result[key]
            continue
        owners.append((stem, basis))
        if (packed := manifold.packed_complement()) is not None:
            result[f"{stem}{PACKED}"] = packed
            del result[key]
    return result


def stored_per_layer(state: Mapping[str, Tensor], complements: Iterable[str]) -> dict[str, Tensor]:
    """The state of an adapter with one complete basis per layer, as transformers' own ``load_adapter`` reads it.

    Args:
        state: keys with the adapter's name, as in the model.
        complements: keys of the bases.
    """
    result = dict(state)
    for key in complements:
        result.pop(f"{key.removesuffix(COMPLEMENT)}{PACKED}", None)
        if (basis := result.get(key)) is not None:
            result[key] = basis.clone()  # transformers saves no tensors that share memory
    return result


def expanded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a file with one basis per layer again, beside the packed columns that define it, if any.

    Raises:
        ValueError: for packed columns that do not fit their frame, or a basis that is shared but not in the file.
    """
    result = dict(state)
    sides = {side: frame for frame, side in FRAMES}
    for key, columns in state.items():
        stem, _, end = key.rpartition(".")
        layer, _, side = stem.rpartition(f".{PREFIX}")
        if end != PACKED or side not in sides:
            continue
        frame = state.get(f"{layer}.{PREFIX}{sides[side]}")
        if frame is None:
            raise ValueError(f"{key} is in the file without its frame {PREFIX}{sides[side]}")
        result[f"{stem}.{COMPLEMENT}"] = unpack(columns, frame.shape[0])
    complete = dict(result)
    for key, name in state.items():
        stem, _, end = key.rpartition(".")
        if end != SHARED or f".{PREFIX}" not in stem:
            continue
        owner = bytes(name.tolist()).decode()
        candidates = [f"{start}.{COMPLEMENT}" for start in (owner, owner.removeprefix(ROOT), ROOT + owner)]
        source = next((candidate for candidate in candidates if candidate in complete), None)
        if source is None:
            raise ValueError(f"{stem} shares the protected basis of {owner}, which the file lacks")
        result[f"{stem}.{COMPLEMENT}"] = complete[source]
        if (own := complete.get(f"{source.removesuffix(COMPLEMENT)}{PACKED}")) is not None:
            result[f"{stem}.{PACKED}"] = own
        del result[key]
    return result


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))
