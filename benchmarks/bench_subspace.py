"""What protected subspaces cost: one layer of a 7B model exactly and sketched, a whole model's memory, a pass's time.

    python benchmarks/bench_subspace.py [--device cuda]

Three parts. One layer: the gradient of a LLaMA-7B MLP weight (11008 x 4096) from 2048 tokens whose singular values
fall like 1/j over a floor of noise, by dense accumulation and a full SVD (timed once, it takes minutes), and by two
passes per sketch. Whole model: the bytes of all sketches at LLaMA-7B shapes, and what a pass over a narrower model
takes beside its sketches. Pass: forward and backward through one block at full width, plain with weight gradients and
sketched, in turn; the ratio is the median of the ratios of single laps. Times are CPU times of the process, since
other work may share the machine: run it with one thread. Memory of the one layer is the peak of the process's resident
set over what it was before (Linux only), that of a pass what torch's allocator had booked at the worst moment. On a
GPU, times are wall times and memory is the GPU's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from manifold_cl import ProtectedSubspace
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.continual.subspaces import GradientSketch, Probes, RangeSketch, Statistic, collect_statistics
from manifold_cl.continual.subspaces.directions import ImportanceMeasurement, LeadingDirections
from manifold_cl.continual.subspaces.hooks import hooked
from manifold_cl.files import write_json
from manifold_cl.linalg import full_precision

WIDTH, INNER, BLOCKS = 4096, 11008, 32
ENERGY = 0.99
BATCH = 512
"""Tokens that are added at once."""
APART = 3.0
"""An exact direction counts as well separated if its singular value is this many times the first one left out."""

PARTS = ("layer", "model", "pass")
AIMS: list[tuple[str, str, str, dict[str, float]]] = [
    ("extraction of one layer, times faster than dense", "one_layer", "times_faster", {"at_least": 10}),
    ("its extra memory, times smaller than dense", "one_layer", "times_smaller", {"at_least": 10}),
    ("captured energy, difference from exact", "one_layer", "energy_difference", {"at_most": 0.01}),
    ("largest angle to the well-separated part, rad", "one_layer", "angle", {"at_most": 1e-2}),
    ("sketches at size 128 over dense gradients, LLaMA-7B", "whole_model", "share_of_dense", {"at_most": 0.07}),
    (
        "a pass beside its sketches: its peak or an addition, share of them",
        "whole_model",
        "beside_sketches",
        {"at_most": 0.10},
    ),
    ("sketched pass over a pass with weight gradients, time", "pass", "over_gradient_pass", {"at_most": 1.3}),
    ("the same over a pass without weight gradients", "pass", "over_frozen_pass", {"at_most": 1.3}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(INNER, WIDTH), help="m and n of the one layer")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--size", type=int, default=256, help="of the one layer's sketch")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the block that is timed")
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, help="parts to measure (default: all; on a GPU not 'model')"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "subspace.json")
    options = parser.parse_args()

    parts = options.part or [part for part in PARTS if part != "model" or options.device == "cpu"]
    found: dict[str, dict[str, Any]] = {}
    with full_precision():
        if "layer" in parts:
            found["one_layer"] = one_layer(
                *options.shape, tokens=options.tokens, size=options.size, device=options.device
            )
    if "model" in parts:
        found["whole_model"] = whole_model()
    if "pass" in parts:
        found["pass"] = pass_time(options.width, laps=options.laps, device=options.device)
    aims = [aim(what, found[part][name], **bound) for what, part, name, bound in AIMS if part in found]
    table = Table(title=f"protected subspaces, float32, {options.device}, {torch.get_num_threads()} thread(s)")
    for column in ("aim", "target", "measured", ""):
        table.add_column(column, justify="left" if column == "aim" else "right")
    for row in aims:
        table.add_row(row["aim"], row["target"], f"{row['measured']:.3g}", "met" if row["met"] else "missed")
    Console().print(table)
    write_json(
        options.out,
        {
            "what": __doc__.strip().splitlines()[0],
            "aims": aims,
            **found,
            "left_out": [part for part in PARTS if part not in parts],
            "device": options.device,
            "threads": torch.get_num_threads(),
            "versions": library_versions(),
            "machine": machine(),
        },
    )


def aim(what: str, measured: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    met = measured >= at_least if at_least is not None else measured <= (at_most or 0.0)
    target = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    return {"aim": what, "target": target, "measured": measured, "met": met}


def one_layer(m: int, n: int, *, tokens: int, size: int, device: str) -> dict[str, Any]:
    x, d = (part.to(device) for part in correlated(m, n, tokens))
    found: dict[str, Any] = {}

    def sketched() -> None:
        first = RangeSketch(m, n, size=size, probes=Probes(0), device=device)
        read(first)
        second = first.refined()
        del first
        read(second)
        held = second.importance()
        del second
        found["captured"] = held.captured
        found["basis"] = ProtectedSubspace.empty(n).extended(held.columns, energy=ENERGY, total=held.total).basis

    def read(statistic: Statistic) -> None:
        for part, gradient in zip(x.split(BATCH), d.split(BATCH), strict=True):
            statistic.add(part, gradient)

    def dense() -> None:
        gradient = torch.zeros(m, n, device=device)
        for part, back in zip(x.split(BATCH), d.split(BATCH), strict=True):
            gradient += back.mT @ part
        found["exact"] = torch.linalg.svd(gradient, full_matrices=False)[1:]

    ours, theirs = cost(sketched, device), cost(dense, device)
    sigma, vt = found["exact"]
    energies = sigma.double().square()
    shares = energies.cumsum(0) / energies.sum()
    k = int((shares < ENERGY).sum()) + 1
    separated = int((sigma[:k] >= APART * sigma[k]).sum())

    def held(basis: Tensor) -> float:
        return float(((vt @ basis).double().square().sum(1) * energies).sum() / energies.sum())

    def angle(basis: Tensor) -> float:
        wanted = vt[:separated].mT.double()
        outside = wanted - basis.double() @ (basis.double().mT @ wanted)
        return float(torch.linalg.matrix_norm(outside, 2).clamp(max=1).asin())

    single = GradientSketch(m, n, size=size, generator=Probes(0), device=device)
    read(single)
    once = single.importance()
    once_basis = ProtectedSubspace.empty(n).extended(once.columns, energy=ENERGY, total=once.total).basis
    return {
        "shape": [m, n],
        "tokens": tokens,
        "size": size,
        "seconds": {"sketched": ours["seconds"], "dense": theirs["seconds"]},
        "extra_mb": {"sketched": ours["extra_mb"], "dense": theirs["extra_mb"]},
        "times_faster": theirs["seconds"] / ours["seconds"],
        "times_smaller": theirs["extra_mb"] / ours["extra_mb"],
        "columns": {"exact": k, "two passes": found["basis"].shape[1], "one pass": once_basis.shape[1]},
        "held": {"exact": float(shares[k - 1]), "two passes": held(found["basis"]), "one pass": held(once_basis)},
        "energy_difference": abs(held(found["basis"]) - float(shares[k - 1])),
        "separated_directions": separated,
        "angle": angle(found["basis"]),
        "angle_one_look": angle(once_basis),
        "estimated_share_missed": 1 - found["captured"],
    }


def correlated(m: int, n: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients whose product has singular values 1/j, j up to 400, over noise of 1 % each."""
    draw = torch.Generator().manual_seed(0)
    rank = min(400, m, n, tokens)

    def frame(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, rank, generator=draw))[0]

    shared = frame(tokens) * torch.arange(1, rank + 1.0) ** -0.5
    x = shared @ frame(n).mT + 0.01 * torch.randn(tokens, n, generator=draw) / n**0.5
    d = shared @ frame(m).mT + 0.01 * torch.randn(tokens, m, generator=draw) / m**0.5
    return x, d


