"""Search for updates at a path, in any of the formats."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from analysis.formats.base_updates import checkpoint_difference
from analysis.formats.checkpoints import Checkpoint, is_checkpoint
from analysis.formats.files import INDEX, TORCH_FILES, is_file, is_folder, read_json, stored_shapes
from analysis.formats.hub import from_hub, is_hub_address
from analysis.formats.own import ProtectedBases, check_format, read_adapter, read_bases
from analysis.formats.patterns import matching_names
from analysis.formats.peft_folder import CONFIG, FILES, INDICES, is_adapter_index, read_peft, renamed_file
from analysis.formats.records import Record
from analysis.formats.single_files import holds_factors, read_single
from analysis.formats.sources import LeftOut, Source
from analysis.names import listed, natural_key, renamed, unwrapped

MANIFEST = "tasks.json"
DEPTH = 2
"""Levels of subfolders that are searched if a folder has no update itself."""
LOOKED_FOR = (
    "record.json (a run), adapter.safetensors, adapter_config.json with adapter_model.safetensors "
    "or .bin (PEFT), one .safetensors file with lora_down and lora_up or lora_A and lora_B, model.safetensors or its "
    f"index (a checkpoint, with its base), {MANIFEST}, and folders with one of these"
)
_IN_FOLDERS = {"record.json", "adapter.json", "adapter.safetensors", CONFIG, *FILES}
"""Files that are read with others beside them: such a path stands for its folder."""
_OF_TRAINER = ("README.md", "trainer_state.json", "optimizer.pt", "training_args.bin")
"""Files of an adapter saved on its own; named adapters lack them, since PEFT writes one README for all."""


class Located(NamedTuple):
    """One task's update, the bases protected at its end, and the folder or file that it is named after."""

    source: Source
    memory: ProtectedBases | None
    path: Path


