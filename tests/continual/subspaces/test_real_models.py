"""Memory functions on models as users have them: in wrappers, with GPT-2's layers, fed by data loaders."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import HIDDEN, INPUTS, ToyModel, frozen_model, toy_stream

from manifold_cl import ContinualRunner, EBLoRALinear, ProtectedSubspace, SubspaceMemory, inject_adapters
from manifold_cl.adapters import eblora_layers, protect
from manifold_cl.adapters.layers import target_linears
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.continual import (
    Training,
    grow_memory,
    grow_memory_from_weights,
    make_method,
    task_directions,
    task_losses,
)
from manifold_cl.continual.method import Stage
from manifold_cl.files import FileError

TARGETS = ["inner", "outer"]
TASK = toy_stream().tasks[0]


def in_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))


def in_eblora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, EBLoraConfig(r=2, target_modules=TARGETS, compensate=True))


def with_adapters(model: nn.Module) -> nn.Module:
    inject_adapters(model, TARGETS, lambda _, layer: EBLoRALinear(layer, 2, initial_scale=0.0))
    return model


def compiled(model: nn.Module) -> nn.Module:
    """Used before, so that its graph has no hooks."""
    model = torch.compile(model, backend="eager")
    model(torch.zeros(3, INPUTS))
    return model


def compiled_layer(model: ToyModel) -> nn.Module:
    model.inner = compiled(model.inner)  # type: ignore[assignment]
    return model


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "lora": in_lora,
    "eblora": in_eblora,
    "our adapters": with_adapters,
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "compiled layer": compiled_layer,
    "compiled eblora": lambda model: compiled(in_eblora(model)),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


def memory_of(model: nn.Module, layers: Mapping[str, nn.Module] | None = None) -> SubspaceMemory:
    layers = target_linears(model, TARGETS) if layers is None else layers
    memory = grow_memory_from_weights(SubspaceMemory.empty(layers), layers, rank=2, energy=0.3)
    losses = task_losses(model, TASK, examples=48)
    return grow_memory(memory, layers, losses, energy=0.8, rank=2, source="sensitivity+gradient", task="t")


def assert_same(ours: SubspaceMemory, theirs: SubspaceMemory) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].k == theirs[name].k > 0
        overlap = torch.linalg.svdvals(ours[name].basis.T @ theirs[name].basis)
        assert float(overlap.min()) > 1 - 1e-4  # float32 sums in another order


@wrappers
def test_wrappers_change_neither_names_nor_numbers(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    plain, wrapped = frozen_model(), wrap(frozen_model())
    layers = target_linears(wrapped, TARGETS)
    assert list(layers) == TARGETS
    assert all(type(layer) is nn.Linear for layer in layers.values())
    expected, found = memory_of(plain), memory_of(wrapped)
    assert_same(found, expected)
    ours, theirs = (task_directions(m, TASK, TARGETS, 2, expected, examples=48) for m in (wrapped, plain))
    for name in TARGETS:
        torch.testing.assert_close(ours[name].sigma, theirs[name].sigma, rtol=1e-4, atol=0)  # float32 sums
    found.with_model(wrapped, layers).save(tmp_path)
    for model in (plain, wrapped):
        assert SubspaceMemory.load(tmp_path, model=model).model is not None
    other = frozen_model()
    with torch.no_grad():
        other.inner.weight.neg_()
    with pytest.raises(FileError, match="inner: its base weight differs"):
        SubspaceMemory.load(tmp_path, model=wrap(other))


def test_the_tuner_s_own_layers_are_taken() -> None:
    wrapped = in_eblora(frozen_model())
    layers = eblora_layers(wrapped)
    assert {name: (layer.in_features, layer.out_features) for name, layer in layers.items()} == {
        "inner": (INPUTS, HIDDEN),
        "outer": (HIDDEN, HIDDEN),
    }
    memory = memory_of(frozen_model())
    assert_same(memory_of(wrapped, layers), memory)
    protect(compiled(wrapped), memory)
    for name, layer in layers.items():
        left = memory[name].basis.T @ layer.eblora_right["default"]
        assert float(left.detach().abs().max()) < 2e-6  # the documented bound


def test_what_is_not_linear_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="statistics are taken of linear layers, act is a Tanh"):
        SubspaceMemory.empty({"act": nn.Tanh()})


def test_a_model_with_adapters_says_so_where_more_are_injected() -> None:
    for wrap in (in_lora, in_eblora):
        with pytest.raises(
            ValueError, match=r"no linear module matches .*; inner carries adapters already: merge them"
        ):
            inject_adapters(wrap(frozen_model()), TARGETS, lambda _, layer: EBLoRALinear(layer, 2))


class Conv1D(nn.Module):
    """GPT-2's linear layer, by its name in transformers: the weight is (inputs, outputs)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.nf = linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def transposed_model() -> ToyModel:
    model = frozen_model()
    model.inner, model.outer = Conv1D(model.inner), Conv1D(model.outer)  # type: ignore[assignment]
    return model


