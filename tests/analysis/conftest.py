"""Small folders in the formats that `analysis` reads, written without the code that reads them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS = {"model.layer.0.query": (12, 10), "model.layer.0.mlp": (20, 10), "model.layer.10.query": (12, 10)}
TASKS = ("news", "nouns", "films")
RANK = 3


def write_tensors(
    folder: Path, name: str, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], shapes: tuple[str, ...]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    layers: dict[str, dict[str, list[int]]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part in shapes:
            layers.setdefault(layer, {})[part] = list(tensor.shape)
    described = {
        "format": f"manifold_cl.{name}",
        "version": 1,
        "library": "0.1.0",
        "layers": layers,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **manifest,
    }
    (folder / f"{name}.json").write_text(json.dumps(described))


@pytest.fixture
def write_adapter() -> Callable[..., Path]:
    def write(folder: Path, task: str, tensors: Mapping[str, Tensor], **manifest: Any) -> Path:
        defaults = {"kind": "eblora", "task": task, "rank": RANK, "alpha": 1.5, "scaling": 0.5}
        write_tensors(folder, "adapter", tensors, {**defaults, **manifest}, ("left", "right"))
        return folder

    return write


@pytest.fixture
def write_memory() -> Callable[..., None]:
    def write(folder: Path, task: str, bases: Mapping[str, Tensor]) -> None:
        tensors = {f"{layer}.basis": basis for layer, basis in bases.items()}
        tensors |= {f"{layer}.energies": torch.ones(basis.shape[1]) for layer, basis in bases.items()}
        manifest = {"task": task, "energy": 0.9, "source": "gradient"}
        write_tensors(folder, "memory", tensors, manifest, ("basis",))

    return write


@pytest.fixture
def record() -> dict[str, Any]:
    """A complete record of three tasks, with 1 decimal so that tests can look for the numbers."""
    return {
        "format": "manifold_cl.record",
        "version": 1,
        "name": "eblora-0",
        "method": "eblora",
        "stream": "toy",
        "status": "complete",
        "config": {"rank": RANK, "optimizer": {"lr": 0.001}},
        "tasks": list(TASKS),
        "zero_shot": {"accuracy": [50.0, 40.0, 30.0]},
        "accuracy": {"accuracy": [[70.0, 41.0, 31.0], [65.0, 80.0, None], [60.0, 75.0, 90.0]]},
        "primary": "accuracy",
        "metrics": {"mft": 80.0, "mfn": 75.0, "maa": 72.5, "bwt": -7.5, "fwt": 36.1, "zero_shot": 40.0},
        "timings": [{"prepare": 1.0, "train": 2.0, "optimizer": 0.1, "finish": 0.5, "evaluate": 9.0}] * 3,
        "losses": [[1.0, None], [0.5], []],
        "constraints": [{"orthonormality": 1.2e-7, "protection": 3.4e-7}] * 3,
        "capacity": [{"mean_fraction": 0.1, "max_fraction": 0.2}] * 3,
        "peak_memory_mb": 900.0,
        "versions": {"torch": "2.13.0"},
        "machine": {"device": "cpu"},
        "provenance": {"model": {"sha256": "53aa"}},
        "started": "2026-01-01T00:00:00Z",
        "finished": None,
    }


@pytest.fixture
def write_run(
    write_adapter: Callable[..., Path], write_memory: Callable[..., None], record: dict[str, Any]
) -> Callable[..., Path]:
    """A run folder: random factors, and bases of which task t protects the first t + 1 coordinates."""

    def write(folder: Path, *, seed: int = 0, memory: bool = True, **changes: Any) -> Path:
        generator = torch.Generator().manual_seed(seed)
        for number, task in enumerate(changes.get("tasks", TASKS), start=1):
            tensors = {}
            for layer, (m, n) in LAYERS.items():
                tensors[f"{layer}.left"] = torch.randn(m, RANK, generator=generator)
                tensors[f"{layer}.right"] = torch.randn(n, RANK, generator=generator)
                tensors[f"{layer}.scale"] = torch.tensor(2.0)
            place = write_adapter(folder / "tasks" / f"{number:02d}-{task}", task, tensors)
            if memory:
                write_memory(place, task, {layer: torch.eye(n)[:, :number] for layer, (_, n) in LAYERS.items()})
        (folder / "record.json").write_text(json.dumps(record | changes))
        return folder

    return write


Matrices = Mapping[str, Sequence[Sequence[Sequence[float | None]] | None]]


@pytest.fixture
def write_study(record: dict[str, Any]) -> Callable[..., Path]:
    """A study folder: by label, one matrix of scores a seed; None for a cell that has not started.

    `named` says what a label is (its own name's method if not), `changes` replace keys of ``study.json``.
    """

    def write(
        folder: Path,
        matrices: Matrices,
        *,
        named: Mapping[str, Mapping[str, Any]] | None = None,
        stored: Mapping[str, Mapping[str, float]] | None = None,
        **changes: Any,
    ) -> Path:
        named = named or {}
        count = max(map(len, matrices.values()))
        cells = []
        for label, runs in matrices.items():
            for seed, matrix in enumerate(runs):
                place = f"cells/{len(cells)}"
                cells.append({"label": label, "order": "default", "seed": seed, "folder": place})
                if matrix is not None:
                    method = named.get(label, {}).get("method", label)
                    data = {**record, "name": place, "method": method, "config": {"seed": seed, "rank": RANK}}
                    data |= {"accuracy": {"accuracy": matrix}, "metrics": study_metrics(matrix)}
                    data |= {"status": "running" if None in matrix[-1] else "complete"}
                    if stored is not None:
                        data["stored"] = stored[label]
                    (folder / place).mkdir(parents=True)
                    (folder / place / "record.json").write_text(json.dumps(data))
        study = {
            "format": "manifold_cl.study",
            "version": 1,
            "name": "small",
            "stream": "toy",
            "reference": next(iter(matrices)),
            "seeds": list(range(count)),
            "orders": {"default": list(TASKS)},
            "training": {"epochs": 1},
            "common": {"rank": RANK},
            "methods": {
                label: {"method": label, "options": {}, "search": None, **named.get(label, {})} for label in matrices
            },
            "device": "cpu",
            "threads": 1,
            "processes": 2,
            "cells": cells,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.json").write_text(json.dumps(study | changes))
        return folder

    return write


def study_metrics(matrix: Sequence[Sequence[float | None]]) -> dict[str, float | None]:
    """MFT, MFN and BWT of three tasks by their definitions; the pre-trained model's mean is that of `record`."""
    (a, *_), (_, b, _), last = matrix
    if a is None or b is None or None in last:
        return {"mft": None, "mfn": None, "bwt": None, "zero_shot": 40.0}
    x, y, z = (float(value) for value in last if value is not None)
    return {"mft": (a + b + z) / 3, "mfn": (x + y + z) / 3, "bwt": (x - a + y - b) / 2, "zero_shot": 40.0}
