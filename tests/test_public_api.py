"""The public names, their arguments and the members of public classes, against the list in ``public_api.txt``.

After a change that is meant, with its line in the changelog: ``python tests/test_public_api.py`` writes the list again.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manifold_cl.plugins import Registry

LIST = Path(__file__).with_name("public_api.txt")
PACKAGES = (
    "manifold_cl",
    "manifold_cl.geometry",
    "manifold_cl.geometry.retractions",
    "manifold_cl.geometry.checks",
    "manifold_cl.geometry.testing",
    "manifold_cl.optim",
    "manifold_cl.adapters",
    "manifold_cl.continual",
    "manifold_cl.continual.metrics",
    "manifold_cl.continual.methods",
    "manifold_cl.continual.subspaces",
    "manifold_cl.streams",
    "manifold_cl.study",
    "manifold_cl.lab",
    "manifold_cl.planning",
    "manifold_cl.infeasible",
    "manifold_cl.integrations.transformers",
    "analysis",
    "analysis.activations",
    "analysis.adapters",
    "analysis.causes",
    "analysis.changes",
    "analysis.formats",
    "analysis.many",
    "analysis.numerics.spectral_measures",
    "analysis.plots",
    "analysis.report",
    "analysis.statistics",
    "analysis.studies",
    "analysis.tables",
    "analysis.training",
)
"""The packages and modules that docs/api names; of a package only what is in its ``__all__``, the rest may change."""
API = Path(__file__).parents[1] / "docs" / "api"


def entries() -> list[str]:
    """One line per public name, and one per public member that its class defines, with arguments but no defaults."""
    return [line for package in PACKAGES for line in _of_package(package)]


def _of_package(package: str) -> Iterator[str]:
    module = importlib.import_module(package)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == package]
    for name in sorted(getattr(module, "__all__", [name for name in own if not name.startswith("_")])):
        value = getattr(module, name)
        yield f"{package}.{name}{_arguments(value)}"
        if isinstance(value, Registry):
            yield from (f"    {key!r}" for key in sorted(value))
        if inspect.isclass(value) and value.__module__.split(".")[0] in ("manifold_cl", "analysis"):
            for name, member in sorted(vars(value).items()):
                if not name.startswith("_"):
                    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                    if getattr(function, "hooked", False) and not _is_own(inspect.unwrap(function), value):
                        continue  # torch puts a wrapped inherited step into a class when it is first instantiated
                    yield f"    {name}{_arguments(inspect.unwrap(function))}"


def _is_own(function: Any, owner: type) -> bool:
    return bool(function.__qualname__.split(".")[0] == owner.__qualname__)


def _arguments(value: Any) -> str:
    """The names of the arguments, with ``=`` after those that have a default; nothing for what cannot be called."""
    if not callable(value):
        return ""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (ValueError, TypeError):
        return ""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    words, only_names = [], False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not only_names:
            words.append("*")
        only_names |= parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        default = "" if parameter.default is inspect.Parameter.empty or parameter.kind in marks else "="
        words.append(f"{marks.get(parameter.kind, '')}{parameter.name}{default}")
    return f"({', '.join(words)})"


def test_the_public_names_and_their_arguments_are_those_of_the_list() -> None:
    listed = LIST.read_text(encoding="utf-8").splitlines()
    changes = list(difflib.unified_diff(listed, entries(), LIST.name, "the code", lineterm=""))
    assert not changes, "\n".join(changes)


def test_the_list_covers_all_packages_that_the_pages_name() -> None:
    named = re.findall(
        r"^\.\. (?:currentmodule|automodule):: (\S+)", "\n".join(map(Path.read_text, API.glob("*.rst"))), re.M
    )
    assert named
    assert set(named) <= set(PACKAGES)


if __name__ == "__main__":
    LIST.write_text("\n".join(entries()) + "\n", encoding="utf-8")
