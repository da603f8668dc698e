"""Several EBLoRA adapters on one layer, each under a name: forward, merging, and mixed batches.

Independent of PEFT. The parts that PEFT must find are dictionaries by adapter name, in attributes that start with
`PREFIX`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import plain_weight, sides
from manifold_cl.adapters.frames import FrameLayer, FrameSlot, random_frames
from manifold_cl.adapters.identity import fingerprint
from manifold_cl.adapters.layers import require_linear
from manifold_cl.adapters.low_rank import Factors, Update
from manifold_cl.adapters.merging import Backup, merge_reversibly
from manifold_cl.adapters.options import EBLoRAOptions, validate_rank
from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.point_holders import Slot, enter_layer

PREFIX = "eblora_"
ALIGNMENT = 64
"""Bytes that torch aligns its own memory to on a CPU."""
FRAMES = (("left", "output"), ("right", "input"))
"""Each frame with the side of the weight that its manifold belongs to."""


class NamedAdapters(FrameLayer):
    """A frozen linear layer and its EBLoRA adapters by name; the subclass decides which of them are active."""

    base_name = "base_layer"
    get_base_layer: Callable[[], nn.Module]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.eblora_left, self.eblora_right, self.eblora_scale = (AlignedParameters() for _ in range(3))
        self.eblora_input, self.eblora_output = nn.ModuleDict(), nn.ModuleDict()
        self.eblora_start, self.eblora_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.eblora_scaling: dict[str, float] = {}
        self.eblora_base: dict[str, str | None] = {}
        self.r: dict[str, int] = {}
        self.name = type(self).__name__
        self.merged_adapters: list[str] = []
        self.merged_dtypes: dict[str, torch.dtype | None] = {}
        self._backup: Backup | None = None
        enter_layer(self)

    @property
    def in_features(self) -> int:
        """n, the length of an input, by the name that PEFT's own layers have for it."""
        return sides(require_linear("base_layer", self))[1]

    @property
    def out_features(self) -> int:
        """m, the length of an output."""
        return sides(require_linear("base_layer", self))[0]

    def add(self, adapter: str, rank: int, options: EBLoRAOptions, *, seed: int, widths: Sequence[int]) -> None:
        """Add an adapter; its random start depends on ``seed`` and the layer's name.

        ``widths`` are those of the complements of input and output that a file is about to fill. ValueError for a rank
        that the weight cannot have.
        """
        base = self.get_base_layer()
        validate_rank(base, rank)
        m, n = sides(base)
        generator = torch.Generator().manual_seed(seed + zlib.crc32(self.name.encode()))
        for container, rows, width in zip((self.eblora_input, self.eblora_output), (n, m), widths, strict=True):
            container[adapter] = options.manifold()
            if width:  # zero columns protect nothing
                container[adapter].complement = torch.zeros(rows, width)
        self.r[adapter] = rank
        self.eblora_scaling[adapter] = 1.0 if options.alpha is None else options.alpha / rank
        self.eblora_dropout[adapter] = nn.Dropout(options.dropout)
        self.eblora_base[adapter] = fingerprint(base)
        left, right = random_frames(self.manifolds(adapter), (m, n), rank, generator=generator)
        scale = options.initial_core(rank)
        scale = scale if scale.ndim else scale[None]  # FSDP2 shards no 0-d parameter
        tensors = {"left": left, "right": right, "scale": scale}
        for key, tensor in tensors.items():
            getattr(self, PREFIX + key)[adapter] = nn.Parameter(tensor)  # on meta, where PEFT wants no memory yet
        if options.compensate:
            self.eblora_start[adapter] = FrozenStart(**tensors)
        if options.start == "task":
            self.starts_due |= {adapter}
        devices = {cast(Tensor, base.weight).device.type, self.eblora_left[adapter].device.type}
        if options.start == "pretrained" and "meta" not in devices:
            weight = plain_weight(base, to="take singular vectors of").cpu()
            self._point_along_weight(weight, generator, adapter)

    def factors(self, adapter: str | None = None) -> Factors:
        """An adapter's update as detached factors; of the first active one, if none is named."""
        return self._current(self._name_of(adapter)).factors()

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """``ΔW x`` of one adapter for inputs as rows, dropout included."""
        return self._current(adapter).apply(self.eblora_dropout[adapter](x))

    def update_mixed(self, x: Tensor, out: Tensor, names: Sequence[str]) -> Tensor:
        """The outputs of a batch whose members have one adapter each; ValueError while adapters are merged."""
        if len(names) != len(x):
            raise ValueError(f"{self.name}: {len(names)} adapter_names for {len(x)} inputs: give one for each input")
        if self.merged_adapters:
            raise ValueError(f"{self.name}: adapter_names while adapters are merged: unmerge_adapter() first")
        for name in dict.fromkeys(name for name in names if name in self.eblora_left):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
            out = out.index_add(0, rows, self.update(name, x[rows]).to(out.dtype))
        return out

    def merge_named(self, names: Sequence[str]) -> None:
        """Add adapters to the base weight, rounded once, in the widest precision of their ``merged_dtypes``."""
        dtypes = [dtype for name in names if (dtype := self.merged_dtypes.get(name)) is not None]
        backup = merge_reversibly(
            self.get_base_layer(),
            [self.factors(name) for name in names],
            points=((f"{self.name}.{key}", p, manifold) for name in names for key, p, manifold in self.points(name)),
            layer=self.name,
            merged_dtype=max(dtypes, key=lambda dtype: dtype.itemsize, default=None),
            what=", ".join(names),
        )
        self._backup = self._backup or backup
        self.merged_adapters.extend(names)

    def restore_base(self) -> None:
        """Restore the base weight as it was before `merge_named`, to the last bit."""
        if self._backup is not None:
            self._backup.restore(self.get_base_layer())
            self._backup = None
            self.merged_adapters.clear()

    def is_merged(self, adapter: str) -> bool:
        """Whether the base weight holds this adapter's update at present."""
        return adapter in self.merged_adapters

    def frame_slots(self) -> Iterator[FrameSlot]:
        """The frames of all adapters, active or not."""
        own: Any = self._modules  # read at every step, and attributes of a module are slow
        for frame, side in FRAMES:
            manifolds = own[PREFIX + side]._modules
            for name, parameter in own[PREFIX + frame]._parameters.items():
                if parameter is not None and name in manifolds:
                    yield name, f"{PREFIX}{frame}.{name}", f"{PREFIX}{side}.{name}", Slot(parameter, manifolds, name)

    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The magnitudes of the active adapters."""
        yield from ((f"eblora_scale.{name}", self.eblora_scale[name]) for name in self.active())

    def manifolds(self, adapter: str) -> tuple[RestrictedStiefel, RestrictedStiefel]:
        """The manifolds of the output frame and of the input frame."""
        return cast(RestrictedStiefel, self.eblora_output[adapter]), cast(RestrictedStiefel, self.eblora_input[adapter])

    def _current(self, name: str) -> Update:
        scaling = self.eblora_scaling[name]
        trained = Factors(self.eblora_left[name], self.eblora_right[name], self.eblora_scale[name] * scaling)
        if name not in self.eblora_start:
            return Update(trained)
        start = cast(FrozenStart, self.eblora_start[name])
        return Update(trained, Factors(start.left, start.right, start.scale * scaling))

    def _reset_start(self, adapter: str) -> None:
        if adapter in self.eblora_start:
            for key in ("left", "right", "scale"):
                getattr(self.eblora_start[adapter], key).copy_(getattr(self, PREFIX + key)[adapter])


class AlignedParameters(nn.ParameterDict):
    """A dictionary of parameters at aligned addresses, wherever they were loaded from."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Copy a parameter out of a file's buffer."""
        if param is not None:
            param.data = _aligned(param.data)
        super().register_parameter(name, param)


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
        super().__setattr__(name, _aligned(value) if isinstance(value, Tensor) else value)


