r"""
The manifold
============

For readers who ask what :doc:`plot_01_two_tasks` does at every step. Geometry is
explained as it occurs; to train, it is not needed. A point with two constraints, steps
that keep them, and optimizers built from such steps. The page runs on one CPU core in a
few seconds and downloads nothing.
"""

# %%
# A point with two constraints
# ----------------------------
# A *frame* is a matrix whose columns have length one and are orthogonal to each other.
# The *protected directions* are the columns of a matrix :math:`F`: the input directions
# of earlier tasks, which an update must pass unchanged. The frames that are orthogonal
# to :math:`F` form a curved set, the restricted Stiefel manifold:
#
# .. math::
#
#    \mathrm{St}(n, p; F)
#    = \{x \in \mathbb{R}^{n \times p} : x^\top x = I, \; F^\top x = 0\}.
#
# Give the manifold the directions to protect and draw a point:

import geoopt
import torch

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD

draw = torch.Generator().manual_seed(0)
# any independent columns: the manifold makes them orthonormal
protected = torch.randn(64, 12, generator=draw)
manifold = RestrictedStiefel(protected)
x = manifold.random(64, 6, generator=draw)
print(manifold)
print("dimension", manifold.dim(64, 6))
print("errors {:.0e} {:.0e}".format(*manifold.constraint_error(x)))

# %%
# The two errors are the largest entries of :math:`x^\top x - I` and of :math:`F^\top
# x`. Both are of the order of one float32 rounding.
#
# A step has two parts. The *tangent* part of a proposed change :math:`u` is the part
# along which the columns stay orthonormal and outside :math:`F`, to first order. The
# *retraction* then turns :math:`x` and this part into the next point, again with both
# conditions. ``retr`` does both:

u = 0.3 * torch.randn(64, 6, generator=draw)
y = manifold.retr(x, u)
print("errors {:.0e} {:.0e}".format(*manifold.constraint_error(y)))

# %%
# Thousands of steps keep them too, because every step corrects the errors of the last
# one (see :doc:`/geometry`).

for _ in range(2000):
    y = manifold.retr(y, 0.1 * torch.randn(64, 6, generator=draw))
print("errors {:.0e} {:.0e}".format(*manifold.constraint_error(y)))

# %%
# A manifold for geoopt, and an optimizer for torch
# -------------------------------------------------
# `RestrictedStiefel` is a geoopt manifold, so geoopt's own optimizers accept it. Ours
# take any torch optimizer and make its step Riemannian. Here is a problem with a known
# answer. The first three principal directions of a covariance are protected, and we
# maximise the variance along three columns. The optimum is the sum of the eigenvalues
# number four to six.

eigenvalues = 1.0 / torch.arange(1, 41, dtype=torch.float64)
random = torch.randn(40, 40, dtype=torch.float64, generator=draw)
axes = torch.linalg.qr(random).Q
covariance = (axes * eigenvalues) @ axes.T
best = float(eigenvalues[3:6].sum())
pca = RestrictedStiefel(axes[:, :3])
start = pca.random(40, 3, generator=draw)

# %%
# The fourth optimizer is what one might write without the library: project the
# *gradient*, then call AdamW. Its element-wise scaling turns a tangent gradient into a
# step that is not tangent.


class GradientOnly(torch.optim.AdamW):
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for point in group["params"]:
                    point.grad = pca.egrad2rgrad(point, point.grad)
        return super().step(closure)


optimizers = {
    "geoopt's RiemannianAdam": lambda ps: geoopt.optim.RiemannianAdam(ps, lr=0.5),
    "our RiemannianAdamW": lambda ps: RiemannianAdamW(ps, lr=0.05, weight_decay=0.0),
    "our RiemannianSGD, momentum": lambda ps: RiemannianSGD(ps, lr=0.3, momentum=0.9),
    "AdamW on a projected gradient": lambda ps: GradientOnly(
        ps, lr=0.05, weight_decay=0.0
    ),
}
STEPS = 300
gaps, errors = {}, {}
for name, make in optimizers.items():
    point = geoopt.ManifoldParameter(start.detach().clone(), manifold=pca)
    optimizer = make([point])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    gaps[name], errors[name] = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        variance = (point * (covariance @ point)).sum()
        (-variance).backward()
        optimizer.step()
        schedule.step()
        gaps[name].append(abs(best - float(variance.detach())))
        errors[name].append(max(pca.constraint_error(point)))

# %%
# The rates suit this problem; for adapters see :doc:`/choosing`. geoopt's Adam keeps
# one second moment per matrix, so its rate is the length of the step. Our rate is the
# change of each entry, which is why the numbers differ. The first three optimizers
# reach the optimum without leaving the manifold. The fourth has an error of 0.3 after a
# few steps and keeps one above 0.1, so its point is no frame. It does not reach the
# optimum.

import matplotlib.pyplot as plt

COLOURS = ("#E69F00", "#0072B2", "#009E73", "#999999")
plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "legend.frameon": False,
    }
)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for (name, gap), colour in zip(gaps.items(), COLOURS, strict=True):
    dashes = "--" if "projected" in name else "-"
    left.semilogy(gap, dashes, color=colour, label=name)
    right.semilogy(errors[name], dashes, color=colour)
left.set(
    title="Distance to the known optimum",
    xlabel="step",
    ylabel="|variance − optimum|",
    ylim=(1e-13, 1e1),
)
right.set(
    title="Distance to the manifold",
    xlabel="step",
    ylabel=r"max$(|x^\top x - I|, |F^\top x|)$",
)
figure.legend(loc="outside lower center", ncols=2)
plt.show()

# %%
# Where to go next
# ----------------
# * Two tasks, one model, and protected subspaces: :doc:`plot_01_two_tasks`.
# * Every word with its letter and a plain sentence: :doc:`/glossary`.
# * Why no retraction depends on :math:`F`, and what a wrong projection does:
#   :doc:`/geometry` and :doc:`plot_03_measured_geometry`.
