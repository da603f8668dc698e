"""Shape checking in the tests only, by beartype at every jaxtyping annotation of the geometry; long files first."""

import gc
import json
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest
import shape_checks
import torch
from jaxtyping import install_import_hook

gc.set_threshold(50_000)  # each collection visits all that torch and transformers have imported

install_import_hook(["manifold_cl.linalg", "manifold_cl.geometry"], "shape_checks.counted")

TIMES = Path(__file__).parents[1] / "benchmarks" / "results" / "suite-times.json"


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that took long begin first, after those without a record, so that workers end together.

    What counts is the time of the parts that run, slow or fast. The sort is stable: the order inside a file stays.
    """
    chosen = {("slow" if item.get_closest_marker("slow") else "fast", _file(item)) for item in items}
    seconds: dict[str, float] = {}
    for part, files in json.loads(TIMES.read_text(encoding="utf-8")).items():
        for file, times in files.items():
            if (part, file) in chosen:
                seconds[file] = seconds.get(file, 0.0) + sum(times[phase] for phase in ("setup", "call", "teardown"))
    items.sort(key=lambda item: -seconds.get(_file(item), inf))


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.fixture(autouse=True)
def _checked_shapes() -> None:
    shape_checks.BUDGET.renew()


@pytest.fixture(autouse=True)
def _fast_path() -> Iterator[None]:
    """A program of the docs turns torch's fast path of attention off, for good: it is on again for the next test."""
    fast = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