@contextmanager
def adapter_names_passed(
    model: nn.Module, modules: Sequence[nn.Module], names: Sequence[str], *, beams: int = 1
) -> Iterator[None]:
    """Inside, each of ``modules`` is called with ``adapter_names``: one per member of the batch, or ``"__base__"``.

    In a beam search each name is repeated per beam, but not in the encoder of ``model``, which sees each input once.
    ValueError for a name that no layer has.
    """
    known = {name for layer in modules if isinstance(layer, NamedAdapters) for name in layer.eblora_left}
    if unknown := sorted({*names} - known - {"__base__"}):
        raise ValueError(f"adapter_names has {unknown[0]!r}: there are {', '.join(sorted(known))} and __base__")
    find = getattr(model, "get_encoder", None)
    encoder = find() if beams > 1 and find is not None else None
    inside = set(map(id, encoder.modules())) if isinstance(encoder, nn.Module) and encoder is not model else set()
    with ExitStack() as stack:
        for module in modules:
            repeated = [name for name in names for _ in range(1 if id(module) in inside else beams)]

            def hook(_: nn.Module, args: Any, kwargs: Any, repeated: list[str] = repeated) -> tuple[Any, Any]:
                return args, {**kwargs, "adapter_names": repeated}

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an aligned address: products of other memory round differently, so logits would not be equal."""
    odd = tensor.device.type == "cpu" and type(tensor) is Tensor and tensor.data_ptr() % ALIGNMENT
    return tensor.clone() if odd else tensor
