"""Tasks for language models from the user's data and from folders of published benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manifold_cl.continual.task import Split
from manifold_cl.files import FileError
from manifold_cl.lists import listed
from manifold_cl.plugins import unknown
from manifold_cl.rules import validate_whole
from manifold_cl.streams.causal_lm import CausalLMTask, ScoreBy, TextExample
from manifold_cl.streams.json_rows import kind_of, require_none
from manifold_cl.streams.selection import HELD_OUT, drawn, hold_out
from manifold_cl.streams.text_layouts import LAYOUTS, NAMES, TaskSource, find_layout
from manifold_cl.streams.text_rows import RowReader

SPLITS: Mapping[str, Split] = {name: split for split, names in NAMES.items() for name in names}
"""Name of a part → its split."""

logger = logging.getLogger("manifold_cl")


def causal_lm_tasks(
    data: Mapping[str, Any] | Sequence[Path | str] | Path | str,
    tokenizer: Any,
    *,
    rule: str | Mapping[str, str] = "exact",
    options: Sequence[str] | Mapping[str, Sequence[str]] = (),
    score_by: ScoreBy | None = None,
    max_length: int = 512,
    max_new_tokens: int = 32,
    examples: int | Mapping[Split, int] | None = None,
    held_out: Sequence[Split] = ("test",),
    chat_template: str | None = None,
) -> list[CausalLMTask]:
    """Tasks for a causal language model, one per entry of ``data``, in its order.

    The data of a task are a JSONL file, a folder with ``train.jsonl`` and perhaps ``validation.jsonl`` and
    ``test.jsonl``, a ``datasets.Dataset`` or ``DatasetDict``, a list of dictionaries, or splits of these by name. A row
    has ``prompt`` and ``completion`` (or ``answer``), or ``messages``, or ``text``; it may name ``options`` and
    ``references``. A part in ``held_out`` that the data lack is held out of training: rows by a fixed draw, at most
    a fifth and 200. A line of the log names that.

    Args:
        data: name of each task → its data; or paths, which name their tasks; or one path.
        tokenizer: of the model, from transformers. Its chat template writes ``messages``.
        rule: of `RULES`, or ``"sari"``, that scores answers; by task if it is a mapping.
        options: legal answers of rows that name none; by task if it is a mapping.
        score_by: ``"generation"``, ``"likelihood"`` (of the options) or ``"loss"``. By default ``"loss"`` for rows of
            plain text, ``"generation"`` for others.
        max_length: tokens of prompt and answer together.
        max_new_tokens: tokens after which a generated answer ends.
        examples: rows per task to take, by a fixed draw: of training, or by split.
        held_out: the parts to hold out where the data lack them.
        chat_template: replaces the tokenizer's: the name of one of its templates, a file, or a Jinja template.

    Raises:
        FileError: for a file that is missing or malformed; the message has its line.
        ValueError: for a row that is no example, two tasks of one name, or a task without rows for training or test.
        TypeError: for data of another kind.
    """
    tasks = []
    for name, given in _named(data):
        reader = RowReader(tokenizer, chat_template=chat_template)
        parts = _prepare(name, _read(name, given, reader), examples, held_out)
        text = reader.form == "text"
        if text and score_by not in (None, "loss"):
            raise ValueError(f"task {name!r} has rows of plain text, which are scored by 'loss', got {score_by!r}")
        task = CausalLMTask(
            name,
            parts,
            tokenizer=tokenizer,
            rule=rule if isinstance(rule, str) else rule.get(name, "exact"),
            options=options.get(name, ()) if isinstance(options, Mapping) else options,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            score_by=score_by or ("loss" if text else "generation"),
        )
        reader.report_unused(name)
        tasks.append(task)
    for setting in (rule, options):
        if isinstance(setting, Mapping) and (odd := [name for name in setting if name not in {t.name for t in tasks}]):
            raise ValueError(unknown("task", odd[0], [task.name for task in tasks]))
    return tasks


def benchmark_tasks(
    folder: Path | str,
    tokenizer: Any,
    *,
    layout: str | None = None,
    order: str | None = None,
    tasks: Sequence[str] | None = None,
    score_by: ScoreBy | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    examples: int | Mapping[Split, int] | None = None,
    held_out: Sequence[Split] = ("test",),
) -> list[CausalLMTask]:
    """The tasks of a folder in the layout of TRACE, O-LoRA, SuperNI, or JSONL, in the order of learning.

    Prompts, rules, lengths and orders are the published ones.

    Args:
        folder: that the user downloaded.
        tokenizer: of the model, from transformers.
        layout: ``"trace"``, ``"olora"``, ``"superni"`` or ``"jsonl"``; found by the files by default.
        order: number of a published order; the first one by default, alphabetical for JSONL.
        tasks: names of tasks, in order, in place of a published order.
        score_by: as in `causal_lm_tasks`.
        max_length: tokens of prompt and answer together; the published number, or 512, by default.
        max_new_tokens: tokens after which a generated answer ends; the published number, or 32, by default.
        examples: rows per task to take, by a fixed draw: of training, or by split.
        held_out: the parts to hold out of training where a task lacks them.

    Raises:
        FileError: for a folder of no known layout, a task that it lacks, and a file that is malformed.
        ValueError: for an unknown layout or order, or a task without rows for training or test.
    """
    found, base = find_layout(Path(folder), layout)
    readers: list[RowReader] = []

    def reader() -> RowReader:
        readers.append(RowReader(tokenizer))
        return readers[-1]

    made = []
    for source, one in zip(found.sources(base, reader, order=order, tasks=tasks), readers, strict=True):
        parts = _prepare(source.name, read_source(source), examples, held_out)
        text = one.form == "text"
        lengths = {"max_length": max_length, "max_new_tokens": max_new_tokens}
        settings = {**source.settings, **{key: value for key, value in lengths.items() if value is not None}}
        settings["score_by"] = score_by or ("loss" if text else "generation")
        made.append(CausalLMTask(source.name, parts, tokenizer=tokenizer, **settings))
        one.report_unused(source.name)
    return made


def read_source(source: TaskSource) -> dict[Split, list[TextExample]]:
    """The examples of every file of a task; FileError with the first problem and the number of the others."""
    parts: dict[Split, list[TextExample]] = {}
    for split, path in source.files.items():
        parts[split], problems = source.read(path)
        require_none(problems)
    return parts


def _named(data: Any) -> list[tuple[str, Any]]:
    """(name, data) of each task."""
    if isinstance(data, str | Path) and Path(data).is_file():
        data = [data]
    elif isinstance(data, str | Path):
        data = LAYOUTS["jsonl"].folders(_existing(Path(data), "tasks"))
    if isinstance(data, Mapping):
        if data and all(name in SPLITS for name in data):
            raise ValueError(
                f"data has the splits {', '.join(data)} where names of tasks are needed: give {{'my task': data}}"
            )
        named = [(str(name), given) for name, given in data.items()]
    elif isinstance(data, Sequence) and all(isinstance(path, str | Path) for path in data):
        named = [(Path(path).name.removesuffix(".jsonl"), path) for path in data]
    else:
        raise TypeError(f"data maps names of tasks to their data, or lists paths, got a {type(data).__name__}")
    names = [name for name, _ in named]
    if not named:
        raise ValueError("data has no tasks: give at least one")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two tasks have the name {', '.join(twice)}: give {{'name': path, ...}} with names that differ"
        )
    return named


def _read(name: str, given: Any, reader: RowReader) -> dict[Split, list[TextExample]]:
    """The examples of the parts that the data of a task have."""
    if isinstance(given, str | Path):
        return read_source(LAYOUTS["jsonl"].source(name, _existing(Path(given), name), reader))
    if not isinstance(given, Mapping):
        given = {"train": given}
    parts: dict[Split, list[TextExample]] = {}
    for key, rows in given.items():
        if key not in SPLITS:
            logger.warning("task %s: the part %r is not used; parts are %s", name, key, ", ".join(SPLITS))
            continue
        if SPLITS[key] in parts:
            raise ValueError(f"task {name!r} has two {SPLITS[key]} parts, one of them {key!r}: keep one")
        if isinstance(rows, str | Path):
            path = _existing(Path(rows), name)
            parts |= {SPLITS[key]: read_source(LAYOUTS["jsonl"].source(name, path, reader))["train"]}
        else:
            parts[SPLITS[key]] = _converted(rows, reader, f"{name}, {key} row")
    return parts


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise FileError(
            f"{path}, the data of {name}, does not exist: give a JSONL file or a folder, or load a data set of the hub "
            "with datasets.load_dataset and pass that"
        )
    return path


def _converted(rows: Any, reader: Callable[[Mapping[str, Any], str], TextExample], place: str) -> list[TextExample]:
    if not isinstance(rows, Iterable) or isinstance(rows, Mapping):
        raise TypeError(f"{place}s are a data set or a list of dictionaries, got a {type(rows).__name__}")
    examples: list[TextExample] = []
    problems: list[str] = []
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"a row is a dictionary, got {kind_of(row)}")
            examples.append(reader(row, f"{place} {number}"))
        except ValueError as error:
            problems.append(f"{place} {number}: {error}")
    if problems:
        raise ValueError(listed(problems, 1, kind="problems"))
    return examples


def _prepare(
    name: str,
    parts: dict[Split, list[TextExample]],
    examples: int | Mapping[Split, int] | None,
    held_out: Sequence[Split],
) -> dict[Split, list[TextExample]]:
    """The parts without empty texts, with those held out, and with as many rows as asked for."""
    if isinstance(held_out, str):
        raise TypeError(f"held_out is a sequence of parts, got the string {held_out!r}: write ({held_out!r},)")
    if odd := [split for split in held_out if split not in ("validation", "test")]:
        raise ValueError(f"held_out names validation or test, got {odd[0]!r}")
    parts = {split: _filled(name, split, part) for split, part in parts.items()}
    if not parts.get("train"):
        raise ValueError(f"task {name!r} has no rows for training")
    for split in ("test", "validation"):
        if split not in parts and split in held_out:
            count = len(parts["train"])
            if count < 2:
                raise ValueError(
                    f"task {name!r} has {count} row for training, too few to hold some out: give a test part"
                )
            parts["train"], parts[split] = hold_out(parts["train"], key=f"{name}-{split}")
            logger.info(
                "task %s: %d of %d training rows are held out as %s part by a fixed draw (at most a fifth and %d)",
                *(name, len(parts[split]), count, split, HELD_OUT),
            )
    if not parts.get("test"):
        raise ValueError(f"task {name!r} has no rows for the test: give a part 'test', or held_out=('test',)")
    counts = examples if isinstance(examples, Mapping) else {"train": examples}
    for split, wanted in counts.items():
        if wanted is not None:
            validate_whole(f"examples, the number of rows for {split},", wanted)
    return {split: drawn(part, counts.get(split), key=f"{name}-{split}") for split, part in parts.items()}


def _filled(name: str, split: Split, part: Sequence[TextExample]) -> list[TextExample]:
    """The examples with an answer; empty rows of plain text are left out with a warning."""
    filled = [example for example in part if example.answer.strip()]
    if len(filled) < len(part):
        first = next(example.source for example in part if not example.answer.strip())
        logger.warning(
            "task %s: %d of %d %s rows have an empty text and are left out (first: %s)",
            *(name, len(part) - len(filled), len(part), split, first),
        )
    return filled
