"""Tasks whose examples are held in memory, in batches of similar length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Generic, TypeVar

import torch

from manifold_cl.continual.task import Split, Task
from manifold_cl.rules import validate_whole

WINDOW = 6
"""Batches whose examples are sorted by length together."""

Examples = TypeVar("Examples", bound=Sized)


class StoredTask(Task, Generic[Examples]):
    """A task with the examples of each split.

    Args:
        name: the task's name.
        parts: split → its examples.
    """

    def __init__(self, name: str, parts: Mapping[Split, Examples]) -> None:
        self.name = name
        self.parts = dict(parts)

    def size(self, split: Split) -> int:
        """Number of examples in ``split``."""
        return len(self.part(split))

    def part(self, split: Split) -> Examples:
        """The examples of ``split``; ValueError for an unknown one."""
        if split not in self.parts:
            raise ValueError(f"task {self.name!r} has no split {split!r}, choose from {', '.join(self.parts)}")
        return self.parts[split]

    def batches(self, split: Split, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Any]:
        """One pass over ``split``: in stored order, or shuffled by ``generator`` into batches of similar length.

        Shuffled examples are sorted by length within windows of six batches, which are then shuffled. That saves
        padding.
        """
        part = self.part(split)
        validate_whole("batch_size", batch_size)
        if generator is None:
            yield from (self._batch(part, indices) for indices in cut(range(len(part)), batch_size))
            return
        lengths = self._lengths(split)
        order = torch.randperm(len(part), generator=generator).tolist()
        for indices in cut(order, WINDOW * batch_size):
            batches = list(cut(sorted(indices, key=lengths.__getitem__), batch_size))
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield self._batch(part, batches[i])

    @abstractmethod
    def _lengths(self, split: Split) -> Sequence[int]:
        """The length of every example of ``split``."""

    @abstractmethod
    def _batch(self, part: Examples, indices: Sequence[int]) -> Any:
        """The batch of these examples."""


def cut(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of ``size`` items; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
