"""Named adapters that are merged into their base layer and taken out again, or act on members of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.bases import plain_weight
from manifold_cl.adapters.frames import require_points
from manifold_cl.adapters.merging import merge_into, restore
from manifold_cl.adapters.named import NamedAdapters


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
        require_points(
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
