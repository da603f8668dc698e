"""A task of visual instructions: the loss of its answers, and scores of what the model says."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.continual.ranks import Ranks, fingerprint
from manifold_cl.continual.task import Split, Task
from manifold_cl.files import VERSION, write_json
from manifold_cl.streams import llava
from manifold_cl.streams.answers import AnswerBook
from manifold_cl.streams.instructions import Instruction
from manifold_cl.streams.scorers import score

SCORES_FORMAT = "manifold_cl.scores"
WINDOW = 6
"""Batches whose items are sorted by length together."""

Batch = tuple[Instruction, ...]


class InstructionTask(Task):
    """Questions about images, learned from their answers and scored by what the model says.

    Images are opened when a batch is used, not before. Under several ranks each answers its share of the questions
    and all return the same scores.

    Args:
        name: the task's name.
        parts: the items of each split.
        collator: makes tensors of them.
        rules: how answers are scored, as `scorers.score` takes it.
        max_new_tokens: where answers end at the latest.
        answer_batch: questions answered together.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[Split, Sequence[Instruction]],
        *,
        collator: llava.Collator,
        rules: Mapping[str, str],
        max_new_tokens: int = 1024,
        answer_batch: int = 8,
    ) -> None:
        self.name = name
        self.parts = {split: tuple(items) for split, items in parts.items()}
        self.collator = collator
        self.rules = dict(rules)
        self.max_new_tokens = max_new_tokens
        self.answer_batch = answer_batch

    def size(self, split: Split) -> int:
        """Number of items in ``split``."""
        return len(self._part(split))

    def batches(self, split: Split, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass over ``split``: in stored order, or shuffled by ``generator`` into batches of similar length.

        Shuffled items are sorted by the length of their texts inside windows of six batches, whose batches are then
        shuffled: less padding, at the price that batch mates are alike in length.
        """
        items = self._part(split)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if generator is None:
            yield from _cut(items, batch_size)
            return
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(order), WINDOW * batch_size):
            window = sorted((items[i] for i in order[start : start + WINDOW * batch_size]), key=_length)
            mates = list(_cut(window, batch_size))
            for i in torch.randperm(len(mates), generator=generator).tolist():
                yield mates[i]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        return llava.loss(model, self.collator.for_training(batch))

    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """``score`` in percent, by the task's rule, of greedily decoded answers; nothing is kept on disk."""
        with tempfile.TemporaryDirectory() as folder:
            return self.evaluate(model, split, Path(folder))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, folder: Path) -> Mapping[str, float]:
        """As `scores`; answers and scores are files in ``folder``, and answers already there are not asked again.

        Answers count only if the model's weights are those that gave them, to the bit.
        """
        items, ranks = self._part(split), Ranks.present()
        if not items:
            raise ValueError(f"task {self.name!r} has no {split} items to score")
        header = self._header(model, split)
        book = AnswerBook(folder, header, rank=ranks.index)
        if ranks.writes:
            book.clear_others()
        ranks.barrier()
        known = book.read()
        # The first rank's list for all: another rank may look only after the first has begun to write.
        unanswered = sorted((i for i in range(len(items)) if i not in known), key=lambda i: _length(items[i]))
        (open_questions, *_) = ranks.gathered(unanswered)
        with closing(book.open()) as file:
            for indices in _cut(ranks.share(open_questions), self.answer_batch):
                batch = self.collator.for_answering([items[i] for i in indices])
                said = llava.answers(model, batch, self.collator.processor, max_new_tokens=self.max_new_tokens)
                for i, answer in zip(indices, said, strict=True):
                    book.add(file, _entry(i, items[i], answer))
        ranks.barrier()
        (found, *_) = ranks.gathered(self._scored(book, items, folder, header) if ranks.writes else {})
        return {"score": found["score"]}

    def _scored(
        self, book: AnswerBook, items: Sequence[Instruction], folder: Path, header: Mapping[str, Any]
    ) -> dict[str, float]:
        known = book.read()
        given = [known[i]["answer"] for i in range(len(items))]
        sources = [item.images[0] if item.images else "" for item in items]
        found = score(self.rules, given, [item.references for item in items], sources)
        content = {"format": SCORES_FORMAT, "version": VERSION, **header, "items": len(items), "scores": found}
        write_json(folder / "scores.json", content)
        return found

    def _header(self, model: nn.Module, split: Split) -> dict[str, Any]:
        digest = hashlib.sha256(repr(self._part(split)).encode()).hexdigest()
        return {
            "task": self.name,
            "split": split,
            "settings": {
                "rules": self.rules,
                "template": self.collator.template.asked([("", "")], images=1, image_token="<image>", end=""),
                "aspect": self.collator.aspect,
                "max_new_tokens": self.max_new_tokens,
                "items_sha256": digest,
            },
            "weights": fingerprint(model.parameters()),
        }

    def _part(self, split: Split) -> tuple[Instruction, ...]:
        if split not in self.parts:
            raise ValueError(f"task {self.name!r} has no split {split!r}, choose from {', '.join(self.parts)}")
        return self.parts[split]


def _entry(index: int, item: Instruction, answer: str) -> dict[str, Any]:
    return {
        "index": index,
        "key": item.key,
        "image": list(item.images),
        "question": item.question,
        "references": list(item.references),
        "answer": answer,
    }


def _length(item: Instruction) -> int:
    return sum(len(question) + len(answer) for question, answer in item.turns)


def _cut(items: Sequence[Any], size: int) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])
