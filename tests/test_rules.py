"""Rules for numbers: one place, names and values in the message, also where options enter far from it."""

import re
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import manifold_cl
from manifold_cl import (
    EBLoRALinear,
    ProtectedSubspace,
    RestrictedStiefel,
    RiemannianSGD,
    SubspaceMemory,
    eblora_adapters,
    inject_adapters,
    param_groups,
)
from manifold_cl.adapters.options import validate_scaling
from manifold_cl.continual.subspaces import leading_directions
from manifold_cl.optim.own_bases import MatrixMuon
from manifold_cl.rules import validate_number, validate_positive, validate_share, validate_whole


@pytest.mark.parametrize(
    ("rule", "options", "right", "wrong"),
    [
        (validate_whole, {}, (1, np.int64(3)), (0, -1)),
        (validate_whole, {"least": 0}, (0,), (-1,)),
        (validate_number, {}, (-1.5, 2, np.float32(0.5)), (float("nan"), float("inf"))),
        (validate_positive, {}, (1e-9, 3), (0, -1.0, float("nan"))),
        (validate_share, {}, (0.5, 1), (0, 1.5, float("nan"))),
        (validate_share, {"zero": True, "one": False}, (0, 0.5), (1, -0.1)),
    ],
)
def test_rules_name_option_and_value(rule: Any, options: dict[str, Any], right: Any, wrong: Any) -> None:
    for value in right:
        rule("speed", value, **options)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^speed .*got {re.escape(str(value))}$"):
            rule("speed", value, **options)
    for value in (True, "3", None, [1]):
        with pytest.raises(TypeError, match=rf"^speed is a .*, got {re.escape(repr(value))}$"):
            rule("speed", value, **options)


def test_options_of_another_kind_are_refused_by_name_where_they_enter() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # the shape checks of the tests come first; renewed per test
    subspace, linear = ProtectedSubspace.empty(4), {"a": torch.nn.Linear(4, 4)}
    with pytest.raises(TypeError, match=r"rank, the number of columns to add, is a whole number, got 1.5"):
        subspace.extended(torch.ones(4, 1), rank=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"energy, the threshold, is a number, got '0.9'"):
        subspace.extended(torch.ones(4, 1), energy="0.9")  # type: ignore[arg-type]
    memory = SubspaceMemory.empty({"a": 4})
    with pytest.raises(ValueError, match="rank, the number of directions to keep free, must be at least 0, got -1"):
        memory.extended({}, energy=0.9, rank=-1)
    with pytest.raises(TypeError, match=r"rank is a whole number, got 2.0"):
        leading_directions(linear, iter, rank=2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dropout is a number, got None"):
        validate_scaling(8.0, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"momentum is a number, got '0.9'"):
        MatrixMuon([torch.nn.Parameter(torch.zeros(3, 2))], momentum="0.9")  # type: ignore[arg-type]


def test_no_other_file_spells_a_share_out() -> None:
    """Shares that are compared by hand, with exceptions whose values come from files or are no options."""
    known = {"manifold_cl/rules.py", "manifold_cl/adapters/identity.py", "manifold_cl/cli/analyze/mend.py"}
    known |= {"manifold_cl/integrations/transformers/arguments.py", "manifold_cl/optim/own_bases.py"}
    root = Path(manifold_cl.__file__).parents[1]
    by_hand = re.compile(r"\b0 <=? [a-z_.]+ <=? 1\b")
    found = {path for path in (root / "manifold_cl").rglob("*.py") if by_hand.search(path.read_text(encoding="utf-8"))}
    assert {str(path.relative_to(root)) for path in found} <= known


def test_counts_and_rates_that_torch_would_refuse_without_a_name() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # the shape checks of the tests come first; renewed per test
    space, net = RestrictedStiefel(torch.eye(8, 2)), torch.nn.Sequential(torch.nn.Linear(6, 5))
    wrong: Any = {
        "n is a whole number, got 8.0": lambda: space.dim(8.0, 2),  # type: ignore[arg-type]
        "p must be at least 0, got -2": lambda: space.dim(8, -2),
        "p must be at least 0, got -3": lambda: space.capacity(-3),
        r"a size is integers of at least 0, got \(8, -2\)": lambda: space.random(8, -2),
        "n must be at least 0, got -3": lambda: ProtectedSubspace.empty(-3),
        "rank must be at least 0, got -2": lambda: ProtectedSubspace.empty(8).capacity(-2),
        "rank is a whole number, got 3.0": lambda: inject_adapters(net, ["0"], eblora_adapters(rank=3.0)),  # type: ignore[arg-type]
        "rank is a whole number, got True": lambda: inject_adapters(net, ["0"], eblora_adapters(rank=True)),
        "lr is a number, got '1e-2', a text: .*float.*1.0e-3": lambda: param_groups(net, lr="1e-2"),  # type: ignore[arg-type]
        "scale_lr is a finite number from 0 on, got nan": lambda: param_groups(net, lr=1.0, scale_lr=float("nan")),
        "weight_decay is a finite number from 0 on, got -1": lambda: param_groups(net, lr=1.0, weight_decay=-1),
        "lr is a number, got '1e-3', a text": lambda: RiemannianSGD(net.parameters(), lr="1e-3"),  # type: ignore[arg-type]
    }
    for message, call in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert [group["lr"] for group in param_groups(net, lr=torch.tensor(0.1))] == [torch.tensor(0.1)] * 2
    layer = EBLoRALinear(torch.nn.Linear(6, 5), np.int64(2), initial_scale=torch.tensor(-0.5))  # type: ignore[arg-type]
    assert float(layer.scale.detach()) == -0.5
