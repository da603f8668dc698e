"""Every baseline's defining property."""

from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_runs import OPTIONS, run_of, stage, trained
from torch import Tensor
from toy import frozen_model, toy_stream

from manifold_cl import ContinualRunner, EBLoRALinear, adapters_of
from manifold_cl.adapters import LoRALinear, read_adapters
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.methods.gpm import ProjectedAdamW, reach
from manifold_cl.continual.methods.joint import Mixture
from manifold_cl.continual.methods.svd_eq import flatten_spectrum
from manifold_cl.geometry import ProtectedSubspace


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


def test_gpm_refuses_weights_in_half_precision_before_it_trains_them() -> None:
    with pytest.raises(TypeError, match=r"the weight of inner is torch.bfloat16, and gpm trains .*float32"):
        make_method("gpm").validate_model(frozen_model().bfloat16(), toy_stream().targets)


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


@pytest.mark.parametrize("core", ["diagonal", "full"])
def test_stella_starts_with_orthonormal_frames_and_an_identity_core(core: str) -> None:
    method, model = make_method("stella_merge", **{**OPTIONS["stella_merge"], "core": core}), frozen_model()
    method.begin_task(model, stage())
    for adapter in adapters_of(model).values():
        sigma = torch.linalg.svdvals(adapter.factors().delta_weight())[:4]
        torch.testing.assert_close(sigma, torch.full((4,), 0.2), rtol=1e-5, atol=0)  # (8 / 4) · 0.1, float32
    with pytest.raises(ValueError, match="core is one of diagonal, full, got 'scalar'"):
        make_method("stella_merge", core="scalar")
