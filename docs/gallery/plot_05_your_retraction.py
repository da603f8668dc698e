r"""
A retraction of your own
========================

From a formula on paper to a row in the lab: a new retraction in under twenty lines,
what the verification finds about it, its tests in an outsider's repository, and how it
compares with the family.
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
# It never sees the protected subspace. The result is :math:`x` and :math:`u` times
# small matrices, so it stays wherever they are.
#
# Verified, not believed
# ----------------------

report = check_retraction(Taylor(), "canonical")
print(report)
plot_report(report)
plt.show()

# %%
# The slope to the geodesic is three: second order, as hoped. Crosswise, for the
# Euclidean metric, it is first order, as declared.

print(check_retraction(Taylor(), "euclidean").geodesic_slope)

# %%
# The same with a slip of the pen, a lost factor of one half. The result is orthonormal
# and avoids the protected directions, and it is a retraction. Only the order gives it
# away.


@dataclass(frozen=True)
class Slip(Taylor):
    name: str = "slip"

    def __call__(self, x, u):
        a, b = split_tangent(x, u)
        return signed_qr(x + u + x @ (a @ a - b.mT @ b) / 2 + b @ a)


for said in check_retraction(Slip(), "canonical").failures():
    print(said)

# %%
# In a test suite
# ---------------
# In a repository of your own three lines make all of it a test, for every declared
# metric and a spread of sizes, the square case and a single column among them::
#
#    from manifold_cl.geometry.testing import RetractionContract
#
#    class TestTaylor(RetractionContract):
#        retraction = Taylor()
#
# In use
# ------
# An object is as good as a name, for the manifold and for everything built on it.

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
# How does it compare? `measure_retractions` sets it beside the family. On the command
# line that is ::
#
#    manifold-cl retractions --plugin my_module:Taylor --plot lab.png
#
# with larger points than here, where the page must build quickly.

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
# Packages can offer their retractions to everybody who has them installed. An entry
# point does it, and the name is known wherever a name is taken::
#
#    [project.entry-points."manifold_cl.retractions"]
#    taylor = "my_module:Taylor"
