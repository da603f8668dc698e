"""Text classification by similarity: a text belongs to the label whose own encoding is nearest to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_cl.continual.task import Split, Task

LOGIT_SCALE = 20.0
"""Factor from cosines to logits, the inverse temperature of the softmax."""
WINDOW = 6
"""Batches whose texts are sorted by length together."""
SCORING_BATCH = 64
LABEL_TOKENS = 32
"""Longer than any label, so that none is cut."""


@dataclass(frozen=True)
class TextBatch:
    """Texts with the index of each one's label among the labels of its task."""

    texts: tuple[str, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


def _count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


class TextTask(Task):
    """A text classification task that is solved the way CLIP matches images with captions.

    The model is called as ``model(texts, max_tokens)`` and returns unit vectors. Labels go through the
    same, current model as texts do, with gradient, so training moves both sides of the comparison.

    Args:
        name: the task's name.
        labels: label texts, in the order that targets count them.
        rivals: label texts of all tasks of the stream, for the ``union`` score; includes ``labels``.
        max_tokens: where texts are cut.
        parts: for each split, texts and their targets.
        count_tokens: lengths of texts, to put texts of similar length in one batch; words by default.
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        *,
        rivals: Sequence[str],
        max_tokens: int,
        parts: Mapping[Split, TextBatch],
        count_tokens: Callable[[Sequence[str]], Sequence[int]] = _count_words,
    ) -> None:
        self.name = name
        self.labels = tuple(labels)
        self.rivals = tuple(dict.fromkeys(rivals))
        self.max_tokens = max_tokens
        self.parts = dict(parts)
        self._count_tokens = count_tokens
        self._lengths: dict[Split, list[int]] = {}
        missing = [label for label in self.labels if label not in self.rivals]
        if missing:
            raise ValueError(f"rivals of task {name!r} must include its labels, {missing[0]!r} is missing")

    def size(self, split: Split) -> int:
        """Number of texts in ``split``."""
        return len(self._part(split))

    def batches(
        self, split: Split, *, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[TextBatch]:
        """One pass over ``split``: in stored order, or shuffled by ``generator`` into batches of similar length.

        Shuffled texts are sorted by length inside windows of six batches, whose batches are then shuffled:
        less padding, at the price that batch mates are alike in length.
        """
        part = self._part(split)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if generator is None:
            yield from _batches(part, range(len(part)), batch_size)
            return
        lengths = self._measured(split)
        order = torch.randperm(len(part), generator=generator).tolist()
        for start in range(0, len(order), WINDOW * batch_size):
            window = sorted(order[start : start + WINDOW * batch_size], key=lengths.__getitem__)
            mates = list(_batches(part, window, batch_size))
            for i in torch.randperm(len(mates), generator=generator).tolist():
                yield mates[i]

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:
        """Cross-entropy over the task's own labels of logits ``20 cos(f(text), f(label))``."""
        texts: Tensor = model(batch.texts, self.max_tokens)
        labels: Tensor = model(self.labels, LABEL_TOKENS)
        targets = torch.tensor(batch.targets, device=texts.device)
        return nn.functional.cross_entropy(LOGIT_SCALE * texts @ labels.T, targets)

    @torch.no_grad()
    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """Accuracies in percent: ``known`` among the task's own labels, ``union`` among all of the stream's."""
        part = self._part(split)
        if not len(part):
            raise ValueError(f"task {self.name!r} has no {split} texts to score")
        rivals: Tensor = model(self.rivals, LABEL_TOKENS)
        own = torch.tensor([self.rivals.index(label) for label in self.labels], device=rivals.device)
        by_length = sorted(range(len(part)), key=self._measured(split).__getitem__)
        known = union = 0
        for batch in _batches(part, by_length, SCORING_BATCH):
            similarities = model(batch.texts, self.max_tokens) @ rivals.T
            targets = torch.tensor(batch.targets, device=rivals.device)
            known += int((similarities[:, own].argmax(dim=1) == targets).sum())
            union += int((similarities.argmax(dim=1) == own[targets]).sum())
        return {"known": 100 * known / len(part), "union": 100 * union / len(part)}

    def _measured(self, split: Split) -> list[int]:
        if split not in self._lengths:
            counts = self._count_tokens(self._part(split).texts)
            self._lengths[split] = [min(count, self.max_tokens) for count in counts]
        return self._lengths[split]

    def _part(self, split: Split) -> TextBatch:
        if split not in self.parts:
            raise ValueError(f"task {self.name!r} has no split {split!r}, choose from {', '.join(self.parts)}")
        return self.parts[split]


def _batches(part: TextBatch, order: Sequence[int], batch_size: int) -> Iterator[TextBatch]:
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield TextBatch(tuple(part.texts[i] for i in chosen), tuple(part.targets[i] for i in chosen))
