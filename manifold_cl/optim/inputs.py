"""What enters the optimizer from outside, refused once and by name where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.restricted_stiefel import kind_of
from manifold_cl.optim.options import DEFAULTS, Group, check_options

FLAGS = {
    "differentiable": "the step reads parameters outside autograd",
    "capturable": "the step asks the host whether a gradient is finite, which a CUDA graph cannot replay",
}
FLATTENED = "an engine that flattens parameters (FSDP1, DeepSpeed ZeRO) does not fit; use DDP or FSDP2"


def refuse_flattened(p: Tensor) -> None:
    """Refuse what FSDP1 and DeepSpeed ZeRO make of a matrix.

    Raises:
        ValueError: for a flat parameter, or one that DeepSpeed has taken over.
    """
    if getattr(p, "_is_flat_param", False) or hasattr(p, "ds_id"):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} holds pieces of several matrices: {FLATTENED}")


def refuse_flags(options: Mapping[str, Any]) -> None:
    """Refuse flags of torch that cannot be honoured, in the constructor's options or in a group's.

    Raises:
        ValueError: naming the flag.
    """
    for flag, reason in FLAGS.items():
        if options.get(flag):
            raise ValueError(f"{flag}=True is not supported: {reason}")


def check_point(p: Tensor, manifold: Any) -> None:
    """Refuse a parameter that cannot be a point of ``manifold``; no value is read.

    Raises:
        ValueError: for a flattened parameter or a wrong shape.
        TypeError: for half precision, integers and complex numbers.
    """
    refuse_flattened(p)
    if p.ndim < 2 and isinstance(manifold, RestrictedStiefel):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} cannot lie on {kind_of(manifold)}: {FLATTENED}")
    if p.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"a point on {kind_of(manifold)} is kept in float32 or float64, got {p.dtype}: rounding alone costs "
            "1e-3 of orthonormality; keep the factors in float32 and let autocast handle the products"
        )
    ok, reason = manifold._check_shape(tuple(p.shape), "parameter")
    if not ok:
        raise ValueError(str(reason))


def check_before_step(p: Tensor, manifold: Any) -> None:
    """Refuse a point that is no longer what it was at construction, or whose gradient is no dense matrix.

    Raises:
        ValueError: for a parameter that an engine has flattened, or moved to half precision, since.
        TypeError: for a sparse gradient.
    """
    if p.ndim < 2 or hasattr(p, "ds_id") or p.dtype not in (torch.float32, torch.float64):
        check_point(p, manifold)
    if p.grad is not None and p.grad.layout is not torch.strided:
        raise TypeError(
            f"a point of shape {tuple(p.shape)} got a gradient of layout {p.grad.layout}: every entry of an "
            "orthonormal matrix moves, so it needs a dense gradient (nn.Embedding(sparse=False))"
        )


def refuse_duplicates(params: Sequence[Tensor]) -> None:
    """Refuse a parameter that a group lists twice: it would step twice.

    Raises:
        ValueError: with the position of the second.
    """
    seen: dict[int, int] = {}
    for place, p in enumerate(params):
        if id(p) in seen:
            raise ValueError(
                f"one parameter of shape {tuple(p.shape)} is listed twice in a group, at {seen[id(p)]} and {place}: "
                "a point steps once"
            )
        seen[id(p)] = place


def check_state(groups: Sequence[Group], state_dict: Mapping[str, Any], *, shapes: bool) -> None:
    """Refuse a saved state that belongs to other parameters, naming what differs.

    Args:
        groups: of the optimizer that is to load it.
        state_dict: what was saved.
        shapes: whether tensors of a parameter's state have its shape, as in element-wise optimizers; others keep
            preconditioners of any shape.

    Raises:
        ValueError: where the number of groups, their sizes, roles or manifolds, or the shape of a moment differ, and
            for an option of the step that cannot be.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"the state has {len(saved)} parameter groups, this optimizer {len(groups)}")
    for place, (there, here) in enumerate(zip(saved, groups, strict=True)):
        name = f"group {place} ({here.get('role', 'no role')})"
        check_options({**DEFAULTS, **there})
        for key in ("role", "manifold"):
            if there.get(key) != here.get(key):
                raise ValueError(f"{name}: {key} is {there.get(key)!r} in the state and {here.get(key)!r} here")
        if len(there["params"]) != len(here["params"]):
            raise ValueError(f"{name}: {len(there['params'])} parameters in the state and {len(here['params'])} here")
        for index, p in zip(there["params"], here["params"], strict=True) if shapes else ():
            for key, value in state_dict["state"].get(index, {}).items():
                # Numbers and one-per-matrix moments have shapes of their own.
                whole = isinstance(value, Tensor) and value.ndim == p.ndim and 1 not in value.shape[-2:]
                if whole and p.ndim and value.shape != p.shape:
                    raise ValueError(
                        f"{name}, parameter {index}: {key} has shape {tuple(value.shape)} in the state, "
                        f"the parameter {tuple(p.shape)} here"
                    )
