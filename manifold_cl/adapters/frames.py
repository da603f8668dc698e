"""Orthonormal frames: the layers that own them, how they start, and their validation against their manifolds."""

from __future__ import annotations

import math
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import WrappedLinear
from manifold_cl.adapters.options import Protected
from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.point_holders import Slot, enter_layer
from manifold_cl.linalg import full_precision

OFF = 1e-3
"""Constraint residual above which a frame is refused: training in float32 stays below 2e-6, averages do not."""
FILL = 0.01
"""Share of the present frame in a start that lacks directions: far above rounding, a tilt of half a degree at most."""
EXACT = 512
"""Smaller side of a weight up to which its singular vectors come from a complete SVD."""
OVERSAMPLING = 4
"""Sketch size over rank: exact for any decaying spectrum together with four passes."""
PASSES = 4

Points = Iterable[tuple[str, Tensor, RestrictedStiefel]]
"""(name, frame, manifold) of several frames."""


FrameSlot = tuple[str, str, str, Slot]
"""(adapter, key of the frame, key of its manifold, frame and manifold), with keys of the layer's state dict."""


class FrameLayer(WrappedLinear):
    """A linear layer with EBLoRA adapters: their frames, manifolds and protected subspaces.

    Subclasses call `enter_layer` when they are built, so that optimizers find the manifolds of their frames.
    """

    starts_due: frozenset[str] = frozenset()
    """Adapters with ``start="task"`` whose frames still have to be pointed along a task."""
    protection_due: frozenset[str] = frozenset()
    """Adapters that were saved with protected subspaces, until their bases were seen here."""

    @abstractmethod
    def frame_slots(self) -> Iterator[FrameSlot]:
        """The frames of all adapters, active or not; per adapter the left one comes first."""

    @abstractmethod
    def active(self) -> list[str]:
        """Names of the adapters that take part in the forward pass and train."""

    @abstractmethod
    def is_merged(self, adapter: str) -> bool:
        """Whether the base weight holds this adapter's update at present."""

    @abstractmethod
    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The magnitudes of the active adapters."""

    @abstractmethod
    def _reset_start(self, adapter: str) -> None:
        """Take the present factors as the start, if this adapter's start is compensated."""

    def adapter_names(self) -> set[str]:
        """Names of all adapters."""
        return {adapter for adapter, _, _, _ in self.frame_slots()}

    def points(self, adapter: str | None = None) -> Iterator[tuple[str, nn.Parameter, RestrictedStiefel]]:
        """(key, frame, manifold) of one adapter's frames, or of all, active or not."""
        for name, key, _, slot in self.frame_slots():
            if adapter in (None, name):
                yield key, slot.parameter, slot.manifold  # type: ignore[misc]  # a slot of ours holds parameters

    def manifold_parameters(self) -> Iterator[tuple[str, nn.Parameter, RestrictedStiefel]]:
        """(key, frame, manifold) of the active adapters' frames."""
        for adapter in self.active():
            yield from self.points(adapter)

    def held_points(self) -> Iterator[Slot]:
        """The frames of all adapters, with the places of their manifolds; read at every optimizer step."""
        return (slot for _, _, _, slot in self.frame_slots())

    @torch.no_grad()
    def point_along(self, left: Tensor, right: Tensor, *, adapter: str | None = None) -> None:
        """Start an adapter's frames at the nearest points to ``left`` (m, r) and ``right`` (n, r).

        Where these have fewer than r independent directions outside the protected subspace, as a gradient of low rank
        has, the present frame supplies the others. A compensated start is reset.
        """
        name = self._name_of(adapter)
        for (_, frame, manifold), target in zip(self.points(name), (left, right), strict=True):
            present = complete(frame.detach())
            write_complete(frame, nearest_frame(manifold, target.to(present), present))
        self.starts_due -= {name}
        self._reset_start(name)

    def validate_started(self) -> None:
        """Raise ValueError for an active adapter that lacks its start or protected subspaces; optimizers ask this."""
        for adapter in self.protection_due & set(self.active()):
            self.validate_protection(adapter)
        if due := sorted(self.starts_due & set(self.active())):
            raise ValueError(
                f'adapter {due[0]!r} has start="task" and no start yet: call start_from_task(model, batches) before '
                'the optimizer is made, or choose start="random". An adapter that was saved has its start, which '
                "transformers' own load_adapter does not show: load the folder with PeftModel.from_pretrained"
            )

    def validate_forward(self) -> None:
        """Raise as `validate_started` in a forward pass that trains, which any optimizer's step follows."""
        due = self.starts_due or (self.protection_due and not torch.compiler.is_compiling())
        if due and self.training and torch.is_grad_enabled():
            self.validate_started()

    def validate_protection(self, adapter: str) -> None:
        """Raise ValueError for an adapter that was saved with protected subspaces and loaded without."""
        if adapter not in self.protection_due:
            return
        if any(manifold.width and not manifold.k for _, _, manifold in self.points(adapter)):
            raise ValueError(
                f"adapter {adapter!r} was saved with protected subspaces, which are not loaded: transformers' own "
                "load_adapter reads none that PEFT's save_pretrained has stored once for several layers, or compactly. "
                "Load the folder with PeftModel.from_pretrained, or call protect(model, memory)"
            )
        self.protection_due -= {adapter}

    def protect(self, inputs: Protected = None, outputs: Protected = None, *, adapter: str | None = None) -> None:
        """Protect these subspaces from an adapter from now on; its frames move to the nearest points outside.

        A side without a subspace is free. An existing optimizer steps on the new manifolds.

        Raises:
            ValueError: when no room is left for the rank, or the adapter is merged; nothing is changed then.
        """
        self.prepare_protection(inputs, outputs, adapter=adapter)()

    @torch.no_grad()
    def prepare_protection(
        self, inputs: Protected = None, outputs: Protected = None, *, adapter: str | None = None
    ) -> Callable[[], None]:
        """The call that carries out `protect`; it cannot fail. Raises as `protect`."""
        name = self._name_of(adapter)
        if self.is_merged(name):
            raise ValueError(
                f"adapter {name!r} is merged into the base weight: unmerge() first, unmerge_adapter() in PEFT"
            )
        slots = [slot for owner, _, _, slot in self.frame_slots() if owner == name]
        frames = [complete(slot.parameter.detach()) for slot in slots]
        manifolds = [
            RestrictedStiefel(basis, retraction=slot.manifold.retraction, metric=slot.manifold.metric).to(frame.device)
            for basis, slot, frame in zip((outputs, inputs), slots, frames, strict=True)
        ]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        # Drawn first: this raises where there is no room.
        fills = random_frames(manifolds, [len(frame) for frame in frames], frames[0].shape[-1], generator=generator)
        points = [
            nearest_frame(manifold, frame, fill.to(frame))
            for manifold, frame, fill in zip(manifolds, frames, fills, strict=True)
        ]

        def carry_out() -> None:
            for slot, manifold in zip(slots, manifolds, strict=True):
                slot.modules[slot.key] = manifold  # type: ignore[index]  # a slot of ours is in a module's own dict
            due = self.starts_due  # a nearest point is no start
            self.point_along(*points, adapter=name)
            self.starts_due = due

        return carry_out

    def _point_along_weight(
        self, weight: Tensor, generator: torch.Generator | None, adapter: str | None = None
    ) -> None:
        """Start the frames at the leading singular vectors of the weight (m, n)."""
        (_, frame, left), (_, _, right) = self.points(self._name_of(adapter))
        vectors = leading_vectors(
            weight, frame.shape[-1], left_manifold=left, right_manifold=right, generator=generator
        )
        self.point_along(*vectors, adapter=adapter)

    def _name_of(self, adapter: str | None) -> str:
        return self.active()[0] if adapter is None else adapter

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        enter_layer(self)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for adapter, key, manifold_key, slot in self.frame_slots():
            saved, saved_frame = state_dict.get(f"{prefix}{manifold_key}.complement"), state_dict.get(prefix + key)
            if prefix + key in state_dict:
                self.starts_due -= {adapter}
            if message := adopt_protection(slot, saved, saved_frame, name=prefix + key):
                rest[-1].append(message)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@torch.no_grad()
