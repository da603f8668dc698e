"""Who competes in ``bench_step.py``: frames of LLaMA-7B's shapes, ways to step on them, laps taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_cl import RestrictedStiefel, RiemannianAdamW

BLOCKS, RANK, PROTECTED = 32, 16, 256
BLOCK = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))
"""(out, in) of the layers of a block: q, k, v, o; gate, up; down."""
LR = 1e-4
REPLAYED = "ours, CUDA graph"
STAND_IN = "ours, replayed without a graph"
"""Name of the stand-in for a CUDA graph in a dry run on the CPU."""
CLOCK = [time.perf_counter]
"""What laps are read from; ``--clock`` sets it."""


class Contestant:
    """One way to step: its own copies of all frames, and its optimizer."""

    def __init__(self, frames: list[Tensor], make: Callable[[list[Tensor]], Any]) -> None:
        self.frames = [torch.nn.Parameter(frame.clone()) for frame in frames]
        self.optimizer = make(self.frames)

    def lap(self, grads: list[Tensor], device: str) -> float:
        """Milliseconds of one step."""
        for frame, grad in zip(self.frames, grads, strict=True):
            frame.grad = grad.clone()  # one of them writes to it
        synchronize(device)
        start = CLOCK[0]()
        self.optimizer.step()
        synchronize(device)
        return 1e3 * (CLOCK[0]() - start)


def work(blocks: int, device: str, width: int = 4096) -> tuple[list[Tensor], list[Tensor | None]]:
    """Points of every frame, and the complement of each (None on the output side); all sizes scale with the width."""
    draw = torch.Generator(device=device).manual_seed(0)
    frames: list[Tensor] = []
    complements: list[Tensor | None] = []
    protected = PROTECTED * width // 4096
    for m, n in [(m * width // 4096, n * width // 4096) for m, n in BLOCK * blocks]:
        basis = torch.linalg.qr(torch.randn(n, protected, device=device, generator=draw))[0].contiguous()
        for rows, complement in ((m, None), (n, basis)):
            manifold = RestrictedStiefel(complement)
            frames.append(manifold.projx(torch.randn(rows, RANK, device=device, generator=draw)))
            complements.append(complement)
    return frames, complements


def gradients(frames: Iterable[Tensor]) -> list[Tensor]:
    draw: dict[torch.device, torch.Generator] = {}
    for frame in frames:
        draw.setdefault(frame.device, torch.Generator(device=frame.device).manual_seed(1))
    return [1e-3 * torch.randn(f.shape, device=f.device, generator=draw[f.device]) for f in frames]


def riemannian_over(
    ps: list[Tensor], complements: list[Tensor | None], kind: Any = RiemannianAdamW, **options: Any
) -> Any:
    """Points with a manifold each, as layers have them."""
    group = {"params": ps, "manifolds": [RestrictedStiefel(c) for c in complements], "lr": LR}
    return kind([group], lr=LR, weight_decay=0.0, **options)


class StandIn:
    """The part of a CUDA graph that `Replayed` uses, on a CPU: a replay is a call."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.replay = work


def recorded(work: Callable[[], Any], device: torch.device) -> Any:
    """A CUDA graph of ``work``; a `StandIn` on the CPU, which takes the first step at once too."""
    if device.type == "cpu":
        work()
        return StandIn(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


class Replayed:
    """A step recorded as a CUDA graph after two ordinary ones. Its time contains the copies of the gradients."""

    def __init__(self, frames: list[Tensor], optimizer: Any) -> None:
        self.frames, self.optimizer = frames, optimizer
        self.graph: Any = None
        self.ordinary = 0

    def step(self) -> None:
        """An ordinary step, the recording, or a replay."""
        grads = [frame.grad for frame in self.frames]
        if self.graph is not None:
            torch._foreach_copy_(self.grads, grads)
            self.graph.replay()
            return
        self.optimizer.step()
        self.ordinary += 1
        if self.ordinary == 2:
            self.grads, self.graph = grads, recorded(self.optimizer.step, self.frames[0].device)


def on_stiefel(ps: list[Tensor]) -> list[Tensor]:
    """The same tensors as parameters on geoopt's Euclidean Stiefel manifold."""
    manifold = geoopt.EuclideanStiefel()
    for p in ps:
        p.manifold = manifold  # what geoopt's optimizers look for  # type: ignore[attr-defined]
        p.__class__ = geoopt.ManifoldParameter
    return ps


def times(
    makers: dict[str, Callable[[list[Tensor]], Any]], frames: list[Tensor], grads: list[Tensor], laps: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of every lap, the contestants in turn, after two laps of warm-up."""
    contestants = {name: Contestant(frames, make) for name, make in makers.items()}
    rows: dict[str, list[float]] = {name: [] for name in makers}
    for lap in range(laps + 2):
        for name, contestant in contestants.items():
            spent = contestant.lap(grads, device)
            if lap >= 2:
                rows[name].append(spent)
    return rows


def ratio(rows: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(rows[one], rows[other], strict=True))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
