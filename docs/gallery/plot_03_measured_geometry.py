r"""
The geometry, measured
======================

For readers of :doc:`/geometry`, which this page needs. It measures what that page
states in formulas: the order of every registered retraction, the leak when the wrong
quantity is projected, and the number of Newton-Schulz steps that a tangent step needs.
"""

# %%
# Order is a slope
# ----------------
# A retraction turns a point and a tangent step into the next point on the manifold. The
# geodesic, the straightest curve, does it exactly and costs more. A retraction of order
# :math:`q` differs from it by :math:`t^{q+1}`, up to a factor. In a log-log plot that
# exponent is the slope. The legend has the measured slope and the declared order. Some
# retractions agree so well that their lines cover each other.

import math

import matplotlib.pyplot as plt
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel, check_retraction
from manifold_cl.geometry import check_projection

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^vD"
plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "legend.frameon": False,
    }
)

draw = torch.Generator().manual_seed(0)
basis = torch.randn(20, 5, dtype=torch.float64, generator=draw)
manifold = RestrictedStiefel(basis)
x = manifold.random(20, 4, generator=draw).as_subclass(torch.Tensor)
u = manifold.proju(x, torch.randn(20, 4, dtype=torch.float64, generator=draw))
u /= u.norm()

lengths = torch.logspace(-2.5, 0, 20, dtype=torch.float64)
figure, axes = plt.subplots(figsize=(6.5, 5.2), layout="constrained")
for index, (name, rule) in enumerate(sorted(RETRACTIONS.items())):
    moved = RestrictedStiefel(basis, retraction=rule)
    errors = [
        float((moved.retr(x, t * u) - moved.expmap(x, t * u)).norm()) for t in lengths
    ]
    report = check_retraction(rule)
    declared = rule.order["euclidean"]
    if math.isinf(declared):  # the geodesic itself
        continue
    label = f"{name}: slope {report.geodesic_slope:.2f}, order {declared}"
    axes.loglog(
        lengths,
        errors,
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        markerfacecolor="none",
        color=COLOURS[index % len(COLOURS)],
        label=label,
    )
axes.set(
    title="Distance to the geodesic (Euclidean metric)",
    xlabel="length t of the step",
    ylabel="|R(x, tu) − exp(x, tu)|",
)
figure.legend(loc="outside lower center", ncols=2, fontsize="small")
plt.show()

# %%
# The projections obey their laws to rounding: idempotent, self-adjoint, tangent, dual
# to the differential.

print(check_projection(manifold, 20, 4))

# %%
# Project the sum, not the direction
# ----------------------------------
# :math:`P = I - FF^\top` can be applied to the direction :math:`u`, or to the sum
# :math:`x + u`. The cost is the same. In the first case, what has leaked into :math:`F`
# by rounding stays there and may grow. In the second case it is removed. The figure
# shows 6000 steps of float32 gradient descent towards a random matrix with each.

target = torch.randn(20, 10, generator=draw)
single = RestrictedStiefel(basis.float())
begin = single.random(20, 10, generator=draw).as_subclass(torch.Tensor)


def polar(y):
    left, _, right = torch.linalg.svd(y, full_matrices=False)
    return left @ right


def descend(step):
    point, leaks = begin.clone(), []
    for _ in range(6000):
        gradient = single.egrad2rgrad(point, point - target)
        point = step(point, -0.02 * gradient)
        leaks.append(single.constraint_error(point).protection)
    return leaks


direction_only = descend(
    lambda point, step: polar(point + step)
)  # the gradient is projected, the sum is not
projected_sum = descend(single.retr)
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
axes.semilogy(direction_only, color="#D55E00", label="P applied to the direction")
axes.semilogy(
    projected_sum, color="#0072B2", label="P applied to the sum (RestrictedStiefel)"
)
axes.set(
    title="Leak into the protected subspace, float32",
    xlabel="step",
    ylabel=r"max$|F^\top x|$",
)
axes.legend()
plt.show()

# %%
# A spectrum known in advance
# ---------------------------
# For tangent :math:`u` the Gram matrix of :math:`x + u` is :math:`I + u^\top u`, with
# eigenvalues in :math:`[1, 1 + \|u\|^2]`. An iteration for its inverse square root that
# is scaled to that interval needs few steps. The usual scaling by the Frobenius norm
# does not use the interval and needs more.

from manifold_cl.linalg import newton_schulz_steps


def steps_from_frobenius(length, p, eps):
    """Cubic Newton-Schulz on singular values in [1, sqrt(1 + length²)]."""
    sigma, count = 1 / (p + length**2) ** 0.5, 0
    while abs(1 - sigma**2) > eps:
        sigma, count = sigma * (3 - sigma**2) / 2, count + 1
    return count


eps = torch.finfo(torch.float32).eps
lengths = torch.logspace(-2, 1, 40).tolist()
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
axes.semilogx(
    lengths,
    [newton_schulz_steps(t**2, eps) for t in lengths],
    color="#0072B2",
    label="known interval",
)
for p, dashes in ((16, "--"), (256, ":")):
    counts = [steps_from_frobenius(t, p, eps) for t in lengths]
    axes.semilogx(
        lengths, counts, dashes, color="#D55E00", label=f"Frobenius scaling, p = {p}"
    )
axes.set(
    title="Newton-Schulz steps to float32 accuracy",
    xlabel="length of the tangent step",
    ylabel="steps",
    ylim=(0, None),
)
axes.legend()
plt.show()

# %%
# Next: verify a retraction of your own, in :doc:`plot_05_your_retraction`.
