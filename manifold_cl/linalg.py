"""Batched kernels for tall matrices and the small square matrices of their products.

Functions work on the last two dimensions, out of place, without n × n matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
"""Newton-Schulz steps when the bound cannot be read; sufficient up to ``|e|_F`` ≈ 6e4."""
LARGE = 16.0
"""``|yᵀy − I|_F`` above which a factor is corrected once more: rounding of the Gram matrix, about 3e-8 times that in
float32, grows with the square of a step."""
NEAR = 0.5
"""``|yᵀy − I|_F`` up to which Newton-Schulz, scaled for eigenvalues above 1, also converges for those below 1."""
BLOCK = {"cpu": 128, "cuda": 512}
"""Rows whose products are added one after the other in a Gram matrix that is summed in blocks, by device type."""
FEW_COLUMNS = 8
"""Columns up to which torch.bmm on a CPU uses its own loop instead of the BLAS, which sums in blocks itself."""
FAR = 256.0
"""``|yᵀy − I|_F`` above which a factor is computed in float64, by Cholesky factors of the Gram matrix."""
SIGN_STEPS = 16
"""Scaled Newton steps to the sign of a matrix: 10 suffice for a condition of 1e8, more near imaginary eigenvalues."""
LOG_ROOTS = 4
"""Square roots before the series of a logarithm: angles below π shrink below π/16."""
POLAR_STEPS = 10
"""Scaled Newton steps to an orthogonal factor: 9 suffice up to a condition of 1e16 (higham2008functions, chapter 8)."""
LOG_TERMS = 8
"""Terms of atanh(z) at |z| ≤ tan(π/32) = 0.0985: the first omitted one is 0.0985¹⁷/17 = 5e-19."""

MATMULS = [
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(getattr(backend, "matmul", None), "fp32_precision")
]
"""The settings of torch 2.9 and later for the precision of float32 products; empty before. Once one of them is set, as
transformers does, the older global setting cannot be read."""
EXACT = ("ieee", "none")
"""Values of these settings that mean float32; "none" is the default."""


@contextmanager
def full_precision(device: torch.device | str = "cpu") -> Iterator[None]:
    """Disables TF32, bfloat16 and autocast for float32 products on ``device``.

    TF32 costs a point three digits of orthonormality (docs/geometry.md, "Precision and drift"), autocast costs five.
    """
    if torch.compiler.is_compiling():  # a change of settings would break the graph
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
    """The value that restores the setting: "none" if it follows the setting of all backends."""
    matmul.fp32_precision = "none"
    return "none" if matmul.fp32_precision == read else read


def sym(a: Square) -> Square:
    """``(a + aᵀ) / 2``."""
    return (a + a.mT) / 2


def skew(a: Square) -> Square:
    """``(a − aᵀ) / 2``."""
    return (a - a.mT) / 2


def gram(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Square:
    """``aᵀ b`` for batches of tall matrices. O(n p²).

    On a CPU, torch sums batches of few columns row by row, with an error of about ``√n 6e-8``: 2e-6 for 4096 rows. On
    a GPU, one block of threads walks all rows of a product of any width, while most of the chip rests. Both are
    therefore summed in blocks of rows.
    """
    n, p = a.shape[-2:]
    kind = a.device.type
    block = BLOCK.get(kind, n)
    if a.ndim == 2 or n <= block or (kind == "cpu" and p > FEW_COLUMNS):
        return torch.matmul(a.mT, b, out=out)
    rest = n % block
    left, right = (x[..., : n - rest, :].reshape(*x.shape[:-2], -1, block, x.shape[-1]) for x in (a, b))
    total = torch.sum(left.mT @ right, dim=-3, out=out)
    return total.add_(a[..., n - rest :, :].mT @ b[..., n - rest :, :]) if rest else total


def gram_error(x: Point) -> Square:
    """``xᵀx − I``: zero exactly when the columns are orthonormal. O(n p²)."""
    return gram(x, x) - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def minus_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x − a b``, the same to the last bit, with one large temporary instead of two."""
    return (a @ -b).add_(x)


def project_out(x: Point, basis: Basis) -> Point:
    """``x − F(Fᵀx)``, the part of x orthogonal to the orthonormal columns F. O(n k p); zero columns change nothing."""
    return minus_product(x, basis, basis.mT @ x)


def split_tangent(x: Point, u: Tangent) -> tuple[Square, Tangent]:
    """``(A, B)`` with ``u = x A + B``: a skew A = xᵀu inside span(x), and the part B outside. O(n p²)."""
    a = skew(x.mT @ u)
    return a, u - x @ a


def newton_schulz_steps(bound: float, eps: float) -> int:
    """Steps after which Newton-Schulz on eigenvalues in [1, 1 + bound], centred, errs by less than ``eps``.

    The error obeys e ← e²(3 + e)/4 from e = b/(2 + b), the exact scalar recursion.
    """
    error, steps = bound / (2 + bound), 0
    while error > eps and steps < 200:  # a NaN bound ends the loop at once, and the NaN propagates
        error = error * error * (3 + error) / 4
        steps += 1
    return steps


