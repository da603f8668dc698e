"""Layers that receive the same input: one statistic, one basis, one tensor in files; never a wrong group."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from analysis.formats.own import read_bases
from manifold_cl import SubspaceMemory
from manifold_cl.continual import grow_memory, make_method
from manifold_cl.continual.subspaces import Directions, Passes, PassReport, measure_importance
from manifold_cl.continual.subspaces.shared_inputs import SharedInputs

N, M = 12, 7
SHARED = Passes(shared_inputs=True)


class Attention(nn.Module):
    """Query, key and value of one input, an output layer, and a layer that is called with a second input."""

    def __init__(self, *, checkpoint: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(N, M, bias=False) for _ in range(3))
        self.out, self.other = nn.Linear(M, N, bias=False), nn.Linear(N, N, bias=False)
        self.checkpoint, self.swap = checkpoint, False
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=draw) / 3)

    def block(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.query(x) @ self.key(x + 0 if self.swap else x).mT, -1) @ self.value(x)
        return self.out(mixed) + self.other(x * 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False) if self.checkpoint else self.block(x)
        return y[:, -2:].square().mean()


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 4, 5, N, generator=torch.Generator().manual_seed(1)))


def losses_of(model: nn.Module) -> Callable[[], list[Callable[[], Tensor]]]:
    return lambda: [lambda x=x: model(x) for x in batches()]  # type: ignore[misc]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def columns_of(importance: Tensor | Directions) -> Tensor:
    return importance if isinstance(importance, Tensor) else importance.columns


def by_hand(model: nn.Module, names: list[str], *, weighted: bool) -> Tensor:
    """The slow twin: gradients of outputs by autograd, summed token by token."""
    moment = torch.zeros(N, N, dtype=torch.float64)
    for x in batches():
        held: list[tuple[Tensor, Tensor]] = []

        def hold(_: nn.Module, i: tuple[Tensor], o: Tensor, held: list[tuple[Tensor, Tensor]] = held) -> None:
            held.append((i[0], o))

        hooks = [dict(model.named_modules())[name].register_forward_hook(hold) for name in names]
        loss = model(x.requires_grad_())
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(loss, [o for _, o in held])
        inputs = held[0][0].detach().reshape(-1, N).double()
        sizes = sum(g.reshape(len(inputs), -1).double().square().sum(1) for g in gradients)
        for token, size in zip(inputs, sizes, strict=True):  # type: ignore[arg-type]
            moment += float(size if weighted else size > 0) * token.outer(token)
    return moment


@pytest.mark.parametrize("source", ["sensitivity", "activation"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_layers_of_one_input_have_one_statistic(source: str, checkpoint: bool) -> None:
    model = Attention(checkpoint=checkpoint)
    found = dict(measure_importance(layers_of(model), losses_of(model), source=source, energy=0.9, passes=SHARED))  # type: ignore[arg-type]
    assert found["query"] is found["key"] is found["value"]
    weighted = source == "sensitivity"
    for name, group in {"query": ["query", "key", "value"], "other": ["other"]}.items():
        expected = by_hand(Attention(), group, weighted=weighted)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    alone = dict(measure_importance(layers_of(model), losses_of(model), source=source, energy=0.9))  # type: ignore[arg-type]
    for name in ("other", "out"):
        assert torch.equal(found[name], alone[name])  # a layer with an input of its own is untouched
    if source == "activation":  # every token has a gradient at some layer of this group
        assert torch.allclose(found["value"], alone["value"])


def test_sketches_are_shared_and_a_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifold_cl.continual.subspaces.directions.EXACT", 4)
    model, options = Attention(), {"source": "sensitivity", "energy": 0.5}
    reports = []
    free = Passes(shared_inputs=True, size=3, on_pass=reports.append)
    found = dict(measure_importance(layers_of(model), losses_of(model), passes=free, **options))  # type: ignore[arg-type]
    passes = len(reports)
    bounded = Passes(shared_inputs=True, size=3, memory_budget=600, on_pass=reports.append)
    again = dict(measure_importance(layers_of(model), losses_of(model), passes=bounded, **options))  # type: ignore[arg-type]
    assert len(reports) - passes > passes
    assert again["query"] is again["key"]
    for name, importance in found.items():
        assert torch.equal(columns_of(importance), columns_of(again[name]))


def test_other_companions_in_a_later_batch_are_an_error() -> None:
    model = Attention()

    def losses() -> list[Callable[[], Tensor]]:
        def second() -> Tensor:
            model.swap = True
            return model(batches()[1])  # type: ignore[no-any-return]

        model.swap = False
        return [lambda: model(batches()[0]), second]

    with pytest.raises(ValueError, match=r"batch 1: \w+ received .*shared_inputs=False"):
        dict(measure_importance(layers_of(model), losses, source="sensitivity", energy=0.9, passes=SHARED))


def test_a_tensor_that_changes_in_between_is_another_input() -> None:
    inputs, x = SharedInputs(), torch.ones(2, 3)
    first = inputs.enter("query", x)
    x.add_(1)
    second = inputs.enter("key", x)
    assert (first.layers, second.layers) == (["query"], ["key"])
    assert inputs.enter("key", x) is not second  # a second call of the same layer


def test_gradients_are_sketched_per_layer() -> None:
    model = Attention()
    options = {"source": "gradient", "energy": 0.9}
    shared = dict(measure_importance(layers_of(model), losses_of(model), passes=SHARED, **options))  # type: ignore[arg-type]
    alone = dict(measure_importance(layers_of(model), losses_of(model), **options))  # type: ignore[arg-type]
    assert all(torch.equal(shared[name].columns, alone[name].columns) for name in alone)  # type: ignore[union-attr]


def test_the_memory_holds_one_basis_per_input_and_stores_it_once(tmp_path: Path) -> None:
    model = Attention()
    layers = layers_of(model)
    memory = SubspaceMemory.empty(layers)
    for task in ("first", "second"):
        energy = 0.6 if task == "first" else 0.9
        memory = grow_memory(memory, layers, losses_of(model), energy=energy, rank=2, task=task, passes=SHARED)
    assert memory["query"] is memory["key"] is memory["value"]
    assert memory.growth["query"] == memory.growth["key"]
    memory = memory.to("cpu")
    memory.save(tmp_path)
    with safe_open(tmp_path / "memory.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["other.basis", "out.basis", "query.basis"]
    for lazy in (False, True):
        loaded = SubspaceMemory.load(tmp_path, lazy=lazy)
        assert sorted(loaded) == sorted(memory)
        assert all(torch.equal(loaded[name].basis, memory[name].basis) for name in memory)
        assert loaded.shapes() == dict(sorted(memory.shapes().items()))
    held = dict(loaded)
    assert held["query"] is held["value"]
    bases = read_bases(tmp_path)
    assert bases is not None
    assert torch.equal(bases.basis("key"), memory["key"].basis)  # type: ignore[arg-type]
    grown = grow_memory(
        SubspaceMemory.load(tmp_path), layers, losses_of(model), energy=1.0, rank=1, task="third", passes=SHARED
    )
    assert grown["query"] is grown["value"]
    assert torch.equal(grown["query"].basis[:, : memory["query"].k], memory["query"].basis)


def test_layers_whose_columns_differ_grow_by_themselves() -> None:
    model = Attention()
    layers, empty = layers_of(model), SubspaceMemory.empty(layers_of(model))
    apart = grow_memory(empty, layers, losses_of(model), energy=0.6, rank=2, task="first")
    both = grow_memory(apart, layers, losses_of(model), energy=0.9, rank=2, task="second", passes=SHARED)
    assert both["query"] is not both["key"]
    for name in ("query", "key"):
        assert torch.equal(both[name].basis[:, : apart[name].k], apart[name].basis)


def test_values_that_are_not_finite_are_left_out_of_the_group() -> None:
    model = Attention()
    bad = batches()[1].clone()
    bad[0, 0, 0] = torch.inf
    reports: list[PassReport] = []

    def losses() -> list[Callable[[], Tensor]]:
        return [
            lambda: model(batches()[0]),
            lambda: model.out(model.query(bad) + model.key(bad)).nan_to_num().sum() * 0,
        ]

    layers = {name: layer for name, layer in layers_of(model).items() if name in ("query", "key", "out")}
    options = {"source": "sensitivity", "energy": 0.9}
    skipping = Passes(shared_inputs=True, on_nonfinite="skip", on_pass=reports.append)
    found = dict(measure_importance(layers, losses, passes=skipping, **options))  # type: ignore[arg-type]
    assert set(reports[0].excluded[1]) == {"query", "key", "out"}
    assert bool(found["query"].isfinite().all())  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match="batch 1: inputs or gradients at "):
        dict(measure_importance(layers, losses, passes=SHARED, **options))  # type: ignore[arg-type]


def test_the_option_is_in_a_record_only_where_it_is_on() -> None:
    assert "shared_inputs" not in make_method("eblora").options()  # records of earlier versions resume
    assert make_method("gpm", shared_inputs=True).options()["shared_inputs"] is True
    with pytest.raises(ValueError, match="shared_inputs=True has no effect with source='gradient'"):
        make_method("eblora", shared_inputs=True, source="gradient")
