"""Layouts of instruction streams: files, template, scorers and presets, read from a TOML file.

The published benchmarks are such files in the package (``presets/``). Users may write their own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar

from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.continual.training import Training
from manifold_cl.continual.validation import validate_name
from manifold_cl.files import FileError, read_toml
from manifold_cl.plugins import unknown
from manifold_cl.streams.published import PUBLISHED
from manifold_cl.streams.scorers import CAPTIONS, RULES

PROJECTOR = r"(.*\.)?multi_modal_projector\..*"
"""The parameters between vision tower and language model, in transformers' names."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskFiles:
    """One task's files, relative to the user's folder; of several names the first that exists is read.

    Args:
        name: of the task.
        train: training instructions.
        test: test instructions.
        scorer: name of a rule of `scorers`, or ``captions``.
        subset_scorers: part of an image path → the rule for such items.
        captions: reference captions in COCO's annotation format, in the order of the test file.
        image_roots: folders of the images, tried in order; the stream's own if empty.
        text_only: whether items without an image are valid.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    scorer: str
    subset_scorers: Mapping[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    image_roots: tuple[str, ...] = ()
    text_only: bool = False

    def __post_init__(self) -> None:
        validate_name("task", self.name)
        for part in ("train", "test", "captions", "image_roots"):
            _validate_paths(f"task {self.name!r}, {part}", getattr(self, part))
        known = [*RULES, CAPTIONS]
        for scorer in (self.scorer, *self.subset_scorers.values()):
            if scorer not in known:
                raise ValueError(f"task {self.name!r}: {unknown('scorer', scorer, known)}")
        if CAPTIONS in self.subset_scorers.values() or (self.scorer == CAPTIONS and self.subset_scorers):
            raise ValueError(f"task {self.name!r}: captions are scored together, not beside other scorers")

    @property
    def rules(self) -> dict[str, str]:
        """Rules as `scorers.score` takes them."""
        return {**self.subset_scorers, "": self.scorer}


@dataclass(frozen=True)
class ProjectorRates:
    """The projector's learning rate (or one per task) and weight decay."""

    lr: float | tuple[float, ...]
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Preset:
    """One published configuration.

    Args:
        method: name of a method.
        total_batch: examples per step over all ranks and accumulated batches.
        options: of the method.
        training: fields of `Training`; ``accumulation`` follows from ``total_batch``.
        projector: the published rates of the projector, which a stream trains on request only.
        deviations: differences from the publication.
    """

    method: str
    total_batch: int
    options: Mapping[str, Any]
    training: Mapping[str, Any]
    projector: ProjectorRates | None = None
    deviations: tuple[str, ...] = ()

    def training_for(self, ranks: int = 1, *, batch_size: int | None = None, seed: int = 0) -> Training:
        """The training of the preset on ``ranks`` processes, at the published total batch.

        Args:
            ranks: number of processes.
            batch_size: examples per process and forward pass; the preset's by default.
            seed: of the run.

        Raises:
            ValueError: when the total batch is no multiple of ``ranks`` times ``batch_size``.
        """
        size = batch_size or int(self.training["batch_size"])
        accumulation, rest = divmod(self.total_batch, size * ranks)
        if rest or not accumulation:
            raise ValueError(
                f"{ranks} ranks of {size} examples do not divide the total batch of {self.total_batch}: "
                "choose another batch_size"
            )
        values = {key: _frozen(value) for key, value in self.training.items()}
        return Training(**{**values, "batch_size": size, "accumulation": accumulation, "seed": seed})

    def additional_parameters(self) -> AdditionalParameters:
        """The projector as the preset trains it."""
        if self.projector is None:
            raise ValueError("the preset does not say how the projector trains: it lacks a projector table")
        return AdditionalParameters(PROJECTOR, lr=self.projector.lr, weight_decay=self.projector.weight_decay)