@dataclass
class Reader:
    """Options of `AdapterSet.load`, and the last checkpoint read: each is compared with the one before it."""

    base: Checkpoint | None = None
    rank: int | None = None
    alpha: float | str | None = None
    pattern: str | None = None
    transposed: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for a pattern that is no regular expression."""
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}, at least 1 was expected")
        for option, pattern in (("layers", self.pattern), ("transposed", self.transposed)):
            try:
                matching_names(pattern or "", [])
            except ValueError as error:
                raise ValueError(f"{option}={pattern!r}: {error}") from error
        for old, new in self.rename.items():
            if not old or old.strip(".") != old or new.strip(".") != new:
                raise ValueError(f"rename={old}={new}: names of layers, or parts of them between dots, were expected")
        self._last = self.base
        self._renamed: set[str] = set()
        if self.base is not None and self.rename:
            self._note_renames(map(unwrapped, self.base.stored.values()))
        self._open: list[Path] = []
        self._alpha_used = False
        self._rank_used = False

    def unused(self, located: Sequence[Located]) -> list[str]:
        """One notice per option that had no effect on the updates."""
        notices = []
        if self.alpha is not None and not self._alpha_used:
            reason = "it stands in where a LoRA file has none, and every layer here has its own scaling"
            notices.append(f"alpha is given as {self.alpha} and has no effect: {reason}")
        if self.rank is not None and not self._rank_used and not any(each.source.kind == "dense" for each in located):
            reason = "it truncates updates that are not stored as two factors, and there are none of a higher rank"
            notices.append(f"rank is given as {self.rank} and has no effect: {reason}")
        for old, new in self.rename.items():
            if old not in self._renamed:
                notices.append(f"the renaming {old}={new} has no effect: no layer's name has {old}")
        return notices

    def locate(self, path: Path, *, deep: bool = True) -> list[Located]:
        """The updates at a path, in order; with `deep`, those in subfolders if it has none itself."""
        if is_hub_address(path):
            return self._on_hub(path)
        if path.name in ("", ".."):  # "." and ".." cannot name a task
            path = path.resolve()
        if is_folder(path):
            located = self._folder(path, DEPTH if deep else 0, named=deep)
        elif is_file(path):
            located = self._file(path)
        else:
            raise FileNotFoundError(f"{path} is not a folder or file")
        if not located:
            raise FileNotFoundError(f"{path} holds no adapter: looked for {LOOKED_FOR}")
        return [self._picked(each) for each in located]

    def _on_hub(self, address: Path) -> list[Located]:
        """The updates in a repository of the hub, named after it."""
        local, name, commit = from_hub(address)
        notice = f"read from hf://{name} at commit {commit[:12]}"
        found = [each._replace(source=each.source.noting([notice])) for each in self.locate(local)]
        own = Path(name).stem if local.is_file() else Path(name).name
        return [
            each._replace(source=replace(each.source, task=own), path=Path(name)) if each.path == local else each
            for each in found
        ]

    def _inside(self, path: Path, depth: int) -> list[Located]:
        """The updates in subfolders, in the order of their numbers, searched to a depth."""
        updates: list[Located] = []
        for child in subfolders(path):
            if self.base is not None and child.resolve() == self.base.path.resolve():
                continue  # the base checkpoint itself is no update
            updates += self._folder(child, depth - 1)
        return updates

    def _folder(self, path: Path, depth: int, *, named: bool = True) -> list[Located]:
        """The updates in a folder itself, or in its subfolders to a depth."""
        if is_file(path / MANIFEST):
            return list(self._manifest(path / MANIFEST))
        if is_file(path / "record.json"):
            return [self._located(source, path, memory) for source, memory in _run(path)]
        if is_file(path / "adapter.json") or is_file(path / "adapter.safetensors"):
            return [self._located(read_adapter(path), path)]
        if is_file(path / CONFIG):
            return self._peft(path, named=named)
        if is_checkpoint(path):
            return [Located(self._difference(path), None, path)]
        singles = [file for file in sorted(path.glob("*.safetensors")) if holds_factors(file)]
        if len(singles) > 1:
            found = f"{len(singles)} LoRA files without a configuration"
            names = ", ".join(file.name for file in singles)
            raise ValueError(f"{path} holds {found}, name them one by one in their order: {names}")
        if singles:
            return [self._located(replace(self._single(singles[0]), task=path.name), path)]
        return self._inside(path, depth) if depth else []

    def _peft(self, path: Path, *, named: bool) -> list[Located]:
        """The adapter of a PEFT folder, and those that PEFT saved into subfolders with their names."""
        first = self._located(read_peft(path, base=self.base), path)
        inner = [child for child in subfolders(path) if is_file(child / CONFIG)]
        alone = [child for child in inner if any((child / name).exists() for name in _OF_TRAINER)]
        others = [child for child in inner if child not in alone] if named else []
        notices = [
            *_notice("the folder holds several adapters, read as tasks in the order of their names", others),
            *_notice("subfolders hold adapters saved on their own, which are not read", alone),
            *_notice("subfolders hold other adapters, which are not read", [] if named else inner),
        ]
        unread = [LeftOut(str(child), "", "another adapter in a subfolder") for child in (alone if named else inner)]
        first = first._replace(source=first.source.noting(notices, unread))
        return [first, *(self._located(read_peft(child, base=self.base), child) for child in others)]

    def _single(self, path: Path) -> Source:
        """The adapter in one file; notes whether the option alpha is used."""
        adapter = read_single(path, alpha=self.alpha, base=self.base)
        self._alpha_used |= any(notice.startswith("alpha is missing") for notice in adapter.notices)
        return adapter

    def _file(self, path: Path) -> list[Located]:
        if _is_part_of_folder(path) and (located := self._folder(path.parent, 0, named=False)):
            return located
        if path.suffix == ".json" and not path.name.endswith(INDEX):
            return list(self._manifest(path))
        if path.suffix in (".safetensors", *TORCH_FILES) and holds_factors(path):
            return [self._located(self._single(path), path)]
        if path.suffix in (".safetensors", ".json", *TORCH_FILES):
            if not stored_shapes(path):
                raise ValueError(f"{path} holds no tensors")
            return [Located(self._difference(path), None, path)]
        raise FileNotFoundError(f"{path} is no file of adapters: looked for .safetensors, .bin, .pt and {MANIFEST}")

    def _located(self, source: Source, path: Path, memory: ProtectedBases | None = None) -> Located:
        """An update at a path; the options `rename`, `transposed` and `rank` replace names and what the files state."""
        if self.rank is not None:
            limited = source.limited(self.rank)
            self._rank_used |= limited.shapes != source.shapes
            source = limited
        source = self._with_names(source, path)
        if memory is not None and self.rename:
            memory = memory.relabelled({renamed(own, self.rename): own for own in memory.shapes})
        if self.transposed is not None:
            layers = matching_names(self.transposed, list(source.shapes))
            source = replace(source, transposed=frozenset(layers) | source.embeddings)
        return Located(source, memory, path)

    def _note_renames(self, names: Iterable[str]) -> None:
        """Keep which renames have an effect on some names."""
        if remaining := self.rename.keys() - self._renamed:
            self._renamed |= {old for name in names for old in remaining if f".{old}." in f".{name}."}

    def _with_names(self, source: Source, path: Path) -> Source:
        """The update with the names of its layers as `rename` has them."""
        names: dict[str, str] = {}
        self._note_renames(source.shapes)
        for own in source.shapes:
            if (other := names.setdefault(renamed(own, self.rename), own)) != own:
                raise ValueError(f"{path}: {other} and {own} have the same name after rename=")
        if all(name == own for name, own in names.items()):
            return source
        return source.relabelled(names, "layers are renamed")

    def _picked(self, located: Located) -> Located:
        """The update of the layers that `pattern` finds."""
        source = located.source
        if self.pattern is None or source.kind == "dense":
            return located
        layers = matching_names(self.pattern, list(source.shapes))
        if not layers:
            others = f"{len(source.shapes)} layers, such as {listed(list(source.shapes))}"
            raise ValueError(f"{located.path}: layers={self.pattern!r} finds none of {others}")
        return located._replace(source=source.picked(layers, reason=f"not found by layers={self.pattern!r}"))

    def _difference(self, path: Path) -> Source:
        if self._last is None:
            remedy = "its update is the difference to another one: give the base checkpoint (base=)"
            raise ValueError(f"{path} is a complete checkpoint: {remedy}")
        after = Checkpoint.load(path)
        self._note_renames(after.shapes)
        before, self._last = self._last, after.renamed(self.rename)
        name = Path(path.name.removesuffix(INDEX)).stem if path.is_file() else path.name
        options = {"pattern": self.pattern, "transposed": self.transposed}
        return checkpoint_difference(name, before, self._last, rank=self.rank, **options)

    def _manifest(self, path: Path) -> Iterator[Located]:
        """Tasks by name and path, relative to the manifest."""
        data = read_json(path)
        check_format(path, data, "analysis.tasks")
        tasks = data.get("tasks")
        if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
            raise ValueError(f"{path}: key 'tasks' is a list of objects with 'name' and 'path'")
        if path.resolve() in self._open:
            raise ValueError(f"{path} names a folder that leads back to itself")
        self._open.append(path.resolve())
        for task in tasks:
            if not isinstance(task.get("path"), str):
                raise ValueError(f"{path}: a task has no 'path': {task}")
            if not isinstance(name := task.get("name"), str | None):
                raise ValueError(f"{path}: the name of a task is {name!r}, text was expected")
            given = Path(task["path"])
            if given.is_absolute() or ".." in given.parts or "\0" in task["path"]:
                raise ValueError(
                    f"{path}: the path {task['path']!r} of a task leaves the folder of this file: give a path below "
                    "it, or put a link there"
                )
            located = self.locate(path.parent / given, deep=False)
            if len(located) != 1:
                raise ValueError(f"{path}: {task['path']} holds {len(located)} adapters, a task has one")
            source = located[0].source
            yield located[0]._replace(source=replace(source, task=name or source.task), path=path)
        self._open.pop()


def subfolders(path: Path) -> list[Path]:
    """The visible subfolders, in the order of their numbers."""
    children = (child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    return sorted(children, key=lambda child: natural_key(child.name))


def _is_part_of_folder(path: Path) -> bool:
    """Whether a file is read with others: a manifest, or tensors beside their configuration."""
    if path.name in _IN_FOLDERS:
        return path.name not in FILES or is_file(path.parent / CONFIG)
    if path.suffix == ".safetensors" and is_file(path.parent / CONFIG) and renamed_file(path.parent) == path:
        return True
    shard = path.name.startswith("adapter_model-") or (path.name in INDICES and is_adapter_index(path))
    return shard and is_file(path.parent / CONFIG)


def _notice(text: str, folders: list[Path]) -> list[str]:
    return [f"{text}: {listed([folder.name for folder in folders])}"] if folders else []


def _run(path: Path) -> list[tuple[Source, ProtectedBases | None]]:
    """The adapters of a run's finished tasks; a run with only one adapter may number it freely."""
    record = Record.load(path)
    folders: dict[int, Path] = {}
    for folder in sorted((path / "tasks").glob("*-*")):
        saved = is_file(folder / "adapter.json") or is_file(folder / "adapter.safetensors")
        if re.match(r"[0-9]+-", folder.name) and saved:
            number = int(folder.name.partition("-")[0])
            if folders.setdefault(number, folder) != folder:
                raise ValueError(f"{path}: {folders[number].name} and {folder.name} are both task {number}")
    if not folders:
        raise FileNotFoundError(f"{path} holds no adapters: looked for tasks/NN-name/adapter.safetensors")
    last = len(record.tasks) if record.status == "complete" else max(folders)
    if len(folders) > 1 and (missing := sorted(set(range(1, last + 1)) - set(folders))):
        name = record.tasks[missing[0] - 1] if missing[0] <= len(record.tasks) else "?"
        raise FileNotFoundError(f"{path}: the adapter of task {missing[0]} ({name}) is missing under tasks/")
    updates: list[tuple[Source, ProtectedBases | None]] = []
    for number, folder in sorted(folders.items()):
        adapter: Source = read_adapter(folder)
        expected = record.tasks[number - 1] if number <= len(record.tasks) else None
        if len(folders) > 1 and adapter.task != expected:
            differs = f"{path / 'record.json'} says that task {number} is {expected!r}"
            if folder.name.partition("-")[2] != expected:
                raise ValueError(f"{folder} holds the adapter of {adapter.task!r}, {differs}: a folder of another run?")
            notice = f"{folder.name} holds an adapter of {adapter.task!r}, though {differs}"
            adapter = adapter.picked(adapter.shapes, notice)
        updates.append((adapter, read_bases(folder)))
    return updates
