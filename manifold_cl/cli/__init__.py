"""The ``manifold-cl`` command: one file per command, collected here; errors become messages and exit codes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from manifold_cl import streams as library
from manifold_cl._version import __version__
from manifold_cl.cli.analyze import commands as analyze
from manifold_cl.cli.compare import compare
from manifold_cl.cli.export import export
from manifold_cl.cli.info import info
from manifold_cl.cli.lab import lab
from manifold_cl.cli.options import Commands
from manifold_cl.cli.places import place_of, trace_of
from manifold_cl.cli.plan import plan
from manifold_cl.cli.retractions import retractions
from manifold_cl.cli.run import FIRST_STEPS, HELP, run
from manifold_cl.cli.screen import INTERRUPTED, ScreenHandler, screen, visible
from manifold_cl.cli.search import search
from manifold_cl.cli.streams import commands as streams
from manifold_cl.cli.study import study
from manifold_cl.cli.subspace import commands as subspace

app = Commands(help="Geometry-first low-rank continual adaptation.", epilog=FIRST_STEPS)
app.command(help=HELP)(run)
for command in (plan, study, search, compare, lab, retractions, export, info):
    app.command()(command)
app.add_typer(analyze, name="analyze")
app.add_typer(subspace, name="subspace")
app.add_typer(streams)

BAD_INPUT = 2


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"manifold-cl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the command itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exit codes: 0 done, 2 wrong or missing input, 130 interrupted (``--resume`` continues)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ScreenHandler()])
    for noisy in ("httpx", "transformers", "matplotlib", "torch"):  # torch: statistics of caches at exit
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if sys.stdout.errors == "strict":  # a terminal that lacks a letter shows its code, as standard error does
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _run(arguments)


def _run(arguments: Sequence[str] | None) -> None:
    """Run the command and turn what it raises into a message and an exit code."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        if code == INTERRUPTED:  # typer catches Ctrl-C and returns its exit code
            raise KeyboardInterrupt
        if code:  # of typer.Exit, which click returns here instead of raising
            sys.exit(code)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _refuse(error)
    except FloatingPointError as error:
        screen.say(("diverged:", "bold red"), f" {error}")
        sys.exit(1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        screen.print()
        screen.say(
            "interrupted: finished tasks are kept; the same command with ", ("--resume", "bold"), " goes on from there"
        )
        sys.exit(INTERRUPTED)
    except Exception as error:
        show = getattr(error, "show", None)  # of typer's own usage errors
        if show is None:
            if isinstance(error, library.FetchError):  # not above: the name loads torch
                _refuse(error)
            screen.say(trace_of(error))
            sys.exit(1)
        error.message = visible(getattr(error, "message", ""))  # type: ignore[attr-defined]
        show()
        sys.exit(getattr(error, "exit_code", BAD_INPUT))


def _refuse(error: Exception) -> NoReturn:
    screen.say(("error:", "bold red"), f" {error}{place_of(error)}")
    sys.exit(BAD_INPUT)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning on one line, without its place in the code."""
    screen.say(("warning:", "bold yellow"), f" {message}")
