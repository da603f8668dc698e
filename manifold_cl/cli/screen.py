"""What all commands share: where they write for a person, and how they speak."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
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


def print_fitting(make: Callable[[Sequence[int]], Table], columns: int, *, wide: int) -> None:
    """Print a table on standard output, in as many parts as the width of the terminal asks for; no number is cut.

    Args:
        make: the table of these columns.
        columns: how many there are; every part starts with the first.
        wide: characters of a line that goes into a file or pipe.
    """
    console = Console(width=None if Console().is_terminal else wide)
    unbounded = console.options.update(width=10_000)

    def fits(chosen: Sequence[int]) -> bool:
        return console.measure(make(chosen), options=unbounded).maximum <= console.width

    parts = [[0]]
    for column in range(1, columns):
        if len(parts[-1]) > 1 and not fits([*parts[-1], column]):
            parts.append([0])
        parts[-1].append(column)
    for part in parts:
        console.print(make(part))
