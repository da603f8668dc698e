"""Rows of data as examples for a language model: prompt and answer, a conversation, or plain text."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from manifold_cl.kinds import is_number
from manifold_cl.streams.causal_lm import TextExample
from manifold_cl.streams.json_rows import kind_of

FORMS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "completion", "answer"),
    "messages": ("messages",),
    "text": ("text",),
}
"""Form of a row → its keys; the first one identifies it, in this order."""
ROLES = ("system", "user", "assistant", "tool")
"""Roles of messages that every chat template may get; others are those that the template names."""
PROBE = "0123456789"
"""Stands for an answer, to see what a chat template writes after it."""
EXTRA = ("options", "references")
"""Keys that a row of any form but text may have."""

logger = logging.getLogger("manifold_cl")


class Parts(NamedTuple):
    """A prompt and an answer, before options and references."""

    prompt: str
    answer: str


class RowReader:
    """Turns rows of one task into examples.

    A row has ``prompt`` and ``completion`` (or ``answer``), or ``messages``, or ``text``. All rows of a task have the
    same form. ``messages``, and a ``prompt`` that is a list of messages, go through the chat template: the last turn,
    which is the assistant's, is the answer. A role is one of `ROLES`, or named in the template. ``options`` lists the
    legal answers, which begin with the same blank as the answer, ``references`` those that are right.

    Args:
        tokenizer: of transformers; its chat template writes messages. None only validates rows.
        chat_template: replaces it: the name of one of its templates, a file, or a Jinja template.

    Raises:
        ValueError: for a chat template that is none of these.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None) -> None:
        self.tokenizer, self.form = tokenizer, ""
        self.template = None if chat_template is None else _template(tokenizer, chat_template)
        self.unused: dict[str, None] = {}
        self._after_answer = ""
        self._seen_end = False
        self._seen_roles: set[str] = set()

    def __call__(self, row: Mapping[str, Any], source: str = "") -> TextExample:
        """The example of one row; ValueError says what is wrong with it."""
        form = _form(row)
        if self.form and form != self.form:
            raise ValueError(f"a row of form {form!r} among rows of form {self.form!r}: a task has rows of one form")
        self.form = form
        known = FORMS[form] if form == "text" else (*FORMS[form], *EXTRA)
        self.unused.update(dict.fromkeys(key for key in row if key not in known))
        if form == "text":
            return TextExample("", _text(row["text"], "text"), source=source)
        if form == "messages":
            parts = self._conversation(_messages(row["messages"], "messages"), "messages", source)
        else:
            parts = self._prompted(row, source)
        if not parts.answer.strip():
            raise ValueError("the answer is empty, so that there is nothing to learn")
        blank = parts.answer[: len(parts.answer) - len(parts.answer.lstrip())]
        options = tuple(blank + option.lstrip() for option in _texts(row, "options"))
        return TextExample(*parts, references=_texts(row, "references"), options=options, source=source)

    def report_unused(self, task: str) -> None:
        """Log the keys of rows that were not used."""
        if self.unused:
            logger.info("task %s: keys that are not used: %s", task, ", ".join(self.unused))

    def _prompted(self, row: Mapping[str, Any], source: str) -> Parts:
        key = "completion" if "completion" in row else "answer"
        if "completion" in row and "answer" in row:
            raise ValueError("both 'completion' and 'answer': keep the one that is to be learned")
        if key not in row:
            raise ValueError(f"'prompt' without 'completion' or 'answer' (the row has {_keys(row)})")
        if not isinstance(row["prompt"], list):
            return Parts(_text(row["prompt"], "prompt"), _text(row[key], key))
        answer = row[key] if isinstance(row[key], list) else [{"role": "assistant", "content": _text(row[key], key)}]
        return self._conversation(_messages([*row["prompt"], *answer], "prompt"), "prompt", source)

    def _conversation(self, messages: Sequence[Mapping[str, str]], key: str, source: str) -> Parts:
        """The written conversation up to the last turn, and that turn."""
        self._validate_roles(messages, key, source)
        *before, last = messages
        if last["role"] != "assistant":
            raise ValueError(f"the last message is the answer, so its role is 'assistant', got {last['role']!r}")
        if not before:
            raise ValueError("no message before the assistant's: nothing asks for the answer")
        prompt = self._written(before, add_generation_prompt=True)
        complete, answer = self._written(messages), last["content"].strip()
        self._report_left_out(before, complete, key, source)
        if not complete.startswith(prompt) or answer not in complete[len(prompt) :]:
            return Parts(prompt, answer)  # the template changes earlier turns or the answer once it is there
        start = self._start_of_answer(messages, complete, len(prompt))
        self._report_end(complete[start + len(answer) :].strip())
        return Parts(complete[:start], answer)  # with what the template puts in front of an answer

    def _start_of_answer(self, messages: Sequence[Mapping[str, str]], complete: str, least: int) -> int:
        """Where the last turn's text begins; the template's own marks, such as ``<|im_end|>``, may hold it too."""
        answer = messages[-1]["content"].strip()
        if not complete.endswith(answer + self._after_answer):
            before, found, after = self._written([*messages[:-1], {**messages[-1], "content": PROBE}]).rpartition(PROBE)
            if not found or complete != before + answer + after:
                return complete.rindex(answer, least)
            self._after_answer = after
        return len(complete) - len(self._after_answer) - len(answer)

    def _written(self, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
        if self.tokenizer is None:
            return "\n".join(message["content"] for message in messages)
        if self.template is None and not self.tokenizer.chat_template:
            raise ValueError(
                f"messages need a chat template, and the tokenizer {_name(self.tokenizer)} has none: give "
                "chat_template=, use the tokenizer of the chat model, or write rows with 'prompt' and 'completion'"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, **options
            )
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return str(text)

    def _validate_roles(self, messages: Sequence[Mapping[str, str]], key: str, source: str) -> None:
        """Refuse a role that is neither usual nor named in the chat template, which is most likely a typing error.

        A template that writes any role would train on it. Without a template, such a role is a warning.
        """
        for number, message in enumerate(messages, 1):
            role = message["role"]
            if role in ROLES or (self.tokenizer is not None and self._names(role)):
                continue
            near = difflib.get_close_matches(role.casefold(), ROLES, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            said = f"message {number} of {key!r} has the role {role!r}{hint} (usual: {', '.join(ROLES)}"
            if self.tokenizer is not None:
                raise ValueError(f"{said}): the chat template does not name it; correct it, or give chat_template=")
            if role not in self._seen_roles:
                logger.warning("%s: %s): only a chat template that names it can write it", source, said)
            self._seen_roles.add(role)

    def _names(self, role: str) -> bool:
        """Whether the chat template has the role as a literal."""
        given = self.tokenizer.chat_template if self.template is None else self.template
        texts = given.values() if isinstance(given, dict) else [given or ""]
        return any(f"{quote}{role}{quote}" in str(text) for text in texts for quote in "'\"")

    def _report_left_out(self, before: Sequence[Mapping[str, str]], complete: str, key: str, source: str) -> None:
        """Warn once per role of a message that the chat template does not write, or writes in another form."""
        if self.tokenizer is None:
            return
        for number, message in enumerate(before, 1):
            role, content = message["role"], message["content"].strip()
            if role == "assistant" or role in self._seen_roles or content in complete:
                continue  # templates leave out earlier reasoning of the assistant
            self._seen_roles.add(role)
            logger.warning(
                "%s: the chat template does not write the text of message %d of %r, of role %r, or not as it is: "
                "nothing is learned from it; give chat_template= with a template that writes this role",
                *(source or "a row", number, key, role),
            )

    def _report_end(self, mark: str) -> None:
        """Say once that the template ends turns with another mark than the end token, which is what is learned."""
        if self.tokenizer is not None and not self._seen_end and mark and mark != self.tokenizer.eos_token:
            self._seen_end = True
            logger.warning(
                "the chat template ends an answer with %r, the tokenizer's end token is %r: answers are trained to end "
                "with the end token; set tokenizer.eos_token to train on the template's mark",
                *(mark, self.tokenizer.eos_token),
            )


def _template(tokenizer: Any, given: str) -> str:
    if "{" in given:
        return given
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if given in named:
        return str(named[given])
    if Path(given).is_file():
        return Path(given).read_text(encoding="utf-8")
    known = f"one of {', '.join(named)}" if named else "a name (this tokenizer has no named templates)"
    raise ValueError(f"unknown chat template {given!r}: give {known}, the path of a file, or a Jinja template")


def _form(row: Mapping[str, Any]) -> str:
    form = next((form for form, keys in FORMS.items() if keys[0] in row), None)
    if form is None:
        raise ValueError(
            f"none of 'prompt' (with 'completion' or 'answer'), 'messages' and 'text' (the row has {_keys(row)})"
        )
    return form


def _messages(messages: Any, key: str) -> list[Mapping[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} is a list of messages, got {kind_of(messages)}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} of {key!r} has no text under 'role'")
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {number} of {key!r} has {kind_of(message.get('content'))} under 'content', text is needed"
            )
    return messages


def _text(value: Any, key: str) -> str:
    """Text; numbers are written out."""
    if is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is text, got {kind_of(value)}")
    return value


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = row.get(key)
    if values is None:
        return ()
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{key!r} is a list of texts with at least one, got {kind_of(values)}")
    return tuple(_text(value, key) for value in values)


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no keys"


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