def adopt_protection(slot: Slot, saved: Tensor | None, saved_frame: Tensor | None, *, name: str) -> str | None:
    """Make room for the protected subspace ``saved`` of a state that is about to be loaded; a message on a conflict.

    A manifold without protection takes the saved one over, so that resumed training respects it.
    """
    frame, manifold = slot.parameter, slot.manifold
    present = manifold.complement
    protects = present is not None and type(present) is Tensor and present.device.type != "meta" and manifold.k > 0
    if saved is None:
        if protects and saved_frame is not None and saved_frame.shape == frame.shape:
            # A frame that is sharded over ranks cannot be measured here.
            whole = type(saved_frame.data) is Tensor
            leak = manifold.constraint_error(saved_frame.to(present.device)).protection if whole else 0.0
            if not leak <= OFF:
                return (
                    f"{name}: the saved frame reaches into what this model protects ({leak:.1e}) and has no protected "
                    "subspace: load the state first, then protect"
                )
        return None
    if protects and saved.device.type != "meta" and (fewer := int((saved != 0).any(dim=-2).sum())) < manifold.k:
        warnings.warn(
            f"{name}: {manifold.k} protected directions are replaced by the {fewer} of the loaded state: protect again",
            UserWarning,
            stacklevel=2,
        )
    if present is None or present.shape != saved.shape:
        manifold.complement = torch.zeros(saved.shape, dtype=saved.dtype, device=frame.device)
    return None


