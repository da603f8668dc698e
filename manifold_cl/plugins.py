"""Registries of named objects, objects named as ``module:name``, and the message for an unknown name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


class UnknownNameError(ValueError, KeyError):
    """A name that a registry does not have; the message lists the nearest names."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


@dataclass(frozen=True)
class ObjectPath:
    """The place of an object that is not imported yet, as ``module:name``."""

    path: str


class Registry(Mapping[str, T]):
    """Objects by name: our own, those registered later, and those that installed packages offer as entry points.

    The mapping is read-only. Our own objects and the entry points of the group ``manifold_cl.<kind>s`` count as names
    at once and are loaded when they are first used: imports stay quick, and a broken package breaks only its own entry.

    Args:
        kind: what an entry is called in messages, such as ``"retraction"``.
        prepare: returns the name and the entry for a registered object, or raises TypeError.
        own: name → ``module:name`` of our own objects.
        advice: for an unknown name, what to say in place of the nearest names, or None.
    """

    def __init__(
        self,
        kind: str,
        prepare: Callable[[Any], tuple[str, T]],
        own: Mapping[str, str] = MappingProxyType({}),
        *,
        advice: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self.kind = kind
        self._advice = advice
        self.group = f"manifold_cl.{kind}s"
        self._prepare = prepare
        self._entries: dict[str, T | ObjectPath] = {name: ObjectPath(path) for name, path in own.items()}

    def register(self, candidate: Any) -> None:
        """Add an object under its own name; ValueError when it is taken, TypeError when the object does not fit."""
        name, entry = self._prepare(candidate)
        if name in self._entries:
            raise ValueError(f"a {self.kind} named {name!r} is registered already")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """The entry; UnknownNameError lists the nearest names, ValueError names a package that cannot be loaded."""
        if name not in self._entries:
            self._load(name)
        if name not in self._entries:
            raise UnknownNameError(self.unknown(name))
        entry = self._entries[name]
        if isinstance(entry, ObjectPath):
            _, entry = self._prepare(load_object(entry.path))
            self._entries[name] = entry
        return entry

    def unknown(self, name: str) -> str:
        """The message for a name without an entry: advice, or the nearest names."""
        advice = self._advice(name)
        return f"unknown {self.kind} {name!r}: {advice}" if advice else unknown(self.kind, name, sorted(self))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._entries, *(entry.name for entry in entry_points(group=self.group))]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self)})"

    def _load(self, name: str) -> None:
        for entry in entry_points(group=self.group, name=name):
            try:
                candidate = entry.load()
                if name not in self._entries:  # loading its module may have registered it
                    self.register(candidate)
                if name not in self._entries:
                    raise TypeError("it has another name than its entry point")
            except Exception as error:
                package = entry.dist.name if entry.dist else "an unknown package"
                raise ValueError(f"the {self.kind} {name!r} of {package} cannot be loaded: {error}") from error


@contextmanager
def listed_on_success(module: ModuleType) -> Iterator[None]:
    """``sys.modules`` has the module, where dataclasses look it up, and has what it had before after an error."""
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    except BaseException:
        sys.modules.pop(module.__name__, None)
        if before is not None:
            sys.modules[module.__name__] = before
        raise


def load_object(path: str) -> Any:
    """The object that ``module:name`` or ``file.py:name`` names; ValueError when one of them does not exist."""
    source, colon, name = path.rpartition(":")
    if not colon or not source or not name:
        raise ValueError(f"a plug-in is module:name or file.py:name, got {path!r}")
    file = Path(source)
    try:
        if file.suffix == ".py":
            module_name = f"manifold_cl_plugin_{file.stem}"  # a prefix, so that a json.py does not replace json
            spec = importlib.util.spec_from_file_location(module_name, file)
            if spec is None or spec.loader is None or not file.is_file():
                raise ImportError(f"no file {file}")
            module = importlib.util.module_from_spec(spec)
            with listed_on_success(module):
                spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except (ImportError, SyntaxError, ValueError) as error:
        raise ValueError(f"the plug-in {path!r} cannot be imported: {error}") from error
    if not hasattr(module, name):
        own = (key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
        raise ValueError(f"{source}: {unknown('name', name, own)}")
    return getattr(module, name)


def prepare_instance(candidate: Any, protocol: Any, needs: str) -> tuple[str, Any]:
    """The name and the entry for an object, or for a class that is made without arguments.

    Raises:
        TypeError: when it does not follow ``protocol``, with what it ``needs``.
    """
    instance = candidate() if isinstance(candidate, type) else candidate
    if not isinstance(instance, protocol):
        called = getattr(candidate, "__name__", type(candidate).__name__)
        raise TypeError(f"{called} needs {needs}")
    return instance.name, instance


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """The message for a name that is none of ``names``, with the nearest ones."""
    names = list(names)
    folded = {each.casefold(): each for each in names}
    word = name.casefold()
    close = (difflib.get_close_matches(word, folded, n=2, cutoff=cutoff) for cutoff in (0.5, 0.4))
    near = next(filter(None, close), [])  # beside a near name, a distant one is no help
    near = [folded[each] for each in ([word] if word in folded else near)]
    hint = f", did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (have: {', '.join(names) or 'none'})"
