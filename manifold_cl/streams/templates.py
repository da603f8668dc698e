"""Templates that write a conversation as text for the model, with the spans of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from manifold_cl.plugins import unknown


class Prompt(NamedTuple):
    """Text for the tokenizer, and the spans (start, end) of the answers in it."""

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """A conversation as ``system USER: question ASSISTANT: answer</s>USER: ...``.

    Args:
        system: text before the first question.
        user: tag of questions.
        assistant: tag of answers.
    """

    system: str
    user: str = "USER"
    assistant: str = "ASSISTANT"

    def written(self, turns: Sequence[tuple[str, str]], *, images: int, image_token: str, end: str) -> Prompt:
        """The complete conversation, for training. Answers include the blank before them and the end mark after.

        Args:
            turns: (question, answer) pairs.
            images: number of image marks at the start of the first question, each on a line of its own.
            image_token: the image mark.
            end: the tokenizer's end of sequence, after every answer.
        """
        text = f"{self.system} " if self.system else ""
        spans = []
        for number, (question, answer) in enumerate(turns):
            marks = f"{image_token}\n" * images if not number else ""
            text += f"{self.user}: {marks}{question} {self.assistant}:"
            start = len(text)
            text += f" {answer}{end}"
            spans.append((start, len(text)))
        return Prompt(text, tuple(spans))

    def asked(self, turns: Sequence[tuple[str, str]], *, images: int, image_token: str, end: str) -> str:
        """The conversation up to the beginning of the last answer, for generation."""
        prompt = self.written(turns, images=images, image_token=image_token, end=end)
        return prompt.text[: prompt.answers[-1][0]]


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        # Word for word as in LLaVA-1.5's training.
        "vicuna_v1": Template(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        "plain": Template(""),
    }
)
"""Templates by name. Source of ``vicuna_v1``: liu2024improved."""


def template(name: str) -> Template:
    """The template of that name; ValueError for an unknown one."""
    if name not in TEMPLATES:
        raise ValueError(unknown("template", name, TEMPLATES))
    return TEMPLATES[name]
