"""Bytes of scratch memory that a step of `RiemannianAdamW` needs, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manifold_cl.optim.buckets import Member, bucketed
from manifold_cl.optim.polar import DUAL, DUAL_ROWS, OWN_BASIS

BASE_STEP = 2
"""Temporary slabs of AdamW's own step on an accelerator: the root of the second moments, and its quotient."""


@dataclass(frozen=True)
class StepScratch:
    """Bytes of a step beside parameters, gradients and moments.

    ``slabs`` hold points, gradients and results, ``stacked`` the copies of protected bases by bucket, ``temporary``
    what the base optimizer allocates inside its own step.
    """

    slabs: int
    stacked: int
    temporary: int

    @property
    def total(self) -> int:
        """All together."""
        return self.slabs + self.stacked + self.temporary


def step_scratch(members: Iterable[Member], *, ranks: int = 1) -> StepScratch:
    """Scratch memory of one step of an element-wise base optimizer, polar retraction, on restricted Stiefel manifolds.

    Args:
        members: points and their manifolds, on any device, ``meta`` for none; their device decides the slabs' size.
        ranks: processes that each hold an equal part of the rows (FSDP2).
    """
    results = stacked = 0
    slabs: dict[str, int] = {}
    for bucket in bucketed(members):
        p = bucket[0].parameter
        count, (n, r), width = len(bucket), p.shape[-2:], max(member.manifold.width for member in bucket)
        rows, on_cpu = -(-n // ranks), p.device.type == "cpu"
        size = count * rows * r * p.element_size()
        results += size
        if width >= DUAL * n and n <= DUAL_ROWS and all(member.manifold.width > n // 2 for member in bucket):
            width = n - min(member.manifold.width for member in bucket)
        own = on_cpu and 4 * rows * width >= OWN_BASIS and all(member.manifold.width for member in bucket)
        stacked += 0 if own else 4 * count * rows * width
        needed = {"x": size, "g": size, "product": size, "inside": 4 * count * r * width, "gram": 4 * count * r * r}
        slabs = {name: max(slabs.get(name, 0), nbytes) for name, nbytes in needed.items()}
    return StepScratch(results + sum(slabs.values()), stacked, BASE_STEP * slabs.get("x", 0))
