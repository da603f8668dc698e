"""Statistics over ranks: two processes with half of the data each equal one with all of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import start_ranks
from old_versions import needs_sharding
from test_shared_inputs import Attention, N, layers_of
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from toy import toy_stream

from manifold_cl import SubspaceMemory, Task
from manifold_cl.continual.subspaces import directions
from manifold_cl.continual.subspaces.directions import leading_directions
from manifold_cl.continual.subspaces.gradient_sketches import GradientSketch, Probes, RangeSketch
from manifold_cl.continual.subspaces.growth import grow_memory, grow_memory_from_weights
from manifold_cl.continual.subspaces.hooks import collect_statistics
from manifold_cl.continual.subspaces.input_moments import InputMoment, InputSketch
from manifold_cl.continual.subspaces.passes import Passes
from manifold_cl.continual.subspaces.statistic import Directions, Statistic, all_reduce


def grow(part: slice, *, distributed: bool) -> dict[str, torch.Tensor]:
    """Of the given batches: float32 sums of each statistic, and what a float64 model protects after two tasks."""
    torch.set_num_threads(1)
    found: dict[str, torch.Tensor] = {}
    stream = toy_stream()
    model = stream.make_model()
    layers = {"inner": model.inner, "outer": model.outer}

    def losses(task: Task) -> list[Callable[[], torch.Tensor]]:
        batches = list(task.batches("train", batch_size=12))[part]
        return [lambda b=b: cross_entropy(model(b[0].to(model.inner.weight)), b[1]) for b in batches]

    draw = Probes(0)
    kinds: dict[str, Callable[[int, int], Statistic]] = {
        "gradient": lambda m, n: GradientSketch(m, n, size=6, generator=draw),
        "range": lambda m, n: RangeSketch(m, n, size=6, probes=draw),
        "input": lambda m, n: InputSketch(n, size=6, probes=draw),
        "moment": lambda m, n: InputMoment(n, weighted=True),
    }
    for kind, make in kinds.items():
        statistics = {name: make(*layer.weight.shape) for name, layer in layers.items()}
        collect_statistics(layers, losses(stream.tasks[0]), statistics)
        if distributed:
            all_reduce(statistics)
        for name, statistic in statistics.items():
            for index, total in enumerate(statistic.sums()):
                found[f"{kind} {name} {index}"] = total.double()
    model.double()
    passes = Passes(distributed=distributed)
    for exact in (0, 2048):
        directions.EXACT = exact
        for source in ("sensitivity", "gradient"):
            memory = SubspaceMemory.empty({"inner": 24, "outer": 16})
            for task in stream.tasks[:2]:
                read = partial(losses, task)
                memory = grow_memory(
                    memory, layers, read, source=source, energy=0.9, rank=3, passes=replace(passes, size=6)
                )
                starts = leading_directions(layers, read, 2, memory, passes=replace(passes, seed=1))
            for name in layers:
                basis, start = memory[name].basis.double(), starts[name]
                found[f"{exact} {source} {name}"] = basis @ basis.T
                found[f"{exact} {source} {name} start"] = (start.left * start.sigma) @ start.right.T
    directions.EXACT = 2048
    return found


def grow_sharded(part: slice, *, distributed: bool) -> dict[str, torch.Tensor]:
    """What a float64 model protects, and its starts: sharded by FSDP2 where ``distributed``."""
    model = Attention().double().requires_grad_(False)
    if distributed:
        fully_shard(model.query)
        fully_shard(model)
        assert isinstance(model.out.weight, DTensor)
    layers = layers_of(model)
    inputs = torch.randn(4, 3, 5, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[part]
    passes = Passes(distributed=distributed, shared_inputs=True)

    def losses() -> list[Callable[[], torch.Tensor]]:
        return [partial(model, x) for x in inputs]

    memory = grow_memory_from_weights(SubspaceMemory.empty(layers), layers, energy=0.4, rank=2)
    memory = grow_memory(memory, layers, losses, energy=0.8, rank=2, passes=passes)
    found = {f"sharded {name}": s.basis.double() @ s.basis.double().T for name, s in memory.items()}
    for name, start in leading_directions(layers, losses, 2, memory, passes=passes).items():
        found[f"sharded {name} start"] = (start.left * start.sigma) @ start.right.T
    return found


def on_rank(rank: int, folder: Path) -> None:
    """What one of two ranks finds with its half of the data, in files."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    part = slice(rank, None, 2)
    torch.save(grow(part, distributed=True) | grow_sharded(part, distributed=True), folder / f"{rank}.pt")
    same, other = (GradientSketch(9, 8, size=2, generator=Probes(seed)) for seed in (0, rank))
    try:
        all_reduce({"same": same, "other": other})
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


@needs_sharding
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    start_ranks(on_rank, (tmp_path,), 2)
    expected = grow(slice(None), distributed=False) | grow_sharded(slice(None), distributed=False)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(expected) == 2 * (4 + 2 + 2 + 1) + 16 + 10
    for name, matrix in expected.items():
        assert torch.equal(first[name], second[name])
        # Float32 sums in another order; what is made of float64 sums is kept as float32 bases.
        assert float((first[name] - matrix).norm()) < 1e-6 * float(matrix.norm()), name
    for rank in range(2):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert message == "ranks drew different test matrices for other: give every rank the same seed"


def test_one_rank_keeps_its_sums(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        sketch = GradientSketch(9, 8, size=3, generator=Probes(0))
        sketch.add(torch.ones(2, 8), torch.ones(2, 9))
        before = [total.clone() for total in sketch.sums()]
        all_reduce({"layer": sketch})
        all_reduce({})
        assert all(map(torch.equal, before, sketch.sums()))
    finally:
        dist.destroy_process_group()


def test_the_captured_share_is_one_where_there_is_no_energy() -> None:
    assert Directions(torch.zeros(4, 2), 0.0).captured == 1.0
    assert Directions(torch.eye(4)[:, :2].double(), 4.0).captured == pytest.approx(0.5, abs=1e-12)  # float64
