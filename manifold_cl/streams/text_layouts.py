"""Layouts of folders with tasks in text: JSONL, TRACE, O-LoRA and SuperNI. Each finds its tasks and their files."""

from __future__ import annotations

import logging
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from manifold_cl.continual.task import Split
from manifold_cl.files import FileError
from manifold_cl.plugins import unknown
from manifold_cl.streams.causal_lm import TextExample
from manifold_cl.streams.json_rows import NotJSONError, Problem, kind_of, list_elements, read_object, read_rows
from manifold_cl.streams.text_rows import RowReader

Read = Callable[[Path], tuple[list[TextExample], list[Problem]]]

NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
"""Split → the names that files and data sets have for it."""

logger = logging.getLogger("manifold_cl")


@dataclass(frozen=True)
class TaskSource:
    """A task in a folder: its files, how they are read, and how its answers are scored.

    Args:
        name: of the task.
        files: split → its file.
        read: returns the examples of a file and its problems.
        settings: arguments of `CausalLMTask` that the layout determines.
    """

    name: str
    files: Mapping[Split, Path]
    read: Read
    settings: Mapping[str, Any] = field(default_factory=dict)


class TextLayout(ABC):
    """A kind of folder. ``name`` is that of the option ``--layout``, ``form`` describes the folder in messages."""

    name: ClassVar[str]
    form: ClassVar[str]

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Orders, lengths and rules, from the layout's preset."""
        text = (Path(__file__).parent / "presets" / f"{self.name}.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)

    @abstractmethod
    def folders(self, root: Path) -> dict[str, Path]:
        """Name of each task in ``root`` → its folder or file; empty where ``root`` is of another layout."""

    @abstractmethod
    def source(self, name: str, path: Path, reader: RowReader) -> TaskSource:
        """The task of that name."""

    def sources(
        self,
        root: Path,
        reader: Callable[[], RowReader],
        *,
        order: str | None = None,
        tasks: Sequence[str] | None = None,
    ) -> list[TaskSource]:
        """The tasks of ``root`` in the order of learning.

        Args:
            root: the folder.
            reader: makes a reader of rows per task.
            order: number of a published order; the first one by default.
            tasks: names of tasks, in order, in place of a published order.

        Raises:
            FileError: for a task that the folder lacks.
            ValueError: for an unknown order, or both an order and tasks.
        """
        there = {name.casefold(): (name, path) for name, path in self.folders(root).items()}
        names = self.names(list(there), order, tasks)
        if missing := [name for name in names if name.casefold() not in there]:
            known = ", ".join(name for name, _ in there.values())
            raise FileError(
                f"{root} lacks the tasks {', '.join(missing)} (it has {known}): add them, or choose with tasks="
            )
        return [self.source(*there[name.casefold()], reader()) for name in names]

    def names(self, there: Sequence[str], order: str | None, tasks: Sequence[str] | None) -> Sequence[str]:
        """The tasks to take, in order, of those that are ``there``; errors as `sources`."""
        if order is not None and tasks is not None:
            raise ValueError(f"order={order} and tasks= both determine the order of tasks: give one of them")
        if tasks is not None:
            return tasks
        orders: Mapping[str, list[str]] = self.facts["orders"]
        order = order or self.facts["default_order"]
        if order not in orders:
            raise ValueError(f"layout {self.name}: {unknown('order', order, orders)}")
        if order in self.facts.get("unverified_orders", ()):
            logger.warning("order %s of %s is not verified: compare it with the publication", order, self.name)
        return orders[order]

    def _settings(self, rule: str, options: Sequence[str] = ()) -> dict[str, Any]:
        lengths = {key: self.facts[key] for key in ("max_length", "max_new_tokens")}
        return {"rule": rule, "options": tuple(options), **lengths}


class JSONL(TextLayout):
    """The user's own rows, one JSON object per line."""

    name = "jsonl"
    form = "NAME.jsonl or NAME/{train,validation,test}.jsonl per task"

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Nothing is published about it."""
        return {}

    def folders(self, root: Path) -> dict[str, Path]:
        """Files and folders in alphabetical order; ``root`` itself where it has a training file."""
        if "train" in split_files(root, (".jsonl",)):
            return {root.resolve().name: root}
        there = {path.stem: path for path in sorted(root.glob("*.jsonl"))}
        for path in _subfolders(root):
            if split_files(path, (".jsonl",)):
                if path.name in there:
                    raise FileError(f"{path} and {path}.jsonl are both the task {path.name}: rename one")
                there[path.name] = path
        return there

    def source(self, name: str, path: Path, reader: RowReader) -> TaskSource:
        """The task, its rows read by ``reader``."""
        files: Mapping[Split, Path] = {"train": path} if path.is_file() else split_files(path, (".jsonl",))
        return TaskSource(name, files, partial(_read_rows, reader=reader))

    def names(self, there: Sequence[str], order: str | None, tasks: Sequence[str] | None) -> Sequence[str]:
        """The given tasks, or all that are there."""
        if order is not None:
            raise ValueError(f"order={order} is one of a published benchmark: for JSONL, give tasks= in their order")
        return there if tasks is None else tasks


class Trace(TextLayout):
    """TRACE: prompts with their instruction, and answers."""

    name = "trace"
    form = "TASK/{train,eval,test}.json, lists of {prompt, answer}, with the task names of TRACE"

    def folders(self, root: Path) -> dict[str, Path]:
        """Folders with a published task's name."""
        known = {name.casefold(): name for name in self.facts["tasks"]}
        return {
            known[path.name.casefold()]: path
            for path in _subfolders(root)
            if path.name.casefold() in known and split_files(path, (".json",))
        }

    def source(self, name: str, path: Path, reader: RowReader) -> TaskSource:
        """The task with its published rule."""
        task = self.facts["tasks"][name]
        files = split_files(path, (".json",))
        return TaskSource(name, files, partial(_read_rows, reader=reader), self._settings(**task))


class OLoRA(TextLayout):
    """O-LoRA: sentences and labels, with an instruction per group."""

    name = "olora"
    form = "GROUP/DATASET/{train,dev,test,labels}.json, lists of {sentence, label}"

    def folders(self, root: Path) -> dict[str, Path]:
        """Folders of data sets inside folders of groups."""
        return {
            path.name: path
            for group in _subfolders(root)
            if group.name in self.facts["instructions"]
            for path in _subfolders(group)
            if split_files(path, (".json",)) and (path / "labels.json").is_file()
        }

    def source(self, name: str, path: Path, reader: RowReader) -> TaskSource:
        """The task; its legal answers are those of ``labels.json``."""
        labels = self._labels(path / "labels.json")
        instruction = self.facts["instructions"][path.parent.name]
        # Prompts end with a colon: the blank after it belongs to the answer, as tokenizers of decoders write it.
        head = f"{instruction}\nOption: {', '.join(labels)} \n" if instruction else ""
        options = tuple(f" {label}" for label in labels)

        def convert(row: Mapping[str, Any], place: str) -> TextExample:
            sentence, label = (_required(row, key) for key in ("sentence", "label"))
            if label not in labels:
                raise ValueError(f"the label {label!r} is none of {', '.join(labels)} (labels.json)")
            return TextExample(f"{head}{sentence}\nAnswer:", f" {label}", (label,), options, place)

        files = split_files(path, (".json",))
        return TaskSource(name, files, partial(read_rows, convert=convert), self._settings(**self.facts["default"]))

    @staticmethod
    def _labels(path: Path) -> list[str]:
        try:
            labels = [row.content for row in list_elements(path)]
        except NotJSONError as error:
            line, column, what = error.args
            raise FileError(str(Problem(path, line, what, column))) from None
        if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
            raise FileError(f"{path}: labels are a list of texts, none of them empty")
        return labels


class SuperNI(TextLayout):
    """SuperNI: one definition per task, inputs and outputs."""

    name = "superni"
    form = "TASK/{train,dev,test}.json, objects with Definition and Instances"

    def folders(self, root: Path) -> dict[str, Path]:
        """Folders whose files hold one JSON object."""
        return {
            path.name: path
            for path in _subfolders(root)
            if (files := split_files(path, (".json",))) and _starts(next(iter(files.values())), "{")
        }

    def source(self, name: str, path: Path, reader: RowReader) -> TaskSource:
        """The task, scored by ROUGE-L, or by exact match for the data sets of the long sequence."""
        long = not name.startswith("task")
        rule = self.facts["long_sequence" if long else "default"]
        files = split_files(path, (".json",))
        return TaskSource(name, files, partial(_read_instances, long=long), self._settings(**rule))


LAYOUTS: Mapping[str, TextLayout] = {layout.name: layout for layout in (JSONL(), Trace(), OLoRA(), SuperNI())}
"""Layouts by name."""


def find_layout(folder: Path, name: str | None = None) -> tuple[TextLayout, Path]:
    """The layout of a folder, and the folder of its tasks: ``folder``, or a folder in it.

    Args:
        folder: of the user.
        name: of a layout; found by the files by default.

    Raises:
        FileError: where the folder does not exist, or fits no layout or several.
        ValueError: for an unknown name.
    """
    if name is not None and name not in LAYOUTS:
        raise ValueError(unknown("layout", name, LAYOUTS))
    if not folder.is_dir():
        raise FileError(f"{folder} is no folder: give the one with the tasks")
    wanted = list(LAYOUTS.values()) if name is None else [LAYOUTS[name]]
    for bases in ([folder], _subfolders(folder)):
        fits = [(layout, base) for layout in wanted for base in bases if layout.folders(base)]
        if len(fits) == 1:
            return fits[0]
        if fits:
            places = ", ".join(f"{layout.name} in {base}" for layout, base in fits)
            raise FileError(f"{folder} fits several layouts ({places}): choose with layout=, or give the inner folder")
    forms = "; ".join(f"{layout.name}: {layout.form}" for layout in wanted)
    raise FileError(f"{folder} holds no tasks that can be read. A folder has, for {forms}")


def split_files(folder: Path, endings: Iterable[str]) -> dict[Split, Path]:
    """The file of each split that ``folder`` has; of several names the first one."""
    found: dict[Split, Path] = {}
    for split, names in NAMES.items():
        paths = (folder / f"{name}{ending}" for name in names for ending in endings)
        if (path := next((path for path in paths if path.is_file()), None)) is not None:
            found[split] = path
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_rows(path: Path, reader: RowReader) -> tuple[list[TextExample], list[Problem]]:
    return read_rows(path, reader)


def _read_instances(path: Path, *, long: bool) -> tuple[list[TextExample], list[Problem]]:
    """The instances of a SuperNI file."""
    try:
        content = read_object(path)
    except NotJSONError as error:
        line, column, what = error.args
        return [], [Problem(path, line, what, column)]
    definition, instances = content.get("Definition"), content.get("Instances")
    if isinstance(definition, list) and definition:
        definition = definition[0]
    if not isinstance(definition, str) or not isinstance(instances, list) or not instances:
        return [], [Problem(path, 0, "'Definition' (text) and 'Instances' (a list with at least one) are needed")]
    head = definition if long else f"Definition: {definition}\n\nNow complete the following example -\nInput: "
    examples, problems = [], []
    for number, instance in enumerate(instances, 1):
        try:
            examples.append(_instance(instance, head, f"{path.name}, instance {number}"))
        except ValueError as error:
            problems.append(Problem(path, 0, f"instance {number}: {error}"))
    return examples, problems


def _instance(instance: Any, head: str, place: str) -> TextExample:
    if not isinstance(instance, dict):
        raise ValueError(f"an instance is a JSON object, got {kind_of(instance)}")
    output = instance.get("output")
    known: list[Any] = output if isinstance(output, list) else [output]
    if not known or not all(isinstance(text, str) and text.strip() for text in known):
        raise ValueError(f"'output' is text or a list of texts, none of them empty, got {kind_of(output)}")
    return TextExample(f"{head}{_required(instance, 'input')}\nOutput:", f" {known[0]}", tuple(known), source=place)


def _required(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"no {key!r} (the row has {', '.join(map(repr, row)) or 'no keys'})")
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key!r} is text that is not empty, got {kind_of(row[key])}")
    return str(row[key])


def _starts(path: Path, mark: str) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip().startswith(mark)
