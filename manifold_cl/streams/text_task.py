"""Text classification by similarity: a text gets the label whose encoding is nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_cl.continual.task import Split
from manifold_cl.streams.stored_task import StoredTask, cut

LOGIT_SCALE = 20.0
"""Factor from cosines to logits, the inverse temperature of the softmax."""
SCORING_BATCH = 64
LABEL_TOKENS = 32
"""More than in any label."""


@dataclass(frozen=True)
class TextBatch:
    """Texts, each with the index of its label in the task."""

    texts: tuple[str, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


def _count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


class TextTask(StoredTask[TextBatch]):
    """A text classification task: the label with the most similar encoding is the answer, as in CLIP.

    The model is called as ``model(texts, max_tokens)`` and returns unit vectors. Labels go through the same model as
    texts, with gradient, so training changes both encodings.

    Args:
        name: the task's name.
        labels: label texts, in the order of targets.
        candidates: label texts of all tasks of the stream, for the ``union`` score; includes ``labels``.
        max_tokens: tokens after which texts are truncated.
        parts: split → texts and their targets.
        count_tokens: lengths of texts, to batch texts of similar length; number of words by default.
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        *,
        candidates: Sequence[str],
        max_tokens: int,
        parts: Mapping[Split, TextBatch],
        count_tokens: Callable[[Sequence[str]], Sequence[int]] = _count_words,
    ) -> None:
        super().__init__(name, parts)
        self.labels = tuple(labels)
        self.candidates = tuple(dict.fromkeys(candidates))
        self.max_tokens = max_tokens
        self._count_tokens = count_tokens
        self._token_counts: dict[Split, list[int]] = {}
        if missing := [label for label in self.labels if label not in self.candidates]:
            raise ValueError(f"candidates of task {name!r} must include its labels, {missing[0]!r} is missing")

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:
        """Cross-entropy over the task's own labels of logits ``20 cos(f(text), f(label))``."""
        texts: Tensor = model(batch.texts, self.max_tokens)
        labels: Tensor = model(self.labels, LABEL_TOKENS)
        targets = torch.tensor(batch.targets, device=texts.device)
        return nn.functional.cross_entropy(LOGIT_SCALE * texts @ labels.T, targets)

    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """Accuracies in percent: ``known`` among the task's own labels, ``union`` among those of all tasks."""
        known, union, _ = self._answers(model, split)
        return {"known": 100 * sum(known) / len(known), "union": 100 * sum(union) / len(union)}

    def example_scores(self, model: nn.Module, split: Split = "test") -> list[float]:
        """100 per text whose label is right among the task's own, else 0."""
        return [100.0 * each for each in self._answers(model, split)[0]]

    def measure(self, model: nn.Module, split: Split, *, batch_size: int = SCORING_BATCH) -> dict[str, float]:
        """As `Task.measure`, from one pass."""
        known, _, loss = self._answers(model, split, batch_size)
        return {"score": 100 * sum(known) / len(known), "loss": loss}

    @torch.no_grad()
    def _answers(
        self, model: nn.Module, split: Split, batch_size: int = SCORING_BATCH
    ) -> tuple[list[bool], list[bool], float]:
        """Whether each text's label is right among the task's own labels, and among those of all tasks; mean loss."""
        part = self.part(split)
        if not len(part):
            raise ValueError(f"task {self.name!r} has no {split} texts to score")
        candidates: Tensor = model(self.candidates, LABEL_TOKENS)
        own = torch.tensor([self.candidates.index(label) for label in self.labels], device=candidates.device)
        by_length = sorted(range(len(part)), key=self._lengths(split).__getitem__)
        known, union, loss = [False] * len(part), [False] * len(part), 0.0
        for indices in cut(by_length, batch_size):
            batch = self._batch(part, indices)
            similarities = model(batch.texts, self.max_tokens) @ candidates.T
            targets = torch.tensor(batch.targets, device=candidates.device)
            right = (similarities[:, own].argmax(dim=1) == targets).tolist()
            of_all = (similarities.argmax(dim=1) == own[targets]).tolist()
            loss += float(nn.functional.cross_entropy(LOGIT_SCALE * similarities[:, own], targets, reduction="sum"))
            for index, first, second in zip(indices, right, of_all, strict=True):
                known[index], union[index] = first, second
        return known, union, loss / len(part)

    def _lengths(self, split: Split) -> Sequence[int]:
        if split not in self._token_counts:
            counts = self._count_tokens(self.part(split).texts)
            self._token_counts[split] = [min(count, self.max_tokens) for count in counts]
        return self._token_counts[split]

    def _batch(self, part: TextBatch, indices: Sequence[int]) -> TextBatch:
        return TextBatch(tuple(part.texts[i] for i in indices), tuple(part.targets[i] for i in indices))
