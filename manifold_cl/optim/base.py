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


class BaseStep(_Base):
    """Runs ``super().step()`` with parameters of our choice."""

    def _base_on(self, group: Group, bucket: Bucket, y: Tensor, g: Tensor) -> list[Tensor]:
        """Let the base optimizer step from y along g, into y; what it averaged, if that is to be transported."""
        carried = group["moments"] == "transport"
        if bucket.bank is None:
            raw = [p.grad for p in bucket.parameters]
            try:
                for p, grad in zip(bucket.parameters, g.unbind(0), strict=True):
                    p.grad = grad
                with self._only(group, bucket.parameters):
                    self._base_step()
            finally:
                for p, before in zip(bucket.parameters, raw, strict=True):
                    p.grad = before
            bucket.gather(y)
            names = [name for name in VECTORS if carried and name in self.state[bucket.parameters[0]]]
            return [torch.stack([self.state[p][name] for p in bucket.parameters]) for name in names]
        y.grad, self.state[y] = g, bucket.bank.state
        try:
            with self._only(group, [y]):
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
    def _only(self, group: Group, params: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the base optimizer sees one group with these parameters."""
        groups, self.param_groups = self.param_groups, [{**group, "params": params}]
        try:
            yield
        finally:
            self.param_groups = groups

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
