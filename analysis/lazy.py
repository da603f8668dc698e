"""Packages that import a public name's module when the name is first used (PEP 562)."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that writes its imports under ``if TYPE_CHECKING:``.

    Type checkers and readers see ordinary imports. At run time each of them is made when its name is first used, so
    that ``import package`` loads nothing. A submodule, too, is imported when it is first used.

    Args:
        package: ``__name__`` of the package. None of its public names may also be the name of one of its modules:
            the import of that module would put the module in the name's place.
    """
    module, root = sys.modules[package], package.partition(".")[0]

    @cache
    def origins() -> dict[str, str]:
        """Public name → the module that defines it, from the source of the package."""
        statements = ast.walk(ast.parse(inspect.getsource(module)))
        imports = [s for s in statements if isinstance(s, ast.ImportFrom) and f"{s.module}.".startswith(f"{root}.")]
        return {alias.name: str(s.module) for s in imports for alias in s.names}

    def attribute(name: str) -> Any:
        if name in module.__all__ and name in origins():
            value = getattr(importlib.import_module(origins()[name]), name)
            setattr(module, name, value)  # the next use finds it without this function
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)

    def names() -> list[str]:
        return sorted({*vars(module), *module.__all__})

    return attribute, names
