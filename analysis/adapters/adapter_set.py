"""Sets of adapters, one per task, read lazily as factors."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.adapters.agreement import (
    distinct_names,
    layer_differences,
    matched_layers,
    shared_layers,
    split_layers,
    validate_bases,
)
from analysis.files import as_paths
from analysis.formats import (
    BareParameter,
    Checkpoint,
    LeftOut,
    ProtectedBases,
    Reader,
    Shape,
    Source,
    held_adapter,
    read_bases,
    save_lora,
)
from analysis.names import listed, natural_key


class LayerUpdate(NamedTuple):
    """One layer's update by one task: ``ΔW = left rightᵀ``, all scale in `left`, both float32."""

    task: str
    layer: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """The updates of a sequence of tasks, iterated as (task, layer, left, right).

    Every task must adapt the same layers; ranks may differ. A folder must hold the update of its own task: the model
    after a task is changed by the sum of the updates so far. Only names and shapes are kept in memory; each iteration
    reads the files again.
    """

    sources: tuple[Source, ...]
    memories: tuple[ProtectedBases | None, ...]
    notices: tuple[str, ...] = ()
    """Contents of the files beside the updates, omissions and assumptions, one sentence each."""
    left_out: tuple[LeftOut, ...] = ()
    """Every tensor, layer or file that is not read or is no part of an update: file, tensor, reason, task."""

    def __post_init__(self) -> None:
        """Raise ValueError for no task, a task twice, or layers or protected bases that differ between tasks."""
        if not self.sources:
            raise ValueError("an AdapterSet needs at least one task")
        if len(set(self.tasks)) < len(self.tasks):
            twice = next(task for task in self.tasks if self.tasks.count(task) > 1)
            remedy = "load separate runs as separate sets, or name the tasks (tasks=)"
            raise ValueError(f"task {twice!r} occurs twice: {remedy}")
        for name in (*self.tasks, *self.layers):
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise ValueError(f"{name!r} is no text, its bytes are not UTF-8: rename it, or name it with tasks=")
        for kind, name, others, remedy in (
            ("task", "protected", self.tasks, "name it with tasks="),
            ("layer", "total", self.layers, "rename it with rename="),
        ):
            if name in others:
                raise ValueError(f"a {kind} is named {name!r}, which tables call something else: {remedy}")
        first = self.sources[0]
        for source in self.sources[1:]:
            if differing := layer_differences(first, source):
                raise ValueError(
                    f"tasks {first.task!r} and {source.task!r} adapt different layers, {len(differing)} differ: "
                    f"{listed(differing, 8, '; ')} (common=True reads only the layers that agree)"
                )
        for source, memory in zip(self.sources[1:], self.memories, strict=False):
            for layer, (n, _) in (memory.shapes if memory else {}).items():
                if memory and layer in source.shapes and n != (inputs := source.shapes[layer][1]):
                    raise ValueError(f"{memory.path}: {layer} has a basis in R^{n}, its adapter has {inputs} inputs")

    @classmethod
    def load(
        cls,
        *paths: str | Path,
        tasks: Sequence[str] | None = None,
        base: str | Path | Checkpoint | None = None,
        common: bool = False,
        rank: int | None = None,
        alpha: float | str | None = None,
        layers: str | None = None,
        transposed: str | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> "AdapterSet":
        """The adapters in `paths`, in this order.

        Formats, and names of layers and tasks: docs/analysis.md, "What can be read". Formats may be mixed as long as
        the layers agree. `notices` describes the parts of files that are not read, and options without effect;
        `left_out` lists these parts one by one.

        Args:
            paths: where the updates lie, in the order of their tasks; ``hf://owner/name`` is a repository of the hub.
            tasks: names that replace those of manifests and folders.
            base: the base checkpoint, which DoRA, OSF and dense checkpoints need. Dense checkpoints follow
                upon each other: the first update is the difference to the base, the second to the first.
            common: read only the layers that all tasks have in common, where layers, shapes or bases differ.
            rank: rank to which updates are truncated that are not stored as two factors: differences of dense
                checkpoints, products, rotations and scalings of weights. Full if not given.
            alpha: stands in where a LoRA file without a configuration has none; ``"rank"`` means scaling 1.
            layers: regular expression; only layers that it finds are read. Of dense checkpoints, all matrices that
                it finds are compared, those that do not differ too.
            transposed: regular expression; layers that it finds have a base weight stored (inputs, outputs), such as
                GPT-2's Conv1D (``r"c_(attn|proj|fc)$"``) and embeddings. Replaces what PEFT folders state.
            rename: components of layers' names to those that replace them, in adapters and in the base, such as
                ``{"model.decoder": "model.language_model"}``. For names that are not matched by themselves.

        Raises:
            FileNotFoundError: a folder or file is missing, or a folder holds none of the formats.
            TypeError: a list of paths in place of the paths.
            ValueError: a file is truncated, differs from its manifest, is a pickle, or is not supported; the
                tasks differ in layers or base model and `common` is not set; a pattern is no regular expression.
        """
        if not paths:
            raise ValueError("AdapterSet.load needs at least one path")
        given = as_paths("AdapterSet.load", paths)
        rename = dict(rename or {})
        checkpoint = base if base is None or isinstance(base, Checkpoint) else Checkpoint.load(base)
        checkpoint = checkpoint.renamed(rename) if checkpoint is not None and rename else checkpoint
        reader = Reader(checkpoint, rank, alpha, layers, transposed, rename)
        located = [found for path in given for found in reader.locate(path)]
        unused = reader.unused(located)
        tasks = distinct_names(located) if tasks is None else tasks
        if len(tasks) != len(located):
            raise ValueError(
                f"tasks= names {len(tasks)} tasks, but the paths hold {len(located)}: give one name per task"
            )
        named = zip(split_layers(located), tasks, strict=True)
        sources = [replace(source, task=task) for source, task in named]
        memories = [adapter.memory for adapter in located]
        for position, source in enumerate(sources[1:], start=1):
            if names := matched_layers(sources[0], source):
                sources[position] = source.relabelled(names, "layers have other names than in the first task")
                memory = memories[position]
                memories[position] = None if memory is None else memory.relabelled(names)
        if common:
            sources = shared_layers(sources)
        else:
            validate_bases(sources)
        notices = tuple(f"{source.task}: {notice}" for source in sources for notice in source.notices)
        left_out = tuple(each._replace(task=source.task) for source in sources for each in source.left_out)
        return cls(tuple(sources), tuple(memories), (*notices, *unused), left_out)

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, Mapping[str, Any]],
        *,
        transposed: Collection[str] = (),
        embeddings: Collection[str] = (),
        tied: Collection[str] = (),
        parameters: Mapping[str, BareParameter] | None = None,
        kernels: Mapping[str, tuple[int, ...]] | None = None,
    ) -> "AdapterSet":
        """A set from task to layer to (left (m, r), right (n, r)), all scale in left.

        An object with ``left``, ``right`` and ``magnitude``, as ``merge_adapters`` of manifold_cl returns, stands for a
        pair. Layers in `transposed` have a base weight stored (inputs, outputs); those in `embeddings` are saved as
        factors of embeddings, and those in `tied`, the model's output too, are not saved. `parameters` are those of
        another set: its layers that are bare parameters of a module. `kernels` are sizes of convolutions' kernels.

        Raises:
            ValueError: a pair of factors is not two matrices of one rank, or holds NaN.
        """
        held: dict[str, dict[str, tuple[Tensor, Tensor]]] = {task: {} for task in factors}
        for task, layers in factors.items():
            for layer, given in layers.items():
                left, right = _pair(given)
                if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
                    shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
                    raise ValueError(f"{task}, {layer}: factors need shapes (m, r) and (n, r), got {shapes}")
                if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                    raise ValueError(f"{task}, {layer}: factors contain NaN or infinite numbers")
                held[task][layer] = (left, right)
        kinds: Any = {"transposed": frozenset(transposed), "embeddings": frozenset(embeddings), "tied": frozenset(tied)}
        kinds |= {"parameters": dict(parameters or {}), "kernels": dict(kernels or {})}
        sources = tuple(replace(held_adapter(task, layers), **kinds) for task, layers in held.items())
        return cls(sources, (None,) * len(sources))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of learning."""
        return tuple(source.task for source in self.sources)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each task's adapter, such as ``"eblora"`` or ``"lora"``."""
        return tuple(source.kind for source in self.sources)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers in the order of the model."""
        return tuple(self.sources[0].shapes)

    @property
    def transposed(self) -> frozenset[str]:
        """Layers known to have a base weight stored (inputs, outputs)."""
        return frozenset().union(*(source.transposed for source in self.sources))

    @property
    def embeddings(self) -> frozenset[str]:
        """Layers known to be embeddings: their factors act on one-hot inputs."""
        return frozenset().union(*(source.embeddings for source in self.sources))

    @property
    def tied(self) -> frozenset[str]:
        """Embeddings known to be the model's output too."""
        return frozenset().union(*(source.tied for source in self.sources))

    @property
    def parameters(self) -> Mapping[str, BareParameter]:
        """Layers that are bare parameters of a module, such as one expert's matrix of a stack."""
        return {layer: each for source in self.sources for layer, each in source.parameters.items()}

    @property
    def kernels(self) -> Mapping[str, tuple[int, ...]]:
        """Layers known to be convolutions, with the sizes of their kernels, such as (3, 3)."""
        return {layer: sizes for source in self.sources for layer, sizes in source.kernels.items()}

    def shape(self, task: str, layer: str) -> Shape:
        """(m, n, r) of one update, from the file's header."""
        return self._source(task).shapes[layer]

    def __len__(self) -> int:
        """Number of updates, tasks times layers."""
        return len(self.sources) * len(self.layers)

    def __iter__(self) -> Iterator[LayerUpdate]:
        """Every update, task by task."""
        for task in self.tasks:
            yield from self.read(task, self.layers)

    def __repr__(self) -> str:
        """Tasks and number of layers."""
        return f"AdapterSet(tasks={', '.join(self.tasks)}; {len(self.layers)} layers)"

    def read(self, task: str, layers: Iterable[str]) -> Iterator[LayerUpdate]:
        """The updates of some layers by one task, from one opened file."""
        layers = tuple(layers)
        for layer, factors in zip(layers, self._source(task).read(layers), strict=True):
            yield LayerUpdate(task, layer, *factors)

    def factors(self, task: str, layer: str) -> tuple[Tensor, Tensor]:
        """Left (m, r) with all scale in it, and right (n, r), float32.

        Raises:
            ValueError: there is no such task or layer.
        """
        if layer not in self.sources[0].shapes:
            raise ValueError(f"no layer {layer!r} among {len(self.layers)}, the first is {self.layers[0]!r}")
        return next(self.read(task, (layer,)))[2:]

    def protected(self, task: str, layer: str) -> Tensor | None:
        """Orthonormal basis (n, k) that was protected while `task` was learned, or None.

        It is the subspace saved after the task before it; the first task has none.
        """
        position = self.tasks.index(self._source(task).task)
        memory = self.memories[position - 1] if position else None
        return None if memory is None else memory.basis(layer)

    def save(self, folder: str | Path) -> Path:
        """The folder, with each task as a LoRA folder that PEFT loads, and a manifest that keeps their order.

        Updates are written with scaling 1, embeddings with PEFT's names and layout. Parts of the original files that
        the set lacks, such as changed norms and biases, are not saved: a warning lists `notices`.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: an embedding is tied to the model's output, to which PEFT would not add the update.
        """
        if self.tied:
            raise ValueError(
                f"{listed(sorted(self.tied))} is the model's output too, to which PEFT adds no embedding's update: "
                "leave it out (layers= with a pattern that does not find it), or save the tuned checkpoint"
            )
        updates = [(task, self.read(task, self.layers)) for task in self.tasks]
        kinds: Any = {"transposed": self.transposed, "embeddings": self.embeddings, "parameters": self.parameters}
        kinds["kernels"] = self.kernels
        saved = save_lora(Path(folder), updates, **kinds)
        if self.notices:
            warnings.warn(f"{saved} holds the updates as they were read: {'; '.join(self.notices)}", stacklevel=2)
        return saved

    def _source(self, task: str) -> Source:
        if task not in self.tasks:
            raise ValueError(f"no task {task!r}; the tasks are {', '.join(self.tasks)}")
        return self.sources[self.tasks.index(task)]


