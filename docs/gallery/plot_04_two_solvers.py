r"""
One problem, two toolboxes
==========================

For users of geoopt or pymanopt; the geometry of :doc:`plot_02_the_manifold` is needed.
The same restricted problem is solved with geoopt's first-order optimizers and with
pymanopt's second-order trust regions. Both use the same definition of the manifold. The
derivatives are verified first.
"""

# %%
# The problem
# -----------
# Brockett's cost orders eigenvectors:
#
# .. math::
#
#    f(x) = \operatorname{tr}(x^\top C\, x\, N), \quad N = \operatorname{diag}(3, 2, 1).
#
# Its minimum over orthonormal :math:`x` has the eigenvectors of the smallest
# eigenvalues as columns, the smallest first. Here the two smallest directions are
# protected, so the answer is known: numbers three, four and five.

# sphinx_gallery_thumbnail_number = 2
import geoopt
import matplotlib.pyplot as plt
import torch

from manifold_cl import RestrictedStiefel, RiemannianAdamW
from manifold_cl.geometry import check_gradient, check_hessian
from manifold_cl.geometry.figures import plot_report

plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
)

n, p = 60, 3
draw = torch.Generator().manual_seed(0)
eigenvalues = torch.linspace(1, 10, n, dtype=torch.float64)
random = torch.randn(n, n, dtype=torch.float64, generator=draw)
vectors = torch.linalg.qr(random).Q
C = (vectors * eigenvalues) @ vectors.T
N = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
F = vectors[:, :2]
best = float((N * eigenvalues[2:5]).sum())


def brockett(x):
    return ((C.to(x.dtype) @ x) * x * N.to(x.dtype)).sum()


# %%
# Verify the derivatives
# ----------------------
# A gradient and a Hessian are claims about Taylor expansions, which can be measured:
# the error of the linear model must fall like :math:`t^2`, that of the quadratic model
# along geodesics like :math:`t^3`.

for metric in ("euclidean", "canonical"):
    manifold = RestrictedStiefel(F, metric=metric)
    print(check_gradient(manifold, brockett, size=(n, p)))
    print(check_hessian(manifold, brockett, size=(n, p)))

# %%
# The Euclidean Hessian alone, projected onto the tangent space, is plausible and wrong.
# It lacks the curvature of the manifold, and the slope shows it.

manifold = RestrictedStiefel(F)


def projected_only(x, u):
    return manifold.proju(x, 2 * C @ u * N)


wrong = check_hessian(manifold, brockett, size=(n, p), hessian=projected_only)
print(wrong)

figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
plot_report(check_hessian(manifold, brockett, size=(n, p)), axes)
plot_report(wrong, axes)
axes.lines[1].set_color("#D55E00")
axes.legend(axes.lines, ["Riemannian Hessian", "projected Euclidean Hessian"])
axes.set_title("Error of the quadratic model along a geodesic", color="black")
plt.show()

# %%
# geoopt: first order
# -------------------
# An ordinary loop over one parameter, with two optimizers: geoopt's own, and torch's
# AdamW made Riemannian. The rates suit this problem; for adapters see :doc:`/choosing`.

STEPS = 250
start = manifold.random(n, p, generator=draw)


def descend(make):
    point = geoopt.ManifoldParameter(start.detach().clone(), manifold=manifold)
    optimizer = make([point])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    gaps = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = brockett(point)
        loss.backward()
        optimizer.step()
        schedule.step()
        gaps.append(float(loss.detach()) - best)
    print("errors {:.0e} {:.0e}".format(*manifold.constraint_error(point)))
    return gaps


gaps = {
    "geoopt: RiemannianAdam": descend(lambda ps: geoopt.optim.RiemannianAdam(ps, 1.0)),
    "torch: RiemannianAdamW": descend(
        lambda ps: RiemannianAdamW(ps, lr=0.05, weight_decay=0.0)
    ),
}

# %%
# pymanopt: second order
# ----------------------
# The pymanopt version of the manifold takes numpy arrays and uses the same numerics.
# Gradient and Hessian of the cost are given in Euclidean form; the manifold converts
# them, in either metric.

import pymanopt
from pymanopt.optimizers import ConjugateGradient, TrustRegions

from manifold_cl.geometry.pymanopt import RestrictedStiefel as NumpyRestrictedStiefel

matrix, weights = C.numpy(), N.numpy()


def solve(optimizer, metric):
    space = NumpyRestrictedStiefel(F, p, metric=metric)

    costs = []

    @pymanopt.function.numpy(space)
    def cost(x):
        value = float(((matrix @ x) * x * weights).sum())
        costs.append(min([value, *costs[-1:]]))  # the best so far
        return value

    @pymanopt.function.numpy(space)
    def gradient(x):
        return 2 * matrix @ x * weights

    @pymanopt.function.numpy(space)
    def hessian(x, u):
        return 2 * matrix @ u * weights

    problem = pymanopt.Problem(
        space, cost, euclidean_gradient=gradient, euclidean_hessian=hessian
    )
    optimizer.run(problem, initial_point=start.detach().numpy().copy())
    return [value - best for value in costs]


for metric in ("euclidean", "canonical"):
    gaps[f"pymanopt: trust regions, {metric}"] = solve(
        TrustRegions(verbosity=0, min_gradient_norm=1e-9), metric
    )
gaps["pymanopt: conjugate gradients"] = solve(
    ConjugateGradient(verbosity=0, max_iterations=STEPS), "euclidean"
)

# %%
# Side by side
# ------------
# pymanopt's solvers find the answer to rounding. The first-order loops are within 0.01
# of it after 250 steps. Trust regions converge quadratically: they need few evaluations
# of the cost, and several products with the Hessian per evaluation. First-order steps
# are cheaper, and the noise of mini-batch gradients does them little harm. Training
# therefore uses them.

figure, axes = plt.subplots(figsize=(6.5, 4.8), layout="constrained")
colours = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73")
for (name, gap), colour in zip(gaps.items(), colours, strict=True):
    floor = [max(value, 1e-13) for value in gap]
    axes.semilogy(range(1, len(floor) + 1), floor, color=colour, label=name)
axes.set(
    xscale="log",
    title="Brockett's cost, two directions protected",
    xlabel="evaluations of the cost",
    ylabel="distance to the known minimum",
)
figure.legend(loc="outside lower center", ncols=2, fontsize="small")
plt.show()
for name, gap in gaps.items():
    print(f"{name}: {len(gap)} evaluations, {gap[-1]:.0e} above the minimum")
