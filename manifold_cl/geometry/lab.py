"""The retraction lab: every retraction side by side, at the sizes that training has.

Order and laws come from `check_retraction`; here are the costs: time forward and backward, memory, and how far
float32 points drift.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_cl.geometry.checks.measure import Curve, gaussian, unit, worst
from manifold_cl.geometry.checks.retraction import check_retraction, walk
from manifold_cl.geometry.points import DTYPES
from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel
from manifold_cl.geometry.retractions import RETRACTIONS, Order, Retraction, as_retraction
from manifold_cl.plugins import load_object

STEP = 0.1
"""Frobenius length of timed steps: ten times what an Adam step of a usual learning rate makes."""
DRIFT_ROWS = 512
"""Drift is walked on at most this many rows: it does not depend on n, and time does."""
MARKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
"""Steps after which drift is noted."""


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
    """Median milliseconds of the gradient in u, beyond the forward pass; None where autograd cannot follow."""
    memory_mb: float
    """Largest sum of tensors alive inside R(x, u), without its inputs."""
    to_geodesic: Mapping[str, Curve]
    """Distance to the geodesic over step lengths, by metric."""


@dataclass(frozen=True)
class LabReport:
    """All rows, with the setting of the measurement."""

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
        dtype: of points and steps: float32 or float64.
        device: where the costs are measured; laws are checked on the CPU in float64.
        steps: of the drift walk.
        laps: how often each is timed.
        seed: of points and directions.
        on_progress: called with (what, done, all).

    Raises:
        ValueError: for an unknown name, or a shape that the complement leaves no room for.
        TypeError: for a dtype other than float32 and float64.
    """
    if dtype not in DTYPES:
        raise TypeError(f"the lab measures float32 and float64, got {dtype}")
    rules = [as_retraction(r) for r in retractions or sorted(RETRACTIONS)]
    tell = on_progress or (lambda what, done, total: None)
    n, p = shape
    draw = torch.Generator().manual_seed(seed)
    first = RestrictedStiefel(gaussian(n, complement, draw=draw).to(device)).to(torch.device(device))
    first.require_room(n, p)
    x = first.random(batch, n, p, dtype=dtype, device=device, generator=draw).as_subclass(Tensor)
    u = STEP * unit(first.proju(x, gaussian(batch, n, p, draw=draw, dtype=dtype).to(device)))

    times = _timed(rules, x, u, laps, lambda lap: tell("timing", lap, laps))
    rows = []
    for done, (rule, (forward, backward)) in enumerate(zip(rules, times, strict=True)):
        tell(rule.name, done, len(rules))
        manifold = RestrictedStiefel(first.complement, retraction=rule)
        reports = {metric: check_retraction(rule, cast(Any, metric), seed=seed) for metric in sorted(rule.order)}
        drift = _drift(rule, min(n, DRIFT_ROWS), p, complement, n, steps, seed)
        failures = tuple(dict.fromkeys(text for report in reports.values() for text in report.failures()))
        rows.append(
            LabRow(
                name=rule.name,
                declared=dict(sorted(rule.order.items())),
                measured={metric: report.geodesic_slope - 1 for metric, report in reports.items()},
                failures=failures,
                error=worst(*manifold.constraint_error(manifold.retr(x, u))),
                drift=drift[-1][1],
                drift_steps=tuple(step for step, _ in drift),
                drift_errors=tuple(error for _, error in drift),
                forward_ms=forward,
                backward_ms=backward,
                memory_mb=peak_bytes(lambda rule=rule: rule(x, u)) / 2**20,  # type: ignore[misc]
                to_geodesic={metric: report.to_geodesic for metric, report in reports.items()},
            )
        )
    tell("done", len(rules), len(rules))
    return LabReport(
        shape=(n, p),
        complement=complement,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        threads=torch.get_num_threads(),
        steps=steps,
        drift_shape=_drift_size(min(n, DRIFT_ROWS), p, complement, n),
        rows=tuple(sorted(rows, key=lambda row: row.forward_ms)),
    )


def load_plugin(path: str) -> Retraction:
    """The retraction that ``module:name`` or ``file.py:name`` names: a class, an instance or a function.

    Raises:
        ValueError: when the module, file or name does not exist, or is no retraction.
    """
    offered = load_object(path)
    if isinstance(offered, type):
        offered = offered()
    try:
        return as_retraction(offered)
    except TypeError as error:
        raise ValueError(f"the plug-in {path!r} is no retraction: {error}") from error


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type its modes
    """Sums the storages behind the tensors that operations return, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._views: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it returned."""
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
    """The largest sum of tensors alive at once during ``call``, beyond those that were there before."""
    watch = _Watch()
    with watch:
        call()
    return watch.peak


def _timed(
    rules: Sequence[Retraction], x: Tensor, u: Tensor, laps: int, tell: Callable[[int], None]
) -> list[tuple[float, float | None]]:
    """Milliseconds forward and on top of it backward, of each rule: two of one name are two."""
    forward: list[list[float]] = [[] for _ in rules]
    both: list[list[float]] = [[] for _ in rules]
    at = u.clone().requires_grad_()
    weight = x.clone()
    for lap in range(laps + 1):  # the first is a warm-up
        tell(max(0, lap - 1))
        for rule, alone, with_gradient in zip(rules, forward, both, strict=True):
            milliseconds = _clocked(lambda rule=rule: rule(x, u), x.device)  # type: ignore[misc]
            if lap:
                alone.append(milliseconds)
            try:
                milliseconds = _clocked(
                    lambda rule=rule: torch.autograd.grad((rule(x, at) * weight).sum(), at),  # type: ignore[misc]
                    x.device,
                )
            except (RuntimeError, NotImplementedError):
                continue  # no derivative: said so by an empty cell
            if lap:
                with_gradient.append(milliseconds)
    return [
        (
            statistics.median(alone),
            statistics.median(max(0.0, b - f) for b, f in zip(with_gradient, alone, strict=True))
            if with_gradient
            else None,
        )
        for alone, with_gradient in zip(forward, both, strict=True)
    ]


def _clocked(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _drift_size(rows: int, p: int, k: int, n: int) -> tuple[int, int, int]:
    return rows, p, min(k * rows // n, rows - p)


def _drift(rule: Retraction, rows: int, p: int, k: int, n: int, steps: int, seed: int) -> list[tuple[int, float]]:
    draw = torch.Generator().manual_seed(seed)
    rows, p, k = _drift_size(rows, p, k, n)
    manifold = RestrictedStiefel(gaussian(rows, k, draw=draw, dtype=torch.float32), retraction=rule)
    seen: list[tuple[int, float]] = []

    def note(step: int, x: Tensor) -> None:
        if step in MARKS or step == steps:
            seen.append((step, worst(*manifold.constraint_error(x))))

    walk(manifold, rows, p, steps, draw, note)
    return seen
