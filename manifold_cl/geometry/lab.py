"""Measurements of every retraction at training sizes: time, memory, drift in float32, and `check_retraction`."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_cl.geometry.checks.measure import Curve, gaussian, unit, worst
from manifold_cl.geometry.checks.retraction import check_retraction, walk
from manifold_cl.geometry.metrics import METRICS
from manifold_cl.geometry.points import DTYPES
from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel
from manifold_cl.geometry.retractions import RETRACTIONS, Order, Retraction, as_retraction
from manifold_cl.plugins import load_object

STEP = 0.1
"""Frobenius length of timed steps: ten times what an Adam step of a usual learning rate makes."""
DRIFT_ROWS = 512
"""Largest number of rows of the drift walk: drift does not depend on n."""
MARKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
"""Steps after which drift is measured."""


@dataclass(frozen=True)
class LabRow:
    """The measurements of one retraction."""

    name: str
    declared: Order
    """Order by metric, as declared."""
    measured: Mapping[str, float]
    """Order by metric, as the slope to the geodesic less one; infinite for the geodesic itself."""
    failures: tuple[str, ...]
    """Laws that do not hold, in either metric."""
    error: float
    """Worst constraint error after one timed step through the manifold, in the lab's dtype."""
    drift: float
    """Worst float32 constraint error after all drift steps."""
    drift_steps: tuple[int, ...]
    drift_errors: tuple[float, ...]
    forward_ms: float
    """Median milliseconds of R(x, u) alone; the manifold's projections cost the same for all."""
    backward_ms: float | None
    """Median milliseconds of the gradient in u, without the forward pass; None without a derivative."""
    memory_mb: float
    """Largest sum of tensors alive inside R(x, u), without its inputs."""
    to_geodesic: Mapping[str, Curve]
    """Distance to the geodesic over step lengths, by metric."""