def inverse_sqrt_deficit(e: Square, *, steps: int | None = None) -> Square:
    """``D`` with ``(I + e)^(-1/2) = I − D``, for symmetric e with eigenvalues at least 0 (up to rounding).

    A coupled Newton-Schulz iteration on the *difference* from the identity, scaled to the interval [1, 1 + |e|_F] of
    the spectrum (docs/geometry.md, "Retractions"). Differentiable at equal eigenvalues. O(p³) per step, 1 to 5 steps
    for |e| below 1. ``steps`` fixes their number, and |e| is then not read.

    Source: higham2008functions, section 6.3.
    """
    eye = torch.eye(e.shape[-1], dtype=e.dtype, device=e.device)
    half = torch.linalg.matrix_norm(e.detach(), keepdim=True) / 2  # a scale, constant for autograd
    if steps is None:
        size = read_largest(2 * half)
        steps = COMPILED_STEPS if size is None else newton_schulz_steps(size, torch.finfo(e.dtype).eps)
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


def polar_near(y: Point, *, far: float = FAR) -> Point:
    """``y(yᵀy)^(-1/2)``, the nearest orthonormal matrix, for yᵀy with eigenvalues in [1, ∞) up to rounding.

    Examples are ``y = x + u`` with u tangent at x, and a point with a small drift, which the true Gram matrix corrects.
    `polar_far` is used where ``|yᵀy − I|_F`` exceeds ``far``: `NEAR` if eigenvalues may be well below 1.
    O(n p²) + O(p³).
    """
    e = gram_error(y)
    size = gram_size(e)
    if not size <= far:
        return polar_far(y)
    q = minus_product(y, y, inverse_sqrt_deficit(e))
    return minus_product(q, q, small_deficit(gram_error(q))) if size > LARGE else q


def gram_size(e: Square) -> float:
    """The largest ``|e|_F`` of a batch; infinite if it cannot be read, which selects the most robust form."""
    size = read_largest(torch.linalg.matrix_norm(e.detach()))
    return math.inf if size is None else size


def polar_far(y: Point, *, total: Callable[[Tensor], Tensor] = lambda part: part) -> Point:
    """The nearest orthonormal matrix of any y with a condition below 1e7, without reading a value. In float64.

    ``y = q r`` by Cholesky factors, then the polar factor of the small r by scaled Newton steps
    (higham2008functions, chapter 8). Differentiable at equal singular values. NaN for a y of lower rank.
    ``total`` sums a p × p block over the ranks that hold rows of y.
    """
    q, r = cholesky_qr(y.double(), total=total)
    return (q @ newton_polar(r)).to(y.dtype)


def cholesky_qr(y: Point, *, total: Callable[[Tensor], Tensor] = lambda part: part) -> tuple[Point, Square]:
    """``y = q r`` with orthonormal q and upper triangular r of positive diagonal, by the Gram matrix, twice.

    The first pass costs the square of the condition, which the second restores (yamamoto2015roundoff). O(n p²).
    """
    q, first = normalise_by_cholesky(y, total(y.mT @ y))
    q, second = normalise_by_cholesky(q, total(q.mT @ q))
    return q, second @ first


def normalise_by_cholesky(y: Point, gram: Square) -> tuple[Point, Square]:
    """``(y r⁻¹, r)`` with ``rᵀr`` the Gram matrix of y. NaN where that is not positive definite."""
    # Without the check, which would wait for an accelerator; a failure gives NaN.
    lower, failed = torch.linalg.cholesky_ex(gram)
    lower = torch.where(failed[..., None, None] > 0, torch.nan, lower)
    q: Point = torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False)
    return q, lower.mT


def newton_polar(a: Square) -> Square:
    """The orthogonal polar factor of a, by Newton's iteration, scaled to equal norms. O(p³) per pass.

    Differentiable at equal singular values. Source: higham2008functions, section 8.3.
    """
    for _ in range(POLAR_STEPS):
        inverse = torch.linalg.inv_ex(a)[0].mT  # without the check, which would wait for an accelerator
        grow = (torch.linalg.matrix_norm(inverse.detach(), keepdim=True)).sqrt()
        grow = grow / torch.linalg.matrix_norm(a.detach(), keepdim=True).sqrt()
        a = (grow * a + inverse / grow) / 2
    return a


def small_deficit(e: Square) -> Square:
    """``D`` with ``(I + e)^(-1/2) ≈ I − D``, two terms of the series: off by a third of |e|³."""
    return e / 2 - 3 / 8 * (e @ e)


def read_largest(sizes: Tensor) -> float | None:
    """The largest size, 0 for no sizes, NaN if one is NaN; None if the host cannot read values.

    Values cannot be read while a graph is traced or captured, inside `torch.func.vmap`, and on the meta device.
    """
    if torch.compiler.is_compiling() or sizes.device.type == "meta" or is_capturing() or _is_batched(sizes):
        return None
    return float(sizes.max()) if sizes.numel() else 0.0


