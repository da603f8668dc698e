r"""
A step of your own
==================

For readers who study optimization on manifolds; some geometry (tangent vectors) is
needed. A new step in fifteen lines, measured beside registered ones on problems whose
optimum is known, and a mistake that the lab finds.
"""

# %%
# The step
# --------
# Barzilai and Borwein choose the length of a gradient step from the last change of the
# point and of the gradient. With :math:`s` and :math:`y` the two changes, it is
# :math:`\langle s, s\rangle / |\langle s, y\rangle|`.
#
# The lab takes a function of ``(x, gradient, rate, manifold)`` that returns the next
# point. The gradient is the Euclidean one. A class is instantiated once per run, so it
# can keep what it needs. Here ``rate`` is the length of the first step, and a tenth of
# the longest one.

import matplotlib.pyplot as plt
import torch

from manifold_cl.lab import Budget, run_suite
from manifold_cl.lab.figures import plot_curves, plot_profiles


class BarzilaiBorwein:
    def __init__(self):
        self.last = None

    def __call__(self, x, gradient, rate, manifold):
        g = manifold.egrad2rgrad(x, gradient)
        length = rate
        if self.last is not None:
            s, y = x - self.last[0], g - self.last[1]
            length = float(s.square().sum() / (s * y).sum().abs())
        self.last = x, g
        return manifold.retr(x, -min(length, 10 * rate) * g)


# %%
# A mistake
# ---------
# The same without the manifold: a QR factorisation keeps the columns orthonormal, but
# nothing keeps the point off the protected directions :math:`F`.


def forgetful(x, gradient, rate, manifold):
    return torch.linalg.qr(x - rate * gradient)[0]


# %%
# In the suite
# ------------
# Every contestant gets the same search for its rate on each problem, from one start,
# and is measured from others. A short suite takes seconds. On the command line the full
# one is ``manifold-cl lab --plugin my_step.py:BarzilaiBorwein``.

report = run_suite(
    [BarzilaiBorwein, forgetful],
    problems=["pca", "procrustes", "nearest"],
    only=["adamw", "momentum", "muon_exact", "pogo", "trust_regions"],
    budget=Budget(evaluations=120),
)
for name, reason in report.excluded.items():
    print(f"excluded: {name} {reason}")

# %%
# The forgetful step is named with its leak, and cannot win.
#
# Performance profiles
# --------------------
# The height of a line at 2 is the share of instances (a problem and a start) on which
# the contestant needed at most twice as much as the best one.

plot_profiles(report)
plt.show()

for unit in ("evaluations", "seconds"):
    print(f"{unit:12s}", ", ".join(report.ranking(unit)))

# %%
# A line that ends below 100 % failed on some instance. The search is short and has one
# start, so a rate that fits there may not fit from another start.
#
# Gap and distance
# ----------------
# The gap is relative to the start: :math:`(f(x) - f^*) / (f(x_0) - f^*)`. POGO leaves
# the manifold by design; its gap is that of the nearest point.

plot_curves(report)
plt.show()
