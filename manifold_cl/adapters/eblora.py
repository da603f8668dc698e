"""EBLoRALinear, the energy-balanced adapter: one magnitude and two orthonormal frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.base_layers import plain_weight, sides, validate_base
from manifold_cl.adapters.frames import FrameLayer, FrameSlot, random_frames
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.options import EBLoRAOptions, Protected, validate_rank
from manifold_cl.geometry.point_holders import Slot, enter_layer

NAME = "default"
"""Name of the one adapter, as PEFT calls it."""


class EBLoRALinear(FrameLayer, Adapter):
    """``ΔW = (alpha / r) · s · left @ rightᵀ`` with orthonormal columns, orthogonal to the protected subspaces.

    With the scalar core all r singular values of the update equal ``|s| alpha / r``: magnitude and direction are
    separate parameters. Train it with a Riemannian optimizer over `param_groups`, which takes the manifolds from the
    layer.

    Source: gu2026eblora. Diagonal and full cores are li2025stella's, for comparison.

    Args:
        base: the layer to adapt.
        rank: r.
        complement: the protected input subspace: a basis (n, k) or a `ProtectedSubspace`.
        output_complement: the same for the output side, in R^m; beyond the paper.
        generator: for the random start of the frames.
        **options: of `EBLoRAOptions`.

    Raises:
        TypeError: for a layer that is not linear, or an unknown option.
        ValueError: when a complement leaves no room for ``rank`` columns; for options out of range.

    >>> layer = EBLoRALinear(nn.Linear(6, 4), 2, complement=torch.eye(6)[:, :3], initial_scale=0.5)
    >>> layer.right[:3].abs().max().item() < 1e-6
    True
    >>> torch.linalg.svdvals(layer.factors().delta_weight())[:2]
    tensor([0.5000, 0.5000])
    """

    kind = "eblora"
    start_scale: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        complement: Protected = None,
        output_complement: Protected = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        chosen = EBLoRAOptions(**options)
        validate_base(base)
        validate_rank(base, rank)
        manifolds = [chosen.manifold(protected) for protected in (output_complement, complement)]
        for manifold, size in zip(manifolds, sides(base), strict=True):
            manifold.require_room(size, rank)
        weight = plain_weight(base, to="take singular vectors of") if chosen.start == "pretrained" else None
        # Everything is validated by now: the next call freezes the base.
        super().__init__(base, rank, alpha=chosen.alpha, dropout=chosen.dropout)
        device = self.left.device
        self.left_manifold, self.right_manifold = (manifold.to(device) for manifold in manifolds)
        self.core = chosen.core
        core = chosen.initial_core(rank, device=device)
        self.scale = nn.Parameter(core if core.ndim else core[None])  # FSDP2 shards no 0-d parameter
        frames = random_frames(
            (self.left_manifold, self.right_manifold), sides(base), rank, generator=generator, device=device
        )
        self.left.data.copy_(frames[0])
        self.right.data.copy_(frames[1])
        if chosen.compensate:
            self.compensate()
        if weight is not None:
            self._point_along_weight(weight.to(device), generator)
        if chosen.start == "task":
            self.starts_due = frozenset({NAME})
        enter_layer(self)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output; ValueError in training before a start of kind ``"task"`` was given."""
        self.validate_forward()
        return super().forward(x)

    def magnitude(self) -> Tensor:
        """``s · alpha / r``, 0-d for a scalar core: the one singular value of the update, with its sign."""
        return self._as_core(self.scale) * self.scaling

    def active(self) -> list[str]:
        """The name of the one adapter."""
        return [NAME]

    def is_merged(self, adapter: str) -> bool:
        """Whether the base weight holds the update at present."""
        return self.merged

    def frame_slots(self) -> Iterator[FrameSlot]:
        """Both frames."""
        frames, modules = self._parameters, self._modules
        for name, manifold in (("left", "left_manifold"), ("right", "right_manifold")):
            if (frame := frames.get(name)) is not None:
                yield NAME, name, manifold, Slot(frame, modules, manifold)

    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The magnitude."""
        yield "scale", self.scale

    def extra_repr(self) -> str:
        """Rank, alpha, compensation and an unusual core, for the printed module."""
        return super().extra_repr() + (f", core={self.core!r}" if self.core != "scalar" else "")

    def _start(self) -> Factors:
        return Factors(self.start_left, self.start_right, self._as_core(self.start_scale) * self.scaling)

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As every adapter; the one number of a scalar core is a 0-d view, which is its form in files."""
        for name, tensor in super().own_tensors():
            yield name, self._as_core(tensor) if name.endswith("scale") else tensor

    def _as_core(self, stored: Tensor) -> Tensor:
        return stored.reshape(()) if self.core == "scalar" else stored

    def _reset_start(self, adapter: str) -> None:
        if self.compensated:
            self.compensate()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        scales = {key: state_dict.get(key) for key in (f"{prefix}scale", f"{prefix}start_scale")}
        numbers = {key: value[None] for key, value in scales.items() if value is not None and not value.ndim}
        # 0-d in states of earlier versions
        super()._load_from_state_dict({**state_dict, **numbers} if numbers else state_dict, prefix, *rest)