def validate_frames(points: Points, *, to: str) -> None:
    """Refuse frames that are off their manifolds by more than `OFF`, NaN included. O(n r (k + r)) per frame.

    Frames that are sharded over ranks are skipped: they are measured where they are gathered. ``to`` says what the
    frames are wanted for. The ValueError names the frame that is farthest off.
    """
    off = {}
    for name, frame, manifold in points:
        if type(frame.data) is not Tensor or frame.device.type == "meta":
            continue
        residuals = manifold.constraint_error(frame)
        if not all(value <= OFF for value in residuals):
            off[name] = residuals
    if not off:
        return
    if damaged := [name for name, residuals in off.items() if math.isnan(sum(residuals))]:
        raise ValueError(f"cannot {to} {damaged[0]}, which holds NaN or infinite values: train the adapter again")
    worst = max(off, key=lambda name: sum(off[name]))
    raise ValueError(
        f"cannot {to} adapters that are off their manifolds: {len(off)} frames, farthest {worst} ({off[worst]}; "
        f"up to {OFF:g} is accepted). Weights were averaged (EMA, SWA, Lookahead) or stepped by an optimizer that "
        "is not Riemannian: call retract_adapters(model), which replaces each frame by its manifold's projx(frame)"
    )


def random_frames(
    manifolds: Sequence[RestrictedStiefel], rows: Sequence[int], rank: int, *,
    generator: torch.Generator | None, device: torch.device | None = None,
) -> list[Tensor]:  # fmt: skip
    """Haar-random frames (n, r) in float32, one per manifold, drawn in this order; ValueError without room."""
    return [
        manifold.random(n, rank, dtype=torch.float32, device=device, generator=generator).as_subclass(Tensor)
        for manifold, n in zip(manifolds, rows, strict=True)
    ]


def complete(part: Tensor) -> Tensor:
    """All rows of a tensor: gathered where ranks hold parts of it (FSDP2), so that every rank must call this."""
    gather = getattr(part, "full_tensor", None)
    return part if gather is None else cast(Tensor, gather())


@torch.no_grad()
def write_complete(part: Tensor, value: Tensor) -> None:
    """Overwrite a tensor in place with ``value``, all of its rows; a rank that holds a part keeps its own rows."""
    if hasattr(part, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, part.device_mesh, part.placements)  # type: ignore[attr-defined]
    part.copy_(value)


def nearest_frame(manifold: RestrictedStiefel, target: Tensor, present: Tensor) -> Tensor:
    """The point nearest to ``target``; where that lacks directions, the present frame supplies the others."""
    if target.shape != present.shape:
        raise ValueError(
            f"a frame of shape {tuple(present.shape)} cannot start along {tuple(target.shape)}: give as many columns, "
            "zero ones where there are no more directions"
        )
    try:
        return manifold.projx(target)
    except ValueError:  # no nearest point
        size = target.norm()
        return manifold.projx((target / size if size > 0 else target) + FILL * present)


@torch.no_grad()
def leading_vectors(
    weight: Tensor, rank: int, *, left_manifold: RestrictedStiefel, right_manifold: RestrictedStiefel,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The leading r singular vectors, (m, r) and (n, r), of the weight (m, n) outside both protected subspaces.

    A complete SVD for small weights, else block power iteration on a sketch of four times the rank. O(m n r).
    """
    with full_precision(weight.device):
        free = _project_out(right_manifold, _project_out(left_manifold, weight.float()).mT).mT
        m, n = free.shape
        size = min(OVERSAMPLING * rank, m, n)
        if min(m, n) <= EXACT:
            u, _, vt = torch.linalg.svd(free, full_matrices=False)
            return u[:, :rank].contiguous(), vt[:rank].mT.contiguous()
        source = generator.device if generator is not None else free.device
        basis = torch.randn(n, size, generator=generator, device=source).to(free.device)
        for _ in range(PASSES):
            basis = torch.linalg.qr(free.mT @ torch.linalg.qr(free @ basis).Q).Q
        u, _, vt = torch.linalg.svd(free @ basis, full_matrices=False)
        return u[:, :rank].contiguous(), (basis @ vt[:rank].mT).contiguous()


def _project_out(manifold: RestrictedStiefel, a: Tensor) -> Tensor:
    basis = manifold.complement
    return a if basis is None or not manifold.width else a - basis.to(a.dtype) @ (basis.to(a.dtype).mT @ a)
