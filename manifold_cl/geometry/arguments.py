"""Validation of the tensors that a verb of the geometry gets: kinds, dtypes, and shapes that fit together.

Wrong shapes often broadcast, so that a verb would return numbers without meaning instead of failing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Outline(NamedTuple):
    """The shape that points of a manifold have as far as the manifold determines it.

    Args:
        rows: n; None where nothing determines it.
        batch: the batch of manifolds, which broadcasts against that of the points.
        source: what determines both, in words: ``"the complement"``.
    """

    rows: int | None = None
    batch: tuple[int, ...] = ()
    source: str = "the complement"


ANY = Outline()
ASYMMETRY = 1e-6
"""Largest ``|B − Bᵀ|`` of a symmetric matrix, relative to its largest entry: what products in float32 leave."""


def validate_arguments(outline: Outline, /, *, one_dtype: bool = True, **tensors: Any) -> None:
    """Refuse arguments of a verb, by name, whose kinds, dtypes or shapes do not fit together.

    The first is a point (…, n, p) or a vector at one, and the others have its n and p. Leading dimensions broadcast.
    Reads no values; 3 µs with the outline.

    Args:
        outline: what the manifold determines.
        one_dtype: whether all have one dtype.
        tensors: the arguments by name.

    Raises:
        TypeError: for an argument that is no tensor, or has another dtype than the first.
        ValueError: for a shape that does not fit.
    """
    rows, batch, _ = outline
    kind = shape = None
    for tensor in tensors.values():
        if not isinstance(tensor, Tensor):
            break
        if shape is None:
            shape, kind = tensor.shape, tensor.dtype
            if len(shape) < 2 or shape[-1] > shape[-2] or (rows is not None and shape[-2] != rows):
                break
            if batch and shape[:-2] != batch:
                break
        elif tensor.shape != shape or (one_dtype and tensor.dtype != kind):
            break
    else:
        return
    _refuse(outline, tensors, one_dtype=one_dtype)


def of_one_shape(verb: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator of a method of tensors, such as ``inverse(self, x, y)``: `validate_arguments` comes first.

    Keyword-only parameters are no tensors.
    """
    parameters = inspect.signature(verb).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]

    @wraps(verb)
    def validated(self: Any, *tensors: Tensor, **named: Any) -> Tensor:
        given: dict[str, Any] = dict(zip(names, tensors, strict=False))
        given |= {name: named[name] for name in names if name in named}
        validate_arguments(ANY, **given)
        return verb(self, *tensors, **named)

    return validated


def shape_fault(outline: Outline, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the shapes of these arguments, in words; None where they fit."""
    first, *others = tensors
    shape = tuple(tensors[first].shape)
    if (fault := _fault_of_first(outline, first, shape)) is not None:
        return fault
    known = {first: shape}
    for name in others:
        own = tuple(tensors[name].shape)
        if len(own) < 2 or own[-2:] != shape[-2:]:
            return f"{name} has shape {own} and must have the shape of {first}, {shape}" + _turned(name, own, shape)
        known[name] = own
    return _fault_of_batches(outline, known)


def _refuse(outline: Outline, tensors: Mapping[str, Any], *, one_dtype: bool) -> None:
    """Raise for the first argument that does not fit; return where all of them broadcast."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} is a tensor (…, n, p), got {type(tensor).__name__}: convert it with torch.as_tensor"
            )
    if (fault := shape_fault(outline, tensors)) is not None:
        raise ValueError(fault)
    kinds = {name: tensor.dtype for name, tensor in tensors.items()} if one_dtype else {}
    first = next(iter(tensors))
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise TypeError(f"{name} has {kind} and {first} {kinds[first]}: convert it with {name}.to({first}.dtype)")


def _fault_of_first(outline: Outline, name: str, shape: tuple[int, ...]) -> str | None:
    n = "n" if outline.rows is None else str(outline.rows)
    if len(shape) < 2:
        column = ": one column is a matrix of width 1, [:, None]" if len(shape) == 1 else ""
        return f"{name} has shape {shape} and must be a matrix (…, {n}, p){column}"
    if outline.rows is not None and shape[-2] != outline.rows:
        wanted = (*shape[:-2], outline.rows, shape[-1])
        turned = _turned(name, shape, (outline.rows, shape[-2])) if shape[-1] == outline.rows else ""
        return f"{name} has shape {shape} and must be (…, {n}, p), {n} rows as {outline.source} has" + (
            turned or f": {wanted}"
        )
    if shape[-1] > shape[-2]:
        return f"{name} has shape {shape} and must be tall, (…, {n}, p) with p ≤ {n}" + _turned(name, shape, shape)
    return None


def _fault_of_batches(outline: Outline, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which of the leading dimensions do not broadcast."""
    joint, before = tuple(outline.batch), f"{outline.source} is a batch {tuple(outline.batch)}"
    for name, shape in shapes.items():
        try:
            joint = broadcast_batches(joint, shape[:-2])
        except RuntimeError:
            return f"{name} has shape {shape}, a batch {shape[:-2]}, but {before}: they must be equal or broadcast"
        if shape[:-2]:
            before = f"{name} has shape {shape}"
    return None


def broadcast_batches(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The batch that these broadcast to; RuntimeError where they do not."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _turned(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The advice to transpose, where that would help."""
    tall = len(shape) > 1 and shape[-2] != shape[-1] and (shape[-1], shape[-2]) in (wanted[-2:], wanted[-2:][::-1])
    return f": pass {name}.mT" if tall else ""


def validate_positive_definite(b: Tensor) -> None:
    """Raise ValueError, with what was measured, for a matrix that is not symmetric and positive definite."""
    if b.ndim != 2 or b.shape[0] != b.shape[1] or not b.numel():
        raise ValueError(f"B is one square matrix (n, n), got shape {tuple(b.shape)}")
    if not bool(b.isfinite().all()):
        raise ValueError("B holds NaN or infinite values")
    asymmetry = float((b - b.mT).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
    if asymmetry > ASYMMETRY:
        raise ValueError(f"B is not symmetric: |B − Bᵀ| is {asymmetry:.1e} of its largest entry; pass (B + B.T) / 2")
    values = torch.linalg.eigvalsh(b)
    if not float(values[0]) > len(b) * torch.finfo(b.dtype).eps * float(values[-1].abs()):
        raise ValueError(
            f"B is not positive definite: its smallest eigenvalue is {float(values[0]):.2e}, the largest "
            f"{float(values[-1]):.2e}; add a multiple of the identity"
        )
