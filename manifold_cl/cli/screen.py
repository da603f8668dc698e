"""What all commands share: where they write for a person, and how they speak."""

from __future__ import annotations

import logging

import torch
from rich.console import Console

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
