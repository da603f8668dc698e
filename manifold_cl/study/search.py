"""Where options come from: results of searches, checked to be on equal terms and not on what is reported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from manifold_cl.files import FileError
from manifold_cl.streams import STREAMS
from manifold_cl.study.plan import Entry

NEEDED: Mapping[str, tuple[type, str]] = {
    "method": (str, "a name"),
    "stream": (str, "a name"),
    "winner": (dict, "the options that won"),
    "trials": (list, "a list of trials"),
}


def read_search(folder: Path, file: Any, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The winner's options in a search's results, and what a study says of the search.

    Raises:
        TypeError: ``file`` is no text.
        FileError: the file is missing or no search's result.
        ValueError: it is a search of another method.
    """
    if not isinstance(file, str):
        raise TypeError(f"winner_of is the path of a search's results, got {file!r}")
    path = folder / file
    if not path.is_file():
        raise FileError(f"winner_of: {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(f"winner_of: {path} is damaged or truncated ({error})") from None
    if wrong := next(_wrong(found), None):
        raise FileError(f"winner_of: {path} holds no search, {wrong}")
    if found["method"] != method:
        raise ValueError(f"winner_of: {path} is a search for {found['method']}, not for {method}")
    best = next((trial for trial in found["trials"] if trial["options"] == found["winner"]), None)
    if best is None:
        raise FileError(f"winner_of: the winner in {path} is none of its trials")
    said = {"file": file, "stream": found["stream"], "trials": len(found["trials"]), "mfn": best["mfn"]}
    return dict(found["winner"]), said | {key: found[key] for key in ("tasks", "evaluate_on") if key in found}


def _wrong(found: Any) -> Iterator[str]:
    """What a search's result lacks or has of another kind."""
    if not isinstance(found, dict):
        yield f"but {type(found).__name__}"
        return
    if lacking := [key for key in NEEDED if key not in found]:
        yield f"it lacks {', '.join(lacking)}"
        return
    for key, (kind, said) in NEEDED.items():
        if not isinstance(found[key], kind):
            yield f"its {key} is {found[key]!r}, not {said}"
    for place, trial in enumerate(found["trials"]):
        if not isinstance(trial, dict):
            yield f"trials[{place}] is {trial!r}, not a table"
        elif not isinstance(trial.get("options"), dict):
            yield f"trials[{place}] has no table of options"
        elif not isinstance(mfn := trial.get("mfn"), Real) or isinstance(mfn, bool) or not math.isfinite(mfn):
            yield f"trials[{place}] has no number mfn"
    if found.get("evaluate_on", "test") not in ("test", "validation"):
        yield f"its evaluate_on is {found['evaluate_on']!r}, not test or validation"
    if not _is_names(found.get("tasks", [])):
        yield f"its tasks are {found['tasks']!r}, not a list of names"


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def check_budgets(entries: Sequence[Entry], *, stream: str, reported: Sequence[str], unequal: bool) -> None:
    """Refuse searches that looked at what is reported, or had more trials than others.

    Args:
        entries: the methods of a study.
        stream: of the study, as its file names it.
        reported: tasks whose test parts are reported; none where other parts are.
        unequal: let budgets differ.

    Raises:
        ValueError: saying which.
    """
    searches: Mapping[str, Mapping[str, Any]] = {e.label: e.search for e in entries if e.search is not None}
    for label, search in searches.items() if reported else ():
        if search.get("evaluate_on", "test") == "validation":
            continue
        if shared := [task for task in reported if task in _tasks(search, stream, reported)]:
            raise ValueError(
                f"{label} was tuned on the test parts of {', '.join(shared)} (stream {search['stream']}), which are "
                "reported: search on a stream of other tasks, or on validation parts (evaluate_on in the search)"
            )
    budgets = {label: search["trials"] for label, search in searches.items()}
    if len(set(budgets.values())) > 1 and not unequal:
        said = ", ".join(f"{label} {trials}" for label, trials in budgets.items())
        raise ValueError(
            f"searches had unequal budgets of trials ({said}): a table on equal terms needs one; "
            "unequal_budgets = true goes on nevertheless"
        )


def _tasks(search: Mapping[str, Any], stream: str, reported: Sequence[str]) -> Sequence[str]:
    """The tasks that a search ran on; those of its stream where it does not name them.

    Raises:
        ValueError: it does not, and its stream is neither the study's nor a known one.
    """
    if "tasks" in search:
        return list(search["tasks"])
    searched = search["stream"]
    if searched == stream:
        return reported
    if searched not in STREAMS:  # it may name code, which is not run for the names of its tasks
        raise ValueError(
            f"{search['file']} does not say which tasks it searched on, and its stream {searched!r} is none of "
            f"{', '.join(STREAMS)}: write their names into it, as tasks"
        )
    return STREAMS[searched].task_names
