"""Ten thousand steps of every step in the registries: constraint errors, memory, time per step.

    python benchmarks/soak.py
    python benchmarks/soak.py --resume  # go on where a run was cut
    python benchmarks/soak.py --steps 400 --only adamw "adamw + cayley" --out /tmp/soak.json

Runs every retraction with AdamW, every optimizer of torch that can be made Riemannian, every step of the lab that is an
optimizer, every step without a retraction, and options of the step. A new entry of a registry takes part without a
change here. Each runs in a process of its own, in float32, on eight points: four kinds, each once with the same
gradient in all steps and once with noise. Much of a gradient lies off the tangent space.

Limits: both constraint errors at most 2e-6, memory growth under 1 %, and the last thousand steps as fast as the first
thousand after the warm-up (CPU time, beside a fixed piece of work, so that other processes matter little). Steps
without a retraction drift from the manifold on purpose: only ``Fᵀx`` has the limit of 2e-6, and after
``return_to_manifold()`` both have it. Results are written after each run. Exit code 1 when a limit is broken.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from manifold_cl import RETRACTIONS, RestrictedStiefel, riemannian
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.infeasible import INFEASIBLE_STEPS, infeasible
from manifold_cl.lab import STEPS
from manifold_cl.lab.steps import OptimizerStep

SHAPES = ((24, 1, 7), (24, 4, 8), (24, 4, 0), (24, 4, 20))
"""(n, p, k) of the points: one column; equal n and p with usual, no and all protected directions (n − k = p)."""
CONSTRAINT, GROWTH, SLOWDOWN = 2e-6, 0.01, 1.25
"""Limits: largest constraint error, relative growth of memory, time of the last steps over that of the first."""
MEASURE_EVERY = 50
"""Steps between two measurements of the constraint."""
RATE = 3e-2
"""Learning rate of AdamW and of torch's other optimizers: a step is about 0.4 long."""
SHORT = 1e-3
"""Rate of SGD where points step without a retraction."""

Make = Callable[[Sequence[Tensor], Sequence[RestrictedStiefel]], list[Any]]


@dataclass(frozen=True)
class Soak:
    """One step to be run: makes its optimizers for points on their manifolds."""

    make: Make
    options: dict[str, Any]
    """Options of the manifolds."""
    infeasible: bool = False


def together(kind: Any, **options: Any) -> Make:
    """One optimizer for all points."""
    return lambda points, manifolds: [kind([{"params": list(points), "manifolds": list(manifolds)}], **options)]


def from_lab(step: OptimizerStep) -> Make:
    """The lab's optimizer, in the middle of its range of rates; all points in one, where it takes groups."""
    low, high = step.rates or (RATE, RATE)
    rate = SHORT if step.infeasible else math.sqrt(low * high)

    def make(points: Sequence[Tensor], manifolds: Sequence[RestrictedStiefel]) -> list[Any]:
        first = step.make(points[0], manifolds[0], rate)
        if getattr(first, "keeps_manifolds", False):
            first.add_param_group({"params": list(points[1:]), "manifolds": list(manifolds[1:])})
            return [first]
        return [first, *(step.make(p, m, rate) for p, m in zip(points[1:], manifolds[1:], strict=True))]

    return make


def soaks() -> tuple[dict[str, Soak], dict[str, str]]:
    """Steps to run, by name, and name → reason for those left out."""
    adamw = riemannian(torch.optim.AdamW)
    found = {
        f"adamw + {name}": Soak(together(adamw, lr=RATE, weight_decay=0.0), {"retraction": name})
        for name in RETRACTIONS
    }
    left_out = {}
    for name in STEPS:
        step = STEPS[name]
        if isinstance(step, OptimizerStep):
            found[name] = Soak(from_lab(step), {}, step.infeasible)
        else:
            left_out[name] = "a solver, which ends by itself"
    for name in INFEASIBLE_STEPS:
        make = together(infeasible(torch.optim.SGD, step=name), lr=SHORT, momentum=0.9)
        found[name] = Soak(make, {}, infeasible=True)
    for name, base in inspect.getmembers(torch.optim, inspect.isclass):
        if base is torch.optim.Optimizer or not issubclass(base, torch.optim.Optimizer):
            continue
        try:
            made = riemannian(base)
        except TypeError as error:
            left_out[f"torch.optim.{name}"] = str(error)
            continue
        decay = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(base.__init__).parameters else {}
        found[f"torch.optim.{name}"] = Soak(together(made, lr=RATE, **decay), {})
    for label, options in {
        "official": {"step_rule": "official", "lr": SHORT},
        "width": {"step_scale": "width", "lr": SHORT},
        "transport": {"moments": "transport", "lr": RATE},
        "polished": {"polish_every": 100, "lr": RATE},
        "long": {"lr": 10.0},
        "tiny": {"lr": 1e-8},
    }.items():
        found[f"adamw, {label}"] = Soak(together(adamw, weight_decay=0.0, **options), {})
    found["adamw, canonical metric"] = Soak(together(adamw, lr=RATE, weight_decay=0.0), {"metric": "canonical"})
    return found, left_out


