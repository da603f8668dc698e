"""What users name on a command line or in a file: ``module:name``, ``file.py:name``, or a name that nothing has."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def load_object(path: str) -> Any:
    """What ``module:name`` or ``file.py:name`` names.

    Raises:
        ValueError: when the module, file or name does not exist.
    """
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"a plug-in is module:name or file.py:name, got {path!r}")
    file = Path(place)
    try:
        if file.suffix == ".py":
            known_as = f"manifold_cl_plugin_{file.stem}"  # no module's own name: json.py is a file like any other
            spec = importlib.util.spec_from_file_location(known_as, file)
            if spec is None or spec.loader is None or not file.is_file():
                raise ImportError(f"no file {file}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[known_as] = module  # where dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, SyntaxError, ValueError) as error:
        raise ValueError(f"the plug-in {path!r} cannot be imported: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{place} has no {name!r}")
    return getattr(module, name)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The complaint about a name that is none of ``known``, with the nearest ones."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.4)
    hint = f", did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (have: {', '.join(names) or 'none'})"
