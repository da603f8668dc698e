"""What the Riemannian step costs, beside its base optimizer, the published step and geoopt, with a target for each.

    python benchmarks/bench_step.py                 # a quarter of LLaVA-1.5-7B's layers, on the CPU
    python benchmarks/bench_step.py --full --device cuda

Work: the adapted linear layers of LLaMA-7B's shapes (14 frames a block, 448 in all), rank 16, k = 256 protected
directions on every input frame. Contestants step in turn on copies of the same frames with the same gradients, so that
a drift of the machine's speed hits all of them; a ratio is the median of the ratios of single laps. The last target is
taken on the main job (`step.py`'s model and batch), unless ``--no-job``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import geoopt
import torch
from contestants import (
    BLOCK,
    BLOCKS,
    CLOCK,
    LR,
    PROTECTED,
    RANK,
    REPLAYED,
    STAND_IN,
    Contestant,
    Replayed,
    gradients,
    on_stiefel,
    ratio,
    riemannian_over,
    synchronize,
    times,
    work,
)
from published_step import PublishedStep
from rich.console import Console
from rich.table import Table
from step_targets import TRIED, Target, judged
from torch import Tensor

from manifold_cl import EBLoRALinear, RiemannianAdamW, inject_adapters, param_groups
from manifold_cl.adapters import LoRALinear
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.infeasible import infeasible
from manifold_cl.optim import RiemannianMuon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="all 32 blocks instead of a quarter of them")
    parser.add_argument("--blocks", type=int, help=f"as many of the {BLOCKS} blocks")
    parser.add_argument("--width", type=int, default=4096, help="of the model, in multiples of 16; the rest scales")
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: CPU time, for a machine with other work on it (one thread, CPU only)",
    )
    parser.add_argument("--replay", action="store_true", help="replay steps on a CPU too, where no graph is recorded")
    parser.add_argument("--no-job", action="store_true", help="leave out the training step of the main job")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_step.json")
    options = parser.parse_args()
    device = options.device
    if options.clock == "process":
        if device.startswith("cuda") or torch.get_num_threads() > 1:
            parser.error("--clock process counts the CPU time of one thread: set OMP_NUM_THREADS=1 and --device cpu")
        CLOCK[0] = time.process_time
    frames, complements = work(options.blocks or (BLOCKS if options.full else BLOCKS // 4), device, options.width)
    grads = gradients(frames)

    def ours(ps: list[Tensor]) -> Any:
        return riemannian_over(ps, complements)

    def published(ps: list[Tensor]) -> PublishedStep:
        return PublishedStep(ps, {p: c for p, c in zip(ps, complements, strict=True) if c is not None}, lr=LR)

    def spectral(direction: str) -> Callable[[list[Tensor]], Any]:
        return lambda ps: riemannian_over(ps, complements, kind=RiemannianMuon, direction=direction)

    pogo = infeasible(torch.optim.AdamW, step="pogo")

    gpu = device.startswith("cuda")

    def replayed(ps: list[Tensor]) -> Replayed:
        return Replayed(ps, riemannian_over(ps, complements, nonfinite="skip", **({"capturable": True} if gpu else {})))

    restricted = times(
        {
            "ours": ours,
            **({REPLAYED if gpu else STAND_IN: replayed} if gpu or options.replay else {}),
            "published": published,
            "ours, RiemannianMuon, exact": spectral("exact"),
            "ours, RiemannianMuon, projected": spectral("projected"),
            "AdamW with POGO steps, infeasible": lambda ps: riemannian_over(ps, complements, kind=pogo),
        },
        frames,
        grads,
        options.laps,
        device,
    )
    report = {
        "what": f"one step on {len(frames)} frames of LLaMA-7B's shapes, rank {RANK}, k = {PROTECTED} on inputs",
        "full": len(frames) == 2 * BLOCKS * len(BLOCK) and options.width == 4096,
        "device": device,
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "laps": options.laps,
        "versions": library_versions(),
        "machine": machine(),
    }
    write_json(options.out, report | figures(restricted))  # a cut does not lose it
    unrestricted = times(
        {
            "ours, nothing protected": lambda ps: riemannian_over(ps, [None] * len(ps)),
            "ours, nothing protected, fused=True": lambda ps: riemannian_over(ps, [None] * len(ps), fused=True),
            "geoopt RiemannianAdam": lambda ps: geoopt.optim.RiemannianAdam(on_stiefel(ps), lr=LR),
            "AdamW(foreach=True)": lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0.0, foreach=True),
            "AdamW with POGO steps, infeasible, nothing protected": lambda ps: riemannian_over(
                ps, [None] * len(ps), kind=pogo
            ),
            "Muon": lambda ps: torch.optim.Muon(ps, lr=LR, weight_decay=0.0),
        },
        frames,
        grads,
        options.laps,
        device,
    )
    memory = extra_memory(frames, complements, grads, device)
    rows = restricted | unrestricted
    job = None if options.no_job else main_job(device, max(10, 3 * options.laps))
    targets = judged(rows, memory, job, device, frames, complements)
    show(rows, targets, memory, job, len(frames), device)
    judgement = [{**asdict(target), "met": target.met} for target in targets]
    rest = {"memory": memory, "main_job": job, "targets": judgement, "tried": TRIED}
    write_json(options.out, report | figures(rows) | rest)


def figures(rows: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and least milliseconds of each contestant."""
    return {
        "median_ms": {name: statistics.median(laps) for name, laps in rows.items()},
        "min_ms": {name: min(laps) for name, laps in rows.items()},
    }


