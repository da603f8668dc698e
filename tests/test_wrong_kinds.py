"""Arguments of another kind, in the calls of a first program: the error says what came and what to give."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import ToyTask, toy_stream

from manifold_cl import (
    RETRACTIONS,
    ContinualRunner,
    EBLoRALinear,
    RestrictedStiefel,
    RiemannianAdamW,
    SubspaceMemory,
    TrainerOptimizer,
    check_retraction,
    eblora_adapters,
    grow_memory,
    inject_adapters,
    load_adapters,
    merge_adapters,
    param_groups,
    protect,
)
from manifold_cl.adapters import target_linears
from manifold_cl.continual import Training, TrainingStatistics, grow_memory_from_weights, make_method
from manifold_cl.infeasible import INFEASIBLE_STEPS, infeasible

TARGETS = ["inner", "outer"]
MODEL = toy_stream().make_model()
LAYERS = target_linears(MODEL, TARGETS)
EMPTY = SubspaceMemory.empty(LAYERS)
STREAM = toy_stream()
MAKE = eblora_adapters(rank=2)
SPACE = RestrictedStiefel(torch.eye(6)[:, :2])
POINT = nn.Parameter(SPACE.random(6, 2, generator=torch.Generator().manual_seed(0)).detach().clone())
GROW = {"energy": 0.9, "rank": 2}


def loss() -> torch.Tensor:
    return MODEL(torch.ones(2, 24)).square().sum()


def adapted() -> nn.Module:
    model = toy_stream().make_model()
    inject_adapters(model, TARGETS, MAKE)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inject_adapters(TARGETS, MODEL, MAKE), "model is a Module, got a list: give the torch model"),
        (lambda: inject_adapters(MODEL, TARGETS, 4), r"make is a function .*, got 4: give eblora_adapters\(rank="),
        (lambda: inject_adapters(MODEL, TARGETS, EBLoRALinear), "got the class EBLoRALinear: give eblora_adapters"),
        (lambda: inject_adapters(MODEL, TARGETS, lambda name, layer: layer), "make returned a Linear for inner"),
        (lambda: inject_adapters(MODEL, TARGETS, eblora_adapters(rank="2")), "inner: rank is a whole number, got '2'"),
        (lambda: merge_adapters("model"), "model is a Module, got 'model'"),
        (lambda: load_adapters("folder", MODEL), "model is a Module, got 'folder'"),
        (lambda: target_linears("model", TARGETS), "model is a Module, got 'model'"),
        (lambda: eblora_adapters(rank=2, memory="folder"), r"memory is a Mapping, got 'folder': .*Memory\.load\("),
        (lambda: eblora_adapters(rank=2, output_memory=MODEL), "output_memory is a Mapping, got a ToyModel"),
        (lambda: protect(adapted(), TARGETS), "memory is a Mapping, got a list"),
        (lambda: SubspaceMemory.empty(MODEL), r"sizes is a Mapping, got a ToyModel: give target_linears\("),
        (lambda: SubspaceMemory.empty(TARGETS), r"sizes is a Mapping, got a list: give target_linears\("),
        (lambda: grow_memory(None, LAYERS, lambda: [loss], **GROW), r"got None: begin with SubspaceMemory\.empty\("),
        (lambda: grow_memory({}, LAYERS, lambda: [loss], **GROW), "memory is a SubspaceMemory, got a dict"),
        (lambda: grow_memory(EMPTY, MODEL, lambda: [loss], **GROW), r"got a ToyModel: .*target_linears\(model"),
        (lambda: grow_memory(EMPTY, LAYERS, loss, **GROW), r"this one returned a Tensor: .*lambda: \[LOSS\]"),
        (lambda: grow_memory(EMPTY, LAYERS, lambda: None, **GROW), "this one returned a NoneType"),
        (lambda: grow_memory_from_weights(EMPTY, MODEL, rank=2), "layers is a Mapping, got a ToyModel"),
        (lambda: grow_memory_from_weights({}, LAYERS, rank=2), "memory is a SubspaceMemory, got a dict"),
        (lambda: TrainingStatistics(MODEL, energy=0.9), "layers is a Mapping, got a ToyModel"),
        (lambda: param_groups(adapted().parameters(), lr=1e-3), r"got a generator: .*param_groups\(model, lr"),
        (lambda: RiemannianAdamW(adapted()), r"got a ToyModel: give RiemannianAdamW\(param_groups\(model, lr"),
        (lambda: RiemannianAdamW([{"params": [POINT], "manifolds": SPACE}]), r"manifolds=\[manifold\]"),
        (lambda: infeasible(torch.optim.SGD)(adapted()), r"got a ToyModel: give InfeasibleSGD\(param_groups\("),
        (lambda: TrainerOptimizer(adapted(), lr=1e-3), r"optimizer_cls_and_kwargs=\(TrainerOptimizer, "),
        (lambda: ContinualRunner(toy_stream, make_method("eblora"), "x"), "got the function toy_stream: give the Task"),
        (lambda: ContinualRunner(STREAM, "eblora", "x"), r"method is a Method, got 'eblora': give make_method\("),
        (lambda: ContinualRunner(STREAM, type(make_method("gpm")), "x"), "got the class GPM: give make_method"),
        (
            lambda: ContinualRunner(STREAM, make_method("gpm"), "x", training={"epochs": 2}),
            r"got a dict: give Training\(",
        ),
        (lambda: replace(STREAM, make_model=MODEL), "make_model is a function .*, got a ToyModel: give the function"),
        (lambda: replace(STREAM, tasks=STREAM.tasks[0]), "tasks is a Sequence, got a ToyTask: give a tuple"),
    ],
)
def test_another_kind_is_refused_with_what_to_give(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_forgotten_argument_or_layer_is_no_silent_default() -> None:
    with pytest.raises(ValueError, match="protect has nothing to protect: give memory, output_memory, or both"):
        protect(adapted())
    with pytest.raises(ValueError, match=r"scale_lr=0\.02 .* no adapters: call inject_adapters before param_groups"):
        param_groups(nn.Linear(3, 2), lr=1e-3, scale_lr=2e-2)
    assert len(param_groups(nn.Linear(3, 2), lr=1e-3)) == 2  # an ordinary model has no magnitudes
    inner = SubspaceMemory.empty({"inner": LAYERS["inner"]})
    model = toy_stream().make_model()
    with pytest.raises(ValueError, match=r"^outer: memory has no entry .* unprotected \(it has inner\): .* None"):
        inject_adapters(model, TARGETS, eblora_adapters(rank=2, memory=inner))
    inject_adapters(model, TARGETS, eblora_adapters(rank=2, memory={**inner, "outer": None}))


def test_a_rank_that_does_not_fit_names_the_layer(tmp_path: Path) -> None:
    stream = replace(toy_stream(), targets=("inner", "head"))
    message = r"^head: rank 8 does not fit a weight of shape \(4, 16\): choose 1 to 4$"
    with pytest.raises(ValueError, match=message):
        ContinualRunner(stream, make_method("sequential_merge", rank=8), tmp_path).run()
    with pytest.raises(ValueError, match=message):
        inject_adapters(stream.make_model(), stream.targets, lambda name, layer: EBLoRALinear(layer, 8))


class Odd(ToyTask):
    """A task whose methods disagree, made from another one."""

    def __init__(self, like: ToyTask) -> None:
        self.__dict__.update(like.__dict__)


class OneScore(Odd):
    def scores(self, model: nn.Module, split: Any = "test") -> Any:
        return 93.5


class UsedUp(Odd):
    """Its batches can be read once."""

    left: Iterator[Any] | None = None

    def batches(self, split: Any, **options: Any) -> Iterator[Any]:
        self.left = self.left or super().batches(split, **options)
        return self.left


class TooLarge(Odd):
    def size(self, split: Any) -> int:
        return 10 * super().size(split)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (OneScore, TypeError, r'task first returns as scores is a Mapping, got 93\.5: return .*"accuracy"'),
        (UsedUp, ValueError, r"examples of first had 0 batches of 16, and its size, 96, means 6: .* a new pass"),
        (TooLarge, ValueError, r"examples of first had 6 batches of 16, and its size, 960, means 60: size\(\) and"),
    ],
)
def test_a_task_whose_methods_disagree_is_refused(
    task: type[Odd], error: type[Exception], message: str, tmp_path: Path
) -> None:
    stream = toy_stream()
    odd = replace(stream, tasks=(task(stream.tasks[0]), *stream.tasks[1:]))  # type: ignore[arg-type]
    training = Training(epochs=2)
    with pytest.raises(error, match=message):
        ContinualRunner(odd, make_method("sequential_merge", rank=2), tmp_path, training=training).run()


def test_a_class_stands_for_its_object_where_a_rule_is_chosen() -> None:
    """As for the functions that register one; called as a function, a class would be an object in place of a point."""
    assert RestrictedStiefel(retraction=type(RETRACTIONS["polar"])).retraction == RETRACTIONS["polar"]
    assert check_retraction(type(RETRACTIONS["qr"])).name == "qr"
    assert infeasible(torch.optim.SGD, step=type(INFEASIBLE_STEPS["pogo"])).infeasible_step == INFEASIBLE_STEPS["pogo"]


def test_directions_in_rows_are_answered_with_the_transpose() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 6\): directions are columns, so pass basis\.mT if they are"):
        RestrictedStiefel(torch.eye(6)[:2])
    with pytest.raises(ValueError, match=r"got shape \(6,\): .* v\[:, None\] for one direction v"):
        RestrictedStiefel(torch.ones(6))
