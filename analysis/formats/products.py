"""Kronecker products (LoKr), Hadamard products (LoHa) and kernels in Tucker form, as factors without the product."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats.sources import Shape
from analysis.formats.structured import Factors, Stored, StructuredLayer, Tensors, full, needed, unequal


def kronecker(path: Path, stored: Stored, parts: Mapping[str, str], scaling: float) -> StructuredLayer:
    """LoKr's update ``s · W₁ ⊗ W₂``: its singular triples are the products of those of both halves.

    A half is stored as a matrix (``w1``), as two factors (``w1_a``, ``w1_b``), or as factors of a kernel with a core
    (``w2_a``, ``w2_b``, ``t2``). The halves are decomposed; the product is not formed. The rank is the product of the
    ranks of the halves. Kernels are flattened to matrices, outputs times inputs and positions.
    """
    (m1, n1, r1), (m2, n2, r2) = (_half_shape(path, stored, parts, half) for half in "12")
    shape = (m1 * m2, n1 * n2, min(m1, n1, r1) * min(m2, n2, r2))
    rule = partial(partial, _kronecker_factors, scaling)
    return StructuredLayer(parts, shape, rule(None), leading=rule)


def peft_kronecker(path: Path, stored: Stored, parts: Mapping[str, str], scaling: float) -> StructuredLayer:
    """LoKr's update as PEFT computes it: `kronecker`, except for kernels of one dimension.

    There W₁ gets a leading dimension before the product, and the result is reshaped. So it is no Kronecker product of
    matrices, and is formed.
    """
    layer = kronecker(path, stored, parts, scaling)
    if "w2" not in parts or len(stored[parts["w2"]]) != 3:
        return layer
    m, n, _ = layer.shape
    return StructuredLayer(parts, (m, n, min(m, n)), partial(_reshaped_factors, scaling, (m, n)))


def hadamard(path: Path, stored: Stored, parts: Mapping[str, str], scaling: float) -> StructuredLayer:
    """LoHa's update ``s · (A₁ B₁ᵀ) ∘ (A₂ B₂ᵀ)``, of rank r₁ r₂.

    Its factors are the row-wise Khatri-Rao products of both left and both right factors: row i of the left one is the
    Kronecker product of the rows i of A₁ and A₂. Where r₁ r₂ exceeds a side of the matrix, the matrix is formed.
    """
    needed(path, parts, "w1_a", "w1_b", "w2_a", "w2_b")
    (m, n, r1), (m2, n2, r2) = (_half_shape(path, stored, parts, half) for half in "12")
    if (m, n) != (m2, n2):
        raise unequal(path, f"the shape of {parts['w2_a']} times {parts['w2_b']}", (m2, n2), (m, n))
    return StructuredLayer(parts, (m, n, min(m, n, r1 * r2)), partial(_hadamard_factors, scaling))


def tucker(path: Path, stored: Stored, parts: Mapping[str, str], scaling: float) -> StructuredLayer:
    """The update of a LoCon with ``lora_mid``: a kernel with cores between its output and input factors."""
    up, mid, down = (stored[parts[part]] for part in ("up", "mid", "down"))
    fits = len(up) >= 2 and len(down) >= 2 and len(mid) > 2 and math.prod(up[2:]) == math.prod(down[2:]) == 1
    if not fits or mid[:2] != (up[1], down[0]) or 0 in (*up, *mid, *down):
        found = f"{parts['up']} {up}, {parts['mid']} {mid} and {parts['down']} {down}"
        raise unequal(path, f"the shape of {found}", "no product", "(m, r), (r, k, ...) and (k, n)")
    n = down[1] * math.prod(mid[2:])
    return StructuredLayer(parts, (up[0], n, up[1]), partial(_tucker_factors, scaling))


def _half_shape(path: Path, stored: Stored, parts: Mapping[str, str], half: str) -> Shape:
    """(m, n, r) of one half."""
    if f"w{half}" in parts:
        if others := [name for part, name in parts.items() if part in (f"w{half}_a", f"w{half}_b", f"t{half}")]:
            raise ValueError(f"{path}: {parts[f'w{half}']} and {others[0]} are the same half of a layer")
        whole = stored[parts[f"w{half}"]]
        if len(whole) < 2 or 0 in whole:
            raise unequal(path, f"the shape of {parts[f'w{half}']}", whole, "a matrix or a kernel")
        m, n = whole[0], math.prod(whole[1:])
        return m, n, min(m, n)
    needed(path, parts, f"w{half}_a", f"w{half}_b")
    a, b = stored[parts[f"w{half}_a"]], stored[parts[f"w{half}_b"]]
    core = stored[parts[f"t{half}"]] if f"t{half}" in parts else None
    kernel = core is not None and len(core) > 2
    fits = len(a) == 2 and (len(b) == 2 if kernel else core is None and len(b) >= 2)
    shape = (0, 0, 0)
    if core is not None and kernel and fits:
        fits = core[:2] == (a[0], b[0])
        shape = (a[1], b[1] * math.prod(core[2:]), a[0])
    elif fits and core is None:
        fits = a[1] == b[0]
        shape = (a[0], math.prod(b[1:]), a[1])
    if not fits or 0 in (*a, *b, *(core or ())):
        beside = f", {parts[f't{half}']} {core}" if core is not None else ""
        found = f"{parts[f'w{half}_a']} {a}, {parts[f'w{half}_b']} {b}{beside}"
        raise ValueError(f"{path}: {found} do not fit: (m, r) and (r, n) were expected, or (r, m), (k, n), (r, k, ...)")
    return shape


def _half(tensors: Tensors, half: str) -> Factors:
    """Left and right factor of one half; a stored matrix with an identity."""
    if f"w{half}" in tensors:
        return full(tensors[f"w{half}"].flatten(1))
    a, b = tensors[f"w{half}_a"], tensors[f"w{half}_b"]
    return (a.mT, _kernel_side(tensors[f"t{half}"], b)) if f"t{half}" in tensors else (a, b.flatten(1).mT)


def _kernel_side(core: Tensor, inputs: Tensor) -> Tensor:
    """The right factor (n · positions, r) of a kernel from its core (r, k, ...) and inputs (k, n)."""
    product: Tensor = torch.tensordot(core, inputs, dims=([1], [0]))  # (r, positions, n)
    return product.movedim(-1, 1).flatten(1).mT


def _triples(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of ``left rightᵀ``, as many as its shapes allow, by thin QR of both and the SVD of the core."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, values, vt = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return q_left @ u, values, q_right @ vt.mT


def _kronecker_factors(scaling: float, rank: int | None, tensors: Tensors, weight: Tensor) -> Factors:
    (u1, s1, v1), (u2, s2, v2) = (_triples(*_half(tensors, half)) for half in "12")
    values, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)
    values, order = values[:rank], order[:rank]
    i, j = order // len(s2), order % len(s2)
    left, right = (_columnwise(x[:, i], y[:, j]) for x, y in ((u1, u2), (v1, v2)))
    return left * (values * scaling), right


def _reshaped_factors(scaling: float, shape: tuple[int, int], tensors: Tensors, weight: Tensor) -> Factors:
    left, right = _half(tensors, "1")
    return full((torch.kron(left @ right.mT, tensors["w2"]) * scaling).reshape(shape))


def _columnwise(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of each column of `a` with that of `b`, (m₁ m₂, r)."""
    return (a[:, None, :] * b[None, :, :]).flatten(0, 1)


def _hadamard_factors(scaling: float, tensors: Tensors, weight: Tensor) -> Factors:
    (a1, b1), (a2, b2) = (_half(tensors, half) for half in "12")
    if a1.shape[1] * a2.shape[1] >= min(len(a1), len(b1)):
        return full((a1 @ b1.mT) * (a2 @ b2.mT) * scaling)
    left, right = ((x[:, :, None] * y[:, None, :]).flatten(1) for x, y in ((a1, a2), (b1, b2)))
    return left * scaling, right


def _tucker_factors(scaling: float, tensors: Tensors, weight: Tensor) -> Factors:
    return tensors["up"].flatten(1) * scaling, _kernel_side(tensors["mid"], tensors["down"].flatten(1))
