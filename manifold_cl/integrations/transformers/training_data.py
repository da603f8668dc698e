"""The training examples of a task as datasets of a ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from manifold_cl.continual.losses import IGNORED
from manifold_cl.continual.methods.joint import Mixture
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import Split, Task

Example = dict[str, list[int]]


def encoded(task: Task, split: Split) -> list[Example] | None:
    """The examples that ``task.encode(split)`` returns, of every part of a mixture; None for a task without it."""
    if isinstance(task, Mixture):
        parts = [encoded(part, split) for part in task.tasks]
        return None if any(part is None for part in parts) else [each for part in parts for each in part or ()]
    encode = getattr(task, "encode", None)
    if encode is None:
        return None
    examples = list(encode(split))
    if masked := [i for i, each in enumerate(examples) if all(label == IGNORED for label in each["labels"])]:
        raise ValueError(
            f"task {task.name!r}: {len(masked)} of {len(examples)} {split} examples have no label but {IGNORED} "
            f"(first: {masked[0]}), so that their loss is a mean over nothing: raise max_length, or leave them out"
        )
    return examples


class TaskBatches(Dataset[Any]):
    """The batches of a task, one epoch at a time, in the order of the project's own loop.

    For tasks whose batches only their own ``loss`` reads. Items are whole batches.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._epoch = -1
        self._batches: list[Any] = []

    def __len__(self) -> int:
        return self._stage.task.batch_count("train", self._stage.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch; the Trainer calls this."""
        if epoch != self._epoch:
            order = self._stage.generator(f"order {epoch}")
            batches = self._stage.task.batches("train", batch_size=self._stage.batch_size, generator=order)
            self._epoch, self._batches = epoch, list(batches)

    def __getitem__(self, index: int) -> Any:
        if self._epoch < 0:
            self.set_epoch(0)
        return self._batches[index]


class Collator:
    """Pads examples of `encoded` on the right; labels with -100.

    Args:
        pad: token of padding, which the attention mask hides.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    @classmethod
    def of(cls, tokenizer: Any) -> Collator:
        """With a tokenizer's padding token, its end token where it has none, 0 without a tokenizer."""
        tokens = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return cls(next((token for token in tokens if isinstance(token, int)), 0))

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tensors (batch, length) by name."""
        fill = {"input_ids": self.pad, "attention_mask": 0, "labels": IGNORED}
        length = max(len(each["input_ids"]) for each in examples)
        return {
            key: torch.tensor([[*each[key], *[value] * (length - len(each[key]))] for each in examples])
            for key, value in fill.items()
        }


def tokenizer_of(task: Task) -> Any:
    """The tokenizer of a task, or of the first part of a mixture; None where it has none."""
    if isinstance(task, Mixture):
        task = task.tasks[0]
    holder = getattr(task, "encoder", task)
    return getattr(holder, "tokenizer", None)
