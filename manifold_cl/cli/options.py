"""Options that commands share: their declarations, their validation, and their names in error messages."""

from __future__ import annotations

import functools
import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer import Option
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo

Command = TypeVar("Command", bound=Callable[..., Any])
GATE_CLOSED = 3
"""Exit code when a condition on the results fails (``--fail-if``, ``--evaluate``); everything is written by then."""


def at_least(least: int) -> Callable[[int | None], int | None]:
    """A callback of an option that refuses smaller numbers; a range would widen the help's column of types."""

    def validate(value: int | None) -> int | None:
        if value is not None and value < least:
            raise typer.BadParameter(f"it is at least {least}, got {value}")
        return value

    return validate


Stream = Annotated[str, Option(help="Name of the stream of tasks, or your own as file.py:function.")]
Tasks = Annotated[str | None, Option(help="Tasks to use: names separated by commas, in this order (default: all).")]
Examples = Annotated[int | None, Option(callback=at_least(1), help="Training examples per task (default: all).")]
Seed = Annotated[int, Option(callback=at_least(0), help="Seed of all random numbers.")]
Device = Annotated[str, Option(help="Device to compute on, such as cpu or cuda.")]
RunsFolder = Annotated[Path, Option("--out", help="Folder for the runs and the report.")]
Resume = Annotated[bool, Option("--resume", help="Continue the runs in the folder.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON to standard output.")]
Memory = Annotated[Path | None, Option(help="Folder with protected subspaces (memory.safetensors).")]
Renames = Annotated[
    list[str] | None,
    Option(
        "--map", metavar="OLD=NEW", help="Parts of layers' names, between dots, and what replaces them; repeatable."
    ),
]
Engine = Annotated[str, Option(help="Engine that runs the work: local (processes of this machine) or ray (a cluster).")]
Address = Annotated[
    str | None,
    Option(help="Running Ray cluster: host:port, ray://host:port or auto (default: a Ray of this machine alone)."),
]
MemoryBudget = Annotated[
    str | None, Option(help="Memory that a computation may use: a number of bytes, such as 500MB or 2GB.")
]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes per unit."""
SPELLED = {"on_nonfinite='skip'": "skip_nonfinite"}
"""Python arguments that have another name as an option: their text in messages → the command's parameter."""


class _FlagsWithoutType(TyperCommand):
    """A command whose help shows no type beside options that take no value, and that refuses empty values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; UsageError for an empty one, which a path would read as the present folder."""
        for position, argument in enumerate(args):
            name = argument[:-1] if re.fullmatch(r"--[a-z-]+=", argument) else ""
            if not argument.strip() or name:
                before = args[position - 1] if position and args[position - 1].startswith("-") else ""
                raise typer.BadParameter(
                    f"{name or before or f'argument {position + 1}'} is empty: give a value, or leave it out (an unset "
                    "variable of the shell expands to nothing)"
                )
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            self._name_set(error)
            raise

    def _name_set(self, error: Any) -> None:
        """Add ``--set`` to the error for an unknown option that is one of a method, as ``--rank``."""
        name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
        if not name or not any(each.name == "set_" for each in self.params):
            return  # --help ends the parsing here too, and needs no methods
        from manifold_cl.continual.methods.registry import METHODS, option_names

        if any(name in option_names(method) for method in METHODS):
            error.possibilities = []
            error.message = f"{error.message}. It is an option of methods: give --set {name}=VALUE"

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, with an empty type for flags."""
        return _without_types(super().get_params(ctx))


class GroupWithoutTypes(TyperGroup):
    """A group of commands whose help shows no type beside options that take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, with an empty type for flags."""
        return _without_types(super().get_params(ctx))


def unwrapped(text: str) -> str:
    r"""The text with one line per paragraph, so that it fills any terminal; indented lines stay on their own.

    >>> unwrapped("One sentence\nof two lines.\n\nExamples:\n    a\n    b")
    'One sentence of two lines.\n\nExamples:\n    a\n    b'
    """
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


def _without_types(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Commands(typer.Typer):
    """Commands whose errors name options as they are typed: ``--base`` instead of Python's ``base=``."""

    def __init__(self, **options: Any) -> None:
        names = {"help_option_names": ["-h", "--help"]}
        settings: dict[str, Any] = {"cls": GroupWithoutTypes, "context_settings": names, "rich_markup_mode": "rich"}
        super().__init__(no_args_is_help=True, add_completion=False, **settings | options)

    def command(self, *args: Any, **options: Any) -> Callable[[Command], Command]:
        """Register a function as a command."""

        def registered(function: Command) -> Command:
            text = options.pop("help", None) or inspect.getdoc(function) or ""
            register = super(Commands, self).command(*args, cls=_FlagsWithoutType, help=unwrapped(text), **options)
            register(_naming_options(function))
            return function

        return registered


def _naming_options(function: Callable[..., Any]) -> Callable[..., Any]:
    flags = flags_of(function)

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (ValueError, TypeError, OSError) as error:
            if error.args and isinstance(error.args[0], str):
                error.args = (as_typed(error.args[0], flags), *error.args[1:])
            raise

    return command