def read_protected(path: str | Path) -> dict[str, Tensor]:
    """Layer name to orthonormal basis (n, k) of a saved memory: a task's folder, or a run's last one.

    Raises:
        FileNotFoundError: there is no memory.
        ValueError: it is truncated, altered or not orthonormal.
    """
    folder = Path(path)
    if folder.name in ("memory.safetensors", "memory.json"):
        folder = folder.parent
    tasks = sorted(folder.glob("tasks/*-*"), key=lambda task: natural_key(task.name))
    for position in (*reversed(tasks), folder):
        if (memory := read_bases(position)) is not None:
            bases = {layer: memory.basis(layer) for layer in memory.shapes}
            return {layer: basis for layer, basis in bases.items() if basis is not None}
    raise FileNotFoundError(
        f"{path} holds no memory: looked for memory.safetensors in it and in the tasks of a run; give the folder of "
        "a run or task, or one that 'manifold-cl subspace build' wrote"
    )


def _pair(update: Any) -> tuple[Tensor, Tensor]:
    if not (hasattr(update, "left") and hasattr(update, "right")):
        left, right = update
        return left, right
    core = torch.as_tensor(getattr(update, "magnitude", 1.0))
    return update.left @ core.to(update.left) if core.ndim == 2 else update.left * core, update.right
