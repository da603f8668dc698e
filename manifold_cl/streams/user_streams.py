"""Streams of the user's own code, named as ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from manifold_cl.continual.task import TaskStream
from manifold_cl.plugins import load_object, unknown
from manifold_cl.streams.registry import is_code, open_stream


def open_named(
    name: str, tasks: Sequence[str] | None = None, examples: int | None = None, *, code_folder: Path | None
) -> TaskStream:
    """The stream of that name, or the one that the user's function returns.

    The function may take ``tasks`` (names, in order) and ``examples`` (training examples per task). Without a
    parameter ``tasks``, the tasks of its stream are chosen here.

    Args:
        name: one of `STREAMS`, ``module:function``, or ``file.py:function``.
        tasks: names of the tasks to take, in order; all by default.
        examples: training examples per task; all by default.
        code_folder: folder that ``file.py`` is relative to. None refuses code.

    Raises:
        ValueError: for code if ``code_folder`` is None, a function that cannot be loaded, an unknown task, or
            ``examples`` for a function that has no such parameter.
        TypeError: when the function returns anything but a `TaskStream`.
    """
    if not is_code(name):
        return open_stream(name, tasks=tasks, examples=examples)
    if code_folder is None:
        raise ValueError(
            f"the stream {name!r} is code, which runs only on request: run the study from its TOML file, or read it "
            "with StudyPlan.load(folder, code_folder=...)"
        )
    source, _, function = name.rpartition(":")
    source = str(code_folder / source) if source.endswith(".py") else source
    build = load_object(f"{source}:{function}")
    if not callable(build):
        raise TypeError(f"the stream {name!r} is a {type(build).__name__}: a function that returns it is needed")
    selection: dict[str, Any] = {"tasks": tasks, "examples": examples}
    parameters = inspect.signature(build).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        selection = {key: selection[key] for key in (parameter.name for parameter in parameters) if key in selection}
    if "examples" not in selection and examples is not None:
        raise ValueError(
            f"{name!r} has no parameter examples, got examples={examples}: add one to the function, or leave it out"
        )
    stream = build(**selection)
    if not isinstance(stream, TaskStream):
        raise TypeError(f"{name!r} returned a {type(stream).__name__}: a TaskStream is needed")
    if tasks is None or "tasks" in selection:
        return stream
    known = {task.name: task for task in stream.tasks}
    for task in tasks:
        if task not in known:
            raise ValueError(f"stream {stream.name!r}: {unknown('task', task, list(known))}")
    return replace(stream, tasks=tuple(known[task] for task in tasks))
