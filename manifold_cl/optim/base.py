"""The base optimizer's own step, taken on a bucket: as one tensor where that changes nothing, else as many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.optim.banks import VECTORS
from manifold_cl.optim.buckets import Bucket
from manifold_cl.optim.options import Group

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object


WITHOUT_DECAY = {"weight_decay": 0.0}
"""For points: decay is radial, and what an element-wise scaling or an average makes of it is not."""


class BaseStep(_Base):
    """Runs ``super().step()`` with parameters of our choice."""

    _written: dict[int, tuple[Group, dict[str, Any]]]
    """What the base optimizer wrote into its groups during this step, by the group's id."""

    def _base_on(self, group: Group, bucket: Bucket, y: Tensor, g: Tensor) -> list[Tensor]:
        """Let the base optimizer step from y along g, into y; what it averaged, if that is to be transported."""
        carried = group["moments"] == "transport"
        if bucket.bank is None:
            raw = [p.grad for p in bucket.parameters]
            try:
                for p, grad in zip(bucket.parameters, g.unbind(0), strict=True):
                    p.grad = grad
                with self._only(group, bucket.parameters, **WITHOUT_DECAY):
                    self._base_step()
            finally:
                for p, before in zip(bucket.parameters, raw, strict=True):
                    p.grad = before
            bucket.gather(y)
            names = [name for name in VECTORS if carried and name in self.state[bucket.parameters[0]]]
            return [torch.stack([self.state[p][name] for p in bucket.parameters]) for name in names]
        y.grad, self.state[y] = g, bucket.bank.state
        try:
            with self._only(group, [y], **WITHOUT_DECAY):
                self._base_step()
        finally:
            bucket.bank.state = self.state.pop(y)
            y.grad = None
        if bucket.bank.outdated():
            self.state.update(zip(bucket.parameters, bucket.bank.share(), strict=True))
        return bucket.bank.vectors() if carried else []

    def _put_back(self, bucket: Bucket, vectors: Sequence[Tensor]) -> None:
        names = [name for name in VECTORS if name in self.state[bucket.parameters[0]]]
        for name, slab in zip(names, vectors, strict=False):
            torch._foreach_copy_([self.state[p][name] for p in bucket.parameters], list(slab.unbind(0)))

    @contextmanager
    def _only(self, group: Group, params: Sequence[Tensor], **other: Any) -> Iterator[None]:
        """Inside, the base optimizer sees one group with these parameters, and these ``other`` options if it has them.

        What it writes there, counters and the like, is noted: every part of a group starts from the same values.
        """
        given = {**group, **{key: value for key, value in other.items() if key in group}, "params": params}
        groups, self.param_groups = self.param_groups, [dict(given)]
        try:
            yield
            (seen,) = self.param_groups
        finally:
            self.param_groups = groups
        for key, value in seen.items():
            if key not in given or value is not given[key]:
                _, noted = self._written.setdefault(id(group), (group, {}))
                if key in noted and not _equal(noted[key], value):
                    raise ValueError(
                        f"{self._base_class().__name__} writes {key!r} into a group, and another value for each of its "
                        "parameters: give every shape of parameter a group of its own"
                    )
                noted[key] = value

    def _keep_written(self) -> None:
        for group, noted in self._written.values():
            group.update(noted)
        self._written.clear()

    def _base_step(self) -> None:
        """The base class's step without torch's hook wrapper, which would run the user's hooks a second time."""
        step = cast(Any, super().step)
        if getattr(step, "hooked", False):
            step.__func__.__wrapped__(self)
        else:
            step()

    @classmethod
    def _base_class(cls) -> type[Optimizer]:
        """The optimizer class that was made Riemannian: the first after the step in the order of resolution."""
        order = cls.__mro__
        base: type[Optimizer] = order[order.index(BaseStep) + 1]
        return base


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
