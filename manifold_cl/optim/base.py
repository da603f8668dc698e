"""The base optimizer's own step: on the stacked state of a bucket, or once for all parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.optim.banks import VECTORS
from manifold_cl.optim.buckets import Bucket
from manifold_cl.optim.options import Group

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class BaseStep:
    """Steps an optimizer by the class that was made Riemannian.

    Args:
        optimizer: an instance of the Riemannian class.
        base: the class whose step is taken.
    """

    def __init__(self, optimizer: Any, base: type[Optimizer]) -> None:
        self.optimizer, self.base = optimizer, base

    def run(self) -> None:
        """One step of the base class on the groups as they are; the user's step hooks do not run."""
        step: Any = self.base.step
        plain = step.__wrapped__ if getattr(step, "hooked", False) else step
        # A base that calls its own parent's step would run the hooks, which torch wraps around each class's step.
        kept = {name: getattr(self.optimizer, name) for name in HOOKS}
        for name in HOOKS:
            setattr(self.optimizer, name, {})
        try:
            plain(self.optimizer)
        finally:
            for name, hooks in kept.items():
                setattr(self.optimizer, name, hooks)

    def run_on_bank(self, group: Group, bucket: Bucket, y: Tensor, g: Tensor) -> None:
        """Step y, all points of the bucket as one tensor, along g; their states lie in the bucket's bank."""
        assert bucket.bank is not None
        state = self.optimizer.state
        y.grad, state[y] = g, bucket.bank.state
        try:
            self.run_on(group, [y], weight_decay=0.0)
        finally:
            bucket.bank.state = state.pop(y)
            y.grad = None
        if bucket.bank.outdated():
            state.update(zip(bucket.parameters, bucket.bank.share(), strict=True))

    def run_on(self, group: Group, params: Sequence[Tensor], **other: Any) -> None:
        """Step these parameters alone, with the group's options and these ``other`` values of options it has."""
        other = {key: value for key, value in other.items() if key in group}
        groups, self.optimizer.param_groups = self.optimizer.param_groups, [{**group, **other, "params": params}]
        try:
            self.run()
        finally:
            self.optimizer.param_groups = groups

    def run_once(self, gradients: Mapping[Tensor, Tensor], points: Mapping[Tensor, Any]) -> None:
        """One ordinary step of all groups, with these gradients in place of the points' own.

        Points are stepped without weight decay, which is radial. A gradient that the base optimizer takes away stays
        away; others are put back.
        """
        raw = {p: p.grad for p in gradients}
        try:
            for p, gradient in gradients.items():
                p.grad = gradient
            with self._without_decay(points):
                self.run()
        finally:
            for p, gradient in gradients.items():
                if p.grad is gradient:
                    p.grad = raw[p]

    @contextmanager
    def _without_decay(self, points: Mapping[Tensor, Any]) -> Iterator[None]:
        """Inside, groups with points have no weight decay; Euclidean parameters beside them are a group of their own.

        Raises:
            ValueError: when the base optimizer writes different values into the two parts of a group.
        """
        groups: list[Group] = self.optimizer.param_groups
        hidden = [
            (group, group["weight_decay"], group["params"])
            for group in groups
            if group.get("weight_decay") and any(p in points for p in group["params"])
        ]
        beside: list[tuple[Group, Group]] = []
        for group, _, params in hidden:
            if rest := [p for p in params if p not in points]:
                beside.append((group, {**group, "params": rest}))
                group["params"] = [p for p in params if p in points]
            group["weight_decay"] = 0.0
        self.optimizer.param_groups = [*groups, *(other for _, other in beside)]
        try:
            yield
            for group, other in beside:
                for key in (group.keys() | other.keys()) - {"params", "weight_decay"}:
                    if not _equal(group.get(key), other.get(key)):
                        raise ValueError(
                            f"{self.base.__name__} writes {key!r} into a group, and another value for points, which "
                            "step without weight decay, than for other parameters: give these a group of their own"
                        )
        finally:
            self.optimizer.param_groups = groups
            for group, decay, params in hidden:
                group["weight_decay"], group["params"] = decay, params


def vectors_of(bucket: Bucket, state: Mapping[Tensor, Any]) -> list[Tensor]:
    """The base optimizer's averages of gradients of a bucket, (B, …) each; a copy where no bank holds them."""
    if bucket.bank is not None:
        return bucket.bank.vectors()
    return [torch.stack([state[p][name] for p in bucket.parameters]) for name in _averages(bucket, state)]


def put_back(bucket: Bucket, vectors: Sequence[Tensor], state: Mapping[Tensor, Any]) -> None:
    """Write `vectors_of` back where they were copies."""
    if bucket.bank is None:
        for name, slab in zip(_averages(bucket, state), vectors, strict=True):
            torch._foreach_copy_([state[p][name] for p in bucket.parameters], list(slab.unbind(0)))


def _averages(bucket: Bucket, state: Mapping[Tensor, Any]) -> list[str]:
    """Names under which every point of the bucket has an average of its own shape."""
    held = [state.get(p, {}) for p in bucket.parameters]
    return [
        name
        for name in VECTORS
        if all(
            isinstance(one.get(name), Tensor) and one[name].shape == p.shape
            for one, p in zip(held, bucket.parameters, strict=True)
        )
    ]


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
