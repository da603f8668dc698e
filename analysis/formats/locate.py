"""From a path to the updates that lie there, whatever wrote them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.formats.checkpoints import Checkpoint, CheckpointDifference, is_checkpoint
from analysis.formats.kohya import is_kohya, read_kohya
from analysis.formats.own import StoredBases, check_format, read_adapter, read_bases
from analysis.formats.peft_folder import PeftAdapter, read_peft
from analysis.formats.records import Record
from analysis.formats.sources import RenamedAdapter, Source, StoredAdapter
from analysis.formats.tensor_files import TORCH_FILES, read_json
from analysis.names import folder_key

Located = tuple[Source, StoredBases | None]
MANIFEST = "tasks.json"
LOOKED_FOR = (
    "record.json (a run), adapter.json with adapter.safetensors, adapter_config.json with adapter_model.safetensors "
    "or .bin (PEFT), one .safetensors file with lora_down and lora_up (Kohya), model.safetensors or its index (a "
    f"checkpoint, with base=), {MANIFEST}, and folders with one of these"
)


@dataclass
class Reader:
    """What is needed beside the paths, and the last checkpoint seen: one follows upon the other."""

    base: Checkpoint | None = None
    rank: int | None = None
    alpha: float | str | None = None
    pattern: str | None = None
    transposed: str | None = None

    def __post_init__(self) -> None:
        """The first checkpoint is compared with the base; patterns are checked.

        Raises:
            ValueError: a pattern is no regular expression.
        """
        for option, pattern in (("layers", self.pattern), ("transposed", self.transposed)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{option}={pattern!r} is no regular expression: {error}") from error
        self._last = self.base

    def locate(self, path: Path, *, deep: bool = True) -> list[Located]:
        """The updates of one path, in order; with `deep`, those of its subfolders where it has none itself.

        Raises:
            FileNotFoundError: the path is missing or holds none of the formats.
            ValueError: a folder holds several Kohya files, or what it holds is damaged or not supported.
        """
        if path.is_file():
            return self._file(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder or file")
        found = self._folder(path)
        if found is None and deep:
            inner = sorted((child for child in path.iterdir() if child.is_dir()), key=lambda p: folder_key(p.name))
            found = [located for child in inner if not self._is_base(child) for located in self._folder(child) or ()]
        if not found:
            raise FileNotFoundError(f"{path} holds no adapter: looked for {LOOKED_FOR}")
        return found

    def _folder(self, path: Path) -> list[Located] | None:
        """The updates that lie in a folder itself; None where it is of no known kind."""
        if (path / MANIFEST).exists():
            return list(self._manifest(path / MANIFEST))
        if (path / "record.json").exists():
            return [(self._turned(source), memory) for source, memory in _run(path)]
        if (path / "adapter.json").exists() or (path / "adapter.safetensors").exists():
            return [(self._turned(read_adapter(path)), None)]
        if (path / "adapter_config.json").exists():
            return [(self._turned(read_peft(path, base=self.base)), None)]
        if is_checkpoint(path):
            return [(self._difference(path), None)]
        kohya = [file for file in sorted(path.glob("*.safetensors")) if is_kohya(file)]
        if len(kohya) > 1:
            names = ", ".join(file.name for file in kohya)
            raise ValueError(f"{path} holds {len(kohya)} Kohya files, name them one by one in their order: {names}")
        if kohya:
            return [(RenamedAdapter(self._turned(read_kohya(kohya[0], alpha=self.alpha)), path.name), None)]
        return None

    def _is_base(self, path: Path) -> bool:
        """Whether a subfolder is the base checkpoint itself, which is no update."""
        return self.base is not None and path.resolve() == self.base.path.resolve()

    def _file(self, path: Path) -> list[Located]:
        if path.name == MANIFEST or path.suffix == ".json":
            return list(self._manifest(path))
        if path.suffix == ".safetensors" and is_kohya(path):
            return [(self._turned(read_kohya(path, alpha=self.alpha)), None)]
        if path.suffix in (".safetensors", *TORCH_FILES):
            return [(self._difference(path), None)]
        raise FileNotFoundError(f"{path} is no file of adapters: looked for .safetensors, .bin, .pt and {MANIFEST}")

    def _turned(self, found: PeftAdapter) -> PeftAdapter:
        """The same update, its base weights stored the way that `transposed` says where it is given."""
        if self.transposed is None:
            return found
        pattern = re.compile(self.transposed)
        return replace(found, transposed=frozenset(layer for layer in found.shapes if pattern.search(layer)))

    def _difference(self, path: Path) -> Source:
        if self._last is None:
            raise ValueError(f"{path} is a whole checkpoint: its update is the difference to another one (give base=)")
        before, self._last = self._last, Checkpoint.load(path)
        name = path.stem if path.is_file() else path.name
        return CheckpointDifference.between(
            name, before, self._last, rank=self.rank, pattern=self.pattern, transposed=self.transposed
        )

    def _manifest(self, path: Path) -> Iterator[Located]:
        """Tasks by name and path, relative to the manifest."""
        data = read_json(path)
        check_format(path, data, "analysis.tasks")
        tasks = data.get("tasks")
        if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
            raise ValueError(f"{path}: key 'tasks' is a list of objects with 'name' and 'path'")
        for task in tasks:
            if not isinstance(task.get("path"), str):
                raise ValueError(f"{path}: a task has no 'path': {task}")
            found = self.locate(path.parent / task["path"], deep=False)
            if len(found) != 1:
                raise ValueError(f"{path}: {task['path']} holds {len(found)} adapters, a task has one")
            source, memory = found[0]
            yield RenamedAdapter(source, str(task.get("name") or source.task)), memory


def _run(path: Path) -> list[tuple[StoredAdapter, StoredBases | None]]:
    """The adapters of a run's finished tasks; a run that saves one adapter in all may number it freely."""
    record = Record.load(path)
    folders = {
        int(folder.name.partition("-")[0]): folder
        for folder in sorted((path / "tasks").glob("*-*"))
        if re.match(r"\d+-", folder.name)
        and ((folder / "adapter.json").exists() or (folder / "adapter.safetensors").exists())
    }
    if not folders:
        raise FileNotFoundError(f"{path} holds no adapters: looked for tasks/NN-name/adapter.json")
    numbers = sorted(folders)
    last = len(record.tasks) if record.status == "complete" else numbers[-1]
    if len(numbers) > 1 and (missing := sorted(set(range(1, last + 1)) - set(numbers))):
        name = record.tasks[missing[0] - 1] if missing[0] <= len(record.tasks) else "?"
        raise FileNotFoundError(f"{path}: the adapter of task {missing[0]} ({name}) is missing under tasks/")
    return [(read_adapter(folders[number]), read_bases(folders[number])) for number in numbers]
