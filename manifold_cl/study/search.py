"""Where options come from: results of searches, checked to be on equal terms and not on what is reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifold_cl.adapters.files import FileError

if TYPE_CHECKING:
    from manifold_cl.study.plan import Entry

NEEDED = ("method", "stream", "winner", "trials")


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
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"winner_of: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"winner_of: {path} is damaged or truncated ({error})") from None
    lacking = [key for key in NEEDED if not isinstance(found, dict) or key not in found]
    if lacking:
        raise FileError(f"winner_of: {path} holds no search, it lacks {', '.join(lacking)}")
    if found["method"] != method:
        raise ValueError(f"winner_of: {path} is a search for {found['method']}, not for {method}")
    best = next((trial for trial in found["trials"] if trial["options"] == found["winner"]), None)
    if best is None:
        raise FileError(f"winner_of: the winner in {path} is none of its trials")
    return dict(found["winner"]), {
        "file": file,
        "stream": found["stream"],
        "trials": len(found["trials"]),
        "mfn": best["mfn"],
    }


def check_budgets(entries: Sequence[Entry], *, stream: str | None, unequal: bool) -> None:
    """Refuse searches that looked at the reported stream, or had more trials than others.

    Args:
        entries: the methods of a study.
        stream: the stream whose test part is reported; None where none is.
        unequal: let budgets differ.

    Raises:
        ValueError: saying which.
    """
    searches: Mapping[str, Mapping[str, Any]] = {e.label: e.search for e in entries if e.search is not None}
    if seen := [label for label, search in searches.items() if search["stream"] == stream]:
        raise ValueError(
            f"{', '.join(seen)} was tuned on {stream}, the stream that is reported: search on another stream or on "
            'its validation part (evaluate_on = "validation")'
        )
    budgets = {label: search["trials"] for label, search in searches.items()}
    if len(set(budgets.values())) > 1 and not unequal:
        said = ", ".join(f"{label} {trials}" for label, trials in budgets.items())
        raise ValueError(
            f"searches had unequal budgets of trials ({said}): a table on equal terms needs one; "
            "unequal_budgets = true goes on nevertheless"
        )
