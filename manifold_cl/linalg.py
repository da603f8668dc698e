"""Batched kernels for tall-skinny points and the small square matrices they produce.

Everything here works on the last two dimensions, never in place, and keeps to matrix products: no
factorisation of a tall matrix, nothing of size n × n.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Point = Float[Tensor, "*b n p"]
"""A point of the manifold: p orthonormal columns of length n; leading dimensions are batch."""
Tangent = Float[Tensor, "*b n p"]
"""A vector at a point, of the same shape."""
Basis = Float[Tensor, "*#b n k"]
"""Orthonormal (or zero) columns; its batch dimensions broadcast against a point's."""
Square = Float[Tensor, "*b p p"]
"""A small square matrix."""

COMPILED_STEPS = 16
"""Newton-Schulz steps where the bound cannot be read (compiled or on an accelerator): right up to |u| ≈ 250."""
LARGE = 16.0
"""``|yᵀy − I|_F`` above which a factor is corrected once more: rounding of the Gram matrix, about 3e-8 times that in
float32, grows with the square of a step."""
SIGN_STEPS = 16
"""Scaled Newton steps to the sign of a matrix: 10 suffice for a condition of 1e8, more near imaginary eigenvalues."""
LOG_ROOTS = 4
"""Square roots before the series of a logarithm: angles below π shrink below π/16."""
POLAR_STEPS = 10
"""Scaled Newton steps to an orthogonal factor: 9 suffice up to a condition of 1e16 (higham2008functions, chapter 8)."""
LOG_TERMS = 8
"""Terms of atanh(z) at |z| ≤ tan(π/32) = 0.0985: the first one left out is 0.0985¹⁷/17 = 5e-19."""


MATMULS = [
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(getattr(backend, "matmul", None), "fp32_precision")
]
"""Where torch 2.9 and later keep the precision of float32 products; empty before. Once anyone has written here, as
transformers does, the older global switch cannot be read any more."""
EXACT = ("ieee", "none")
"""Settings of a backend that mean float32; "none" is what nobody has set."""


