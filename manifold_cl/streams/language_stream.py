"""Streams of tasks in text, in a folder of the user, for any causal language model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from manifold_cl.adapters.layers import ALL_LINEAR
from manifold_cl.continual.task import Split, TaskStream
from manifold_cl.files import FileError
from manifold_cl.plugins import unknown
from manifold_cl.rules import validate_whole
from manifold_cl.streams.causal_lm import CausalLMTask, ScoreBy
from manifold_cl.streams.causal_tasks import benchmark_tasks, causal_lm_tasks
from manifold_cl.streams.folder_report import FileReport, TaskReport
from manifold_cl.streams.folder_stream import MERGED, PRECISIONS
from manifold_cl.streams.language_model import load_causal_lm, load_tokenizer, validate_tokenizer
from manifold_cl.streams.selection import Evaluated, validate_selection
from manifold_cl.streams.text_layouts import find_layout, split_files
from manifold_cl.streams.text_rows import RowReader


@dataclass(frozen=True)
class LanguageOptions:
    """Options of a stream of tasks in text.

    Args:
        model: a folder, or the name of a causal language model on the hub.
        layout: of the folder; found by its files by default.
        order: number of a published order; the first one by default.
        tasks: the tasks to take, in the order to learn them, in place of a published order.
        examples: training examples per task, by a fixed draw; all by default.
        test_examples: test examples per task, chosen in the same way.
        general: JSONL files, or folders with a test part, that are evaluated and never trained.
        score_by: as in `causal_lm_tasks`.
        max_length: tokens of prompt and answer together; the layout's by default.
        max_new_tokens: tokens after which an answer ends; the layout's by default.
        evaluate_on: with ``"validation"``, a part held out of training replaces a missing validation part.
        dtype: precision of the frozen weights: ``"float32"`` or ``"bfloat16"``.
        merged_dtype: precision of the weights that updates are merged into.
        checkpointing: recompute activations in the backward pass.
        local_files_only: never ask the network for the model.
    """

    model: str
    layout: str | None = None
    order: str | None = None
    tasks: Sequence[str] | None = None
    examples: int | None = None
    test_examples: int | None = None
    general: Sequence[Path | str] = ()
    score_by: ScoreBy | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    evaluate_on: Evaluated = "test"
    dtype: str = "float32"
    merged_dtype: str = "float32"
    checkpointing: bool = False
    local_files_only: bool = False

    def __post_init__(self) -> None:
        validate_selection(self.tasks, self.evaluate_on)
        for name, known in (("dtype", PRECISIONS), ("merged_dtype", MERGED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("examples", "test_examples", "max_length", "max_new_tokens"):
            if (given := getattr(self, name)) is not None:
                validate_whole(name, given)


def open_language_stream(folder: Path | str, options: LanguageOptions) -> TaskStream:
    """The stream of the tasks in ``folder``, for the model in ``options``.

    All files are read now. The model is loaded when the stream is run, and compared with its tokenizer.

    Raises:
        FileError: for a folder of no known layout, a task that it lacks, a malformed file, or a model that is missing.
        ValueError: for an unknown layout or order, or a task without rows for training or test.
    """
    layout, base = find_layout(Path(folder), options.layout)
    tokenizer = load_tokenizer(options.model, local_files_only=options.local_files_only)
    evaluated = options.test_examples
    asked: dict[Split, int | None] = {"train": options.examples, "validation": evaluated, "test": evaluated}
    counts = {split: count for split, count in asked.items() if count is not None}
    tasks = benchmark_tasks(
        base,
        tokenizer,
        layout=layout.name,
        order=options.order,
        tasks=options.tasks,
        score_by=options.score_by,
        max_length=options.max_length,
        max_new_tokens=options.max_new_tokens,
        examples=counts,
        held_out=("test",) if options.evaluate_on == "test" else ("test", "validation"),
    )
    ways = {task.score_by: task.name for task in tasks}
    if len(ways) > 1:
        found = ", ".join(f"{name} by {way}" for way, name in ways.items())
        raise ValueError(
            f"tasks of a stream are scored in one way, got {found}: give score_by='loss', or choose tasks="
        )
    general = _general(options, tokenizer)
    sources = layout.sources(base, lambda: RowReader(None), order=options.order, tasks=options.tasks)
    name = layout.name + (f"-order{options.order}" if options.order else "")
    return TaskStream(
        name=base.resolve().name if layout.name == "jsonl" else name,
        tasks=tuple(tasks),
        make_model=partial(_make_model, options, tokenizer),
        targets=ALL_LINEAR,
        provenance={
            "model": options.model,
            "dtype": options.dtype,
            "merged_dtype": options.dtype if options.dtype == "float32" else options.merged_dtype,
            "layout": layout.name,
            "evaluate_on": options.evaluate_on,
            "files": {source.name: {str(p): _digest(p) for p in source.files.values()} for source in sources},
            "general": [str(path) for path in options.general],
            "sizes": {task.name: {split: task.size(split) for split in task.parts} for task in (*tasks, *general)},
        },
        general=tuple(general),
    )


def open_rows(
    data: Sequence[Path | str], model: str, *, tasks: Sequence[str] | None = None, local_files_only: bool = False
) -> TaskStream:
    """Rows as tasks of a causal language model, for statistics: all rows of a file are its training and test part.

    Args:
        data: JSONL files, each a task of its own name; or one folder of tasks, as in `open_language_stream`.
        model: a folder, or the name of a causal language model on the hub.
        tasks: the tasks to take, in order; all by default.
        local_files_only: never ask the network for the model.

    Raises:
        FileError: for a file that is missing or malformed.
        ValueError: for a folder beside other data, and an unknown task.
    """
    paths = [Path(path) for path in data]
    options = LanguageOptions(model, tasks=tasks, local_files_only=local_files_only)
    if folders := [path for path in paths if path.is_dir()]:
        if len(paths) > 1:
            raise ValueError(f"{folders[0]} is a folder beside other data: give one folder, or files")
        return open_language_stream(folders[0], options)
    rows = {path.stem: dict.fromkeys(("train", "test"), path) for path in paths}
    if len(rows) < len(paths):
        raise ValueError(f"two files have the same name, got {', '.join(map(str, paths))}: rename one")
    for name in tasks or ():
        if name not in rows:
            raise ValueError(unknown("task", name, rows))
    tokenizer = load_tokenizer(model, local_files_only=local_files_only)
    made = causal_lm_tasks({name: rows[name] for name in tasks or rows}, tokenizer)
    return TaskStream("rows", tuple(made), partial(_make_model, options, tokenizer), ALL_LINEAR, {"model": model})


def verify_texts(
    folder: Path | str, layout: str | None = None, *, order: str | None = None, tasks: Sequence[str] | None = None
) -> list[TaskReport]:
    """One report per task of the folder: its files, their rows, and every problem with them.

    Conversations are not written by a chat template, so that no tokenizer is needed.

    Args:
        folder: of the user.
        layout: of the folder; found by its files by default.
        order: number of a published order: a task that the folder lacks is reported.
        tasks: names of the tasks to verify; all that the folder has by default.

    Raises:
        FileError: for a folder of no known layout.
    """
    found, base = find_layout(Path(folder), layout)
    there = found.folders(base)
    if order is None and tasks is None:
        tasks = list(there)
    wanted = found.names(list(there), order, tasks)
    by_name = {name.casefold(): name for name in there}
    reports = []
    for name in wanted:
        if name.casefold() not in by_name:
            missing = FileReport("train", str(base / name), False, 0, (f"missing: {base} has no task {name}",))
            reports.append(TaskReport(name, (missing,), 0, ()))
            continue
        own = by_name[name.casefold()]
        try:
            source = found.source(own, there[own], RowReader(None))
        except FileError as error:
            broken = FileReport("train", str(there[own]), True, 0, (str(error),))
            reports.append(TaskReport(own, (broken,), 0, ()))
            continue
        files = [FileReport(split, str(p), True, *_inspected(source.read, p)) for split, p in source.files.items()]
        if "train" not in source.files:
            problem = f"missing: {there[own]} has no training file"
            files.insert(0, FileReport("train", str(there[own]), False, 0, (problem,)))
        reports.append(TaskReport(own, tuple(files), 0, ()))
    return reports


def _inspected(read: Any, path: Path) -> tuple[int, tuple[str, ...]]:
    examples, problems = read(path)
    return len(examples), tuple(map(str, problems))


def _general(options: LanguageOptions, tokenizer: Any) -> list[CausalLMTask]:
    """A task per general set: all rows of a file, or the test part of a folder, are the test part."""
    tasks = []
    for given in options.general:
        path = Path(given)
        parts = split_files(path, (".jsonl",)) if path.is_dir() else {"test": path}
        if "test" not in parts:
            raise FileError(f"{path}, a general set, has no test.jsonl: give a JSONL file, or a folder with that file")
        (task,) = causal_lm_tasks(
            {path.stem: dict.fromkeys(("train", "validation", "test"), parts["test"])},
            tokenizer,
            max_length=options.max_length or 512,
            max_new_tokens=options.max_new_tokens or 32,
            examples=dict.fromkeys(("validation", "test"), options.test_examples) if options.test_examples else None,
        )
        tasks.append(task)
    return tasks


def _make_model(options: LanguageOptions, tokenizer: Any) -> nn.Module:
    model = load_causal_lm(
        options.model,
        dtype=PRECISIONS[options.dtype],
        merged_dtype=MERGED[options.merged_dtype],
        checkpointing=options.checkpointing,
        local_files_only=options.local_files_only,
    )
    validate_tokenizer(model, tokenizer)
    return model


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