@dataclass(frozen=True)
class Layout:
    """A stream of instruction tasks.

    Args:
        name: of the stream.
        tasks: in the order of learning.
        targets: regular expression of the linear modules that receive adapters, in the language model.
        template: name of the conversation template.
        aspect: ``"pad"`` makes images square with the mean colour before they are resized; ``"crop"`` passes them to
            the processor as they are.
        max_length: tokens after which training texts are truncated, including those of the image.
        max_new_tokens: tokens after which an answer ends.
        image_roots: folders of the images, tried in order.
        presets: published configurations by name.
    """

    name: str
    tasks: tuple[TaskFiles, ...]
    targets: str
    template: str = "vicuna_v1"
    aspect: Literal["pad", "crop"] = "pad"
    max_length: int = 2048
    max_new_tokens: int = 1024
    image_roots: tuple[str, ...] = (".",)
    presets: Mapping[str, Preset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.aspect not in ("pad", "crop"):
            raise ValueError(f"aspect is 'pad' or 'crop', got {self.aspect!r}")
        validate_name("stream", self.name)
        try:
            re.compile(self.targets)
        except (re.error, TypeError) as error:
            raise ValueError(f"targets is a regular expression, got {self.targets!r} ({error})") from None
        for name in self.presets:
            validate_name("preset", name)
        _validate_paths("image_roots", self.image_roots)

    def roots(self, task: TaskFiles) -> tuple[str, ...]:
        """The folders of the images of ``task``."""
        return task.image_roots or self.image_roots

    def preset(self, name: str, *, tasks: Sequence[str] | None = None) -> Preset:
        """The preset of that name, restricted to ``tasks`` in their order; ValueError for an unknown name."""
        if name not in self.presets:
            raise ValueError(f"stream {self.name!r}: {unknown('preset', name, self.presets)}")
        preset = self.presets[name]
        if tasks is None:
            return preset
        indices = [self.tasks.index(task) for task in self.select(tasks)]

        def picked(value: Any) -> Any:
            return tuple(value[i] for i in indices) if isinstance(value, list | tuple) else value

        projector = preset.projector and replace(preset.projector, lr=picked(preset.projector.lr))
        return replace(preset, training={k: picked(v) for k, v in preset.training.items()}, projector=projector)

    def select(self, names: Sequence[str] | None) -> list[TaskFiles]:
        """The tasks of these names in their order; all by default. ValueError for an unknown name."""
        tasks = {task.name: task for task in self.tasks}
        for name in names or ():
            if name not in tasks:
                raise ValueError(f"stream {self.name!r}: {unknown('task', name, tasks)}")
        return [tasks[name] for name in (tasks if names is None else names)]


def published_layout(name: str) -> Layout:
    """The layout of a published benchmark: ``"ucit"`` or ``"mllm-dcl"``."""
    return _layout(tomllib.loads(published_text(name)), PUBLISHED[name])


def published_text(name: str) -> str:
    """The TOML text of a published benchmark's layout."""
    if name not in PUBLISHED:
        raise ValueError(unknown("stream", name, PUBLISHED))
    return (Path(__file__).parent / "presets" / PUBLISHED[name]).read_text(encoding="utf-8")


def read_layout(path: Path | str) -> Layout:
    """The layout in the user's TOML file; FileError for a missing or malformed one, and unknown or missing keys."""
    path = Path(path)
    content = read_toml(path)
    try:
        return _layout(content, str(path))
    except (ValueError, TypeError) as error:
        raise FileError(f"{path}: {error}") from None


def _validate_paths(name: str, paths: object) -> None:
    """Raise TypeError for anything but a list of texts, ValueError for a path outside the data's folder."""
    if not isinstance(paths, tuple) or not all(isinstance(path, str) for path in paths):
        raise TypeError(f"{name} is a list of paths, got {paths!r}")
    for path in paths:
        for pure in (PurePosixPath(path), PureWindowsPath(path)):
            if pure.anchor or ".." in pure.parts or not path.isprintable():
                raise ValueError(
                    f"{name}: {path!r} leaves the folder with the data: give a path below it, or put a link there"
                )


def _layout(content: dict[str, Any], where: str) -> Layout:
    tasks = content.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"{where} lists no [[tasks]]")
    tables = content.get("presets", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise TypeError(f"{where}: presets are tables [presets.NAME], got {tables!r}")
    presets = {name: _preset(name, values) for name, values in tables.items()}
    built = tuple(_filled(TaskFiles, task, f"task {task.get('name', '?')!r}") for task in tasks)
    return _filled(Layout, {**content, "tasks": built, "presets": presets}, "the stream")


def _preset(name: str, values: dict[str, Any]) -> Preset:
    values = dict(values)
    if "projector" in values:
        values["projector"] = _filled(ProjectorRates, values["projector"], f"preset {name!r}, projector")
    _validate_keys(f"preset {name!r}, training", values.get("training", {}), [e.name for e in fields(Training)])
    return _filled(Preset, values, f"preset {name!r}")


def _filled(cls: type[_T], values: Mapping[str, Any], where: str) -> _T:
    """An instance of the dataclass from TOML values, lists as tuples; ValueError for unknown and missing keys."""
    known = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
    _validate_keys(where, values, list(known))
    required = [k for k, e in known.items() if e.default is MISSING and e.default_factory is MISSING]
    if lacking := [key for key in required if key not in values]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    return cls(**{key: _frozen(value) for key, value in values.items()})


def _validate_keys(where: str, keys: Iterable[str], known: list[str]) -> None:
    for key in keys:
        if key not in known:
            raise ValueError(f"{where}: {unknown('key', key, known)}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
