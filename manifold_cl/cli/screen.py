"""What all commands share: where they write for a person, and how they speak."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

screen = Console(stderr=True)
"""Everything meant for a person. Standard output is kept for what ``--json`` prints and for tables."""


class ScreenHandler(logging.Handler):
    """Log records as dim lines on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        screen.print(f"[dim]{escaped(record.getMessage())}[/]", highlight=False, soft_wrap=True)


def check_device(device: str) -> None:
    """Raise for a device that this machine lacks."""
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available here: {str(error).splitlines()[0]}") from None


def escaped(text: object) -> str:
    """The text, safe for a console that reads square brackets as markup."""
    return str(text).replace("[", r"\[")


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], key: str, *, wide: int) -> None:
    """Print a table on standard output, in as many parts as the width of the terminal asks for; no number is cut.

    Args:
        title: a line above.
        headings: of the columns; every part of the table starts with the first.
        rows: their cells.
        key: what the headings mean, below.
        wide: characters of a line that goes into a file or pipe.
    """
    console = Console(width=None if Console().is_terminal else wide)
    unbounded = console.options.update(width=10_000)

    def made(columns: Sequence[int]) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for column in columns:
            table.add_column(headings[column], justify="right" if column else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        return table

    parts = [[0]]
    for column in range(1, len(headings)):
        wider = made([*parts[-1], column])
        if len(parts[-1]) > 1 and console.measure(wider, options=unbounded).maximum > console.width:
            parts.append([0])
        parts[-1].append(column)
    console.print(f"[italic]{escaped(title)}[/]")
    for part in parts:
        console.print(made(part))
    console.print(escaped(key), style="dim", highlight=False)
