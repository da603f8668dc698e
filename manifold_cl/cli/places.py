"""Where in a user's own file an error came from: a stream, method or retraction that the command was given."""

from __future__ import annotations

import sysconfig
import traceback
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def of_users(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an error from the first one on that is in no library and in none of our packages."""
    known = [*LIBRARIES, *_packages()]
    frames = traceback.extract_tb(error.__traceback__)
    for first, frame in enumerate(frames):
        path = Path(frame.filename).resolve()
        if path.is_file() and not any(path.is_relative_to(folder) for folder in known):
            return frames[first:]
    return []


def place_of(error: BaseException) -> str:
    """``" (mine.py, line 3, in stream)"``, the last line of the user's own file; empty where none is part of it.

    The message of an error that our code raised says what is wrong with it, and the place where to look.
    """
    frames = of_users(error)
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def trace_of(error: BaseException) -> str:
    """The trace of an error that nobody expected: from the user's own file on, or all of it."""
    frames = of_users(error) or traceback.extract_tb(error.__traceback__)
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    return "".join([*lines, *traceback.format_exception_only(error)])


def _packages() -> list[Path]:
    found = [find_spec(name) for name in ("manifold_cl", "analysis")]
    return [Path(spec.origin).parent.resolve() for spec in found if spec is not None and spec.origin]
