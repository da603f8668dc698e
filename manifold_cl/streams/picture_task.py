"""A task of questions about pictures, answered in words by a vision-language model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from manifold_cl.continual.task import Split
from manifold_cl.streams.answering import AnsweringTask
from manifold_cl.streams.causal_tokens import TextEncoder, Tokens, answer_loss, greedy_answers, option_log_likelihoods
from manifold_cl.streams.scorers import score
from manifold_cl.streams.small_llava import IMAGE_TOKEN, IMAGE_TOKENS, Shown
from manifold_cl.streams.vision_tower import normalised

PictureScore = Literal["likelihood", "generation"]
MAX_NEW_TOKENS = 6


@dataclass(frozen=True)
class Picture:
    """Pixels and their origin.

    Args:
        pixels: colours in 0..255.
        source: names the picture, such as ``"pizza"`` or ``"digit 17"``.
    """

    pixels: UInt8[Tensor, "3 h w"] = field(repr=False, compare=False)
    source: str
    digest: str = field(init=False)
    """Of the pixels."""

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.pixels.contiguous().numpy().tobytes()).hexdigest()
        object.__setattr__(self, "digest", digest[:16])


@dataclass(frozen=True)
class PictureQuestion:
    """A picture with its answer, one of the task's options."""

    picture: Picture
    answer: str


class PictureTask(AnsweringTask[PictureQuestion]):
    r"""One question about many pictures, whose options stand in the prompt.

    The prompt is ``<image>…<image>\n{question} {options}\nAnswer:``, the answer one blank and an option. ``score`` is
    the share of right answers in percent. By ``"likelihood"`` the answer is the option with the largest
    ``log p(option | picture, prompt)``. By ``"generation"`` it is decoded greedily, and ``drift`` is the share of
    answers that are none of the options.

    Args:
        name: the task's name.
        parts: split → its pictures with answers.
        question: asked about every picture.
        options: the legal answers, in the order of the prompt.
        tokenizer: of the model, with the token ``<image>``.
        score_by: ``"likelihood"`` or ``"generation"``.
        answer_batch: pictures answered together.

    Raises:
        ValueError: for an unknown way of scoring, or an answer that is none of the options.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[Split, Sequence[PictureQuestion]],
        *,
        question: str,
        options: Sequence[str],
        tokenizer: Any,
        score_by: PictureScore = "likelihood",
        answer_batch: int = 32,
    ) -> None:
        super().__init__(name, parts, answer_batch=answer_batch)
        if score_by not in get_args(PictureScore):
            raise ValueError(f"task {name!r} is scored by {', '.join(get_args(PictureScore))}, got {score_by!r}")
        self.options, self.score_by = tuple(options), score_by
        for split, items in self.parts.items():
            for item in items:
                if item.answer not in self.options:
                    raise ValueError(
                        f"task {name!r}, {split} picture {item.picture.source!r}: the answer {item.answer!r} is none "
                        f"of the options {', '.join(self.options)}"
                    )
        self.prompt = f"{IMAGE_TOKEN * IMAGE_TOKENS}\n{question} {', '.join(self.options)}\nAnswer:"
        self.encoder = TextEncoder(tokenizer, max_length=512)
        (self._prompt,) = self.encoder.prompts([self.prompt])
        self._answers = dict(zip(self.options, self.encoder.answers([f" {o}" for o in self.options]), strict=True))
        if (found := self._prompt.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))) != IMAGE_TOKENS:
            raise ValueError(
                f"the tokenizer turns {IMAGE_TOKENS} times {IMAGE_TOKEN} into {found} image tokens: add "
                f"{IMAGE_TOKEN} to it as a special token"
            )

    def loss(self, model: nn.Module, batch: Sequence[PictureQuestion]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, end tokens included."""
        examples = [Tokens(self._prompt, self._answers[item.answer]) for item in batch]
        return answer_loss(self._shown(model, batch), examples, self.encoder.pad)

    def answer(self, model: nn.Module, items: Sequence[PictureQuestion]) -> list[str]:
        """The most likely options, or the greedily decoded answers."""
        shown, prompts = self._shown(model, items), [self._prompt] * len(items)
        if self.score_by == "generation":
            return greedy_answers(shown, prompts, self.encoder, max_new_tokens=MAX_NEW_TOKENS)
        answers = [list(self._answers.values())] * len(items)
        values = option_log_likelihoods(shown, prompts, answers, self.encoder.pad)
        return [self.options[int(each.argmax())] for each in values]

    def score_answers(self, answers: Sequence[str], items: Sequence[PictureQuestion]) -> dict[str, float]:
        """``score``, and ``drift`` where answers are generated."""
        scores = score({"": "exact"}, answers, [(item.answer,) for item in items], [""] * len(items))
        if self.score_by == "generation":
            scores["drift"] = 100 * sum(answer not in self.options for answer in answers) / len(items)
        return scores

    def settings(self) -> dict[str, Any]:
        """Prompt, options and way of scoring."""
        return {"prompt": self.prompt, "options": list(self.options), "score_by": self.score_by}

    def entry(self, item: PictureQuestion) -> dict[str, Any]:
        """The picture's name and the right answer."""
        return {"picture": item.picture.source, "references": [item.answer]}

    def length(self, item: PictureQuestion) -> int:
        """The number of tokens of prompt and answer."""
        return len(self._prompt) + len(self._answers[item.answer])

    def _shown(self, model: nn.Module, items: Sequence[PictureQuestion]) -> Shown:
        device = next(model.parameters()).device
        pixels = torch.stack([item.picture.pixels for item in items]).to(device, non_blocking=True)
        return Shown(model, normalised(pixels))
