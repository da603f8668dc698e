"""Library versions, hardware, time and memory of this process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import torch

from manifold_cl._version import __version__

LIBRARIES = ("torch", "geoopt", "numpy", "scipy", "safetensors", "transformers")


class Clock:
    """Seconds per phase: laps follow each other, shares lie inside a lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Set the seconds of ``phase`` to the time since the last lap."""
        last, self._last = self._last, time.perf_counter()
        self.seconds[phase] = self._last - last

    @contextmanager
    def share(self, phase: str) -> Iterator[None]:
        """A context whose time is added to ``phase``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def utc_now() -> str:
    """The current time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package, and of the installed libraries that the numbers depend on.

    Our own is that of the code that runs: an editable installation keeps the metadata of the day it was made.
    """
    versions = {"python": platform.python_version(), "manifold-cl": __version__}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def machine() -> dict[str, Any]:
    """Operating system, processor, cores, threads and name of the GPU."""
    return {
        "system": platform.system(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
