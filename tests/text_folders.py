"""Miniature folders in the layouts of TRACE, O-LoRA and SuperNI, written in the words of `tiny_decoder`."""

import json
from pathlib import Path
from typing import Any

COLOURS, ANIMALS = ("red", "green", "blue"), ("cat", "dog", "cow")
TRACE = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
OLORA = {"TC": ("dbpedia", "yahoo", "agnews"), "SC": ("amazon", "yelp"), "COPA": ("COPA",)}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def write_trace(folder: Path, *, rows: int = 6) -> Path:
    answers = {"C-STANCE": ("A", "B", "C"), "FOMC": ("A", "C", "B")}
    for task in TRACE:
        known = answers.get(task, COLOURS)
        for part in ("train", "eval", "test"):
            content = [{"prompt": f"say {known[i % 3]} :", "answer": known[i % 3]} for i in range(rows)]
            write(folder / task / f"{part}.json", content)
    return folder


def write_olora(folder: Path, *, rows: int = 6) -> Path:
    for group, names in OLORA.items():
        for number, name in enumerate(names):
            labels = COLOURS if number % 2 == 0 else ANIMALS
            for part in ("train", "dev", "test"):
                content = [{"label": labels[i % 3], "sentence": f"this is {labels[i % 3]}"} for i in range(rows)]
                write(folder / group / name / f"{part}.json", content)
            write(folder / group / name / "labels.json", list(labels))
    return folder


def write_superni(folder: Path, names: tuple[str, ...], *, rows: int = 6) -> Path:
    for name in names:
        for part in ("train", "dev", "test"):
            instances = [
                {"id": str(i), "input": f"the {COLOURS[i % 3]} sky", "output": [COLOURS[i % 3], "sky"]}
                for i in range(rows)
            ]
            write(
                folder / name / f"{part}.json",
                {"Definition": ["name the colour"], "Positive Examples": [], "Instances": instances},
            )
    return folder


def write_jsonl(folder: Path, *, rows: int = 12) -> Path:
    """Two tasks: colours by prompt and answer in one file, animals in a folder with its parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, words, count in (
        (folder / "colours.jsonl", COLOURS, rows),
        (folder / "animals/train.jsonl", ANIMALS, rows),
        (folder / "animals/validation.jsonl", ANIMALS, 3),
        (folder / "animals/test.jsonl", ANIMALS, 3),
    ):
        path.parent.mkdir(exist_ok=True)
        content = [
            {"prompt": f"say {words[i % 3]} :", "answer": f" {words[i % 3]}", "options": list(words)}
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return folder