def flags_of(function: Callable[..., Any]) -> dict[str, str]:
    """Parameter → option as typed, for the function of a command."""
    hints = get_type_hints(function, include_extras=True)
    flags = {}
    for name in inspect.signature(function).parameters:
        for declaration in getattr(hints.get(name), "__metadata__", ()):
            if isinstance(declaration, OptionInfo):
                # Inside Annotated the first name is the default.
                names = (declaration.default, *(declaration.param_decls or ()))
                typed = [each for each in names if isinstance(each, str) and each.startswith("--")]
                flags[name] = typed[0] if typed else "--" + name.replace("_", "-")
    return flags


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """The message with ``name=``, ``name=True`` and ``name=value`` of these options as they are typed.

    >>> as_typed("give base=, or common=True", {"base": "--base", "common": "--common"})
    'give --base, or --common'
    """
    for python, name in SPELLED.items():
        message = message.replace(python, flags.get(name, python))
    if not flags:
        return message
    names = "|".join(map(re.escape, flags))
    # Only after a space or an opening bracket: elsewhere the name is part of a path or of another word.
    pattern = re.compile(rf"(?<![^\s(])({names})=(True\b|(?=[\s),.;:]|$))?")
    return pattern.sub(lambda match: flags[match[1]] + ("=" if match[2] is None else ""), message)


def split_names(text: str | None) -> list[str] | None:
    """The names in a list separated by commas; None for no or an empty list, ValueError for an empty name."""
    names = [name.strip() for name in text.split(",")] if text else None
    if names and not all(names):
        raise ValueError(f"a name in the list {text!r} is empty: leave out the comma")
    return names


def parse_renames(pairs: Sequence[str] | None) -> dict[str, str]:
    """Old parts of layers' names to new ones.

    >>> parse_renames(["model.decoder=model.language_model"])
    {'model.decoder': 'model.language_model'}
    """
    renames: dict[str, str] = {}
    for pair in pairs or ():
        old, separator, new = pair.partition("=")
        if not separator or not old or old in renames:
            reason = "it is given twice" if old in renames else "OLD=NEW was expected, such as decoder=language_model"
            raise ValueError(f"--map {pair}: {reason}")
        renames[old] = new
    return renames


def parse_bytes(text: str) -> int:
    """The number of bytes that the text stands for, at least 1.

    >>> parse_bytes("500MB"), parse_bytes("2 GiB"), parse_bytes("1e6")
    (500000000, 2147483648, 1000000)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = match and UNITS.get(match[2].upper())
    try:
        size = int(float(match[1]) * unit) if match and unit else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"--memory-budget is a number of bytes above 0, such as 500MB or 2GB, got {text!r}")
    return size


def validate_device(device: str) -> None:
    """Refuse a device that this machine lacks."""
    import torch

    try:
        kind = torch.zeros(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(" device type at start")[0]
        remedy = "give cpu, or install a build of torch for the device (docs/install.md)"
        raise ValueError(f"device {device!r} is not available here: {reason}: {remedy}") from None
    if kind == "meta":
        raise ValueError(f"device {device!r} holds no numbers, so nothing can be computed on it: give cpu or cuda")


def require_path(path: Path, needed: str) -> None:
    """Raise FileNotFoundError for a path that does not exist; ``needed`` says what the user has to give.

    An address on the hub (``hf://owner/name``) is not looked for here.
    """
    if not path.exists() and not str(path).startswith("hf:/"):
        raise FileNotFoundError(f"{path} does not exist: give {needed}")


def validate_out(folder: Path, option: str = "--out", *, write: bool = True) -> None:
    """Refuse a folder in which no file can be written, before the work whose results it is for.

    Args:
        folder: of the results; it need not exist.
        option: that gave it.
        write: prove it by a file without a name in the folder, or in the first one above it that exists.

    Raises:
        NotADirectoryError: the folder is a file or below one.
        PermissionError: the file could not be written.
    """
    for part in (folder, *folder.parents):
        if part.is_dir():
            if write:
                _validate_writable(folder, part, option)
            return
        if part.exists() or part.is_symlink():
            raise NotADirectoryError(f"{option} is {folder}, but {part} is a file: choose another folder")


def _validate_writable(folder: Path, part: Path, option: str) -> None:
    # Permission bits do not decide: /proc, a read-only disk and a full one refuse files of the owner too.
    try:
        with tempfile.TemporaryFile(dir=part):
            return
    except OSError as error:
        where = "it" if part == folder else part
        raise PermissionError(
            f"{option} is {folder}, but no file can be written in {where} ({error.strerror}): choose a folder that you "
            "may write to"
        ) from None


def validate_new(folder: Path, option: str = "--out") -> None:
    """Raise for a folder that is not empty, or as `validate_out`, before the work whose results it is for.

    Raises:
        FileExistsError: the folder holds something.
        NotADirectoryError: the folder is a file or below one.
        PermissionError: no file can be written there.
    """
    validate_out(folder, option)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{option} is {folder}, a folder that is not empty: choose a new one")
