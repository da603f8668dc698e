"""Sets of adapters, one a task, read lazily as factors."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from analysis.formats import HeldAdapter, Shape, Source, StoredAdapter, StoredBases, read_adapter, read_bases
from analysis.peft_folder import read_peft
from analysis.records import Record

Located = tuple[StoredAdapter, StoredBases | None]


class Factors(NamedTuple):
    """One layer's update by one task: ``ΔW = left rightᵀ``, all scale in `left`, both float32."""

    task: str
    layer: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """The updates of a sequence of tasks, iterated as (task, layer, left, right).

    Every task must adapt the same layers; ranks may differ. The sum of the updates up to a task is the change
    of the model after it, so a folder must hold what *its* task added. Nothing but names and shapes is kept in
    memory: each iteration reads the files again.
    """

    sources: tuple[Source, ...]
    memories: tuple[StoredBases | None, ...]

    def __post_init__(self) -> None:
        """Check that the tasks differ in name and agree in layers.

        Raises:
            ValueError: no task, a task twice, or layers that differ between tasks.
        """
        if not self.sources:
            raise ValueError("an AdapterSet needs at least one task")
        if len(set(self.tasks)) < len(self.tasks):
            twice = next(task for task in self.tasks if self.tasks.count(task) > 1)
            raise ValueError(
                f"task {twice!r} occurs twice: load separate runs as separate sets, or name the tasks with tasks="
            )
        first = self.sources[0]
        for source in self.sources[1:]:
            _check_same_layers(first, source)
        for source, memory in zip(self.sources[1:], self.memories, strict=False):
            for layer, (n, _) in (memory.shapes if memory else {}).items():
                if memory and layer in source.shapes and n != source.shapes[layer][1]:
                    raise ValueError(
                        f"{memory.path}: {layer} has a basis in R^{n}, its adapter has {source.shapes[layer][1]} inputs"
                    )

    @classmethod
    def load(cls, *paths: str | Path, tasks: Sequence[str] | None = None) -> "AdapterSet":
        """The adapters in `paths`, in this order.

        A path is a run folder (all its tasks, with their protected subspaces), one adapter folder of ours, or
        a PEFT LoRA folder. Formats may be mixed as long as the layers agree. `tasks` replaces the names that
        manifests and folders give.

        Raises:
            FileNotFoundError: a folder or file is missing, or a folder holds none of the formats.
            ValueError: a file is truncated, differs from its manifest, or is not supported.
        """
        if not paths:
            raise ValueError("AdapterSet.load needs at least one path")
        located = [found for path in paths for found in _locate(Path(path))]
        if tasks is not None:
            if len(tasks) != len(located):
                raise ValueError(f"tasks names {len(tasks)} tasks, the paths hold {len(located)}")
            located = [(replace(found[0], task=task), found[1]) for found, task in zip(located, tasks, strict=True)]
        return cls(tuple(found[0] for found in located), tuple(found[1] for found in located))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> "AdapterSet":
        """A set from task to layer to (left (m, r), right (n, r)), all scale in left.

        Raises:
            ValueError: a pair of factors is not two matrices of one rank.
        """
        for task, layers in factors.items():
            for layer, (left, right) in layers.items():
                if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
                    raise ValueError(
                        f"{task}, {layer}: factors need shapes (m, r) and (n, r), "
                        f"got {tuple(left.shape)} and {tuple(right.shape)}"
                    )
        sources = tuple(HeldAdapter(task, layers) for task, layers in factors.items())
        return cls(sources, (None,) * len(sources))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of learning."""
        return tuple(source.task for source in self.sources)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What made each task's update, such as ``"eblora"`` or ``"lora"``."""
        return tuple(source.kind for source in self.sources)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers in the order of the model."""
        return tuple(self.sources[0].shapes)

    def shape(self, task: str, layer: str) -> Shape:
        """(m, n, r) of one update, from the file's header."""
        return self._source(task).shapes[layer]

    def __len__(self) -> int:
        """Number of updates, tasks times layers."""
        return len(self.sources) * len(self.layers)

    def __iter__(self) -> Iterator[Factors]:
        """Every update, task by task."""
        for task in self.tasks:
            yield from self.read(task, self.layers)

    def __repr__(self) -> str:
        """Tasks and number of layers."""
        return f"AdapterSet(tasks={', '.join(self.tasks)}; {len(self.layers)} layers)"

    def read(self, task: str, layers: Iterable[str]) -> Iterator[Factors]:
        """The updates of some layers by one task, from one opened file."""
        layers = tuple(layers)
        for layer, (left, right) in zip(layers, self._source(task).read(layers), strict=True):
            yield Factors(task, layer, left, right)

    def factors(self, task: str, layer: str) -> tuple[Tensor, Tensor]:
        """Left (m, r) with all scale in it, and right (n, r), float32.

        Raises:
            ValueError: there is no such task or layer.
        """
        if layer not in self.layers:
            raise ValueError(f"no layer {layer!r} among {len(self.layers)}, the first is {self.layers[0]!r}")
        found = next(self.read(task, (layer,)))
        return found.left, found.right

    def protected(self, task: str, layer: str) -> Tensor | None:
        """Orthonormal basis (n, k) that was protected while `task` was learned, or None.

        It is the subspace saved after the task before it; the first task has none.
        """
        place = self.tasks.index(self._source(task).task)
        memory = self.memories[place - 1] if place else None
        return None if memory is None else memory.basis(layer)

    def _source(self, task: str) -> Source:
        for source in self.sources:
            if source.task == task:
                return source
        raise ValueError(f"no task {task!r}; the tasks are {', '.join(self.tasks)}")


def _check_same_layers(first: Source, other: Source) -> None:
    ours, theirs = first.shapes, other.shapes
    if differing := sorted(set(ours) ^ set(theirs)):
        raise ValueError(
            f"tasks {first.task!r} and {other.task!r} adapt different layers: {differing[0]!r} is in one of them "
            f"only, {len(differing)} layers differ"
        )
    for layer, shape in ours.items():
        if shape[:2] != theirs[layer][:2]:
            raise ValueError(
                f"{layer} is {shape[0]} × {shape[1]} in task {first.task!r} and {theirs[layer][0]} × "
                f"{theirs[layer][1]} in task {other.task!r}: the adapters belong to different models"
            )


def _locate(path: Path) -> list[Located]:
    """The adapters of one path."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    if (path / "record.json").exists():
        return _locate_run(path)
    if (path / "adapter.json").exists() or (path / "adapter.safetensors").exists():
        return [(read_adapter(path), None)]
    if (path / "adapter_config.json").exists():
        return [(read_peft(path), None)]
    raise FileNotFoundError(
        f"{path} holds no adapter: looked for record.json (a run), adapter.json with adapter.safetensors, and "
        "adapter_config.json with adapter_model.safetensors (PEFT)"
    )


def _locate_run(path: Path) -> list[Located]:
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
