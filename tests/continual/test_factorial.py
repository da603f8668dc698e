"""The factorial method: its corners are the named methods, each factor varies alone, the norm is imposed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import frozen_model, toy_stream

from manifold_cl import ContinualRunner, RunRecord, adapters_of
from manifold_cl.adapters import read_adapters
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.factorial import impose_norm

OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8.0, "lr": 0.03, "scale_lr": 0.1, "statistic_examples": 96}


def run(folder: Path, name: str, **options: Any) -> RunRecord:
    method = make_method(name, **OPTIONS, **options)
    return ContinualRunner(toy_stream(), method, folder, training=Training(epochs=2)).run()


def updates(folder: Path) -> list[torch.Tensor]:
    return [
        update.delta_weight()
        for task in sorted((folder / "tasks").iterdir())
        for _, update in sorted(read_adapters(task).items())
    ]


@pytest.mark.parametrize(
    ("name", "core", "restriction"),
    [("balanced", "scalar", "none"), ("eblora", "scalar", "input"), ("restricted", "full", "input")],
)
def test_corners_are_the_named_methods_bit_for_bit(name: str, core: str, restriction: str, tmp_path: Path) -> None:
    own = {} if name == "balanced" else {"energy": 0.9}
    named = run(tmp_path / name, name, **own)
    cell = run(tmp_path / "cell", "factorial", core=core, restriction=restriction, start="task", energy=0.9)
    assert (cell.losses, cell.accuracy, cell.capacity) == (named.losses, named.accuracy, named.capacity)
    assert all(map(torch.equal, updates(tmp_path / "cell"), updates(tmp_path / name)))
    memories = [sorted(p.name for p in (tmp_path / each).glob("tasks/*/memory*")) for each in ("cell", name)]
    assert memories[0] == memories[1] != (["x"] if restriction == "none" else [])


@pytest.mark.parametrize("core", ["scalar", "diagonal", "full"])
@pytest.mark.parametrize("restriction", ["none", "input"])
@pytest.mark.parametrize("start", ["random", "task"])
def test_every_update_has_the_imposed_norm(core: str, restriction: str, start: str, tmp_path: Path) -> None:
    factors = {"core": core, "restriction": restriction, "start": start}
    record = run(tmp_path, "factorial", update_norm=0.7, energy=0.9, **factors)
    found = updates(tmp_path)
    assert len(found) == 6  # two layers, three tasks
    for update in found:
        assert float(torch.linalg.matrix_norm(update)) == pytest.approx(0.7, rel=1e-5)
        sigma = torch.linalg.svdvals(update)[:4]
        assert (float(sigma[0] - sigma[3]) < 1e-5) == (core == "scalar")
    assert len(record.losses[0]) == 12
    assert bool(record.capacity[-1]) == (restriction == "input")


def begun(**options: Any) -> tuple[Any, Any, Stage]:
    stream, model = toy_stream(), frozen_model()
    stage = Stage(stream.tasks[0], 0, ("inner", "outer"), 0, 16, stream.tasks)
    method = make_method("factorial", **OPTIONS, **options)
    method.begin_task(model, stage)
    return method, model, stage


def norms(model: Any) -> list[float]:
    found = adapters_of(model).values()
    return [float(torch.linalg.matrix_norm(adapter.factors().delta_weight())) for adapter in found]


def test_the_norm_rises_over_half_the_steps_and_stays() -> None:
    method, model, stage = begun(core="full", update_norm=2.0)
    seen = []
    for step in (1, 5, 10, 20):
        with method.step_context(model, stage, step, 20):
            seen.append(norms(model)[0])
    assert seen == pytest.approx([0.2, 1.0, 2.0, 2.0], rel=1e-5)


def test_a_scalar_core_keeps_the_sign_of_its_start() -> None:
    method, model, stage = begun(update_norm=2.0)
    for adapter in adapters_of(model).values():
        adapter.scale.data.mul_(-1)  # as a step longer than the core
    with method.step_context(model, stage, 20, 20):
        assert all(float(adapter.scale.detach()) < 0 for adapter in adapters_of(model).values())
        assert norms(model) == pytest.approx([2.0, 2.0], rel=1e-5)


def test_a_free_norm_is_left_alone() -> None:
    method, model, stage = begun()
    before = norms(model)
    with method.step_context(model, stage, 1, 20):
        assert norms(model) == before


def test_starts_differ_in_the_frames_alone() -> None:
    (_, task, _), (_, random, _) = begun(core="diagonal"), begun(core="diagonal", start="random")
    for name, adapter in adapters_of(task).items():
        other = adapters_of(random)[name]
        assert torch.equal(adapter.scale, other.scale)
        assert not torch.allclose(adapter.right, other.right, atol=0.1)


def test_bad_input_is_named() -> None:
    for options, message in (
        ({"core": "banded"}, "factorial: core is one of scalar, diagonal, full, got 'banded'"),
        ({"restriction": "output"}, "restriction is one of none, input, got 'output'"),
        ({"start": "zero"}, "start is one of random, task, got 'zero'"),
        ({"update_norm": 0.0}, "update_norm"),
        ({"update_norm": 1.0, "initial_scale": 0.0}, "update_norm=1.0 needs a core that is not zero"),
    ):
        with pytest.raises(ValueError, match=message):
            make_method("factorial", **options)
    _, model, _ = begun()
    next(iter(adapters_of(model).values())).scale.data.zero_()
    with pytest.raises(FloatingPointError, match="inner: the core has the norm 0"):
        impose_norm(model, 1.0)