@dataclass(frozen=True)
class LabReport:
    """The rows of all retractions, and the settings of the measurement."""

    shape: tuple[int, int]
    complement: int
    batch: int
    dtype: str
    device: str
    threads: int
    steps: int
    drift_shape: tuple[int, int, int]
    """(n, p, k) of the drift walk."""
    rows: tuple[LabRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: infinite orders become ``"exact"``."""
        content = asdict(self)
        for row in content["rows"]:
            for key in ("declared", "measured"):
                row[key] = {metric: "exact" if math.isinf(q) else q for metric, q in row[key].items()}
            row["to_geodesic"] = {metric: curve._asdict() for metric, curve in row["to_geodesic"].items()}
        return content


def measure_retractions(
    retractions: Sequence[Retraction | str | Callable[[Tensor, Tensor], Tensor]] = (),
    *,
    shape: tuple[int, int] = (4096, 16),
    complement: int = 256,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    steps: int = 1000,
    laps: int = 5,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> LabReport:
    """Measure several retractions in the same setting.

    Retractions are timed in turn, lap by lap, so that a change of the machine's speed affects all of them.

    Args:
        retractions: names, objects or bare functions; every registered one if empty.
        shape: (n, p) of the points.
        complement: protected directions k.
        batch: points per call.
        dtype: precision of points and steps, float32 or float64.
        device: device for time and memory; laws are checked on the CPU in float64.
        steps: length of the drift walk.
        laps: timings per retraction.
        seed: seed of points and directions.
        on_progress: called with (label, number done, total number).

    Raises:
        ValueError: for an unknown name, or a complement that leaves too few free directions.
        TypeError: for a dtype other than float32 and float64.
    """
    if dtype not in DTYPES:
        raise TypeError(f"the lab measures float32 and float64, got {dtype}")
    rules = [as_retraction(r) for r in retractions or sorted(RETRACTIONS)]
    progress = on_progress or (lambda label, done, total: None)
    (n, p), rows = shape, min(shape[0], DRIFT_ROWS)
    drift_shape = (rows, p, min(complement * rows // n, rows - p))
    draw = torch.Generator().manual_seed(seed)
    first = RestrictedStiefel(gaussian(n, complement, draw=draw).to(device)).to(torch.device(device))
    first.require_room(n, p)
    x = first.random(batch, n, p, dtype=dtype, device=device, generator=draw).as_subclass(Tensor)
    u = STEP * unit(first.proju(x, gaussian(batch, n, p, draw=draw, dtype=dtype).to(device)))
    times = _timed(rules, x, u, laps, lambda lap: progress("timing", lap, laps))
    measured = []
    for done, (rule, (forward, backward)) in enumerate(zip(rules, times, strict=True)):
        progress(rule.name, done, len(rules))
        manifold = RestrictedStiefel(first.complement, retraction=rule)
        named = sorted({*rule.order} & {*METRICS})
        reports = {metric: check_retraction(rule, cast(Any, metric), seed=seed) for metric in named}
        at, drift = zip(*_drift(rule, drift_shape, steps, seed), strict=True)
        measured.append(
            LabRow(
                name=rule.name,
                declared=dict(sorted(rule.order.items())),
                measured={metric: report.geodesic_slope - 1 for metric, report in reports.items()},
                failures=tuple(dict.fromkeys(text for report in reports.values() for text in report.failures())),
                error=worst(*manifold.constraint_error(manifold.retr(x, u))),
                drift=drift[-1],
                drift_steps=at,
                drift_errors=drift,
                forward_ms=forward,
                backward_ms=backward,
                memory_mb=peak_bytes(lambda rule=rule: rule(x, u)) / 2**20,  # type: ignore[misc]
                to_geodesic={metric: report.to_geodesic for metric, report in reports.items()},
            )
        )
    progress("done", len(rules), len(rules))
    return LabReport(
        shape=(n, p),
        complement=complement,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        threads=torch.get_num_threads(),
        steps=steps,
        drift_shape=drift_shape,
        rows=tuple(sorted(measured, key=lambda row: row.forward_ms)),
    )


def load_plugin(path: str) -> Retraction:
    """The retraction named ``module:name`` or ``file.py:name``: a class, an instance or a function; else ValueError."""
    candidate = load_object(path)
    try:
        return as_retraction(candidate() if isinstance(candidate, type) else candidate)
    except TypeError as error:
        raise ValueError(f"the plug-in {path!r} is no retraction: {error}") from error


class _MemoryPeak(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type its modes
    """Sums the storages of the tensors that operations return, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._views: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._views[storage._cdata] += 1
                self._bytes[storage._cdata] = storage.nbytes()
                weakref.finalize(leaf, self._dropped, storage._cdata)
        self.peak = max(self.peak, sum(self._bytes.values()))
        return out

    def _dropped(self, storage: int) -> None:
        self._views[storage] -= 1
        if not self._views[storage]:  # the last view of it
            del self._bytes[storage]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The largest sum of bytes of tensors that ``call`` creates and that are alive at the same time."""
    memory = _MemoryPeak()
    with memory:
        call()
    return memory.peak


def _timed(
    rules: Sequence[Retraction], x: Tensor, u: Tensor, laps: int, progress: Callable[[int], None]
) -> list[tuple[float, float | None]]:
    """Median milliseconds per rule of the forward pass, and of the backward pass without the forward pass."""
    forward: list[list[float]] = [[] for _ in rules]
    both: list[list[float]] = [[] for _ in rules]
    at = u.clone().requires_grad_()

    def backward(rule: Retraction) -> None:
        torch.autograd.grad((rule(x, at) * x).sum(), at)

    for lap in range(laps + 1):  # the first is a warm-up
        progress(max(0, lap - 1))
        for rule, alone, with_gradient in zip(rules, forward, both, strict=True):
            alone.append(_clocked(x.device, rule, x, u))
            with suppress(RuntimeError, NotImplementedError):  # no derivative
                with_gradient.append(_clocked(x.device, backward, rule))
    times: list[tuple[float, float | None]] = []
    for alone, with_gradient in zip(forward, both, strict=True):
        beyond = [max(0.0, b - f) for b, f in zip(with_gradient[1:], alone[1:], strict=False)]
        times.append((statistics.median(alone[1:]), statistics.median(beyond) if beyond else None))
    return times


def _clocked(device: torch.device, call: Callable[..., Any], *args: Any) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _drift(rule: Retraction, shape: tuple[int, int, int], steps: int, seed: int) -> list[tuple[int, float]]:
    n, p, k = shape
    draw = torch.Generator().manual_seed(seed)
    manifold = RestrictedStiefel(gaussian(n, k, draw=draw, dtype=torch.float32), retraction=rule)
    points = enumerate(walk(manifold, n, p, steps, draw), start=1)
    return [(i, worst(*manifold.constraint_error(x))) for i, x in points if i in MARKS or i == steps]
