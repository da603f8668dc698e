"""A task of visual instructions: the loss of its reference answers, and the scores of the model's answers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.continual.ranks import Ranks, tensor_digest
from manifold_cl.continual.task import Split
from manifold_cl.files import VERSION, write_json
from manifold_cl.streams import llava
from manifold_cl.streams.answers import AnswerBook
from manifold_cl.streams.instructions import Instruction
from manifold_cl.streams.scorers import score
from manifold_cl.streams.stored_task import StoredTask, cut

SCORES_FORMAT = "manifold_cl.scores"

Batch = tuple[Instruction, ...]


class InstructionTask(StoredTask[Batch]):
    """Questions about images: training on reference answers, scores of the model's answers.

    Images are opened when a batch is used. Under several ranks each answers its share of the questions, and all return
    the same scores.

    Args:
        name: the task's name.
        parts: split → its items.
        collator: turns items into tensors.
        rules: of scoring, in the form of `scorers.score`.
        max_new_tokens: tokens after which an answer ends.
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
        super().__init__(name, {split: tuple(items) for split, items in parts.items()})
        self.collator = collator
        self.rules = dict(rules)
        self.max_new_tokens = max_new_tokens
        self.answer_batch = answer_batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        return llava.loss(model, self.collator.for_training(batch))

    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """``score`` in percent, by the task's rule, of greedily decoded answers. Writes no file."""
        with tempfile.TemporaryDirectory() as folder:
            return self.evaluate(model, split, Path(folder))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, folder: Path) -> Mapping[str, float]:
        """`scores`, with answers and scores written to ``folder``.

        A question with an answer there, of a model with the same weights to the last bit, is not asked again.
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
        unanswered = sorted((i for i in range(len(items)) if i not in answered), key=lambda i: _length(items[i]))
        (open_questions, *_) = ranks.all_gather(unanswered)
        with closing(book.open()) as file:
            for indices in cut(ranks.share(open_questions), self.answer_batch):
                batch = self.collator.for_answering([items[i] for i in indices])
                answers = llava.answers(model, batch, self.collator.processor, max_new_tokens=self.max_new_tokens)
                for i, answer in zip(indices, answers, strict=True):
                    book.add(file, _entry(i, items[i], answer))
        ranks.barrier()
        (scores, *_) = ranks.all_gather(self._scored(book, items, folder, header) if ranks.writes else {})
        return {"score": scores["score"]}

    def _scored(
        self, book: AnswerBook, items: Sequence[Instruction], folder: Path, header: Mapping[str, Any]
    ) -> dict[str, float]:
        entries = book.read()
        answers = [entries[i]["answer"] for i in range(len(items))]
        sources = [item.images[0] if item.images else "" for item in items]
        scores = score(self.rules, answers, [item.references for item in items], sources)
        content = {"format": SCORES_FORMAT, "version": VERSION, **header, "items": len(items), "scores": scores}
        write_json(folder / "scores.json", content)
        return scores

    def _header(self, model: nn.Module, split: Split) -> dict[str, Any]:
        return {
            "task": self.name,
            "split": split,
            "settings": {
                "rules": self.rules,
                "template": self.collator.template.asked([("", "")], images=1, image_token="<image>", end=""),
                "aspect": self.collator.aspect,
                "max_new_tokens": self.max_new_tokens,
                "items_sha256": hashlib.sha256(repr(self.part(split)).encode()).hexdigest(),
            },
            "weights": tensor_digest(model.parameters()),
        }

    def _lengths(self, split: Split) -> Sequence[int]:
        return [_length(item) for item in self.part(split)]

    def _batch(self, part: Batch, indices: Sequence[int]) -> Batch:
        return tuple(part[i] for i in indices)


def _entry(index: int, item: Instruction, answer: str) -> dict[str, Any]:
    content = {"key": item.key, "image": item.images, "question": item.question, "references": item.references}
    return {"index": index, **content, "answer": answer}


def _length(item: Instruction) -> int:
    return sum(len(question) + len(answer) for question, answer in item.turns)