def whole_model() -> dict[str, Any]:
    """Bytes at full size from the objects themselves, and the peak of a real pass at a quarter of the width."""
    probes = Probes(0)
    sketches = [
        GradientSketch(m, n, size=128, generator=probes) for _ in range(BLOCKS) for m, n in shapes(WIDTH, INNER)
    ]
    own = sum(sketch.nbytes() for sketch in sketches)
    measurement = ImportanceMeasurement("gradient", energy=ENERGY, seed=0, per_sketch=1)
    linears = [nn.Linear(n, m, bias=False, device="meta") for m, n in shapes(WIDTH, INNER)]
    shared = measurement.shared_nbytes(linears, 128)
    dense = 4 * BLOCKS * sum(m * n for m, n in shapes(WIDTH, INNER))
    del sketches
    model = nn.Sequential(*(Block(1024) for _ in range(8))).requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    x = torch.randn(BATCH, 1024, generator=torch.Generator().manual_seed(0))

    def listening() -> None:
        with hooked(layers, lambda *_: None):
            model(x).square().mean().backward()

    statistics_ = {
        name: GradientSketch(layer.out_features, layer.in_features, size=128, generator=probes)
        for name, layer in layers.items()
    }
    for sketch in statistics_.values():  # zeros take no memory before they are written to
        for total in sketch.sums():
            total += 0.0
    listening()
    quiet = peak_mb(listening)
    loud = peak_mb(lambda: collect_statistics(layers, [lambda: model(x).square().mean()], statistics_))
    back = {name: torch.zeros(BATCH, layer.out_features) for name, layer in layers.items()}
    inputs = {name: torch.zeros(BATCH, layer.in_features) for name, layer in layers.items()}
    widest = max(layers, key=lambda name: layers[name].weight.numel())
    passing = peak_mb(lambda: statistics_[widest].add(inputs[widest], back[widest]))
    held = sum(s.nbytes() for s in statistics_.values()) / 1e6
    return {
        "sketches_gb": own / 1e9,
        "shared_test_matrices_gb": shared / 1e9,
        "dense_gradients_gb": dense / 1e9,
        "share_of_dense": (own + shared) / dense,
        "quarter_width": {
            "sketches_mb": held,
            "pass_peak_mb": quiet,
            "sketched_pass_peak_mb": loud,
            "one_addition_mb": passing,
        },
        "beside_sketches": max(loud - quiet, passing) / held,
    }


