"""What all commands share: consoles that show text as it is, tables, bars, and options named as the user types them."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text
from typer.models import OptionInfo

Command = TypeVar("Command", bound=Callable[..., Any])

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
SPELLED = {"on_nonfinite='skip'": "skip_nonfinite"}
"""Python's spelling of an option to the parameter of a command that has another name for it."""


def visible(text: object, encoding: str = "utf-8") -> str:
    r"""The text on one line, with escapes for what is not printable or not in the encoding.

    Names in records and adapters come from others: a control character could move the cursor or rewrite what stands
    there, a mark of direction could turn the rest of the line around.

    >>> visible("a\x1b]0;b\n")
    'a\\x1b]0;b\\n'
    """
    shown = "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else repr(letter)[1:-1]
        for letter in str(text)
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


class Screen(Console):
    """A console that shows text as it is: square brackets are no markup, control characters become escapes.

    Styles are given beside the text, never inside it.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        """On standard output, or on standard error; as wide as the terminal, or `width`."""
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string that it prints: lines, cells, titles."""
        return super().render_str(visible(text, self.encoding), **options)

    def styled(self, *parts: str | tuple[str, str]) -> Text:
        """One text of several parts, each a string or (string, style); further lines are indented."""
        pairs = [part if isinstance(part, tuple) else (part, "") for part in parts]
        lines = [("\n  ".join(visible(line, self.encoding) for line in str(text).split("\n")), s) for text, s in pairs]
        return Text.assemble(*lines)

    def say(self, *parts: str | tuple[str, str]) -> None:
        """Print a message of several parts, each a string or (string, style), without breaking its lines."""
        self.print(self.styled(*parts), soft_wrap=True)


screen = Screen(stderr=True)
"""Everything meant for a person. Standard output is kept for what ``--json`` prints and for tables."""


def output(wide: int) -> Screen:
    """Standard output, of so many columns where it goes into a file or pipe."""
    return Screen(width=None if Console().is_terminal else wide)


class Words(TextColumn):
    """A column of text beside a progress bar, shown as it is."""

    def __init__(self, form: str, style: str = "none") -> None:
        """`form` is a format string of ``task``."""
        super().__init__(form, style=style, markup=False)

    def render(self, task: Task) -> Text:
        """The text for one bar."""
        return Text(visible(self.text_format.format(task=task), screen.encoding), style=self.style)


def bars(*columns: ProgressColumn) -> Progress:
    """Progress bars with these columns, on a terminal; nothing elsewhere."""
    return Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True)


class ScreenHandler(logging.Handler):
    """Log records as dim lines on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        screen.say((record.getMessage(), "dim"))


class Commands(typer.Typer):
    """Commands whose errors name options the way they are typed: ``--base`` for Python's ``base=``."""

    def command(self, *args: Any, **options: Any) -> Callable[[Command], Command]:
        """Register a function as a command."""
        register = super().command(*args, **options)

        def registered(function: Command) -> Command:
            register(_naming_options(function))
            return function

        return registered


def _naming_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with Python's spelling of its options replaced in the errors that it raises."""
    flags = flags_of(function)

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (ValueError, TypeError, OSError) as error:
            if error.args and isinstance(error.args[0], str):
                error.args = (as_typed(error.args[0], flags), *error.args[1:])
            raise

    return called


def flags_of(function: Callable[..., Any]) -> dict[str, str]:
    """Parameter to option as typed, of a command's function."""
    hints = get_type_hints(function, include_extras=True)
    flags = {}
    for name in inspect.signature(function).parameters:
        for given in getattr(hints.get(name), "__metadata__", ()):
            if isinstance(given, OptionInfo):
                written = (given.default, *(given.param_decls or ()))  # inside Annotated the name comes first
                named = [each for each in written if isinstance(each, str) and each.startswith("--")]
                flags[name] = named[0] if named else "--" + name.replace("_", "-")
    return flags


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """The message with ``name=``, ``name=True`` and ``name=value`` of the given options as they are typed.

    >>> as_typed("give base=, or common=True", {"base": "--base", "common": "--common"})
    'give --base, or --common'
    """
    for python, name in SPELLED.items():
        message = message.replace(python, flags.get(name, python))
    if not flags:
        return message
    names = "|".join(map(re.escape, flags))
    # a name in a path or after another word is no option: only after a space or an opening bracket
    pattern = re.compile(rf"(?<![^\s(])({names})=(True\b|(?=[\s),.;:]|$))?")
    return pattern.sub(lambda found: flags[found[1]] + ("=" if found[2] is None else ""), message)


def check_device(device: str) -> None:
    """Raise for a device that this machine lacks."""
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available here: {str(error).splitlines()[0]}") from None


def check_out(folder: Path, option: str = "--out") -> None:
    """Raise for a folder that cannot be made, before the work whose results go there.

    Raises:
        NotADirectoryError: it, or one above it, is a file.
    """
    for part in (folder, *folder.parents):
        if part.is_dir():
            return
        if part.exists() or part.is_symlink():
            raise NotADirectoryError(f"{option} is {folder}, but {part} is a file: choose another folder")


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], key: str, *, wide: int) -> None:
    """Print a table on standard output, in as many parts as the width of the terminal asks for; no number is cut.

    Args:
        title: a line above.
        headings: of the columns; every part of the table starts with the first.
        rows: their cells.
        key: what the headings mean, below.
        wide: characters of a line that goes into a file or pipe.
    """
    console = output(wide)
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
    console.print(title, style="italic")
    for part in parts:
        console.print(made(part))
    console.print(key, style="dim")
