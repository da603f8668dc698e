"""Several balanced adapters on one layer, each under a name: what the PEFT tuner puts in the place of a target.

The parts that PEFT must find are dictionaries by adapter name whose own names start with `PREFIX`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import apply_keeping, fingerprint, plain_weight, sides
from manifold_cl.adapters.eblora import Protected
from manifold_cl.adapters.frames import adopt_all, leading_vectors, nearest_frame, validate_frames
from manifold_cl.adapters.layers import require_linear
from manifold_cl.adapters.low_rank import Factors, low_rank
from manifold_cl.adapters.merging import merge_into, restore
from manifold_cl.adapters.options import initial_core, validate_rank
from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.holders import Slot, enter_layer

PREFIX = "eblora_"
ALIGNMENT = 64
"""Bytes that torch aligns its own memory to on a CPU."""


class Options(Protocol):
    """What a layer reads from the tuner's configuration."""

    core: str
    initial_scale: float
    start: str
    compensate: bool
    dropout: float
    retraction: str | None
    metric: Literal["euclidean", "canonical"]
    seed: int
    protected: dict[str, list[int]]


class Settled(nn.ParameterDict):
    """A dictionary of parameters that lie where fresh ones do, wherever they were loaded from."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Copy what is given out of a file's buffer."""
        if param is not None:
            param.data = settled(param.data)
        super().register_parameter(name, param)


def settled(tensor: Tensor) -> Tensor:
    """The tensor at an aligned address: products of other memory round differently, so logits would not be equal."""
    odd = tensor.device.type == "cpu" and type(tensor) is Tensor and tensor.data_ptr() % ALIGNMENT
    return tensor.clone() if odd else tensor


class FrozenStart(nn.Module):
    """The factors that an adapter started from, kept to be subtracted."""

    left: Tensor
    right: Tensor
    scale: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, settled(value) if isinstance(value, Tensor) else value)


