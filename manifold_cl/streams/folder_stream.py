"""Streams of visual instructions from a folder that the user downloads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.continual.task import Split, TaskStream
from manifold_cl.files import FileError
from manifold_cl.rules import validate_whole
from manifold_cl.streams.captions import read_captions, require_tools
from manifold_cl.streams.folder_report import find_file, find_image, locations
from manifold_cl.streams.instruction_task import InstructionTask
from manifold_cl.streams.instructions import Instruction, read_instructions
from manifold_cl.streams.layout import PROJECTOR, Layout, TaskFiles, read_layout
from manifold_cl.streams.llava import Collator, load_llava, load_processor, require_llava
from manifold_cl.streams.published import DEFAULT_MODEL
from manifold_cl.streams.scorers import CAPTIONS
from manifold_cl.streams.selection import Evaluated, hold_out, spaced, validate_selection
from manifold_cl.streams.templates import template

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Precisions of products. float16 is not among them: its gradients underflow without loss scaling."""
MERGED = {**PRECISIONS, "float16": torch.float16}
"""Precisions of the weights that updates are merged into."""


@dataclass(frozen=True)
class FolderOptions:
    """Options of a stream of instructions.

    Args:
        model: a folder, or a LLaVA checkpoint's name on the hub.
        dtype: precision of the frozen weights: ``"bfloat16"`` or ``"float32"``.
        merged_dtype: precision of the weights that updates are merged into; ``"float16"`` halves their memory and
            rounds each merge to three digits, ``"bfloat16"`` would lose most of an update.
        tasks: the tasks to take, in the order to learn them; all in their own order by default.
        examples: training items per task, evenly spaced over its file; all by default.
        test_examples: test items per task, chosen in the same way.
        evaluate_on: with ``"validation"`` no test item is read; items held out of the training file replace them.
        train_projector: train the projector too, without protection. True takes the rates of the layout's first preset.
        checkpointing: recompute activations in the backward pass.
        answer_batch: questions answered together.
        layout: the user's own layout file, in place of the published one.
        local_files_only: never ask the network for the model.
    """

    model: str = DEFAULT_MODEL
    dtype: str = "bfloat16"
    merged_dtype: str = "float32"
    tasks: Sequence[str] | None = None
    examples: int | None = None
    test_examples: int | None = None
    evaluate_on: Evaluated = "test"
    train_projector: bool | AdditionalParameters = False
    checkpointing: bool = False
    answer_batch: int = 8
    layout: Path | str | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        validate_selection(self.tasks, self.evaluate_on)
        for name, known in (("dtype", PRECISIONS), ("merged_dtype", MERGED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("examples", "test_examples", "answer_batch"):
            if (given := getattr(self, name)) is not None:
                validate_whole(name, given)


def open_folder(folder: Path | str, layout: Layout, options: FolderOptions | None = None) -> TaskStream:
    """The stream that ``layout`` describes, its data in ``folder``.

    Instruction files are read now, images when they are used: call `verify_folder` before a long run.

    Raises:
        FileError: for a missing or malformed file.
        ValueError: for an unknown task.
    """
    options, folder = options or FolderOptions(), Path(folder)
    if options.layout is not None:
        layout = read_layout(options.layout)
    chosen = layout.select(options.tasks)
    projector = _projector(layout, options, chosen)
    if any(task.scorer == CAPTIONS for task in chosen):
        require_tools()
    require_llava(options.model)
    files = {task.name: _find_files(folder, task, options.evaluate_on) for task in chosen}
    processor = load_processor(options.model, local_files_only=options.local_files_only)
    collator = partial(
        Collator, processor, template(layout.template), aspect=layout.aspect, max_length=layout.max_length
    )
    tasks = [
        InstructionTask(
            task.name,
            _parts(_read_items(task, files[task.name]), options),
            collator=collator(_finder(folder, layout.roots(task))),
            rules=task.rules,
            max_new_tokens=layout.max_new_tokens,
            answer_batch=options.answer_batch,
        )
        for task in chosen
    ]
    return TaskStream(
        name=layout.name,
        tasks=tuple(tasks),
        make_model=partial(
            load_llava,
            options.model,
            dtype=PRECISIONS[options.dtype],
            targets=layout.targets,
            merged_dtype=MERGED[options.merged_dtype],
            train_projector=projector is not None,
            checkpointing=options.checkpointing,
            local_files_only=options.local_files_only,
        ),
        targets=layout.targets,
        provenance={
            "model": options.model,
            "dtype": options.dtype,
            "merged_dtype": options.dtype if options.dtype == "float32" else options.merged_dtype,
            "template": layout.template,
            "evaluate_on": options.evaluate_on,
            "projector": "frozen" if projector is None else "trained",
            "files": {
                name: {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths.values()}
                for name, paths in files.items()
            },
            "sizes": {task.name: {split: task.size(split) for split in task.parts} for task in tasks},
        },
        additional_parameters=projector,
    )


def _projector(layout: Layout, options: FolderOptions, chosen: Sequence[TaskFiles]) -> AdditionalParameters | None:
    """The additional parameters: none, the caller's, or the projector at the first preset's rates for these tasks."""
    if isinstance(options.train_projector, AdditionalParameters):
        return options.train_projector
    if not options.train_projector:
        return None
    names = [task.name for task in chosen]
    preset = next((layout.preset(name, tasks=names) for name, p in layout.presets.items() if p.projector), None)
    if preset is None:
        raise ValueError(
            f"layout {layout.name!r} has no preset with a projector's rate: "
            f"pass train_projector=AdditionalParameters({PROJECTOR!r}, lr=...)"
        )
    return preset.additional_parameters()


def _find_files(folder: Path, task: TaskFiles, evaluate_on: Evaluated) -> dict[str, Path]:
    """The files of one task that are read: training, test, captions."""
    names = {"train": task.train}
    if evaluate_on == "test":
        names |= {"test": task.test, **({"captions": task.captions} if task.captions else {})}
    files = {}
    for part, candidates in names.items():
        path = find_file(folder, candidates)
        if path is None:
            raise FileError(
                f"task {task.name} lacks its {part} file: {locations(folder, candidates)}; "
                "'manifold-cl streams check' lists everything that is missing"
            )
        files[part] = path
    return files


def _read_items(task: TaskFiles, files: Mapping[str, Path]) -> dict[str, list[Instruction]]:
    items = {
        part: read_instructions(path, text_only=task.text_only) for part, path in files.items() if part != "captions"
    }
    if "captions" in files:
        captions = read_captions(files["captions"])
        if len(captions) != len(items["test"]):
            raise FileError(
                f"{files['captions']}: captions of {len(captions)} images for {len(items['test'])} test items"
            )
        items["test"] = [replace(i, references=r) for i, r in zip(items["test"], captions, strict=True)]
    return items


def _parts(items: Mapping[str, list[Instruction]], options: FolderOptions) -> dict[Split, list[Instruction]]:
    train = items["train"]
    if options.evaluate_on == "test":
        return {"train": spaced(train, options.examples), "test": spaced(items["test"], options.test_examples)}
    rest, held = hold_out(train)
    validation = spaced(held, options.test_examples)
    return {"train": spaced(rest, options.examples), "validation": validation, "test": validation}


def _finder(folder: Path, roots: Sequence[str]) -> Callable[[str], Path]:
    @cache
    def find(image: str) -> Path:
        path = find_image(folder, roots, image)
        if path is None:
            raise FileError(f"image {image} is missing: it belongs under {locations(folder, roots)}")
        return path

    return find