@contextmanager
def full_precision(device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, float32 products on ``device`` are float32 products: no TF32, no bfloat16, no autocast.

    TF32 costs a point three digits of orthonormality (geometry.md 4.9), autocast costs five.
    """
    if torch.compiler.is_compiling():  # the precision is the caller's there: a switch would break the graph
        yield
        return
    kind = torch.device(device).type
    with ExitStack() as stack:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        for matmul in MATMULS:
            if (before := matmul.fp32_precision) not in EXACT:
                stack.callback(setattr, matmul, "fp32_precision", _own_setting(matmul, before))
                matmul.fp32_precision = "ieee"
        if not MATMULS and (precision := torch.get_float32_matmul_precision()) != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        yield


def _own_setting(matmul: Any, read: str) -> str:
    """What has to be written so that the setting is as it was: "none" where it follows that of all backends."""
    matmul.fp32_precision = "none"
    return "none" if matmul.fp32_precision == read else read


def sym(a: Square) -> Square:
    """``(a + aᵀ) / 2``."""
    return (a + a.mT) / 2


def skew(a: Square) -> Square:
    """``(a − aᵀ) / 2``."""
    return (a - a.mT) / 2


def gram_error(x: Point) -> Square:
    """``xᵀx − I``: zero exactly when the columns are orthonormal. O(n p²)."""
    return x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def minus_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x − a b``, the same to the last bit, with one large temporary instead of two: pages cost more than flops."""
    return (a @ -b).add_(x)


def project_out(x: Point, basis: Basis) -> Point:
    """``x − F(Fᵀx)``, the part of x orthogonal to the orthonormal columns F. O(n k p); zero columns change nothing."""
    return minus_product(x, basis, basis.mT @ x)


def split_tangent(x: Point, u: Tangent) -> tuple[Square, Tangent]:
    """``(A, B)`` with ``u = x A + B``: the skew A = xᵀu turns within span(x), B leaves it. O(n p²)."""
    a = skew(x.mT @ u)
    return a, u - x @ a


def newton_schulz_steps(bound: float, eps: float) -> int:
    """Steps after which Newton-Schulz on eigenvalues in [1, 1 + bound], centred, errs by less than ``eps``.

    The error obeys e ← e²(3 + e)/4 from e = b/(2 + b), the exact scalar recursion (geometry.md 4.3).
    """
    error, steps = bound / (2 + bound), 0
    while error > eps and steps < 200:  # a NaN bound ends the loop at once, and the NaN propagates
        error = error * error * (3 + error) / 4
        steps += 1
    return steps


def inverse_sqrt_deficit(e: Square) -> Square:
    """``D`` with ``(I + e)^(-1/2) = I − D``, for symmetric e with eigenvalues at least 0 (up to rounding).

    A coupled Newton-Schulz iteration on the *difference* from the identity, so that a small e keeps its
    digits, scaled to the interval [1, 1 + |e|_F] that is known to hold the spectrum. Matrix products
    only: it batches, and its gradient is right at equal eigenvalues, where that of an
    eigendecomposition is not. O(p³) a step, 1 to 5 steps for |e| below 1.

    Source: higham2008functions, section 6.3; the scaling is geometry.md 4.3.
    """
    eye = torch.eye(e.shape[-1], dtype=e.dtype, device=e.device)
    half = torch.linalg.matrix_norm(e.detach(), keepdim=True) / 2  # a scale only: no gradient belongs to it
    if _readable(e):
        steps = newton_schulz_steps(2 * float(half.max()), torch.finfo(e.dtype).eps) if e.numel() else 0
    else:
        steps = COMPILED_STEPS
    root = (1 + half).sqrt()
    residual = (e - half * eye) / (1 + half)
    deficit = torch.zeros_like(residual)
    for _ in range(steps):
        deficit = deficit + (residual - deficit @ residual) / 2
        square = residual @ residual
        residual = (square @ residual - 3 * square) / 4
    deficit = deficit + (residual - deficit @ residual) / 2
    scaled: Tensor = ((half / (1 + root)) * eye + deficit) / root
    return scaled


def polar_near(y: Point) -> Point:
    """``y(yᵀy)^(-1/2)``, the nearest orthonormal matrix, for yᵀy with eigenvalues in [1, ∞) up to rounding.

    That is the case for ``y = x + u`` with u tangent at x, where ``yᵀy = I + uᵀu``, and for a point that
    has drifted a little. The true Gram matrix is used, so drift is corrected. O(n p²) + O(p³).
    """
    e = gram_error(y)
    q = minus_product(y, y, inverse_sqrt_deficit(e))
    return minus_product(q, q, small_deficit(gram_error(q))) if is_large(e) else q


def is_large(e: Square) -> bool:
    """Whether what was normalised by the Gram matrix ``I + e`` has to be corrected once more.

    Where reading a number is free it is read; elsewhere the answer is yes, as a correction never harms.
    """
    if not _readable(e):
        return True
    return bool(e.numel()) and float(torch.linalg.matrix_norm(e.detach()).max()) > LARGE


def small_deficit(e: Square) -> Square:
    """``D`` with ``(I + e)^(-1/2) ≈ I − D``, two terms of the series: off by a third of |e|³."""
    return e / 2 - 3 / 8 * (e @ e)


def _readable(e: Tensor) -> bool:
    """Whether the host can look at a value without waiting for a device or breaking a graph."""
    return e.device.type == "cpu" and not torch.compiler.is_compiling()


def polar_factor(y: Point) -> tuple[Point, Tensor]:
    """The nearest orthonormal matrix of any y of full rank, and the singular values (…, p), which carry no gradient."""
    factor, sigma = _PolarFactor.apply(y)  # type: ignore[no-untyped-call]
    return factor, sigma


class _PolarFactor(torch.autograd.Function):
    """The polar factor by SVD, with a backward pass that divides by sums of singular values, never differences."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        left, sigma, right = torch.linalg.svd(y, full_matrices=False)
        ctx.save_for_backward(left, sigma, right)
        ctx.mark_non_differentiable(sigma)
        return left @ right, sigma

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor, _: Tensor) -> Tensor:
        left, sigma, right = ctx.saved_tensors
        turned = weight @ right.mT
        spin = 2 * skew(left.mT @ turned) / (sigma.unsqueeze(-1) + sigma.unsqueeze(-2))
        gradient: Tensor = (left @ spin + project_out(turned, left) / sigma.unsqueeze(-2)) @ right
        return gradient


def signed_qr(y: Point) -> Point:
    """The orthonormal factor of ``y = q r`` with a positive diagonal of r: unique, and continuous in y. O(n p²)."""
    q, r = torch.linalg.qr(y)
    flipped = r.diagonal(dim1=-2, dim2=-1) < 0
    signed: Tensor = q * (1 - 2 * flipped.to(q.dtype)).unsqueeze(-2)
    return signed


def identity_like(a: Square) -> Square:
    """The identity, of the batch shape, dtype and device of a."""
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)


def matrix_exp(a: Square) -> Square:
    """``exp(a)``. `torch.matrix_exp`, kept off its path for single matrices.

    That path (torch 2.13, CPU, float64) errs by 1e-11 where the norm is between 0.02 and 0.05; batches do not.
    """
    single = a.shape[:-2].numel() == 1
    power: Square = torch.matrix_exp(torch.stack([a, torch.zeros_like(a)]))[0] if single else torch.matrix_exp(a)
    return power


def solve_sylvester(a: Square, b: Square, c: Square) -> Square:
    """``x`` with ``a x + x b = c``, for a and b with all eigenvalues in the right half-plane.

    The off-diagonal block of the sign of [[a, c], [0, −b]], by Newton's iteration: inverses of p × p matrices
    only, so it batches and differentiates. The scaling equalises norms and leaves the limit alone.

    Source: roberts1980linear; higham2008functions, sections 2.4 and 5.5. O(p³) a pass.
    """
    for _ in range(SIGN_STEPS):
        a_inverse, b_inverse = torch.linalg.inv(a), torch.linalg.inv(b)
        size = torch.linalg.matrix_norm(a.detach(), keepdim=True) * torch.linalg.matrix_norm(b.detach(), keepdim=True)
        size_of_inverses = torch.linalg.matrix_norm(a_inverse.detach(), keepdim=True) * torch.linalg.matrix_norm(
            b_inverse.detach(), keepdim=True
        )
        grow = (size_of_inverses / size) ** 0.25
        c = (grow * c + a_inverse @ c @ b_inverse / grow) / 2
        a, b = (grow * a + a_inverse / grow) / 2, (grow * b + b_inverse / grow) / 2
    return c / 2


def log_orthogonal(v: Square) -> Square:
    """The skew-symmetric principal logarithm of an orthogonal v without the eigenvalue −1.

    Square roots until all angles are below π/16, then ``2 atanh((v − I)(v + I)⁻¹)`` by its series. The square
    root of an orthogonal v is the orthogonal factor of I + v, which Newton's iteration finds: inverses only.

    Source: higham2008functions, sections 8.3 (polar factor), 11.5 (inverse scaling and squaring). O(p³).
    """
    eye = identity_like(v)
    for _ in range(LOG_ROOTS):
        root = eye + v
        for _ in range(POLAR_STEPS):
            inverse = torch.linalg.inv(root).mT
            grow = torch.linalg.matrix_norm(inverse.detach(), keepdim=True)
            grow = (grow / torch.linalg.matrix_norm(root.detach(), keepdim=True)).sqrt()
            root = (grow * root + inverse / grow) / 2
        v = root
    z = torch.linalg.solve(v + eye, v - eye)
    square, term, total = z @ z, z, z
    for odd in range(3, 2 * LOG_TERMS + 1, 2):
        term = term @ square
        total = total + term / odd
    return skew(2 ** (LOG_ROOTS + 1) * total)