def is_finite(a: Tensor) -> bool:
    """Whether no entry is NaN or infinite; of a sharded tensor, no entry of this rank.

    A finite sum proves it, in a tenth of the time that a mask of the entries takes on a CPU. Finite entries may
    overflow their sum, which the mask then decides.
    """
    a = a.detach()
    a = a.to_local() if hasattr(a, "to_local") else a
    return bool(a.sum().isfinite()) or bool(a.isfinite().all())


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, so that the host cannot read values."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # cheaper than is_available
    return begun and torch.cuda.is_current_stream_capturing()


def _is_batched(a: Tensor) -> bool:
    """Whether `torch.func.vmap` hides a dimension of a, also under other transforms."""
    functorch = torch._C._functorch  # there is no public function
    while functorch.is_functorch_wrapped_tensor(a):
        if functorch.is_batchedtensor(a):
            return True
        a = functorch.get_unwrapped(a)
    return False


def polar_factor(y: Point) -> tuple[Point, Tensor]:
    """The nearest orthonormal matrix of any y of full rank, and the singular values (…, p), which carry no gradient.

    NaN for a member of the batch that is not finite.
    """
    factor, sigma = _PolarFactor.apply(y)  # type: ignore[no-untyped-call]
    return factor, sigma


class _PolarFactor(torch.autograd.Function):
    """The polar factor by SVD; its derivatives divide by sums of singular values, never by differences."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> tuple[Tensor, Tensor]:
        broken = ~y.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
        left, sigma, right = torch.linalg.svd(y.masked_fill(broken, 0), full_matrices=False)  # raises for NaN
        return (left @ right).masked_fill(broken, torch.nan), sigma.masked_fill(broken[..., 0], torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])
        ctx.save_for_forward(*inputs, output[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, weight: Tensor, _: Tensor) -> Tensor:
        y, factor = ctx.saved_tensors
        return _polar_derivative(y, factor, weight)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        y, factor = ctx.saved_tensors
        return _polar_derivative(y, factor, tangent), None


def _polar_derivative(y: Point, q: Point, v: Tensor) -> Tensor:
    """The derivative in direction v of the polar factor q of y, a linear map that equals its own transpose."""
    sigma, right = torch.linalg.eigh(sym(q.mT @ y))
    left, turned = q @ right, v @ right
    spin = 2 * skew(left.mT @ turned) / (sigma.unsqueeze(-1) + sigma.unsqueeze(-2))
    derivative: Tensor = (left @ spin + project_out(turned, left) / sigma.unsqueeze(-2)) @ right.mT
    return derivative


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
    """``exp(a)`` by `torch.matrix_exp`, as a batch of two for a single matrix.

    For single matrices torch 2.13 (CPU, float64) has errors of 1e-11 at norms between 0.02 and 0.05.
    """
    single = a.shape[:-2].numel() == 1
    power: Square = torch.matrix_exp(torch.stack([a, torch.zeros_like(a)]))[0] if single else torch.matrix_exp(a)
    return power


def solve_sylvester(a: Square, b: Square, c: Square) -> Square:
    """``x`` with ``a x + x b = c``, for a and b with all eigenvalues in the right half-plane.

    The off-diagonal block of the sign of [[a, c], [0, −b]], by Newton's iteration with inverses of p × p matrices. The
    scaling equalises norms and does not change the limit. O(p³) per pass.

    Source: roberts1980linear; higham2008functions, sections 2.4 and 5.5.
    """
    for _ in range(SIGN_STEPS):
        a_inverse, b_inverse = torch.linalg.inv(a), torch.linalg.inv(b)
        parts = (a_inverse, b_inverse, a, b)
        sizes = [torch.linalg.matrix_norm(part.detach(), keepdim=True) for part in parts]
        grow = (sizes[0] * sizes[1] / (sizes[2] * sizes[3])) ** 0.25
        c = (grow * c + a_inverse @ c @ b_inverse / grow) / 2
        a, b = (grow * a + a_inverse / grow) / 2, (grow * b + b_inverse / grow) / 2
    return c / 2


def log_orthogonal(v: Square) -> Square:
    """The skew-symmetric principal logarithm of an orthogonal v without the eigenvalue −1.

    Square roots until all angles are below π/16, then ``2 atanh((v − I)(v + I)⁻¹)`` by its series. The square
    root of an orthogonal v is the orthogonal factor of I + v, by Newton's iteration.

    Source: higham2008functions, sections 8.3 (polar factor), 11.5 (inverse scaling and squaring). O(p³).
    """
    eye = identity_like(v)
    for _ in range(LOG_ROOTS):
        v = newton_polar(eye + v)
    z = torch.linalg.solve(v + eye, v - eye)
    square, term, total = z @ z, z, z
    for odd in range(3, 2 * LOG_TERMS + 1, 2):
        term = term @ square
        total = total + term / odd
    return skew(2 ** (LOG_ROOTS + 1) * total)
