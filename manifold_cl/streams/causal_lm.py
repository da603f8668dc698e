"""A task in text for causal language models: prompts, reference answers, and the scores of the model's answers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from manifold_cl.continual.losses import IGNORED
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.task import Split
from manifold_cl.streams.answering import AnsweringTask
from manifold_cl.streams.causal_tokens import (
    TextEncoder,
    Tokens,
    answer_loss,
    greedy_answers,
    option_log_likelihoods,
)
from manifold_cl.streams.language_model import validate_tokenizer
from manifold_cl.streams.scorers import credit, exact, score, validate_rule
from manifold_cl.streams.stored_task import cut

ScoreBy = Literal["generation", "likelihood", "loss"]

logger = logging.getLogger("manifold_cl")


@dataclass(frozen=True)
class TextExample:
    """A prompt and its answer, as the model reads and writes them: with every blank and template mark in place.

    Args:
        prompt: everything before the answer.
        answer: what is learned.
        references: accepted answers; the answer alone if empty.
        options: the legal answers of this example; those of the task if empty.
        source: where it comes from, such as ``"train.jsonl:17"``, for messages.
    """

    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    source: str = ""


class CausalLMTask(AnsweringTask[TextExample]):
    """Prompts and answers for a causal language model: training on answers, scores of the model's own answers.

    ``score`` is in percent. By ``"generation"`` answers are decoded greedily, and ``drift`` is the share of answers
    that are no legal answer: none of the options, or empty where there are none. By ``"likelihood"`` the option with
    the largest ``log p(option | prompt)`` is the answer, which is cheaper. By ``"loss"`` the score is
    ``100 exp(−loss)``, the geometric mean of the probabilities of the answers' tokens, beside the perplexity.

    Args:
        name: the task's name.
        parts: split → its examples.
        tokenizer: of the model, from transformers.
        rule: of `RULES`, or ``"sari"`` with the prompt as source: compares an answer with its references.
        options: legal answers of all examples that name none.
        max_length: tokens of prompt and answer together. A longer prompt loses its beginning, with a warning.
        max_new_tokens: tokens after which a generated answer ends.
        score_by: ``"generation"``, ``"likelihood"`` or ``"loss"``.
        answer_batch: examples answered together.

    Raises:
        ValueError: for an unknown rule or way of scoring, ``"likelihood"`` for examples without options, or an answer
            that is empty or none of its options.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[Split, Sequence[TextExample]],
        *,
        tokenizer: Any,
        rule: str = "exact",
        options: Sequence[str] = (),
        max_length: int = 512,
        max_new_tokens: int = 32,
        score_by: ScoreBy = "generation",
        answer_batch: int = 32,
    ) -> None:
        super().__init__(name, parts, answer_batch=answer_batch)
        validate_rule(rule, f"task {name!r}: ")
        self.encoder = TextEncoder(tokenizer, max_length)
        if not 1 <= max_new_tokens < max_length and score_by == "generation":
            raise ValueError(
                f"task {name!r}: max_new_tokens is from 1 to max_length - 1, got {max_new_tokens} of {max_length}: it "
                "would leave no room for the prompt"
            )
        self.rule, self.options, self.score_by = rule, tuple(options), score_by
        self.max_new_tokens = max_new_tokens
        self._tokens: dict[Split, list[Tokens]] = {}
        self._of_example: dict[TextExample, Tokens] = {}
        self._warned: set[Split] = set()
        self._validate_all()

    def scored_by(self, score_by: ScoreBy) -> CausalLMTask:
        """The same task, scored in another way; ValueError where its examples do not allow it."""
        other = copy.copy(self)
        other.score_by, other._warned = score_by, set()
        other._validate_all()
        return other

    def validate_model(self, model: nn.Module) -> None:
        """Raise ValueError for a model without an embedding of some token, and warn of a tokenizer of another model."""
        validate_tokenizer(model, self.encoder.tokenizer)

    def loss(self, model: nn.Module, batch: Sequence[TextExample]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, end tokens included."""
        return answer_loss(model, [self._encoded_example(example) for example in batch], self.encoder.pad)

    def encode(self, split: Split) -> list[dict[str, list[int]]]:
        """``input_ids``, ``attention_mask`` and ``labels`` of each example, for transformers' ``Trainer``.

        Labels are the answer's tokens, and -100 in the prompt. Nothing is padded.
        """
        return [
            {
                "input_ids": [*each.prompt, *each.answer],
                "attention_mask": [1] * len(each),
                "labels": [IGNORED] * len(each.prompt) + list(each.answer),
            }
            for each in self._encoded(split)
        ]

    def answer(self, model: nn.Module, items: Sequence[TextExample]) -> list[str]:
        """The greedily decoded answers, or the most likely options."""
        prompts = [item.prompt for item in items]
        if self.score_by == "generation":
            read = self.encoder.fitted_prompts(prompts, [self.max_new_tokens] * len(items))
            return greedy_answers(model, read, self.encoder, max_new_tokens=self.max_new_tokens)
        options = [self.options_of(item) for item in items]
        written = [self.encoder.answers(each) for each in options]
        read = self.encoder.fitted_prompts(prompts, [max(map(len, each)) for each in written])
        values = option_log_likelihoods(model, read, written, self.encoder.pad)
        return [texts[int(each.argmax())] for texts, each in zip(options, values, strict=True)]

    def evaluate(self, model: nn.Module, split: Split, folder: Path) -> Mapping[str, float]:
        """The scores; answers are written to ``folder``, from which an interrupted evaluation continues."""
        if self.score_by == "loss":
            return self._likelihood(model, split)
        self._encoded(split)  # warns of examples that are too long
        self._warn_of_cut_prompts(split)
        return super().evaluate(model, split, folder)

    def example_scores(self, model: nn.Module, split: Split = "test") -> list[float] | None:
        """The score of each answer alone; None where the loss is scored, whose mean is over tokens."""
        return None if self.score_by == "loss" else super().example_scores(model, split)

    def score_answers(self, answers: Sequence[str], items: Sequence[TextExample]) -> dict[str, float]:
        """``score`` by the rule; ``drift`` where answers are generated."""
        references = [item.references or (item.answer,) for item in items]
        scores = score({"": self.rule}, answers, references, [item.prompt for item in items])
        if self.score_by == "generation":
            illegal = sum(not self._legal(a, item) for a, item in zip(answers, items, strict=True))
            scores["drift"] = 100 * illegal / len(items)
        return scores

    def settings(self) -> dict[str, Any]:
        """Rule, options, lengths and the way of scoring."""
        return {
            "rule": self.rule,
            "options": self.options,
            "score_by": self.score_by,
            "max_length": self.encoder.max_length,
            "max_new_tokens": self.max_new_tokens,
        }

    def entry(self, item: TextExample) -> dict[str, Any]:
        """Source, prompt and references."""
        return {"source": item.source, "prompt": item.prompt, "references": item.references or (item.answer,)}

    def length(self, item: TextExample) -> int:
        """Tokens of prompt and answer."""
        return len(self._encoded_example(item))

    def options_of(self, example: TextExample) -> tuple[str, ...]:
        """The legal answers of an example, with the blank that its answer begins with; empty for an open one."""
        if example.options:
            return example.options
        blank = example.answer[: len(example.answer) - len(example.answer.lstrip())]
        return tuple(blank + option.lstrip() for option in self.options)

    def _lengths(self, split: Split) -> Sequence[int]:
        return [len(each) for each in self._encoded(split)]

    def _encoded(self, split: Split) -> list[Tokens]:
        """The tokens of all examples of a split, with one warning about those that were cut."""
        if split not in self._tokens:
            examples = self.part(split)
            tokens = self.encoder.examples([e.prompt for e in examples], [e.answer for e in examples])
            self._tokens[split] = tokens
            self._of_example.update(zip(examples, tokens, strict=True))
            if long := [i for i, each in enumerate(tokens) if each.cut]:
                logger.warning(
                    "task %s: %d of %d %s examples are longer than %d tokens, so that prompts lose their beginning and "
                    "answers of that length their end (first: %s, by %d tokens): raise max_length, or shorten them",
                    *(self.name, len(long), len(tokens), split, self.encoder.max_length),
                    *(examples[long[0]].source or f"example {long[0]}", tokens[long[0]].cut),
                )
        return self._tokens[split]

    def _warn_of_cut_prompts(self, split: Split) -> None:
        """One warning for prompts that fit with their own answer, and not with what evaluation leaves room for."""
        if self.score_by != "generation" or split in self._warned:
            return
        self._warned.add(split)
        room = self.encoder.max_length - self.max_new_tokens
        examples, tokens = self.part(split), self._encoded(split)
        if long := [i for i, each in enumerate(tokens) if not each.cut and len(each.prompt) > room]:
            logger.warning(
                "task %s: %d of %d %s prompts have more than %d tokens, which is max_length without max_new_tokens, so "
                "that their beginning is not read when an answer is generated (first: %s, %d tokens): raise "
                "max_length, or lower max_new_tokens",
                *(self.name, len(long), len(tokens), split, room),
                *(examples[long[0]].source or f"example {long[0]}", len(tokens[long[0]].prompt)),
            )

    def _encoded_example(self, example: TextExample) -> Tokens:
        if example not in self._of_example:
            (self._of_example[example],) = self.encoder.examples([example.prompt], [example.answer])
        return self._of_example[example]

    @torch.no_grad()
    def _likelihood(self, model: nn.Module, split: Split) -> dict[str, float]:
        tokens, ranks = self._encoded(split), Ranks.current()
        if not tokens:
            raise ValueError(f"task {self.name!r} has no {split} items to score")
        model.eval()
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        total = count = 0.0
        for indices in cut(ranks.share(by_length), self.answer_batch):
            batch = [tokens[i] for i in indices]
            written = sum(len(each.answer) for each in batch)
            total += written * float(answer_loss(model, batch, self.encoder.pad))
            count += written
        sums = ranks.all_gather((total, count))
        loss = torch.tensor(sum(t for t, _ in sums) / sum(c for _, c in sums))
        return {"score": float(100 * (-loss).exp()), "perplexity": float(loss.exp())}

    def _legal(self, answer: str, item: TextExample) -> bool:
        """Whether the answer is an option, by the task's rule or apart from case; open answers only have some text."""
        options = self.options_of(item)
        if not options:
            return bool(answer.strip())
        return any(exact(answer, option) or credit(self.rule, answer, [option]) == 1 for option in options)

    def _validate_all(self) -> None:
        if self.score_by not in get_args(ScoreBy):
            raise ValueError(f"task {self.name!r} is scored by {', '.join(get_args(ScoreBy))}, got {self.score_by!r}")
        for split, examples in self.parts.items():
            for index, example in enumerate(examples):
                self._validate(example, f"task {self.name!r}, {example.source or f'{split} example {index}'}")

    def _validate(self, example: TextExample, where: str) -> None:
        if not example.answer.strip():
            raise ValueError(f"{where}: the answer is empty, so that there is nothing to learn")
        options = self.options_of(example)
        if not options and self.score_by == "likelihood":
            raise ValueError(f"{where} has no options to compare: give some, or score_by='generation'")
        if options and not any(exact(option, example.answer) for option in options):
            raise ValueError(f"{where}: the answer {example.answer!r} is none of its options {', '.join(options)}")