def pass_time(width: int, *, laps: int, device: str) -> dict[str, Any]:
    block = Block(width).requires_grad_(False).to(device)
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    x = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(0)).to(device)
    measurement = LeadingDirections(32, protected={}, generator=torch.Generator().manual_seed(0), size=128)
    sketches = {name: measurement.statistic(name, layer, 128) for name, layer in layers.items()}

    def loss() -> Tensor:
        return block(x).square().mean()

    def gradient_pass() -> None:
        block.requires_grad_(True)
        loss().backward()
        block.zero_grad(set_to_none=True)
        block.requires_grad_(False)

    def frozen_pass() -> None:
        x.requires_grad_(True)
        loss().backward()
        x.grad = None
        x.requires_grad_(False)

    def sketched_pass() -> None:
        x.requires_grad_(True)
        collect_statistics(layers, [loss], sketches)
        x.grad = None
        x.requires_grad_(False)

    work = {"gradient": gradient_pass, "frozen": frozen_pass, "sketched": sketched_pass}
    times: dict[str, list[float]] = {name: [] for name in work}
    for lap in range(laps + 1):
        for name, call in work.items():
            start = now(device)
            call()
            if lap:
                times[name].append(now(device) - start)
    return {
        "width": width,
        "tokens": BATCH,
        "size": 128,
        "median_seconds": {name: statistics.median(lap) for name, lap in times.items()},
        "over_gradient_pass": median_ratio(times["sketched"], times["gradient"]),
        "over_frozen_pass": median_ratio(times["sketched"], times["frozen"]),
    }


class Block(nn.Module):
    """The seven linear maps of a LLaMA block, with its attention, gate and norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        names = ("q", "k", "v", "o", "gate", "up", "down")
        inner = width * INNER // WIDTH
        for seed, (name, (m, n)) in enumerate(zip(names, shapes(width, inner), strict=True)):
            linear = nn.Linear(n, m, bias=False)
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(m, n, generator=draw) / n**0.5)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """What attention and the gated map make of x (tokens, width)."""
        y = nn.functional.rms_norm(x, x.shape[-1:])
        q, k, v = (part.unflatten(-1, (-1, 128)).transpose(0, 1) for part in (self.q(y), self.k(y), self.v(y)))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + self.o(mixed)
        y = nn.functional.rms_norm(x, x.shape[-1:])
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def shapes(width: int, inner: int) -> list[tuple[int, int]]:
    """(out, in) of q, k, v, o, gate, up, down."""
    return [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]


def peak_mb(work: Callable[[], None]) -> float:
    """MB of tensors that were alive at once at the worst moment, as torch's own allocator booked them."""
    with torch.profiler.profile(profile_memory=True) as watched:
        work()
    alive = peak = 0
    booked = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(booked, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak / 1e6


def now(device: str) -> float:
    """Seconds of the process; of the clock, once its work is done, on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def cost(work: Callable[[], None], device: str) -> dict[str, float]:
    """Seconds, and MB of memory at the peak over before: of the GPU, or of the process's resident set."""
    gc.collect()
    if device != "cpu":
        work()  # handles, kernels and the allocator's first blocks
        torch.cuda.reset_peak_memory_stats()
        held, start = torch.cuda.memory_allocated(), now(device)
        work()
        return {"seconds": now(device) - start, "extra_mb": (torch.cuda.max_memory_allocated() - held) / 1e6}
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before counts as free
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    return {"seconds": seconds, "extra_mb": (status("VmHWM") - before) / 1e3}


def status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return float(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/status")


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()
