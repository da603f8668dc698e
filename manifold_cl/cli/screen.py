"""Consoles that show text without interpreting it, tables, and progress bars."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

NARROW = 100
"""Columns below which a progress line has no note."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def visible(text: object, encoding: str = "utf-8") -> str:
    r"""The text on one line, with escapes for what is not printable or not in the encoding.

    Names in records and adapters come from others: a control character could move the cursor or rewrite what stands
    there, a mark of direction could turn the rest of the line around. The rule is that of `analysis.names.visible`,
    which cannot be imported here: messages must work where a folder of the user hides our package `analysis`.

    >>> visible("a\x1b]0;b\n")
    'a\\x1b]0;b\\n'
    """
    shown = "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else repr(letter)[1:-1]
        for letter in str(text)
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


class Screen(Console):
    """A console that interprets no markup and escapes control characters; styles are given beside the text."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text that rich shows for a string: a line, cell or title."""
        return super().render_str(visible(text, self.encoding), **options)

    def styled(self, *parts: str | tuple[str, str]) -> Text:
        """One text from several parts, each a string or (string, style); further lines are indented."""
        pairs = [part if isinstance(part, tuple) else (part, "") for part in parts]
        lines = [("\n  ".join(visible(line, self.encoding) for line in str(text).split("\n")), s) for text, s in pairs]
        return Text.assemble(*lines)

    def say(self, *parts: str | tuple[str, str]) -> None:
        """Print a message from several parts, each a string or (string, style).

        Lines are broken between words on a terminal, unless a word, such as a path, is longer than a line.
        """
        text = self.styled(*parts)
        fits = max(map(len, text.plain.split()), default=0) <= self.width
        self.print(text, soft_wrap=not (self.is_terminal and fits))


screen = Screen(stderr=True)
"""Standard error, for messages and progress. Standard output holds results: tables, paths, or JSON."""


def output(wide: int) -> Screen:
    """Standard output, ``wide`` columns wide when it goes into a file or pipe."""
    return Screen(width=None if Console().is_terminal else wide)


class Words(TextColumn):
    """A column of uninterpreted text beside a progress bar; ``form`` is a format string of ``task``."""

    def __init__(self, form: str, style: str = "none") -> None:
        super().__init__(form, style=style, markup=False)

    def render(self, task: Task) -> Text:
        """The text of one bar."""
        return Text(visible(self.text_format.format(task=task), screen.encoding), style=self.style)


def bars(*, counted: bool = False) -> Progress:
    """Progress bars on a terminal, each with a description, the time, and the fields ``note`` and ``left``.

    ``counted`` bars show a count. On a narrow terminal the bars are short.
    """
    narrow = screen.width < NARROW
    return Progress(
        Words("{task.description}", "bold"),
        BarColumn(10 if narrow else 20),
        *([MofNCompleteColumn()] if counted else []),
        TimeElapsedColumn(),
        Words("{task.fields[left]}"),
        *([] if narrow and not counted else [Words("{task.fields[note]}")]),
        console=screen,
        disable=not screen.is_terminal,
        transient=True,
    )


class ScreenHandler(logging.Handler):
    """Log records as dim lines on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        screen.say((record.getMessage(), "dim"))


def print_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    key: str = "",
    *,
    wide: int = 120,
    leading: int = 1,
) -> None:
    """Print a table on standard output, split into parts that fit the terminal; no number is truncated.

    Every part starts with the ``leading`` first columns, which name a row. ``key`` explains the headings. ``wide`` is
    the number of characters per line in a file or pipe.
    """
    console = output(wide)
    unbounded = console.options.update(width=10_000)

    def made(columns: Sequence[int]) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for column in columns:
            table.add_column(headings[column], justify="left" if column < leading else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        return table

    parts = [[*range(leading)]]
    for column in range(leading, len(headings)):
        wider = made([*parts[-1], column])
        if len(parts[-1]) > leading and console.measure(wider, options=unbounded).maximum > console.width:
            parts.append([*range(leading)])
        parts[-1].append(column)
    console.print(title, style="italic")
    for part in parts:
        console.print(made(part))
    if key:
        console.print(key, style="dim")
