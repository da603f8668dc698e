"""What the cheap forms of the retractions save, as ratios taken in one run.

    python benchmarks/bench_retractions.py

The polar retraction from p × p products beside the batched SVD and the batched QR of x + u; the Cayley retraction by
one p × p solve beside the n × n solve it replaces. Contestants are timed in turn, so that a drift of the machine's
speed hits all of them, and a ratio is the median of the ratios of single laps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from manifold_cl import RETRACTIONS, RestrictedStiefel
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

STEP = 0.1
"""Frobenius length of the steps: ten times what an Adam step of a usual learning rate makes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 16))
    parser.add_argument("--dense", type=int, default=2048, help="n of the n × n Cayley solve")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retractions.json")
    options = parser.parse_args()

    n, p = options.shape
    x, u = point_and_step(options.batch, n, p, options.device)
    family = {name: lambda rule=rule: rule(x, u) for name, rule in RETRACTIONS.items()}
    many = timed(family, options.laps, options.device)
    a, b = point_and_step(1, options.dense, p, options.device)
    one = timed(
        {"cayley": lambda: RETRACTIONS["cayley"](a, b), "n × n solve": lambda: dense_cayley(a, b)},
        options.laps,
        options.device,
    )
    ratios = {
        "polar_svd / polar": ratio(many, "polar_svd", "polar"),
        "qr / polar": ratio(many, "qr", "polar"),
        f"n × n solve / cayley at n = {options.dense}": ratio(one, "n × n solve", "cayley"),
    }
    table = Table(
        title=f"{options.batch} × ({n} × {p}), float32, {options.device}, {torch.get_num_threads()} thread(s)"
    )
    table.add_column("")
    table.add_column("ms, median (smallest)", justify="right")
    for name, laps in sorted(many.items(), key=lambda item: statistics.median(item[1])):
        table.add_row(name, f"{statistics.median(laps):.1f} ({min(laps):.1f})")
    for name, value in ratios.items():
        table.add_row(name, f"{value:.1f} ×")
    Console().print(table)
    write_json(
        options.out,
        {
            "what": f"retractions of {options.batch} points {n} × {p} in float32, steps of length {STEP}, and one "
            f"Cayley step at n = {options.dense}, p = {p}",
            "device": options.device,
            "threads": torch.get_num_threads(),
            "laps": options.laps,
            "median_ms": {name: statistics.median(laps) for name, laps in (many | prefixed(one)).items()},
            "min_ms": {name: min(laps) for name, laps in (many | prefixed(one)).items()},
            "ratios": ratios,
            "versions": library_versions(),
            "machine": machine(),
        },
    )


def point_and_step(batch: int, n: int, p: int, device: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    manifold = RestrictedStiefel()
    x = manifold.random(batch, n, p, dtype=torch.float32, generator=draw).as_subclass(Tensor).to(device)
    u = manifold.proju(x, torch.randn(batch, n, p, generator=draw).to(device))
    return x, STEP * u / torch.linalg.matrix_norm(u, keepdim=True)


def dense_cayley(x: Tensor, u: Tensor) -> Tensor:
    """``(I − W/2)⁻¹(I + W/2)x`` as it is written."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    half = u - x @ (x.mT @ u) / 2
    w = half @ x.mT - x @ half.mT
    moved: Tensor = torch.linalg.solve(eye - w / 2, (eye + w / 2) @ x)
    return moved


def timed(work: dict[str, Callable[[], Tensor]], laps: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every lap, the contestants in turn, after one lap of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for lap in range(laps + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if lap:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def prefixed(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {f"one point: {name}": laps for name, laps in times.items()}


if __name__ == "__main__":
    main()
