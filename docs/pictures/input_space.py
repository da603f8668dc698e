"""Picture A: the input space of a layer, split by the protected directions, and what an update does to its outputs."""

from math import ceil, log10

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from style import FREE, INK, NEW, OLD, SOFT, TEXT, arrow, card, drawing, seen, write

from manifold_cl import EBLoRALinear, RiemannianAdamW, param_groups

STEPS = 100
TURN = 0.5
DRAWN = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q.float()
"""The three directions of the drawing: two free ones and, upright, F. They are no axes of the input space."""
PROTECTED = DRAWN[:, 2:]
OLD_INPUTS = torch.tensor([[0.0, 0.0, height] for height in (1.05, 0.6, -0.6, -1.05)]) @ DRAWN.T
NEW_INPUTS = torch.tensor([[1.0, 0.1, 0.75], [0.8, -0.75, -0.3], [-0.65, 0.75, 0.3], [-0.8, -0.35, 0.75]]) @ DRAWN.T


def trained() -> EBLoRALinear:
    """A layer from three inputs to two outputs, trained on new inputs with F protected."""
    base = torch.nn.Linear(3, 2, bias=False)
    base.weight.data = torch.tensor([[0.35, -0.1, 0.9], [-0.45, 0.75, 0.35]]) @ DRAWN.T
    draw = torch.Generator().manual_seed(0)
    layer = EBLoRALinear(base, rank=1, complement=PROTECTED, initial_scale=0.1, generator=draw)
    targets = NEW_INPUTS @ (base.weight + torch.tensor([[0.5, -0.4, 0.3], [0.9, -0.6, -0.4]]) @ DRAWN.T).T
    optimizer = RiemannianAdamW(param_groups(layer, lr=6e-2, scale_lr=6e-2))  # larger than usual, for few steps
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(NEW_INPUTS) - targets.detach()).square().mean().backward()
        optimizer.step()
    return layer


def draw() -> Figure:
    """The picture, from the layer's own factors."""
    layer = trained()
    update = layer.factors().delta_weight().detach()
    weight = layer.base.weight.detach()
    figure = card(3.9)
    _space(drawing(figure, (0.03, 0.17, 0.47, 0.7), (-1.5, 1.5, -1.75, 1.7)), (layer.right.detach().T @ DRAWN)[0])
    _outputs(drawing(figure, (0.53, 0.17, 0.44, 0.7), (-1.75, 1.75, -2.05, 1.9)), weight, update)
    for x, words in ((0.265, "inputs of a layer"), (0.75, "its outputs")):
        figure.text(x, 0.915, words, ha="center", va="center", fontsize=TEXT + 1.5, color=INK, weight="bold")
    moved = ceil(log10(float((OLD_INPUTS @ update.T).norm(dim=1).max())))
    least = float((NEW_INPUTS @ update.T).norm(dim=1).min())
    words = (
        f"ΔW F = s U VᵀF = 0. The update moves old outputs by less than 1e{moved}\n"
        f"(rounding of float32) and new ones by at least {least:.1f}."
    )
    figure.text(0.5, 0.11, words, ha="center", va="center", fontsize=TEXT, color=INK, linespacing=1.4)
    return figure


def _space(axes: Axes, right: torch.Tensor) -> None:
    """The line of F, the plane that it leaves free, and the inputs with their free parts."""
    angles = torch.linspace(0, 2 * torch.pi, 181)
    rim = 1.3 * torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    axes.add_patch(Polygon(seen(rim, turn=TURN), facecolor=FREE, alpha=0.13, edgecolor="none"))
    ends = torch.tensor([[0, 0, -1.4], [0, 0, 1.4]])
    axes.plot(*seen(ends, turn=TURN).T, color=OLD, linewidth=2.2, solid_capstyle="round")
    tip = seen(right, turn=TURN)
    tip = tip if tip[0] > 0 else -tip  # the sign of V is that of s
    arrow(axes, np.zeros(2), tip, FREE, linewidth=2.4)
    write(axes, np.add(0.62 * tip, (0, 0.17)), "V", FREE, weight="bold", fontsize=TEXT + 1)
    inputs = NEW_INPUTS @ DRAWN
    for top, foot in zip(seen(inputs, turn=TURN), seen(inputs * torch.tensor([1, 1, 0]), turn=TURN), strict=True):
        axes.plot(*np.stack([top, foot]).T, color=NEW, linewidth=1.0, linestyle=(0, (2, 2)))
        axes.plot(*foot, ".", color=NEW, markersize=3)
        axes.plot(*top, "D", color=NEW, markersize=6.5, markeredgecolor="white")
    axes.plot(*seen(OLD_INPUTS @ DRAWN, turn=TURN).T, "o", color=OLD, markersize=7.5, markeredgecolor="white")
    write(axes, np.array([0.0, 1.48]), "protected: span F", OLD)
    write(axes, np.array([-0.78, -0.75]), "free plane", FREE)
    write(axes, np.array([0.85, -0.9]), "new inputs", NEW)
    write(axes, np.array([0.0, -1.52]), "old inputs", OLD)


def _outputs(axes: Axes, weight: torch.Tensor, update: torch.Tensor) -> None:
    """Outputs without the update, hollow, and with it, filled."""
    for inputs, color, marker, size in ((OLD_INPUTS, OLD, "o", 7.5), (NEW_INPUTS, NEW, "D", 6.5)):
        before, after = ((inputs @ matrix.T).numpy() for matrix in (weight, weight + update))
        for start, end in zip(before, after, strict=True):
            if np.hypot(*(end - start)) > 0.05:
                arrow(axes, start, end, color, linewidth=1.4, mutation_scale=9, shrinkB=3)
        axes.plot(*before.T, marker, markersize=size, markerfacecolor="white", markeredgecolor=color)
        axes.plot(*after.T, marker, color=color, markersize=size - 2.5, markeredgewidth=0)
    for y, face, words in ((-1.45, "white", "W x"), (-1.78, SOFT, "(W + ΔW) x")):
        axes.plot(-0.75, y, "o", markersize=6.5, markerfacecolor=face, markeredgecolor=SOFT)
        write(axes, np.array([-0.55, y]), words, SOFT, ha="left")