def test_a_layer_that_stores_its_weight_transposed_is_read_like_its_twin(tmp_path: Path) -> None:
    expected, found = memory_of(frozen_model()), memory_of(transposed_model())
    assert_same(found, expected)
    assert {name: (s.n, s.k) for name, s in found.items()} == {name: (s.n, s.k) for name, s in expected.items()}
    model = frozen_model()
    expected.with_model(model, target_linears(model, TARGETS)).save(tmp_path)
    SubspaceMemory.load(tmp_path, model=transposed_model())  # the same weights, stored otherwise
    ours, theirs = (task_directions(m, TASK, TARGETS, 2, examples=48) for m in (transposed_model(), model))
    assert ours["inner"].right.shape == (INPUTS, 2)
    assert ours["inner"].left.shape == (HIDDEN, 2)
    torch.testing.assert_close(ours["inner"].sigma, theirs["inner"].sigma, rtol=1e-4, atol=0)  # float32 sums


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eblora", {"rank": 3}),
        ("inflora", {"rank": 3}),
        ("keeplora", {"rank": 3}),
        ("gpm", {}),
        ("stella_merge", {"rank": 3}),
    ],
)
def test_methods_learn_on_transposed_layers_as_on_their_twins(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    stream = toy_stream(tasks=["first", "second"])
    records = [
        ContinualRunner(chosen, make_method(name, **options), tmp_path / str(i), training=Training()).run()
        for i, chosen in enumerate((stream, replace(stream, make_model=transposed_model)))
    ]
    ours, theirs = (torch.tensor([loss for losses in r.losses for loss in losses]) for r in records)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # float32 sums in another order, over 12 steps


class WithLoss(nn.Module):
    """Returns its loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = frozen_model()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"loss": loss, "logits": logits})()


def rows() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in TASK.batches("train", batch_size=16)]


def test_batches_are_any_iterable_of_dictionaries() -> None:
    examples = [{"x": x, "labels": y} for batch in rows() for x, y in zip(batch["x"], batch["labels"], strict=True)]

    def generated() -> Iterator[dict[str, Tensor]]:
        yield from rows()

    sources = [rows(), tuple(rows()), DataLoader(examples, batch_size=16), generated()]
    found = [task_directions(WithLoss(), source, ["inner"], 3, examples=48) for source in sources]
    assert all(torch.equal(each["body.inner"].right, found[0]["body.inner"].right) for each in found)
    fewer = task_directions(WithLoss(), rows()[:3], ["inner"], 3)
    assert torch.equal(fewer["body.inner"].right, found[0]["body.inner"].right)  # 48 examples: three batches
    model = WithLoss()
    layers = target_linears(model, ["inner"])
    losses = task_losses(model, generated(), examples=96)  # two passes read it, though it can be read once only
    grow_memory(SubspaceMemory.empty(layers), layers, losses, energy=0.9, rank=2, source="gradient")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (3, TypeError, "a task or its batches are needed, got a int: give a Task, or a list"),
        ({"x": torch.zeros(2, INPUTS)}, TypeError, "a task or its batches are needed, got a dict"),
        ([torch.zeros(2, INPUTS)], TypeError, "batch 0 is a Tensor: a dictionary of the model's arguments is needed"),
        ([{"x": [1, 2]}], TypeError, r"batch 0 holds no tensors \(x is a list\): collate the examples first"),
        ([{}], TypeError, r"batch 0 holds no tensors \(it is empty\)"),
        (
            [{"x": torch.zeros(2, INPUTS)}],
            ValueError,
            r"the model returned no loss for batch 0 \(its arguments are x\)",
        ),
        ([], ValueError, "there is no batch to collect statistics from"),
        (
            [{"x": torch.zeros(2, INPUTS), "labels": torch.full((2,), -100)}],
            FloatingPointError,
            "the loss of batch 0 became nan .*: every label of a batch is -100",
        ),
    ],
)
def test_batches_of_another_kind_are_named(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        task_directions(WithLoss(), batches, ["inner"], 3)


class WithHead(nn.Module):
    """Two layers and a head, found as transformers' models let theirs be found."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.config = {}
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.add_module(head, nn.Linear(4, 2))
        self._head = head

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, self._head) if self._head == "lm_head" else None

    def forward(self, x: Tensor) -> Tensor:
        head: nn.Module = getattr(self, self._head)
        output: Tensor = head(self.second(self.first(x)))
        return output