class NamedAdapters(nn.Module):
    """A frozen linear layer and its balanced adapters by name; which of them act is up to the subclass."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.eblora_left, self.eblora_right, self.eblora_scale = (Settled() for _ in range(3))
        self.eblora_input, self.eblora_output = nn.ModuleDict(), nn.ModuleDict()
        self.eblora_start, self.eblora_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.eblora_scaling: dict[str, float] = {}
        self.eblora_base: dict[str, str | None] = {}
        self.r: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        enter_layer(self)

    @property
    def in_features(self) -> int:
        """n, the length of an input, by the name that PEFT's own layers have for it."""
        return sides(require_linear("base_layer", self))[1]

    @property
    def out_features(self) -> int:
        """m, the length of an output."""
        return sides(require_linear("base_layer", self))[0]

    def acting(self) -> list[str]:
        """The adapters that take part in the forward pass and train."""
        raise NotImplementedError

    def add(self, adapter: str, options: Options, *, base: nn.Module, layer: str, r: int, alpha: float | None) -> None:
        """Add an adapter of rank r to this layer, which the model calls ``layer``.

        Raises:
            ValueError: for a rank that the weight cannot have.
        """
        validate_rank(base, r)
        m, n = sides(base)
        draw = torch.Generator().manual_seed(options.seed + zlib.crc32(layer.encode()))
        widths = options.protected.get(layer, (0, 0))
        for container, rows, width in zip((self.eblora_input, self.eblora_output), (n, m), widths, strict=True):
            manifold = RestrictedStiefel(retraction=options.retraction, metric=options.metric)
            if width:  # room for what a file holds; zero columns protect nothing
                manifold.complement = torch.zeros(rows, width)
            container[adapter] = manifold
        self.r[adapter] = r
        self.eblora_scaling[adapter] = 1.0 if alpha is None else alpha / r
        self.eblora_dropout[adapter] = nn.Dropout(options.dropout)
        self.eblora_base[adapter] = fingerprint(base)
        left, right = self._drawn(self.manifolds(adapter), (m, n), r, draw)
        scale = initial_core(options.core, r, options.initial_scale)
        scale = scale if scale.ndim else scale[None]  # FSDP2 shards no 0-d parameter
        values = {"left": left, "right": right, "scale": scale}
        for key, value in values.items():
            getattr(self, PREFIX + key)[adapter] = nn.Parameter(value)  # on meta, where PEFT wants no memory yet
        if options.compensate:
            self.eblora_start[adapter] = FrozenStart(**values)
        present = {cast(Tensor, base.weight).device.type, self.eblora_left[adapter].device.type}
        if options.start == "pretrained" and "meta" not in present:
            weight = plain_weight(base, to="take singular vectors of").cpu()
            output, inputs = self.manifolds(adapter)
            vectors = leading_vectors(weight, r, left_manifold=output, right_manifold=inputs, generator=draw)
            self.point_along(*vectors, adapter=adapter)

    def factors(self, adapter: str | None = None) -> Factors:
        """An adapter's update as detached factors; of the first that acts, if none is named."""
        name = adapter or self.acting()[0]
        trained = self._factors(name)
        detached = Factors(trained.left.detach(), trained.right.detach(), trained.magnitude.detach())
        return detached.minus(self._started(name)) if name in self.eblora_start else detached

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """``ΔW x`` of one adapter for inputs as rows, dropout included."""
        x = self.eblora_dropout[adapter](x)
        parts = self._factors(adapter)
        update = low_rank(x, parts.left, parts.right, parts.magnitude)
        if adapter in self.eblora_start:
            start = self._started(adapter)
            update = update - low_rank(x, start.left, start.right, start.magnitude)
        return update

    @torch.no_grad()
    def point_along(self, left: Tensor, right: Tensor, *, adapter: str | None = None) -> None:
        """Start an adapter's frames at the points nearest to ``left`` (m, r) and ``right`` (n, r)."""
        name = adapter or self.acting()[0]
        for key, manifold, wanted in zip(("left", "right"), self.manifolds(name), (left, right), strict=True):
            frame = getattr(self, PREFIX + key)[name]
            frame.copy_(nearest_frame(manifold, wanted.to(frame), frame.detach()))
        if name in self.eblora_start:
            start = self.eblora_start[name]
            for key, tensor in self._parts(name).items():
                getattr(start, key).copy_(tensor)

    def protect(self, inputs: Protected = None, outputs: Protected = None, *, adapter: str | None = None) -> None:
        """Keep an adapter off these subspaces from now on; its frames move to the nearest points outside.

        A side without a subspace is free. An optimizer that exists already steps on the new manifolds.

        Raises:
            ValueError: when no room is left for the rank, or the adapter is merged; nothing is changed then.
        """
        self.prepared_protection(inputs, outputs, adapter=adapter)()

    @torch.no_grad()
    def prepared_protection(
        self, inputs: Protected = None, outputs: Protected = None, *, adapter: str | None = None
    ) -> Callable[[], None]:
        """The call that carries out `protect`, which cannot fail any more.

        Raises:
            ValueError: as `protect`.
        """
        name = adapter or self.acting()[0]
        if name in self.merged_adapters:
            raise ValueError(f"adapter {name!r} is merged into the base weight: unmerge_adapter() first")
        frames = (self.eblora_left[name].detach(), self.eblora_right[name].detach())
        new = [
            RestrictedStiefel(basis, retraction=was.retraction, metric=was.metric).to(frame.device)
            for basis, was, frame in zip((outputs, inputs), self.manifolds(name), frames, strict=True)
        ]
        fill = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        # A random point first: it is what raises where there is no room.
        fills = self._drawn(new, tuple(frame.shape[0] for frame in frames), self.r[name], fill)
        points = [
            nearest_frame(manifold, frame, other.to(frame))
            for manifold, frame, other in zip(new, frames, fills, strict=True)
        ]

        def carry_out() -> None:
            self.eblora_output[name], self.eblora_input[name] = new
            self.point_along(*points, adapter=name)

        return carry_out

    def manifold_parameters(self) -> Iterator[tuple[str, nn.Parameter, RestrictedStiefel]]:
        """The frames of all adapters that act, with the manifolds they live on."""
        for name in self.acting():
            yield from self.points(name)

    def points(self, adapter: str) -> Iterator[tuple[str, nn.Parameter, RestrictedStiefel]]:
        """The frames of one adapter, whether it acts or not, with the manifolds they live on."""
        output, inputs = self.manifolds(adapter)
        yield f"eblora_left.{adapter}", self.eblora_left[adapter], output
        yield f"eblora_right.{adapter}", self.eblora_right[adapter], inputs

    def held_points(self) -> Iterator[Slot]:
        """The frames of all adapters, with the places of their manifolds."""
        own: Any = self._modules  # an attribute of a module is looked up slowly, and this is asked at every step
        for frame, side in (("left", "output"), ("right", "input")):
            manifolds = own[f"{PREFIX}{side}"]._modules
            for name, parameter in own[PREFIX + frame]._parameters.items():
                if parameter is not None and name in manifolds:
                    yield Slot(parameter, manifolds, name)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        enter_layer(self)

    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The magnitudes of all adapters that act."""
        yield from ((f"eblora_scale.{name}", self.eblora_scale[name]) for name in self.acting())

    def manifolds(self, adapter: str) -> tuple[RestrictedStiefel, RestrictedStiefel]:
        """Those of the output and of the input frame."""
        return cast(RestrictedStiefel, self.eblora_output[adapter]), cast(RestrictedStiefel, self.eblora_input[adapter])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        pairs = (
            (f"{PREFIX}{frame}.{name}", getattr(self, PREFIX + frame)[name], f"{PREFIX}{side}.{name}", manifold)
            for name in self.eblora_left
            for frame, side, manifold in zip(("left", "right"), ("output", "input"), self.manifolds(name), strict=True)
        )
        rest[-1].extend(adopt_all(pairs, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _parts(self, name: str) -> dict[str, Tensor]:
        return {key: getattr(self, PREFIX + key)[name] for key in ("left", "right", "scale")}

    def _factors(self, name: str) -> Factors:
        return Factors(
            self.eblora_left[name], self.eblora_right[name], self.eblora_scale[name] * self.eblora_scaling[name]
        )

    def _started(self, name: str) -> Factors:
        start = cast(FrozenStart, self.eblora_start[name])
        return Factors(start.left, start.right, start.scale * self.eblora_scaling[name])

    @staticmethod
    def _drawn(manifolds: Any, rows: tuple[int, ...], r: int, draw: torch.Generator) -> list[Tensor]:
        return [
            manifold.random(size, r, dtype=torch.float32, generator=draw).as_subclass(Tensor).contiguous()
            for manifold, size in zip(manifolds, rows, strict=True)
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_keeping(self, fn, base="base_layer", recurse=recurse)
        return self


class SwitchedAdapters(NamedAdapters):
    """`NamedAdapters` that can be merged, in a precision that each may choose, and mixed in one batch."""

    get_base_layer: Callable[[], nn.Module]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.name = type(self).__name__
        self.merged_dtypes: dict[str, torch.dtype | None] = {}
        self._base_before: tuple[Tensor, torch.dtype | None] | None = None

    def mixed(self, x: Tensor, out: Tensor, names: Sequence[str]) -> Tensor:
        """The outputs of a batch whose members have an adapter each."""
        if len(names) != len(x):
            raise ValueError(f"{self.name}: {len(names)} adapter_names for {len(x)} inputs: give one for each input")
        if self.merged_adapters:
            raise ValueError(f"{self.name}: adapter_names while adapters are merged: unmerge_adapter() first")
        for name in dict.fromkeys(name for name in names if name in self.eblora_left):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
            out = out.index_add(0, rows, self.update(name, x[rows]).to(out.dtype))
        return out

    @torch.no_grad()
    def merge_named(self, names: Sequence[str]) -> None:
        """Add adapters to the base weight, rounded once; the weight as it was is kept on the CPU.

        Raises:
            TypeError: for a quantised or computed base weight.
            ValueError: for frames off their manifolds, or a result that is not finite. Nothing is changed then.
        """
        base = self.get_base_layer()
        weight = plain_weight(base, to="merge into")
        validate_frames(
            ((f"{self.name}.{key}", p, manifold) for name in names for key, p, manifold in self.points(name)),
            to="merge",
        )
        bias = cast(Tensor | None, base.bias)
        before = (weight.detach().cpu().clone(), None if bias is None else bias.dtype)
        dtypes = [dtype for name in names if (dtype := self.merged_dtypes.get(name)) is not None]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize, default=None)
        updates = [self.factors(name) for name in names]  # rounded once, however many there are
        merge_into(base, updates, layer=self.name, merged_dtype=widest, what=", ".join(names))
        self._base_before = self._base_before or before
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def restore_base(self) -> None:
        """Put the base weight back as it was before `merge_named`, to the last bit."""
        if self._base_before is not None:
            restore(self.get_base_layer(), *self._base_before)
            self._base_before = None
            self.merged_adapters.clear()


@contextmanager
def names_handed_on(
    model: nn.Module, takers: Sequence[nn.Module], names: Sequence[str], *, beams: int = 1
) -> Iterator[None]:
    """Inside, each of ``takers`` is called with ``adapter_names``, repeated for each beam of a search.

    Args:
        model: that the takers are in; its encoder, if it has one, sees each input once whatever the beams.
        takers: modules whose forward takes ``adapter_names``.
        names: one adapter for each member of the batch, or ``"__base__"``.
        beams: of a beam search.

    Raises:
        ValueError: for a name that no layer has.
    """
    known = {name for layer in takers if isinstance(layer, NamedAdapters) for name in layer.eblora_left}
    if unknown := sorted({*names} - known - {"__base__"}):
        raise ValueError(f"adapter_names has {unknown[0]!r}: there are {', '.join(sorted(known))} and __base__")
    find = getattr(model, "get_encoder", None)
    encoder = find() if beams > 1 and find is not None else None
    inside = set(map(id, encoder.modules())) if isinstance(encoder, nn.Module) and encoder is not model else set()
    with ExitStack() as stack:
        for module in takers:
            repeated = [name for name in names for _ in range(1 if id(module) in inside else beams)]
            hook = partial(_with_names, names=repeated)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _with_names(_: nn.Module, args: Any, kwargs: dict[str, Any], *, names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