def extra_memory(
    frames: list[Tensor], complements: list[Tensor | None], grads: list[Tensor], device: str
) -> dict[str, Any]:
    """Bytes that a step needs beyond parameters, gradients and moments, against the largest bucket.

    A bucket is all frames of one shape with their complements. Persistent: scratch memory and stacked complements.
    Transient: what one step allocates and frees again.
    """
    sizes: dict[tuple[object, ...], int] = {}
    for frame, complement in zip(frames, complements, strict=True):
        key = (frame.shape, complement is None)
        sizes[key] = sizes.get(key, 0) + frame.nbytes + (0 if complement is None else complement.nbytes)
    points: dict[tuple[object, ...], int] = {}
    for frame, complement in zip(frames, complements, strict=True):
        key = (frame.shape, complement is None)
        points[key] = points.get(key, 0) + frame.nbytes
    contestant = Contestant(frames, lambda ps: riemannian_over(ps, complements))
    for _ in range(2):
        contestant.lap(grads, device)
    scratch = contestant.optimizer._riemannian.plan.workspace.nbytes
    plan = contestant.optimizer._riemannian.plan.buckets
    stacked = sum(b.geometry.projector.stacked.nbytes for _, b in plan if b.geometry.projector.stacked is not None)
    peaks = [transient(contestant, grads, device) for _ in range(3)]
    return {
        "largest_bucket": max(sizes.values()),
        "points_of_largest_bucket": max(points.values()),
        "scratch": scratch,
        "copies_of_complements": stacked,
        "transient_by_step": peaks,
        "ratio": (scratch + max(peaks)) / max(sizes.values()),
        "ratio_to_points": (scratch + max(peaks)) / max(points.values()),
        "grows": contestant.optimizer._riemannian.plan.workspace.nbytes != scratch,
    }


def transient(contestant: Contestant, grads: list[Tensor], device: str) -> int:
    """Peak bytes allocated within one step over what was held before it."""
    for frame, grad in zip(contestant.frames, grads, strict=True):
        frame.grad = grad
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as seen:
        contestant.optimizer.step()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main_job(device: str, laps: int) -> dict[str, Any]:
    """One training step of the main job, with our adapters and step, and with plain LoRA and AdamW."""
    from manifold_cl.streams import open_stream

    stream = open_stream("text-six", tasks=["nouns"])
    task = stream.tasks[0]
    draw = torch.Generator().manual_seed(0)

    def protected(_: str, linear: torch.nn.Linear) -> EBLoRALinear:
        n = linear.in_features
        basis = torch.linalg.qr(torch.randn(n, int(0.35 * n), generator=draw))[0].to(device)
        return EBLoRALinear(linear, RANK, alpha=32, complement=basis, initial_scale=-0.02, generator=draw)

    runs: dict[str, Callable[[Any], None]] = {}
    for name, make in {"ours": protected, "LoRA": lambda _, linear: LoRALinear(linear, RANK, alpha=32)}.items():
        model = stream.make_model().to(device)
        inject_adapters(model, stream.targets, make)
        groups = param_groups(model, lr=LR)
        optimizer = (
            RiemannianAdamW(groups, lr=LR, weight_decay=0.0)
            if name == "ours"
            else torch.optim.AdamW([p for group in groups for p in group["params"]], lr=LR, weight_decay=0.0)
        )

        def run(batch: Any, model: torch.nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            synchronize(device)

        runs[name] = run
    batches = list(task.batches("train", batch_size=16, generator=draw))
    rows: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(laps + 2):
        for name, run in runs.items():
            start = CLOCK[0]()
            run(batches[lap % len(batches)])
            if lap >= 2:
                rows[name].append(1e3 * (CLOCK[0]() - start))
    return {
        "protected_share": 0.35,
        "median_ms": {name: statistics.median(laps) for name, laps in rows.items()},
        "ratio": ratio(rows, "ours", "LoRA"),
    }


def show(
    rows: dict[str, list[float]],
    targets: list[Target],
    memory: dict[str, Any],
    job: dict[str, Any] | None,
    frames: int,
    device: str,
) -> None:
    console = Console()
    table = Table(title=f"one step on {frames} frames, {device}, {torch.get_num_threads()} thread(s)")
    table.add_column("")
    table.add_column("ms, median (smallest)", justify="right")
    for name, laps in rows.items():
        table.add_row(name, f"{statistics.median(laps):.1f} ({min(laps):.1f})")
    for name, spent in (job["median_ms"] if job else {}).items():
        table.add_row(f"main job, training step, {name}", f"{spent:.1f}")
    table.add_row("scratch memory, MB", f"{memory['scratch'] / 1e6:.1f}")
    table.add_row("allocated and freed within a step, MB", f"{max(memory['transient_by_step']) / 1e6:.1f}")
    console.print(table)
    table = Table(title="targets")
    for column in ("", "target", "measured", ""):
        table.add_column(column)
    for target in targets:
        sign = "at least" if target.at_least else "at most"
        measured = "" if target.measured is None else f"{target.measured:.2f}"
        verdict = {True: "met", False: "missed", None: target.reason}[target.met]
        table.add_row(target.name, f"{sign} {target.bound:g}", measured, verdict)
    console.print(table)


if __name__ == "__main__":
    main()