@pytest.mark.parametrize("head", ["lm_head", "score", "classifier"])
def test_all_linear_is_what_peft_means_by_it(head: str) -> None:
    model = WithHead(head)
    assert list(target_linears(model, "all-linear")) == ["first", "second"]
    assert list(inject_adapters(copy.deepcopy(model), "all-linear", lambda _, la: EBLoRALinear(la, 1))) == [
        *("first", "second")
    ]
    wrapped = get_peft_model(model, LoraConfig(r=1, target_modules=["first"]))
    assert list(target_linears(wrapped, "all-linear")) == ["first", "second"]
    assert list(target_linears(frozen_model(), "all-linear")) == ["inner", "outer", "head"]  # nothing says it is one


def test_a_copy_that_peft_trains_whole_is_read_in_its_place() -> None:
    wrapped = get_peft_model(WithHead("score"), LoraConfig(r=1, target_modules=["first"], modules_to_save=["score"]))
    layers = target_linears(wrapped, ["first", "score"])
    assert list(layers) == ["first", "score"]
    assert layers["score"].weight.requires_grad


def test_a_memory_that_lacks_a_layer_is_refused_by_name() -> None:
    model = frozen_model()
    partly = {"inner": ProtectedSubspace.empty(INPUTS)}
    message = r"the memory has no entry for 1 layers, which would be free: outer\. Grow it over all layers"
    with pytest.raises(ValueError, match=message):
        task_directions(model, TASK, TARGETS, 2, partly, examples=16)
    assert list(task_directions(model, TASK, ["inner"], 2, partly, examples=16)) == ["inner"]
    stage = Stage(TASK, 0, TARGETS, 0, 16, (TASK,))
    for name in ("eblora", "inflora", "keeplora", "gpm"):
        method: Any = make_method(name, **({} if name == "gpm" else {"rank": 2}))
        method.memory = SubspaceMemory.empty({"inner": INPUTS})  # as read where the stream had other targets
        with pytest.raises(ValueError, match=message):
            method.begin_task(frozen_model(), stage)


def test_a_compiled_model_learns_under_the_names_of_the_plain_one(tmp_path: Path) -> None:
    stream = toy_stream(tasks=["first", "second"])

    def make_compiled() -> nn.Module:
        return torch.compile(frozen_model(), backend="eager")

    records = [
        ContinualRunner(chosen, make_method("eblora", rank=3), tmp_path / str(i), training=Training()).run()
        for i, chosen in enumerate((stream, replace(stream, make_model=make_compiled)))
    ]
    assert records[0].losses == records[1].losses
    assert list(SubspaceMemory.load(next((tmp_path / "1" / "tasks").glob("02-*")))) == TARGETS
