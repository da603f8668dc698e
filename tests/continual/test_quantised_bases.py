"""Bases with integer weights: refused before a task trains where a method needs plain weights, else kept beside."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from toy import Int8Linear, frozen_model, toy_stream

from manifold_cl import METHODS, ContinualRunner, SubspaceMemory, TaskStream
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import Training, grow_memory_from_weights, make_method

NEED_WEIGHTS = {"ewc_lora": "take gradients of", "keeplora": "take singular vectors of"}
"""Methods that read the weights, where updates are kept too; and what for."""
NEVER_KEEP = {"gpm", "osft_lora"}


def quantised() -> nn.Module:
    model = frozen_model()
    for name in ("inner", "outer"):
        setattr(model, name, Int8Linear(getattr(model, name)))
    return model


def stream() -> TaskStream:
    return replace(toy_stream(tasks=["first"], examples=32), make_model=quantised)


def run(name: str, folder: Path, *, keep: bool) -> Sequence[float]:
    method = make_method(name) if name in ("zero_shot", "gpm") else make_method(name, rank=2)
    if keep:
        method.keep_updates()
    return ContinualRunner(stream(), method, folder, training=Training(batch_size=16)).run().losses[0]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"zero_shot"}))
def test_a_method_that_would_merge_is_refused_before_it_trains(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=r"inner is (quantised|torch\.int8)|the weight of inner is torch\.int8"
    ):
        run(name, tmp_path, keep=False)
    assert not (tmp_path / "tasks").exists()


def test_zero_shot_needs_no_weights(tmp_path: Path) -> None:
    assert run("zero_shot", tmp_path, keep=False) == []


@pytest.mark.parametrize("name", sorted(METHODS.keys() - NEVER_KEEP - {"zero_shot"}))
def test_kept_updates_train_beside_integer_weights(name: str, tmp_path: Path) -> None:
    if use := NEED_WEIGHTS.get(name):
        with pytest.raises(TypeError, match=rf"inner is quantised .*no plain weight to {use}"):
            run(name, tmp_path, keep=True)
        assert not (tmp_path / "tasks").exists()
    else:
        assert run(name, tmp_path, keep=True)


def test_codes_are_not_read_as_weights() -> None:
    layers = target_linears(quantised(), ["inner"])
    with pytest.raises(TypeError, match="inner is quantised"):
        grow_memory_from_weights(SubspaceMemory.empty(layers), layers, rank=2)
