r"""
A retraction of your own
========================

For readers who study optimization on manifolds; geodesics and tangent vectors are
needed. A new retraction (a rule that turns a point and a tangent step into the next
point) in under twenty lines: its verification, its tests in a repository of your own,
and its comparison with the registered retractions.
"""

# %%
# The idea
# --------
# With :math:`A = x^\top u` and :math:`B = u - xA`, the geodesic of the canonical metric
# starts with
#
# .. math::
#
#    x + u + \tfrac12 \bigl( x (A^2 - B^\top B) + B A \bigr) + O(\|u\|^3) .
#
# So take this polynomial and bring it back onto the manifold by QR. It should be second
# order for the canonical metric, like Cayley's, but without a linear system. Formulas
# of this kind are easy to write down and easy to get wrong.

# sphinx_gallery_thumbnail_number = 2
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import torch

from manifold_cl import RestrictedStiefel, RiemannianSGD, check_retraction
from manifold_cl.geometry.figures import plot_report
from manifold_cl.linalg import signed_qr, split_tangent

plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
)


@dataclass(frozen=True)
class Taylor:
    """The orthonormal factor of the geodesic's second-order Taylor polynomial."""

    name: str = "taylor"
    order: dict = field(
        default_factory=lambda: {"euclidean": 1, "canonical": 2}, hash=False
    )
    self_correcting: bool = True
    tangent_only: bool = False

    def __call__(self, x, u):
        a, b = split_tangent(x, u)
        return signed_qr(x + u + (x @ (a @ a - b.mT @ b) + b @ a) / 2)


# %%
# It does not use the protected subspace. The result is :math:`x` and :math:`u` times
# small matrices, so it is orthogonal to whatever they are orthogonal to.
#
# Verification
# ------------

report = check_retraction(Taylor(), "canonical")
print(report)
plot_report(report)
plt.show()

# %%
# The slope to the geodesic is three: second order, as declared for the canonical
# metric. For the Euclidean metric it is first order, as declared too.

print(check_retraction(Taylor(), "euclidean").geodesic_slope)

# %%
# The same formula with a mistake, a lost factor of one half. The result is orthonormal,
# avoids the protected directions, and is a retraction. Only the order is wrong.


@dataclass(frozen=True)
class Slip(Taylor):
    name: str = "slip"

    def __call__(self, x, u):
        a, b = split_tangent(x, u)
        return signed_qr(x + u + x @ (a @ a - b.mT @ b) / 2 + b @ a)


for failure in check_retraction(Slip(), "canonical").failures():
    print(failure)

# %%
# In a test suite
# ---------------
# In a repository of your own, three lines turn this verification into tests. They cover
# every declared metric and several sizes, square points and single columns among them::
#
#    from manifold_cl.geometry.testing import RetractionContract
#
#    class TestTaylor(RetractionContract):
#        retraction = Taylor()
#
# In use
# ------
# The manifold, and everything built on it, accepts the object in place of a name.

draw = torch.Generator().manual_seed(0)
protected = torch.randn(64, 12, generator=draw)
manifold = RestrictedStiefel(protected, retraction=Taylor(), metric="canonical")
target = manifold.random(64, 4, generator=draw)
point = torch.nn.Parameter(manifold.random(64, 4, generator=draw).detach().clone())
optimizer = RiemannianSGD(
    [{"params": [point], "manifolds": [manifold]}], lr=0.1, momentum=0.9
)
for _ in range(100):
    optimizer.zero_grad()
    loss = (point - target).square().sum()
    loss.backward()
    optimizer.step()
print(f"loss {float(loss.detach()):.1e}, errors", manifold.constraint_error(point))

# %%
# In the lab
# ----------
# `measure_retractions` compares it with the registered retractions. On the command line
# that is ::
#
#    manifold-cl retractions --plugin my_module:Taylor --plot lab.png
#
# with larger points than here.

from manifold_cl import RETRACTIONS
from manifold_cl.geometry.figures import plot_lab
from manifold_cl.geometry.lab import measure_retractions

lab = measure_retractions(
    [Taylor(), *sorted(RETRACTIONS)],
    shape=(1024, 16),
    complement=64,
    batch=16,
    steps=300,
)
plot_lab(lab)
plt.show()
for row in lab.rows:
    orders = ", ".join(f"{order:.2f}" for order in row.measured.values())
    print(f"{row.name:>22}  {row.forward_ms:6.1f} ms  orders C, E: {orders}")

# %%
# Packages can offer retractions by an entry point. The name is then accepted wherever
# the name of a retraction is::
#
#    [project.entry-points."manifold_cl.retractions"]
#    taylor = "my_module:Taylor"
