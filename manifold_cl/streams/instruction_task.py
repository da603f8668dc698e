"""A task of visual instructions: the loss of its reference answers, and the scores of the model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from manifold_cl.continual.task import Split
from manifold_cl.streams import llava
from manifold_cl.streams.answering import AnsweringTask
from manifold_cl.streams.instructions import Instruction
from manifold_cl.streams.scorers import CAPTIONS, score

Batch = tuple[Instruction, ...]


class InstructionTask(AnsweringTask[Instruction]):
    """Questions about images: training on reference answers, scores of the model's greedily decoded answers.

    Images are opened when a batch is used. ``score`` is in percent, by the task's rule.

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
        super().__init__(name, parts, answer_batch=answer_batch)
        self.collator = collator
        self.rules = dict(rules)
        self.max_new_tokens = max_new_tokens

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        return llava.loss(model, self.collator.for_training(batch))

    def answer(self, model: nn.Module, items: Sequence[Instruction]) -> list[str]:
        """The greedily decoded answers."""
        batch = self.collator.for_answering(items)
        return llava.answers(model, batch, self.collator.processor, max_new_tokens=self.max_new_tokens)

    def score_answers(self, answers: Sequence[str], items: Sequence[Instruction]) -> dict[str, float]:
        """``score``, and for captions the metrics that it is the mean of."""
        sources = [item.images[0] if item.images else "" for item in items]
        return score(self.rules, answers, [item.references for item in items], sources)

    def example_scores(self, model: nn.Module, split: Split = "test") -> list[float] | None:
        """The score of each answer alone; None for captions, whose metrics are of a corpus."""
        return None if self.rules[""] == CAPTIONS else super().example_scores(model, split)

    def reported(self, scores: Mapping[str, float]) -> dict[str, float]:
        """``score`` alone: tasks of one stream have the same scores."""
        return {"score": scores["score"]}

    def settings(self) -> dict[str, Any]:
        """Rules, template, images' shape, and the longest answer."""
        return {
            "rules": self.rules,
            "template": self.collator.template.asked([("", "")], images=1, image_token="<image>", end=""),
            "aspect": self.collator.aspect,
            "max_new_tokens": self.max_new_tokens,
        }

    def entry(self, item: Instruction) -> dict[str, Any]:
        """Key, images, question and references."""
        return {"key": item.key, "image": item.images, "question": item.question, "references": item.references}

    def length(self, item: Instruction) -> int:
        """Characters of all turns."""
        return sum(len(question) + len(answer) for question, answer in item.turns)
