"""The toy stream, and runs of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from old_versions import HAS_MUON, needs_muon
from toy import toy_stream

from manifold_cl import ContinualRunner, RunRecord, TaskStream
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.runner import Progress

OPTIONS: dict[str, dict[str, Any]] = {
    "eblora": {"rank": 4, "alpha": 8.0, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistic_examples": 96},
    "sequential_merge": {"rank": 4, "alpha": 8.0, "lr": 0.03},
    "zero_shot": {},
}
EPOCHS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_MUON:
        return
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if any(isinstance(value, str) and value == "lora_muon" for value in params.values()):
            item.add_marker(needs_muon)


@pytest.fixture
def stream() -> TaskStream:
    return toy_stream()


@pytest.fixture
def runner() -> Callable[..., ContinualRunner]:
    """Makes a runner with a fresh method, as a new process would."""

    def make(
        folder: Path,
        method: str = "eblora",
        *,
        seed: int = 0,
        epochs: int = EPOCHS,
        on_progress: Callable[[Progress], None] | None = None,
        stream: TaskStream | None = None,
        details: dict[str, Any] | None = None,
        **options: Any,
    ) -> ContinualRunner:
        return ContinualRunner(
            stream or toy_stream(),
            make_method(method, **{**OPTIONS[method], **options}),
            folder,
            training=Training(epochs=epochs, seed=seed),
            details=details,
            on_progress=on_progress,
        )

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one complete run a method, named after it; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    for name, options in OPTIONS.items():
        training = Training(epochs=EPOCHS)
        ContinualRunner(toy_stream(), make_method(name, **options), folder / name, training=training).run()
    return folder


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete runs of one epoch, by method, to compare interrupted ones with."""
    folder = tmp_path_factory.mktemp("short")
    for name in ("eblora", "sequential_merge"):
        training = Training(epochs=1)
        ContinualRunner(toy_stream(), make_method(name, **OPTIONS[name]), folder / name, training=training).run()
    return folder


@pytest.fixture(scope="session")
def records(finished: Path) -> dict[str, RunRecord]:
    return {name: RunRecord.load(finished / name) for name in OPTIONS}