class Points:
    """Points on their manifolds, and the gradients that they get."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.manifolds, self.points, self.gradients = [], [], []
        for n, p, k in SHAPES * 2:  # first those with one gradient, then those with noise
            basis = torch.linalg.qr(torch.randn(n, k, generator=self.draw))[0] if k else None
            manifold = RestrictedStiefel(basis, **options)
            x = manifold.random(n, p, generator=self.draw).as_subclass(Tensor)
            self.manifolds.append(manifold)
            self.points.append(torch.nn.Parameter(x.clone()))
            self.gradients.append(torch.randn(n, p, generator=self.draw))

    def give_gradients(self, held: Sequence[Tensor]) -> None:
        """Set the gradients of the next step."""
        for i, (point, gradient) in enumerate(zip(held, self.gradients, strict=True)):
            if i >= len(SHAPES):
                gradient.normal_(generator=self.draw)
            point.grad = gradient.clone()

    def errors(self, held: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
        """The largest errors xᵀx − I and Fᵀx, for each kind of gradient; infinite for NaN."""
        each = [
            [e if e == e else math.inf for e in manifold.constraint_error(p.detach().as_subclass(Tensor))]
            for manifold, p in zip(self.manifolds, held, strict=True)
        ]
        half = len(SHAPES)
        kinds = {"coherent": each[:half], "noise": each[half:]}
        return {kind: (max(e[0] for e in part), max(e[1] for e in part)) for kind, part in kinds.items()}


def run(soak: Soak, steps: int, window: int) -> dict[str, Any]:
    """Takes the steps, measures, and returns the figures."""
    warnings.filterwarnings("ignore", message=".*(left their manifold|weight decay).*")
    work = Points(soak.options)
    optimizers = soak.make(work.points, work.manifolds)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    worst = dict.fromkeys(("coherent", "noise"), (0.0, 0.0))
    laps, beside = array("d", bytes(8 * steps)), array("d", bytes(8 * (steps // 5 + 1)))  # no memory grows with them
    held_mb: list[float] = []
    objects: list[int] = []
    for step in range(steps):
        work.give_gradients(held)
        start = time.process_time()
        for optimizer in optimizers:
            optimizer.step()
        laps[step] = time.process_time() - start
        if step % 5 == 0:
            beside[step // 5] = fixed_work()
        if step % MEASURE_EVERY == 0 or step == steps - 1:
            for kind, error in work.errors(held).items():
                worst[kind] = (max(worst[kind][0], error[0]), max(worst[kind][1], error[1]))
        if step % window == window - 1:
            size, count = memory()
            held_mb.append(round(size / 1e6, 2))
            objects.append(count)
    figures: dict[str, Any] = {
        "steps": steps,
        "orthonormality": {kind: error[0] for kind, error in worst.items()},
        "protection": {kind: error[1] for kind, error in worst.items()},
        "memory_mb": held_mb,
        "memory_growth": held_mb[-1] / held_mb[0] - 1,
        "objects_grown": objects[-1] - objects[0],
        **speed(laps, beside, window),
    }
    if soak.infeasible:
        for optimizer in optimizers:
            optimizer.return_to_manifold()
        figures["returned"] = max(e for pair in work.errors(held).values() for e in pair)
    return figures


def speed(laps: Sequence[float], beside: Sequence[float], window: int) -> dict[str, float]:
    """CPU times of a step: first window after the warm-up window, last window, and their ratio as work stays equal."""
    first, last = statistics.median(laps[window : 2 * window]), statistics.median(laps[-window:])
    few = window // 5
    drift = statistics.median(beside[-few:]) / statistics.median(beside[few : 2 * few])
    return {
        "first_ms": round(1e3 * first, 4),
        "last_ms": round(1e3 * last, 4),
        "machine": round(drift, 3),
        "slowdown": round(last / first / drift, 3),
    }


def fixed_work() -> float:
    """CPU seconds of small products and sums that never change: how fast the machine is now."""
    a = torch.full((48, 16), 0.1)
    start = time.process_time()
    for _ in range(12):
        b = a @ (a.mT @ a)
        a = a + 1e-3 * b
    return time.process_time() - start


def memory() -> tuple[int, int]:
    """Bytes of this process in memory, and the number of Python objects."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096, len(gc.get_objects())


