"""Results of searches for options: equal budgets, and no search on the reported test parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from manifold_cl.files import FileError, loads
from manifold_cl.kinds import is_number
from manifold_cl.streams import STREAMS
from manifold_cl.study.plan import MethodEntry

NEEDED: Mapping[str, tuple[type, str]] = {
    "method": (str, "a name"),
    "stream": (str, "a name"),
    "winner": (dict, "the options that won"),
    "trials": (list, "a list of trials"),
}


def read_search(folder: Path, file: Any, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The winner's options in the results of a search, and the summary of the search for a study.

    Raises TypeError if ``file`` is no text, FileError for a missing or invalid file, ValueError for another method.
    """
    if not isinstance(file, str):
        raise TypeError(f"winner_of is the path of a search's results, got {file!r}")
    path = folder / file
    content = validate_results(path, "winner_of")
    if content["method"] != method:
        raise ValueError(f"winner_of: {path} is a search for {content['method']}, not for {method}")
    best = next((trial for trial in content["trials"] if trial["options"] == content["winner"]), None)
    if best is None:
        raise FileError(f"winner_of: the winner in {path} is none of its trials")
    summary = {"file": file, "stream": content["stream"], "trials": len(content["trials"]), "mfn": best["mfn"]}
    return dict(content["winner"]), summary | {key: content[key] for key in ("tasks", "evaluate_on") if key in content}


def validate_results(path: Path, start: str) -> dict[str, Any]:
    """The content of a file of results; FileError, which begins with ``start``, if it is missing or invalid."""
    if not path.is_file():
        raise FileError(f"{start}: {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        content = loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{start}: {path} is damaged or truncated ({error})") from None
    if fault := next(_faults(content), None):
        raise FileError(f"{start}: {path} holds no search, {fault}")
    return dict(content)


def _faults(content: Any) -> Iterator[str]:
    """Missing and invalid parts of a search's result."""
    if not isinstance(content, dict):
        yield f"but {type(content).__name__}"
        return
    if missing := [key for key in NEEDED if key not in content]:
        yield f"it lacks {', '.join(missing)}"
        return
    for key, (kind, words) in NEEDED.items():
        if not isinstance(content[key], kind):
            yield f"its {key} is {content[key]!r}, not {words}"
    for index, trial in enumerate(content["trials"]):
        if not isinstance(trial, dict):
            yield f"trials[{index}] is {trial!r}, not a table"
        elif not isinstance(trial.get("options"), dict):
            yield f"trials[{index}] has no table of options"
        elif not is_number(mfn := trial.get("mfn")) or not math.isfinite(mfn):
            yield f"trials[{index}] has no number mfn"
    if content.get("evaluate_on", "test") not in ("test", "validation"):
        yield f"its evaluate_on is {content['evaluate_on']!r}, not test or validation"
    tasks = content.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
        yield f"its tasks are {tasks!r}, not a list of names"


def validate_budgets(entries: Sequence[MethodEntry], *, stream: str, reported: Sequence[str], unequal: bool) -> None:
    """Raise ValueError for searches on reported test parts, and for unequal numbers of trials.

    Args:
        entries: the methods of a study.
        stream: of the study, as in its file.
        reported: tasks with reported test parts; empty if other parts are reported.
        unequal: whether numbers of trials may differ.
    """
    searches: Mapping[str, Mapping[str, Any]] = {e.label: e.search for e in entries if e.search is not None}
    for label, search in searches.items():
        if not reported or search.get("evaluate_on") == "validation":
            continue
        if shared := [task for task in reported if task in _tasks(search, stream, reported)]:
            raise ValueError(
                f"{label} was tuned on the test parts of {', '.join(shared)} (stream {search['stream']}), which are "
                "reported: search on a stream of other tasks, or on validation parts (evaluate_on in the search)"
            )
    trials = {label: search["trials"] for label, search in searches.items()}
    if len(set(trials.values())) > 1 and not unequal:
        raise ValueError(
            f"searches had unequal budgets of trials ({', '.join(f'{label} {n}' for label, n in trials.items())}): "
            "search with equal budgets, or allow it by unequal_budgets = true"
        )


def _tasks(search: Mapping[str, Any], stream: str, reported: Sequence[str]) -> Sequence[str]:
    """Names of the tasks of a search, by default those of its stream; ValueError if they are unknown."""
    if "tasks" in search:
        return list(search["tasks"])
    if search["stream"] == stream:
        return reported
    if search["stream"] not in STREAMS:  # code does not run for the names of its tasks
        raise ValueError(
            f"{search['file']} does not name the tasks it searched on, and its stream {search['stream']!r} is none of "
            f"{', '.join(STREAMS)}: add their names to it, as tasks"
        )
    return STREAMS[search["stream"]].task_names
