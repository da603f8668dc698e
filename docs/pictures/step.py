"""Picture B: one step on the manifold, and the errors of three orders of its parts."""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from style import FREE, HALO, INK, LINE, NEW, OLD, SOFT, TEXT, arrow, card, drawing, seen, write

from manifold_cl import ProtectedSubspace, RestrictedStiefel

TURN = -2.05
POINT = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
PROPOSAL = torch.tensor([[0.2], [1.55], [1.65]], dtype=torch.float64)
"""A displacement with a part along the point, a tangent part and a part along F."""
SHAPE, WIDTH, STEPS, RATE = (64, 4), 16, 200, 3e-2
"""Of the measured walk: (n, r) of V, columns of F, steps and learning rate."""
MARKS = sorted({round(STEPS ** (share / 16)) for share in range(17)})
"""Steps after which the errors are drawn."""
NAIVE, LAST, OURS = "project the gradient only", "retract, then project", "project, then retract (this library)"
Finish = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Makes a new point of a point and a proposed displacement."""


def one_step() -> dict[str, np.ndarray]:
    """Points of one step in space: start, proposal, end of the tangent part, result."""
    manifold = RestrictedStiefel(torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64))
    tangent = manifold.proju(POINT, PROPOSAL)
    points = {
        "start": POINT,
        "proposal": POINT + PROPOSAL,
        "tangent": POINT + tangent,
        "end": manifold.retr(POINT, tangent),
    }
    return {name: point.numpy()[:, 0] for name, point in points.items()}


def errors() -> dict[str, list[float]]:
    """Worst error of the two constraints after the steps `MARKS`, for three orders of the same parts, in float32."""
    draw = torch.Generator().manual_seed(0)
    n, p = SHAPE
    protected = ProtectedSubspace.from_directions(torch.randn(n, WIDTH, generator=draw), rank=WIDTH)
    manifold, unprotected = RestrictedStiefel(protected), RestrictedStiefel()
    batches = torch.randn(STEPS, 8, n, generator=draw) * torch.linspace(1.5, 0.5, n)
    start = manifold.random(n, p, generator=draw)
    orders = {
        NAIVE: torch.add,
        LAST: lambda point, proposal: protected.project_out(unprotected.retr(point, proposal)),
        OURS: manifold.retr,  # makes the proposal tangent and retracts
    }
    return {name: _walk(finish, manifold, batches, start) for name, finish in orders.items()}


def _walk(finish: Finish, manifold: RestrictedStiefel, batches: torch.Tensor, start: torch.Tensor) -> list[float]:
    """Errors where Adam maximises ‖x V‖² over batches of x.

    Adam has the Riemannian gradient. `finish` makes a point of what Adam proposes.
    """
    point = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([point], lr=RATE)
    errors = []
    for x in batches:
        before = point.detach().clone()
        point.grad = manifold.egrad2rgrad(before, -2 * x.T @ (x @ before))
        optimizer.step()
        point.data = finish(before, point.detach() - before)
        errors.append(max(manifold.constraint_error(point)))
    return [errors[mark - 1] for mark in MARKS]


def draw() -> Figure:
    """The picture: one step in space above, measured errors below."""
    figure = card(6.3)
    _title(figure, 0.955, "one step of an optimizer")
    _space(drawing(figure, (0.02, 0.48, 0.96, 0.46), (-1.75, 2.2, -0.86, 1.34)), one_step())
    _title(figure, 0.435, f"distance from the manifold in {STEPS} steps")
    _errors(figure.add_axes((0.15, 0.105, 0.79, 0.3)), errors())
    return figure


def _title(figure: Figure, height: float, words: str) -> None:
    figure.text(0.5, height, words, ha="center", va="center", fontsize=TEXT + 1.5, color=INK, weight="bold")


def _space(axes: Axes, step: dict[str, np.ndarray]) -> None:
    """The line of F, the circle of all unit vectors orthogonal to it, and the three parts of a step."""
    angles = np.linspace(0, 2 * np.pi, 181)
    circle = seen(np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=-1), turn=TURN)
    axes.add_patch(Polygon(1.3 * circle, facecolor=FREE, alpha=0.13, edgecolor="none"))
    axes.plot(*circle.T, color=FREE, linewidth=2.0)
    axes.plot(*seen(np.array([[0, 0, -0.75], [0, 0, 1.25]]), turn=TURN).T, color=OLD, linewidth=2.2, zorder=0)
    start, proposal, tangent, end = (seen(step[name], turn=TURN) for name in ("start", "proposal", "tangent", "end"))
    arrow(axes, start, proposal, NEW, linewidth=2.0)
    arrow(axes, start, tangent, INK, linewidth=2.0)
    axes.plot(*np.stack([proposal, tangent]).T, color=SOFT, linewidth=1.0, linestyle=(0, (2, 2)))
    arrow(axes, tangent, end, FREE, linewidth=2.0, connectionstyle="arc3,rad=0.3", shrinkB=4)
    for point, color in ((start, INK), (end, FREE)):
        axes.plot(*point, "o", color=color, markersize=7, markeredgecolor="white", zorder=4)
    left = {"ha": "left"}
    write(axes, np.array([-0.1, 1.15]), "F", OLD, weight="bold", ha="right", fontsize=TEXT + 1)
    write(axes, np.array([-1.1, 0.78]), "manifold: every V\nwith VᵀV = I, FᵀV = 0", FREE)
    write(axes, np.add(start, (-0.1, -0.17)), "V", INK, weight="bold", fontsize=TEXT + 1)
    write(axes, np.add(proposal, (0.12, 0.2)), "1  proposal:\noff the manifold", NEW)
    write(axes, np.add(tangent, (0.1, -0.03)), "2  its tangent part", INK, **left)
    write(axes, (end + tangent) / 2 + (0.27, 0.1), "3  retraction", FREE, path_effects=HALO, **left)


def _errors(axes: Axes, curves: dict[str, list[float]]) -> None:
    """The worst error over the steps, with the name of each curve beside it."""
    for (name, values), color, marker, side in zip(curves.items(), (NEW, OLD, FREE), "D^o", (1, 1, 1), strict=True):
        axes.loglog(MARKS, values, color=color, marker=marker, markersize=4.5, linewidth=1.6)
        nearest = (max if side > 0 else min)(values[3:-3])
        words = {"xytext": (0, 13 * side), "textcoords": "offset points", "ha": "center", "va": "center"}
        axes.annotate(name, (14, nearest), color=color, fontsize=TEXT, path_effects=HALO, **words)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.set_ylim(1e-8, 30)
    axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1], ["1e−8", "1e−6", "1e−4", "1e−2", "1"])
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()
    axes.tick_params(labelsize=TEXT - 0.5, color=SOFT, labelcolor=INK, length=3)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_xlabel("steps", fontsize=TEXT, color=INK, labelpad=2)
    axes.set_ylabel("largest error", fontsize=TEXT, color=INK, labelpad=2)
