"""Defining properties of the newer baselines, each against a dense or slow form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_runs import OPTIONS, stage, trained
from torch import Tensor, nn
from toy import frozen_model

from manifold_cl import adapters_of
from manifold_cl.adapters import read_adapters
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import make_method
from manifold_cl.continual.methods.e2lora import kept_counts, principal_parts
from manifold_cl.continual.methods.ewc_lora import fisher_diagonals
from manifold_cl.continual.methods.slao import orthonormal
from manifold_cl.continual.methods.splitlora import minor_directions

TARGETS = ("inner", "outer")


def weights(model: Any) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in target_linears(model, TARGETS).items()}


def product(adapter: Any) -> Tensor:
    result: Tensor = adapter.magnitude() * adapter.left @ adapter.right.mT
    return result


@pytest.mark.parametrize("name", ["ella", "ewc_lora"])
def test_the_first_task_of_a_penalty_is_plain_lora(name: str) -> None:
    plain = {key: OPTIONS[name][key] for key in ("rank", "alpha", "lr")}
    _, ours = trained(name, tasks=1)
    other, theirs = make_method("sequential_merge", **plain), frozen_model()
    other.begin_task(theirs, stage())
    optimizer = other.make_optimizer(theirs)
    for batch in stage().task.batches("train", batch_size=16, generator=stage().generator("order 0")):
        optimizer.zero_grad()
        other.loss(theirs, stage().task, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for (_, a), (_, b) in zip(adapters_of(ours).items(), adapters_of(theirs).items(), strict=True):
        assert torch.equal(a.left, b.left)
        assert torch.equal(a.right, b.right)


@pytest.mark.parametrize(("name", "factor"), [("ella", 1.0), ("ewc_lora", 0.5)])
def test_the_penalty_is_that_of_the_dense_update(name: str, factor: float) -> None:
    method, model = trained(name, strength=3.0)
    adapters, importance = adapters_of(model), method.importance
    mean = torch.cat([each.flatten() for each in importance.values()]).mean()
    updates = {layer: product(adapter).detach().requires_grad_() for layer, adapter in adapters.items()}
    dense = factor * 3.0 / mean * sum((importance[layer] * updates[layer].square()).sum() for layer in updates)
    assert isinstance(dense, Tensor)
    penalty = method.penalty(model)
    torch.testing.assert_close(penalty, dense)
    for parameter in model.parameters():
        parameter.grad = None
    penalty.backward()
    dense.backward()  # type: ignore[no-untyped-call]
    for layer, adapter in adapters.items():
        gradient = updates[layer].grad
        assert gradient is not None
        twice = 2 * factor * 3.0 / mean * importance[layer] * updates[layer].detach()
        torch.testing.assert_close(gradient, twice)
        torch.testing.assert_close(adapter.left.grad, adapter.magnitude() * gradient @ adapter.right.detach())
        torch.testing.assert_close(adapter.right.grad, adapter.magnitude() * gradient.mT @ adapter.left.detach())


def test_ella_penalises_only_entries_that_earlier_updates_changed_whatever_their_sign() -> None:
    method, model = trained("ella")
    inner = adapters_of(model)["inner"]
    method.drift = {"inner": torch.zeros_like(product(inner))}
    method.drift["inner"][0, :] = torch.tensor(-2.0)
    method.importance = {"inner": method.drift["inner"].square()}
    before = method.penalty(model).item()
    with torch.no_grad():
        inner.left[1:].mul_(5.0)  # rows that no update changed
    assert method.penalty(model).item() == pytest.approx(before)
    with torch.no_grad():
        inner.left[0].mul_(2.0)
    assert method.penalty(model).item() == pytest.approx(4 * before)


def test_ellas_drift_is_the_change_of_the_weights() -> None:
    method, model = trained("ella", tasks=3)
    method.end_task(model, stage(2))
    start, now = weights(frozen_model()), weights(model)
    for layer, drift in method.drift.items():
        torch.testing.assert_close(drift, now[layer] - start[layer], rtol=1e-4, atol=1e-5)  # float32 sums
        assert torch.equal(method.importance[layer], drift.square())


def test_a_layer_that_no_example_reaches_is_of_no_importance_to_ewc() -> None:
    model = frozen_model()
    layers = {**target_linears(model, TARGETS), "unused": nn.Linear(3, 2).requires_grad_(False)}
    found = fisher_diagonals(model, layers, stage(), 4)
    assert not found["unused"].any()
    assert found["inner"].any()


def test_ewcs_importance_is_the_mean_squared_gradient_of_single_examples() -> None:
    model, at = frozen_model(), stage()
    layers = target_linears(model, TARGETS)
    found = fisher_diagonals(model, layers, at, 12)
    sums = {layer: torch.zeros_like(module.weight) for layer, module in layers.items()}
    draw = torch.Generator().manual_seed(at.derive_seed("importance"))
    batches = list(at.task.batches("train", batch_size=1, generator=draw))[:12]
    for batch in batches:
        for module in layers.values():
            module.weight.requires_grad_(True)
        gradients = torch.autograd.grad(at.task.loss(model, batch), [module.weight for module in layers.values()])
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.square() / len(batches)
    for layer, total in sums.items():
        torch.testing.assert_close(found[layer], total)
        assert (found[layer] >= 0).all()


def test_ewcs_importance_adds_up_over_tasks_and_leaves_the_model_frozen() -> None:
    method, model = make_method("ewc_lora", **OPTIONS["ewc_lora"]), frozen_model()
    parts = []
    for index in range(2):
        method.begin_task(model, stage(index))
        method.end_task(model, stage(index))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        parts.append(fisher_diagonals(model, target_linears(model, TARGETS), stage(index), 32))
    for layer, total in method.importance.items():
        torch.testing.assert_close(total, parts[0][layer] + parts[1][layer])


def test_slaos_tasks_begin_at_the_trained_output_factor_and_an_orthonormal_input_factor() -> None:
    method, model = trained("slao", tasks=2)
    start = weights(frozen_model())
    method.end_task(model, stage(1))
    trained_left, merged = dict(method.trained), dict(method.merged)
    now = weights(model)
    for layer, (left, right) in merged.items():  # the model holds one adapter of rank r
        torch.testing.assert_close(now[layer] - start[layer], 2.0 * left @ right.mT, rtol=1e-4, atol=1e-5)
    method.begin_task(model, stage(2))
    for layer, adapter in adapters_of(model).items():
        basis, right = adapter.right.detach(), merged[layer][1]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(basis @ (basis.mT @ right), right, rtol=1e-4, atol=1e-5)  # the same columns
        assert torch.equal(adapter.left, trained_left[layer])
        change = adapter.factors().delta_weight() + 2.0 * merged[layer][0] @ right.mT
        torch.testing.assert_close(change, 2.0 * trained_left[layer] @ basis.mT, rtol=1e-4, atol=1e-5)


def test_slaos_output_factor_is_a_running_mean_with_the_published_weights() -> None:
    method, model = make_method("slao", **OPTIONS["slao"]), frozen_model()
    merged: dict[str, Tensor] = {}
    for index in range(3):
        method.begin_task(model, stage(index))
        with torch.no_grad():
            for adapter in adapters_of(model).values():
                adapter.left.add_(torch.randn(adapter.left.shape, generator=torch.Generator().manual_seed(index)))
        new = {layer: adapter.left.detach().clone() for layer, adapter in adapters_of(model).items()}
        merged = {layer: merged.get(layer, each) + (each - merged.get(layer, each)) / (index + 1) ** 0.5 for layer, each in new.items()}  # fmt: skip  # noqa: E501
        method.finish_task(model, stage(index))
        method.end_task(model, stage(index))
        for layer, left in merged.items():
            torch.testing.assert_close(method.merged[layer][0], left)


def test_an_orthonormal_basis_keeps_the_directions_of_the_columns() -> None:
    right = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    triangle = orthonormal(right).mT @ right
    assert (triangle.diagonal() > 0).all()
    torch.testing.assert_close(triangle, triangle.triu(), rtol=0, atol=1e-5)


def test_keeplora_scales_updates_by_depth() -> None:
    method = make_method("keeplora", depth_scale_start=0.2)
    names = ["h.0.q", "h.0.v", "h.1.q", "h.2.q"]
    assert method.depth_factors(names) == pytest.approx({"h.0.q": 0.2, "h.0.v": 0.2, "h.1.q": 0.6, "h.2.q": 1.0})
    assert method.depth_factors(["query"]) == {"query": 1.0}
    assert method.options()["depth_scale_start"] == 0.2
    assert "depth_scale_start" not in make_method("keeplora").options()  # records of earlier versions resume


def test_adapters_scaled_by_depth_are_saved_and_merged_as_they_train(tmp_path: Path) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = frozen_model()
            self.blocks, self.head = nn.ModuleList([whole.inner, whole.outer]), whole.head

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.tanh(self.blocks[1](torch.tanh(self.blocks[0](x)))))
            return logits

    targets, updates = ("blocks.0", "blocks.1"), {}
    at = replace(stage(), targets=targets)
    for start in (1.0, 0.2):
        method, model = make_method("keeplora", **{**OPTIONS["keeplora"], "depth_scale_start": start}), Blocks()
        method.begin_task(model, at)
        for adapter in adapters_of(model).values():
            torch.nn.init.ones_(adapter.left)
        method.save_update(model, tmp_path / str(start), at)
        updates[start] = read_adapters(tmp_path / str(start))
    for name, factor in zip(targets, (0.2, 1.0), strict=True):
        before, after = (updates[start][name].delta_weight() for start in (1.0, 0.2))
        torch.testing.assert_close(after, factor * before)


def test_osft_leaves_the_leading_directions_of_the_weights_alone_on_both_sides() -> None:
    method, model = make_method("osft_lora", **OPTIONS["osft_lora"]), frozen_model()
    for index in range(3):
        before = weights(model)
        method.begin_task(model, stage(index))
        optimizer = method.make_optimizer(model)
        for batch in stage(index).task.batches("train", batch_size=16, generator=stage(index).generator("order 0")):
            optimizer.zero_grad()
            method.loss(model, stage(index).task, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        method.end_task(model, stage(index))
        for layer, weight in before.items():
            u, _, vt = torch.linalg.svd(weight, full_matrices=False)
            k = min(int(min(weight.shape) * index / 3), min(weight.shape) - 4)
            change, size = weights(model)[layer] - weight, float(torch.linalg.matrix_norm(weight))
            assert float(change.abs().max()) > 1e-3
            assert float((change @ vt[:k].mT).abs().max() if k else 0.0) <= 1e-5 * size
            assert float((u[:, :k].mT @ change).abs().max() if k else 0.0) <= 1e-5 * size


def test_splitloras_factor_is_frozen_among_the_minor_directions_and_shrinks() -> None:
    method, model = trained("splitlora", tasks=2)
    plain, other = make_method("sequential_merge", rank=4, alpha=8.0), frozen_model()
    plain.begin_task(other, stage(1))
    for layer, adapter in adapters_of(model).items():
        basis = method.minor[layer]
        assert not adapter.right.requires_grad
        torch.testing.assert_close(basis @ (basis.mT @ adapter.right), adapter.right.detach(), rtol=1e-4, atol=1e-6)
        kaiming = torch.linalg.vector_norm(adapters_of(other)[layer].right)
        torch.testing.assert_close(torch.linalg.vector_norm(adapter.right), kaiming / 2)


def test_the_closed_rule_minimises_the_published_objective() -> None:
    draw = torch.Generator().manual_seed(2)
    for alpha, tasks in ((20.0, 3), (2.0, 4), (1.0, 7)):
        root = torch.randn(12, 12, generator=draw) * torch.logspace(0, 2, 12)
        moment = root.mT @ root
        values = torch.linalg.eigvalsh(moment.double())  # ascending: the k smallest come first
        objective = [tasks * float(values[:k].sum() / values.sum()) - alpha * k / 12 for k in range(1, 13)]
        assert minor_directions(moment, alpha / tasks).shape[1] == 1 + int(torch.tensor(objective).argmin())


def test_fewer_directions_are_minor_as_tasks_come() -> None:
    moment = torch.diag(torch.logspace(-3, 0, 16))
    counts = [minor_directions(moment, 4.0 / tasks).shape[1] for tasks in range(1, 9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    flat = torch.eye(16)
    assert (minor_directions(flat, 1.5).shape[1], minor_directions(flat, 0.5).shape[1]) == (16, 1)


def test_e2loras_tasks_have_orthogonal_outputs_within_the_budget() -> None:
    method, model = make_method("e2lora", **OPTIONS["e2lora"]), frozen_model()
    for index in range(3):
        before = weights(model)
        released = {layer: list(parts) for layer, parts in method.components.items()}
        method.begin_task(model, stage(index))
        for layer, adapter in adapters_of(model).items():
            kept = method.components.get(layer, [])
            taken = sum(parts.left.shape[1] for parts in kept)
            assert taken == 10 * index // (index + 1)
            assert taken + adapter.left.shape[1] == 10
            assert adapter.left.requires_grad is (index == 0)
            lost = sum((p.left @ p.right.mT for p in released.get(layer, [])), torch.zeros_like(before[layer]))
            lost = lost - sum((p.left @ p.right.mT for p in kept), torch.zeros_like(lost))
            torch.testing.assert_close(adapter.factors().delta_weight(), -2.0 * lost, rtol=1e-3, atol=1e-5)
        optimizer = method.make_optimizer(model)
        for batch in stage(index).task.batches("train", batch_size=16, generator=stage(index).generator("order 0")):
            optimizer.zero_grad()
            method.loss(model, stage(index).task, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        method.end_task(model, stage(index))
        for layer, tasks in method.components.items():
            columns = torch.cat([parts.left for parts in tasks], dim=1)
            torch.testing.assert_close(columns.mT @ columns, torch.eye(10), rtol=0, atol=1e-4)
            total = sum((p.left @ p.right.mT for p in tasks), torch.zeros_like(before[layer]))
            change = weights(model)[layer] - weights(frozen_model())[layer]
            torch.testing.assert_close(change, 2.0 * total, rtol=1e-3, atol=1e-5)  # the parts are all there is


def test_parts_are_ordered_by_the_variance_of_outputs_and_sum_to_the_update() -> None:
    draw = torch.Generator().manual_seed(6)
    left, right, x = (torch.randn(*shape, generator=draw) for shape in ((9, 4), (7, 4), (50, 7)))
    parts = principal_parts(left, right, x.mT @ x)
    torch.testing.assert_close(parts.left @ parts.right.mT, left @ right.mT)
    torch.testing.assert_close(parts.left.mT @ parts.left, torch.eye(4), rtol=0, atol=1e-5)
    outputs = x @ right @ left.mT
    torch.testing.assert_close(parts.variance.float(), torch.linalg.svdvals(outputs)[:4].square())


@pytest.mark.slow
def test_the_kept_counts_are_those_of_the_largest_threshold_that_fits() -> None:
    draw = torch.Generator().manual_seed(7)
    variances = [torch.rand(6, generator=draw, dtype=torch.float64).sort(descending=True).values for _ in range(3)]
    shares = [variance / variance.sum() for variance in variances]
    sums = [share.cumsum(0).tolist() for share in shares]

    def counts(step: int) -> list[int]:
        return [min(6, 1 + sum(total <= 1 - step / 1e5 for total in each)) for each in sums]

    for limit in range(3, 19):
        step = next(
            step for step in range(1, 100_001) if sum(counts(step)) <= limit
        )  # fmt: skip
        least = counts(step)
        found = kept_counts(variances, limit)
        assert sum(found) == limit
        assert all(a >= b for a, b in zip(found, least, strict=True))
        added = [float(s[k]) for s, a, b in zip(shares, found, least, strict=True) for k in range(b, a)]
        left = [float(s[a]) for s, a in zip(shares, found, strict=True) if a < 6]
        assert not added or not left or min(added) >= max(left)


def test_a_task_without_energy_keeps_one_part() -> None:
    assert kept_counts([torch.zeros(6), torch.tensor([3.0, 2.0, 1.0])], 3) == [1, 2]


def test_e2lora_needs_a_direction_per_task() -> None:
    method, model = make_method("e2lora", rank=4, budget=1), frozen_model()
    method.begin_task(model, stage(0))
    method.end_task(model, stage(0))
    with pytest.raises(ValueError, match="budget is 1, too few directions for 2 tasks"):
        method.begin_task(model, stage(1))
