"""The ``manifold-cl`` command: run methods over a stream, compare runs, look into adapters.

One file a command; this one collects them and turns what they raise into exit codes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import typer

from manifold_cl.cli.analyze import analyze
from manifold_cl.cli.comparison import compare
from manifold_cl.cli.export import export
from manifold_cl.cli.info import info
from manifold_cl.cli.retractions import retractions
from manifold_cl.cli.run import run
from manifold_cl.cli.screen import INTERRUPTED, ScreenHandler, escaped, screen
from manifold_cl.cli.streams import streams
from manifold_cl.cli.study import study
from manifold_cl.cli.subspace import subspace
from manifold_cl.streams import FetchError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Geometry-first low-rank continual adaptation.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, study, compare, analyze, retractions, export, info):
    app.command()(command)
app.add_typer(subspace, name="subspace")
app.add_typer(streams)

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exit codes: 0 done, 2 wrong or missing input, 130 interrupted (``--resume`` continues)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ScreenHandler()])
    for noisy in ("httpx", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        if code == INTERRUPTED:  # typer catches Ctrl-C and returns the code that it would have ended with
            raise KeyboardInterrupt
        if code:  # what a command ended with by typer.Exit, which click returns here instead of raising
            sys.exit(code)
    except (ValueError, TypeError, FetchError, OSError, ImportError) as error:
        screen.print(f"[bold red]error:[/] {escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
    except FloatingPointError as error:
        screen.print(f"[bold red]diverged:[/] {escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        screen.print(
            "\ninterrupted: finished tasks are kept; the same command with [bold]--resume[/] goes on from there"
        )
        sys.exit(INTERRUPTED)
    except Exception as error:
        show = getattr(error, "show", None)  # typer's own usage errors know how to print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", BAD_INPUT))
