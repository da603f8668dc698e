"""Tasks whose items are answered in text, into files from which an interrupted evaluation continues."""

from __future__ import annotations

import hashlib
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from manifold_cl.adapters.frozen_updates import kept_updates
from manifold_cl.continual.ranks import Ranks, tensor_digest
from manifold_cl.continual.task import Split
from manifold_cl.files import VERSION, write_json
from manifold_cl.rules import validate_whole
from manifold_cl.streams.answers import AnswerBook
from manifold_cl.streams.stored_task import StoredTask, cut

SCORES_FORMAT = "manifold_cl.scores"

Item = TypeVar("Item")


class AnsweringTask(StoredTask[tuple[Item, ...]], Generic[Item]):
    """Items with reference answers, and the scores of the model's answers to them.

    Under several ranks each answers its share, and all return the same scores.

    Args:
        name: the task's name.
        parts: split → its items.
        answer_batch: items answered together.
    """

    def __init__(self, name: str, parts: Mapping[Split, Sequence[Item]], *, answer_batch: int) -> None:
        super().__init__(name, {split: tuple(items) for split, items in parts.items()})
        validate_whole("answer_batch", answer_batch)
        self.answer_batch = answer_batch

    @abstractmethod
    def answer(self, model: nn.Module, items: Sequence[Item]) -> list[str]:
        """The model's answer to each item."""

    @abstractmethod
    def score_answers(self, answers: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
        """Scores in percent of all answers, the primary one first."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What determines the answers and scores besides model and items: plain values."""

    @abstractmethod
    def entry(self, item: Item) -> dict[str, Any]:
        """What the answer file holds of an item: plain values."""

    @abstractmethod
    def length(self, item: Item) -> int:
        """A measure of an item's length, by which batches are made."""

    def digest(self) -> str:
        """A digest of the settings and of every item."""
        return hashlib.sha256(repr((self.settings(), self.parts)).encode()).hexdigest()

    def reported(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Those of the scores that go into the record; all by default."""
        return dict(scores)

    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """The reported scores. Writes no file that stays."""
        with tempfile.TemporaryDirectory() as folder:
            return self.evaluate(model, split, Path(folder))

    @torch.no_grad()
    def example_scores(self, model: nn.Module, split: Split = "test") -> list[float] | None:
        """The primary score of each item's answer alone. Writes no file; one process answers all items."""
        items = self.part(split)
        answers = [""] * len(items)
        for indices in cut(sorted(range(len(items)), key=lambda i: self.length(items[i])), self.answer_batch):
            for i, answer in zip(indices, self.answer(model, [items[i] for i in indices]), strict=True):
                answers[i] = answer
        return [self._primary(answer, item) for answer, item in zip(answers, items, strict=True)]

    def _primary(self, answer: str, item: Item) -> float:
        return next(iter(self.score_answers([answer], [item]).values()))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, folder: Path) -> Mapping[str, float]:
        """`scores`, with answers and scores written to ``folder``.

        An item with an answer there, of a model with the same weights to the last bit, is not asked again.
        """
        items, ranks = self.part(split), Ranks.current()
        if not items:
            raise ValueError(f"task {self.name!r} has no {split} items to score")
        header = self._header(model, split)
        book = AnswerBook(folder, header, rank=ranks.index)
        if ranks.writes:
            book.clear_others()
        ranks.barrier()
        answered = book.read()
        # All ranks take the first rank's list, since another rank may read the folder when writing has begun.
        unanswered = sorted((i for i in range(len(items)) if i not in answered), key=lambda i: self.length(items[i]))
        (open_items, *_) = ranks.all_gather(unanswered)
        with closing(book.open()) as file:
            for indices in cut(ranks.share(open_items), self.answer_batch):
                answers = self.answer(model, [items[i] for i in indices])
                for i, answer in zip(indices, answers, strict=True):
                    book.add(file, {"index": i, **self.entry(items[i]), "answer": answer})
        ranks.barrier()
        (scores, *_) = ranks.all_gather(self._scored(book, items, folder, header) if ranks.writes else {})
        return self.reported(scores)

    def _scored(
        self, book: AnswerBook, items: Sequence[Item], folder: Path, header: Mapping[str, Any]
    ) -> dict[str, float]:
        entries = book.read()
        scores = self.score_answers([entries[i]["answer"] for i in range(len(items))], items)
        content = {"format": SCORES_FORMAT, "version": VERSION, **header, "items": len(items), "scores": scores}
        write_json(folder / "scores.json", content)
        return scores

    def _header(self, model: nn.Module, split: Split) -> dict[str, Any]:
        items = hashlib.sha256(repr(self.part(split)).encode()).hexdigest()
        return {
            "task": self.name,
            "split": split,
            "settings": {**self.settings(), "items_sha256": items},
            "weights": tensor_digest(chain(model.parameters(), _beside(model))),
        }

    def _lengths(self, split: Split) -> Sequence[int]:
        return [self.length(item) for item in self.part(split)]

    def _batch(self, part: tuple[Item, ...], indices: Sequence[int]) -> tuple[Item, ...]:
        return tuple(part[i] for i in indices)


def _beside(model: nn.Module) -> Iterator[Tensor]:
    """The factors of updates that act beside the weights: they are no parameters, and determine answers too."""
    for updates in kept_updates(model).values():
        for update in updates:
            yield from (update.weighted_left(), update.right)