def broken_limits(soak: Soak, figures: dict[str, Any]) -> list[str]:
    """The limits that a run broke; "failed" where it raised."""
    if "error" in figures:
        return ["failed"]
    errors = [*figures["protection"].values()]
    errors += [figures["returned"]] if soak.infeasible else figures["orthonormality"].values()
    limits = {
        "constraint": max(errors) <= CONSTRAINT,
        "memory": figures["memory_growth"] < GROWTH,
        "time": figures["slowdown"] <= SLOWDOWN,
    }
    return [name for name, kept in limits.items() if not kept]


def apart(soak: Soak, steps: int, window: int) -> dict[str, Any]:
    """`run` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(send, soak, steps, window))
    process.start()
    send.close()  # so that a process that dies ends the wait
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with {process.exitcode}"}
    process.join()
    return found


def _send(send: Connection, soak: Soak, steps: int, window: int) -> None:
    try:
        send.send(run(soak, steps, window))
    except Exception as error:  # the others still run
        send.send({"error": f"{type(error).__name__}: {error}"})


def kept(path: Path, steps: int) -> dict[str, dict[str, Any]] | None:
    """The results in a file; empty where there is no file, None for results of another number of steps."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["results"] if content["steps"] == steps else None


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="largest errors, growth of memory, time per step")
    for column in ("step", "xᵀx − I", "Fᵀx", "memory", "objects", "first ms", "last / first", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right")
    for name, found in results.items():
        if "error" in found:
            table.add_row(name, *[""] * 6, found["error"])
            continue
        errors = [f"{max(found[kind].values()):.1e}" for kind in ("orthonormality", "protection")]
        cells = [f"{100 * found['memory_growth']:.2f} %", f"{found['objects_grown']:+d}", f"{found['first_ms']:.2f}"]
        table.add_row(name, *errors, *cells, f"{found['slowdown']:.2f}", ", ".join(found["broken"]))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of steps; results of others stay")
    parser.add_argument("--resume", action="store_true", help="only the steps that the file has no results of")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # before any work: a forked process waits for ever for the threads of its parent
    known, left_out = soaks()
    if options.steps < 30:
        parser.error("--steps is at least 30: thirds are a warm-up, the first and the last window")
    if unknown := sorted({*(options.only or ())} - known.keys()):
        parser.error(f"--only: no step named {unknown[0]!r}; have {', '.join(known)}")
    keeps = options.only or options.resume
    found = kept(options.out, options.steps) if keeps else {}
    if found is None:
        flag = "--only" if options.only else "--resume"
        parser.error(f"{flag}: {options.out} holds results of other --steps, which would be lost: give another --out")
    window = min(1000, options.steps // 3)
    run(known[next(iter(known))], 30, 10)  # imports, once for all processes, what a first step imports
    gc.freeze()  # what is imported is not collected again in each process
    results = dict(found)
    for name in options.only or known:
        if options.resume and name in results:
            continue
        results[name] = apart(known[name], options.steps, window)
        results[name]["broken"] = broken_limits(known[name], results[name])
        print(json.dumps({name: results[name]}), flush=True)
        write_json(
            options.out,
            {
                "what": f"{options.steps} steps of every step on {2 * len(SHAPES)} points in float32",
                "shapes": SHAPES,
                "steps": options.steps,
                "limits": {"constraint": CONSTRAINT, "memory_growth": GROWTH, "slowdown": SLOWDOWN},
                "results": results,
                "left_out": left_out,
                "versions": library_versions(),
                "machine": machine(),
            },
        )
    show(results)
    return 1 if any(found["broken"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
