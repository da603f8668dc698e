"""Every baseline's defining property, and properties of all methods: they run, resume and answer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ToyModel, frozen_model, toy_stream

from manifold_cl import METHODS, ContinualRunner, EBLoRALinear, adapters_of
from manifold_cl.adapters import LoRALinear, read_adapters
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.gpm import ProjectedAdamW, reach
from manifold_cl.continual.methods.joint import Mixture
from manifold_cl.continual.methods.svd_eq import flatten_spectrum
from manifold_cl.files import read_tensors
from manifold_cl.geometry import ProtectedSubspace

LOW_RANK = {"rank": 4, "alpha": 8.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "balanced": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "statistic_examples": 96},
    "best": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistics_during": 0.25},
    "e2lora": {**LOW_RANK, "lr": 0.1, "budget": 10, "statistic_examples": 96},
    "ella": {**LOW_RANK, "lr": 0.03, "strength": 0.01},
    "ewc_lora": {**LOW_RANK, "lr": 0.03, "strength": 0.01, "statistic_examples": 32},
    "factorial": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "update_norm": 1.0, "statistic_examples": 96},
    "gpm": {"lr": 0.02, "statistic_examples": 96, "energy": 0.9},
    "inflora": {**LOW_RANK, "lr": 0.1, "energy": 0.8, "last_energy": 0.9, "statistic_examples": 96},
    "joint": {**LOW_RANK, "lr": 0.03},
    "keeplora": {**LOW_RANK, "lr": 0.1, "energy": 0.9, "from_weights": 0.5, "statistic_examples": 96},
    "lora_muon": {**LOW_RANK, "lr": 0.1},
    "lora_muon_ogd": {**LOW_RANK, "lr": 0.1, "energy": 0.9, "statistic_examples": 96},
    "olora": {**LOW_RANK, "lr": 0.03, "orthogonality": 0.5},
    "osft_lora": {**LOW_RANK, "lr": 0.03},
    "restricted": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistic_examples": 96},
    "sequential": {**LOW_RANK, "lr": 0.03},
    "slao": {**LOW_RANK, "lr": 0.03},
    "splitlora": {**LOW_RANK, "lr": 0.1, "trade_off": 2.0, "statistic_examples": 96},
    "stella_merge": {**LOW_RANK, "lr": 0.03, "initial_scale": 0.1},
    "svd_eq": {**LOW_RANK, "lr": 0.03},
}
methods = pytest.mark.parametrize("name", sorted(OPTIONS))


def run_of(folder: Path, name: str, *, stop_after: int | None = None, **options: Any) -> ContinualRunner:
    class StopHereError(Exception):
        pass

    def watch(progress: Any) -> None:
        if stop_after is not None and progress.index == stop_after and progress.phase == "train" and progress.step == 2:
            raise StopHereError

    runner = ContinualRunner(
        toy_stream(), make_method(name, **{**OPTIONS[name], **options}), folder, training=Training(epochs=3),
        on_progress=watch,
    )  # fmt: skip
    if stop_after is not None:
        with pytest.raises(StopHereError):
            runner.run()
    return runner


def stage(index: int = 0) -> Stage:
    stream = toy_stream()
    return Stage(stream.tasks[index], index, ("inner", "outer"), 0, 16, stream.tasks)


def trained(name: str, tasks: int = 2, **options: Any) -> tuple[Any, ToyModel]:
    """A method in the middle of its last task: adapters trained, nothing folded in."""
    method, model = make_method(name, **{**OPTIONS[name], **options}), frozen_model()
    for index in range(tasks):
        at = stage(index)
        method.begin_task(model, at)
        optimizer = method.make_optimizer(model)
        for batch in at.task.batches("train", batch_size=16, generator=at.generator("order 0")):
            optimizer.zero_grad()
            method.loss(model, at.task, batch).backward()
            optimizer.step()
        method.finish_task(model, at)
        if index < tasks - 1:
            method.end_task(model, at)
    return method, model


def test_the_list_here_is_the_registry() -> None:
    assert set(OPTIONS) | {"eblora", "sequential_merge", "zero_shot"} == set(METHODS)


@methods
def test_every_method_learns_something(name: str, tmp_path: Path) -> None:
    record = run_of(tmp_path, name).run()
    assert record.status == "complete"
    before = sum(record.zero_shot["accuracy"]) / 3
    assert record.metrics["mft"] > before + 5  # 25 % by chance; every method passes 40
    assert all(task_losses or name == "joint" for task_losses in record.losses)


@methods
def test_every_method_resumes_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    straight = run_of(tmp_path / "straight", name).run()
    last = 0 if name == "joint" else 2  # joint trains at its first stage only
    run_of(tmp_path / "stopped", name, stop_after=last)
    resumed = run_of(tmp_path / "stopped", name).run(resume=True)
    assert resumed.losses == straight.losses
    assert resumed.accuracy == straight.accuracy
    again = run_of(tmp_path / "stopped", name)
    assert again.run(resume=True).metrics == straight.metrics  # a complete run is read, not repeated


@pytest.mark.parametrize("name", ["best", "gpm", "inflora", "keeplora", "lora_muon_ogd", "restricted"])
def test_a_memory_on_disk_says_which_task_was_last(name: str, tmp_path: Path) -> None:
    method, model = trained(name, tasks=1)
    method.end_task(model, stage())
    method.save_state(tmp_path, stage())
    assert read_tensors(tmp_path / "memory.safetensors")[1]["task"] == "first"


def test_joint_sees_every_task_once_and_then_rests(tmp_path: Path) -> None:
    record = run_of(tmp_path, "joint").run()
    steps = 3 * sum(-(-task.size("train") // 16) for task in toy_stream().tasks)
    assert [len(losses) for losses in record.losses] == [steps, 0, 0]
    rows = record.accuracy["accuracy"]
    assert rows[0] == rows[1] == rows[2]
    assert not (tmp_path / "tasks" / "02-second").exists()


def test_a_continued_adapter_is_one_adapter_that_stays_in_place(tmp_path: Path) -> None:
    _, model = trained("sequential", tasks=3)
    # The twin: the adapters of the first task trained on, nothing merged in between, a fresh AdamW a task.
    plain, twin = make_method("sequential_merge", **OPTIONS["sequential"]), frozen_model()
    plain.begin_task(twin, stage())
    for index in range(3):
        at, optimizer = stage(index), plain.make_optimizer(twin)
        for batch in at.task.batches("train", batch_size=16, generator=at.generator("order 0")):
            optimizer.zero_grad()
            plain.loss(twin, at.task, batch).backward()
            optimizer.step()
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)  # float32, 18 steps apart in rounding
    for (name, ours), (_, theirs) in zip(adapters_of(model).items(), adapters_of(twin).items(), strict=True):
        torch.testing.assert_close(ours.left, theirs.left, rtol=1e-3, atol=1e-5, msg=name)  # the same rounding


def test_the_updates_of_a_continued_adapter_add_up_to_its_rank(tmp_path: Path) -> None:
    run_of(tmp_path, "sequential").run()
    updates = [read_adapters(folder) for folder in sorted((tmp_path / "tasks").iterdir())]
    assert [u["inner"].rank for u in updates] == [4, 8, 8]  # what each task adds: the old factors are subtracted
    total = sum(u["inner"].delta_weight().double() for u in updates)
    sigma = torch.linalg.svdvals(total)
    assert sigma[4] < 1e-5 * sigma[0] < sigma[3]


def test_a_mixture_hands_out_every_batch_of_every_task() -> None:
    tasks = toy_stream().tasks
    mixture = Mixture(tasks)
    assert mixture.size("train") == sum(task.size("train") for task in tasks)
    batches = list(mixture.batches("train", batch_size=16, generator=torch.Generator().manual_seed(0)))
    assert [sum(task is own for own, _ in batches) for task in tasks] == [6, 6, 6]
    assert [own.name for own, _ in batches] != sorted(own.name for own, _ in batches)  # shuffled across tasks
    model = frozen_model()
    own, batch = batches[0]
    assert torch.equal(mixture.loss(model, batches[0]), own.loss(model, batch))
    assert mixture.scores(model)["mean"] == pytest.approx(
        sum(task.scores(model)["accuracy"] for task in tasks) / 3, abs=1e-9  # the same sum
    )  # fmt: skip


@pytest.mark.parametrize("together", [1, 2])
def test_joint_schedules_the_steps_that_it_takes(together: int, tmp_path: Path) -> None:
    steps_seen: set[tuple[int, int]] = set()
    runner = ContinualRunner(
        toy_stream(examples=90), make_method("joint", **OPTIONS["joint"]), tmp_path,
        training=Training(batch_size=16, accumulation=together),
        on_progress=lambda at: steps_seen.add((at.step, at.steps)) if at.phase == "train" and at.step else None,
    )  # fmt: skip
    record = runner.run()
    steps = 18 // together  # six batches a task, the last one of ten; 270 examples in one heap would be 17
    assert len(record.losses[0]) == steps
    assert steps_seen == {(step + 1, steps) for step in range(steps)}


def test_joint_refuses_what_changes_from_task_to_task(tmp_path: Path) -> None:
    for training, message in (
        (Training(epochs=(1, 2, 1)), r"joint learns all tasks at once .* epochs has 1, 2, 1: give one number"),
        (Training(rates=(1.0, 0.5, 0.5)), r"joint learns all tasks at once .* rates has 1\.0, 0\.5, 0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ContinualRunner(toy_stream(), make_method("joint"), tmp_path, training=training)
    equal = Training(epochs=(2, 2, 2), rates=(0.5, 0.5, 0.5))
    ContinualRunner(toy_stream(), make_method("joint"), tmp_path, training=equal)


def test_olora_penalises_what_two_input_factors_share() -> None:
    method, model = make_method("olora", **OPTIONS["olora"]), frozen_model()
    method.begin_task(model, stage())
    inner = adapters_of(model)["inner"]
    earlier = torch.zeros(24, 2)
    earlier[0, 0], earlier[1, 1] = 2.0, -1.0
    method.earlier = {"inner": [earlier]}
    with torch.no_grad():
        inner.right.zero_()
        inner.right[0, 0], inner.right[1, 0], inner.right[5, 1] = 3.0, 4.0, 7.0
    # |3 · 2| + |4 · (−1)|: entries of A_t A_iᵀ, by hand; the third entry meets nothing.
    assert float(method.penalty(model).detach()) == 10.0
    task = stage().task
    batch = next(task.batches("train", batch_size=16))
    assert float((method.loss(model, task, batch) - task.loss(model, batch)).detach()) == pytest.approx(
        0.5 * 10.0, abs=1e-5
    )  # float32
    method.earlier = {}
    assert torch.equal(method.loss(model, task, batch), task.loss(model, batch))


def test_olora_keeps_input_factors_apart_better_than_plain_lora() -> None:
    def overlap(weight: float) -> float:
        method, model = trained("olora", orthogonality=weight)
        return float(method.penalty(model).detach())

    assert overlap(0.5) < 0.5 * overlap(0.0)


@pytest.mark.parametrize("name", ["inflora", "keeplora"])
def test_updates_stay_in_the_span_of_the_frozen_input_factor(name: str) -> None:
    method, model = trained(name)
    for layer, adapter in adapters_of(model).items():
        assert isinstance(adapter, LoRALinear)
        assert not adapter.right.requires_grad
        update = adapter.factors().delta_weight()
        basis = torch.linalg.qr(adapter.right.detach())[0]
        outside = update - (update @ basis) @ basis.mT
        assert float(outside.norm()) < 1e-6 * float(update.norm())  # float32
        memory = method.memory[layer]
        assert memory.k > 0
        assert reach(update, memory) < 1e-6  # off what the first task used
        assert float(update.norm()) > 0


def test_lora_muon_ogd_stays_off_what_the_first_task_used() -> None:
    method, model = trained("lora_muon_ogd")
    for layer, adapter in adapters_of(model).items():
        assert adapter.right.requires_grad
        update, memory = adapter.factors().delta_weight(), method.memory[layer]
        assert memory.k > 0
        assert reach(update, memory) < 1e-6  # float32
        assert float(update.norm()) > 0


def test_inflora_scales_its_factor_and_raises_its_threshold() -> None:
    method, model = trained("inflora", tasks=1)
    right = adapters_of(model)["inner"].right.detach()
    torch.testing.assert_close(right.mT @ right, torch.eye(4) / 3, rtol=0, atol=1e-6)  # float32
    assert [method.threshold(stage(i)) for i in range(3)] == pytest.approx(
        [0.8, 0.8 + 0.1 / 3, 0.8 + 0.2 / 3], abs=1e-12
    )


def test_keeplora_protects_pretrained_weights_and_starts_orthonormal() -> None:
    method, model = trained("keeplora", tasks=1)
    assert all(subspace.k > 0 for subspace in method.memory.values())  # before any task has ended
    right = adapters_of(model)["inner"].right.detach()
    torch.testing.assert_close(right.mT @ right, torch.eye(4), rtol=0, atol=1e-6)  # float32


def test_gpm_moves_weights_off_what_earlier_tasks_saw_under_adam_too() -> None:
    method, model = make_method("gpm", **OPTIONS["gpm"]), frozen_model()
    start = {name: layer.weight.clone() for name, layer in model.named_modules() if name in ("inner", "outer")}
    for index in range(2):
        at = stage(index)
        before = {name: model.get_submodule(name).weight.detach().clone() for name in start}
        method.begin_task(model, at)
        optimizer = method.make_optimizer(model)
        for batch in at.task.batches("train", batch_size=16):
            optimizer.zero_grad()
            at.task.loss(model, batch).backward()
            optimizer.step()
        for name, old in before.items():
            update = model.get_submodule(name).weight.detach() - old
            assert float(update.norm()) > 0
            if index:
                assert method.memory[name].k > 0
                assert reach(update, method.memory[name]) < 1e-5  # float32 sums over six steps
        method.end_task(model, at)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.head.weight, frozen_model().head.weight)


def test_projecting_gradients_alone_would_not_keep_gpm_off() -> None:
    draw = torch.Generator().manual_seed(0)
    subspace = ProtectedSubspace(torch.linalg.qr(torch.randn(12, 3, generator=draw))[0])
    gradient = torch.randn(8, 12, generator=draw)

    def moved(optimizer_of: Any, gradient: Tensor) -> float:
        p = torch.nn.Parameter(torch.zeros(8, 12))
        optimizer = optimizer_of(p)
        p.grad = gradient.clone()
        optimizer.step()
        return reach(p.detach(), subspace)

    projected = subspace.project_out(gradient.mT).mT
    assert moved(lambda p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.0), projected) > 0.05
    ours = moved(lambda p: ProjectedAdamW([p], {p: subspace}, lr=1e-2, weight_decay=0.0), gradient)
    assert ours < 1e-6  # float32


def test_flattening_keeps_directions_and_norm_and_levels_the_spectrum() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 3, generator=draw), torch.randn(7, 3, generator=draw) * torch.tensor([5.0, 1.0, 0.1])
    flat_left, flat_right = flatten_spectrum(left, right)
    before, after = torch.linalg.svd(left @ right.mT), torch.linalg.svd(flat_left @ flat_right.mT)
    level = float(before.S[:3].square().mean().sqrt())
    torch.testing.assert_close(after.S[:3], torch.full((3,), level), rtol=1e-5, atol=0)  # float32
    assert float(after.S[3:].max()) < 1e-5 * level
    # The update is level · U Vᵀ with the old singular directions.
    expected = level * before.U[:, :3] @ before.Vh[:3]
    torch.testing.assert_close(flat_left @ flat_right.mT, expected, rtol=0, atol=1e-4)
    assert float(flatten_spectrum(torch.zeros(9, 3), right)[0].abs().max()) == 0


def test_svd_eq_folds_in_what_it_wrote(tmp_path: Path) -> None:
    run_of(tmp_path, "svd_eq").run()
    from manifold_cl.adapters import read_adapters

    for folder in sorted((tmp_path / "tasks").iterdir()):
        for factors in read_adapters(folder).values():
            sigma = torch.linalg.svdvals(factors.delta_weight())[:4]
            assert float(sigma.min()) > 0.999 * float(sigma.max())


def test_the_ablations_differ_from_eblora_in_one_ingredient_each() -> None:
    balanced, model = trained("balanced")
    assert balanced.capacity() == {}
    assert not list(balanced.state())
    assert all(adapter.core == "scalar" for adapter in adapters_of(model).values())
    restricted, model = trained("restricted")
    assert all(subspace.k > 0 for subspace in restricted.memory.values())
    for adapter in adapters_of(model).values():
        assert isinstance(adapter, EBLoRALinear)
        assert adapter.core == "full"
        sigma = torch.linalg.svdvals(adapter.factors().delta_weight())[:4]
        assert float(sigma.max()) > 1.2 * float(sigma.min())  # no longer balanced


def test_stella_takes_the_width_that_most_layers_have() -> None:
    method, model = make_method("stella_merge", **OPTIONS["stella_merge"]), frozen_model()
    widths = [layer.in_features for layer in target_linears(model, stage(0).targets).values()]
    method.begin_task(model, stage(0))
    assert method.make_optimizer(model).param_groups[0]["reference_width"] == max(set(widths), key=widths.count)
    given = make_method("stella_merge", **OPTIONS["stella_merge"], hidden=7)
    given.begin_task(model_given := frozen_model(), stage(0))
    assert given.make_optimizer(model_given).param_groups[0]["reference_width"] == 7


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        *((name, {"lr": -1.0}, ValueError, r"lr is a positive number, got -1\.0") for name in OPTIONS),
        *((name, {"rank": 0}, ValueError, "rank must be at least 1, got 0") for name in sorted(set(OPTIONS) - {"gpm"})),
        *((name, {"alpha": 0.0}, ValueError, "alpha is a positive number") for name in sorted(set(OPTIONS) - {"gpm"})),
        *(
            (name, {"energy": 7.0}, ValueError, r"energy is a share in \(0, 1\], got 7\.0")
            for name in ("gpm", "inflora", "keeplora", "lora_muon_ogd", "restricted")
        ),
        *(
            (name, {"statistic_examples": 0}, ValueError, "statistic_examples must be at least 1, got 0")
            for name in ("balanced", "gpm", "inflora", "keeplora", "lora_muon_ogd", "restricted")
        ),
        ("keeplora", {"from_weights": 2.0}, ValueError, r"from_weights is a share in \(0, 1\], got 2\.0"),
        ("restricted", {"from_weights": 1.0}, ValueError, r"from_weights is a share in \[0, 1\), got 1\.0"),
        ("restricted", {"scale_lr": 0.0}, ValueError, "scale_lr is a positive number"),
        ("restricted", {"scale_decay": -0.1}, ValueError, "scale_decay is a finite number from 0 on"),
        ("restricted", {"initial_scale_last": "deep"}, TypeError, "initial_scale_last is a number, got 'deep'"),
        ("inflora", {"last_energy": 0.0}, ValueError, r"last_energy is a share in \(0, 1\], got 0\.0"),
        ("lora_muon", {"momentum": 1.0}, ValueError, r"momentum is a share in \[0, 1\), got 1\.0"),
        ("lora_muon", {"adjust_lr_fn": "none"}, ValueError, "adjust_lr_fn is one of match_rms_adamw, original"),
        ("lora_muon_ogd", {"weight_decay": -0.1}, ValueError, "weight_decay is a finite number from 0 on"),
        ("lora_muon_ogd", {"source": "hessian"}, ValueError, "source is sensitivity, activation, gradient"),
        ("gpm", {"growth": -0.1}, ValueError, "growth is a finite number from 0 on"),
        ("olora", {"orthogonality": float("nan")}, ValueError, "orthogonality is a finite number from 0 on, got nan"),
        ("stella_merge", {"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        ("stella_merge", {"initial_scale": float("inf")}, ValueError, "initial_scale is a finite number, got inf"),
    ],
)
def test_options_that_cannot_be_are_refused_where_they_enter(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    make_method(name, **OPTIONS[name])
    with pytest.raises(error, match=message):
        make_method(name, **{**OPTIONS[name], **options})


@pytest.mark.parametrize("option", ["energy", "source", "policy", "statistics_at", "from_weights"])
def test_balanced_has_no_options_of_a_memory(option: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option of balanced '{option}'"):
        make_method("balanced", **{option: 1})


@pytest.mark.parametrize("core", ["diagonal", "full"])
def test_stella_starts_with_orthonormal_frames_and_an_identity_core(core: str) -> None:
    method, model = make_method("stella_merge", **{**OPTIONS["stella_merge"], "core": core}), frozen_model()
    method.begin_task(model, stage())
    for adapter in adapters_of(model).values():
        sigma = torch.linalg.svdvals(adapter.factors().delta_weight())[:4]
        torch.testing.assert_close(sigma, torch.full((4,), 0.2), rtol=1e-5, atol=0)  # (8 / 4) · 0.1, float32
    with pytest.raises(ValueError, match="core is one of diagonal, full, got 'scalar'"):
        make_method("stella_merge", core="scalar")


def test_no_method_touches_global_state(tmp_path: Path) -> None:
    script = Path(__file__).with_name("every_method.py")
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=True)
    changed = json.loads(ended.stdout)
    assert changed.keys() >= {*OPTIONS, "eblora", "sequential_merge", "zero_shot"}
    assert {name: states for name, states in changed.items() if states} == {}
