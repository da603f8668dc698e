"""Optimizers for the two factors of plain LoRA adapters, with AdamW for every other group in the same object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.linalg import full_precision
from manifold_cl.rules import validate_share

if TYPE_CHECKING:
    Muon = Optimizer
else:
    Muon = getattr(torch.optim, "Muon", Optimizer)  # torch 2.9 and later have it

FACTORS = "factors"
"""The role of a group of factors."""
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""Options of the other groups where they are not given."""
NULL = 64
"""Units of rounding of the parameters, relative to the largest singular value, below which a direction is absent."""


class FactorOptimizer(Optimizer):
    """Steps groups of the role ``"factors"`` by `_step_factors`, and all other groups as AdamW does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["role"] == FACTORS]
            self._step_factors()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["role"] != FACTORS:
                self._step_adamw(group)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that step as in AdamW, with ``lr``, and ``betas``, ``eps`` and ``weight_decay`` if given.

        Raises:
            ValueError: without a rate; that of the factors has another unit.
        """
        group = {"role": "additional", **param_group}
        if group["role"] != FACTORS:
            if "lr" not in group:
                raise ValueError("parameters beside the factors step as in AdamW and need a rate of their own: give lr")
            group = {**ADAMW, **group}
        super().add_param_group(group)

    def _step_factors(self) -> None:
        raise NotImplementedError

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update({"step": torch.zeros((), dtype=torch.float32), **moments})
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class MuonOnFactors(FactorOptimizer, Muon):
    """`torch.optim.Muon` on factors, AdamW on groups that are added.

    Args:
        factors: matrices.
        **options: of `torch.optim.Muon`.

    Raises:
        RuntimeError: with a torch before 2.9, which has no Muon.
        ValueError: for a factor that is no matrix.
    """

    def __init__(self, factors: Iterable[Tensor], **options: Any) -> None:
        if Muon is Optimizer:
            raise RuntimeError(f"torch {torch.__version__} has no torch.optim.Muon: install torch 2.9 or later")
        super().__init__([{"params": list(factors), "role": FACTORS}], **options)

    def _step_factors(self) -> None:
        Muon.step(self)


class PairMuon(FactorOptimizer):
    """Steepest descent on ``L Rᵀ`` under the spectral norm, half of the length to each factor, AdamW on added groups.

    With the averages m of the gradients, ``S_R = RᵀR``, ``S_L = LᵀL`` and P the projection off a layer's protected
    inputs F::

        dL = −(lr / 2) msign(m_L S_R^(-1/2)) S_R^(-1/2)
        dR = −(lr / 2) msign(P m_R S_L^(-1/2)) S_L^(-1/2)
        L ← s L + dL / s,   R ← P(s R + dR / s),   s = √(1 − lr · weight_decay)

    So ``|dL Rᵀ|₂ = |L dRᵀ|₂ = lr / 2`` whatever the condition of the factors is, and ``FᵀR = 0`` stays. Roots are
    pseudo-inverses: where L is zero, R does not move. Small matrices are decomposed in float64.

    Source: cesista2026loramuon for the step and the decay of the product. The pseudo-inverse and the projection
    are ours; they stand for the multipliers of cesista2026loramuonogd.

    Args:
        pairs: (L, R) of every layer, shapes (m, r) and (n, r).
        lr: spectral length of a step of ``L Rᵀ``, to first order.
        momentum: decay of the average of gradients, in [0, 1).
        weight_decay: of the product ``L Rᵀ``, decoupled.
        protected: per pair, the subspace of R^n that R avoids; R starts there.

    Raises:
        ValueError: for factors that do not pair, options out of range, or gradients that are not finite.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        protected: Sequence[ProtectedSubspace | None] = (),
    ) -> None:
        listed = list(pairs)
        for left, right in listed:
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
                raise ValueError(
                    f"a pair is (m, r) and (n, r) with one r, got {tuple(left.shape)} and {tuple(right.shape)}"
                )
        validate_share("momentum", momentum, zero=True, one=False)
        if not (lr >= 0 and weight_decay >= 0 and lr * weight_decay < 1):
            raise ValueError(f"lr and weight_decay are at least 0 with a product below 1, got {lr} and {weight_decay}")
        subspaces = list(protected) or [None] * len(listed)
        self._avoided = {right: subspace for (_, right), subspace in zip(listed, subspaces, strict=True)}
        group = {"params": [factor for pair in listed for factor in pair], "role": FACTORS}
        super().__init__([group], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _step_factors(self) -> None:
        for group in self.param_groups:
            pairs = list(zip(group["params"][::2], group["params"][1::2], strict=True))
            ready = [(left, right) for left, right in pairs if left.grad is not None and right.grad is not None]
            for pair in ready:
                for factor in pair:
                    if not bool(factor.grad.isfinite().all()):
                        raise ValueError(f"the gradient of a factor of shape {tuple(factor.shape)} is not finite")
            for left, right in ready:
                self._step_pair(left, right, group)

    def _step_pair(self, left: Tensor, right: Tensor, group: dict[str, Any]) -> None:
        averages = []
        for factor in (left, right):
            state = self.state[factor]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(factor)
            averages.append(state["momentum_buffer"].lerp_(factor.grad, 1 - group["momentum"]))
        avoided, shrink = self._avoided.get(right), (1 - group["lr"] * group["weight_decay"]) ** 0.5
        with full_precision(left.device):
            length = float(group["lr"]) / (2 * shrink)
            lift = steepest_factor(averages[0], right)
            turn = steepest_factor(_without(averages[1], avoided), left)
            left.copy_(shrink * left.double() - length * lift)
            right.copy_(_without((shrink * right.double() - length * turn).to(right.dtype), avoided))


def steepest_factor(m: Tensor, other: Tensor) -> Tensor:
    """``D = msign(m S^(-1/2)) S^(-1/2)`` with ``S = otherᵀ other``, in float64: ``|D otherᵀ|₂ = 1``, or 0 for no m.

    Of all D with ``|D otherᵀ|₂ ≤ 1`` it has the largest ``⟨m, D⟩``. Directions below `NULL` units of rounding of the
    largest count as absent: the root is a pseudo-inverse, and the sign of a null direction is 0. O((m + n) r²).
    """
    floor = NULL * torch.finfo(m.dtype).eps
    root = _inverse_root(other.double(), floor)
    basis, small = torch.linalg.qr(m.double() @ root)
    u, sigma, vt = torch.linalg.svd(small)
    held = sigma > floor * sigma[:1]
    factor: Tensor = (basis @ (u * held)) @ (vt @ root)
    return factor


def _without(x: Tensor, avoided: ProtectedSubspace | None) -> Tensor:
    """The part of x off the subspace."""
    return x if avoided is None or not avoided.k else avoided.project_out(x.to(avoided.basis.dtype)).to(x.dtype)


def _inverse_root(a: Tensor, floor: float) -> Tensor:
    """``(aᵀa)^(-1/2)`` on the directions of a whose singular values exceed ``floor`` times the largest; 0 elsewhere."""
    energies, vectors = torch.linalg.eigh(a.mT @ a)
    held = energies > floor**2 * energies[-1:]
    root: Tensor = (vectors * (torch.where(held, energies, 1).rsqrt() * held)) @ vectors.mT
    return root
