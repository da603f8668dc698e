"""Compact bases in state dicts: the columns in six bits per entry are loaded beside the basis that they define."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from test_peft import config
from tiny_models import llama
from torch import nn

from manifold_cl import ProtectedSubspace, eblora_adapters, inject_adapters
from manifold_cl.adapters import eblora_layers, protect


def compact(seed: int, *, n: int = 70, k: int = 5) -> ProtectedSubspace:
    draw = torch.Generator().manual_seed(seed)
    return ProtectedSubspace.from_directions(torch.randn(n, k, generator=draw)).compacted()


def injected(seed: int, inputs: ProtectedSubspace | None = None) -> Any:
    model = nn.Sequential(nn.Linear(70, 66))
    draw = torch.Generator().manual_seed(seed)
    inject_adapters(model, ["0"], eblora_adapters(rank=2, generator=draw))
    if inputs is not None:
        protect(model, {"0": inputs})
    return model


def test_a_state_dict_keeps_the_columns_of_compact_bases() -> None:
    model, subspace = injected(0, compact(0)), compact(0)
    for assign in (False, True):
        for before in (None, compact(1), compact(2, k=7)):  # nothing, as many columns, more columns
            again = injected(1, before)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # seven directions are replaced by five
                again.load_state_dict(model.state_dict(), assign=assign)
            manifold = again[0].right_manifold
            assert torch.equal(manifold.packed_complement(), subspace.packed)
            assert torch.equal(manifold.complement, subspace.basis)
            again.load_state_dict(model.state_dict())  # in place: the columns of the first model stay
            assert torch.equal(model[0].right_manifold.packed_complement(), subspace.packed)


def test_a_state_without_columns_replaces_those_of_the_model() -> None:
    """States of earlier versions have no columns, and states of plain bases neither."""
    state = injected(0, ProtectedSubspace(compact(3).basis)).state_dict()
    model = injected(1, compact(1))
    model.load_state_dict(state)
    assert model[0].right_manifold.packed is None
    assert torch.equal(model[0].right_manifold.complement, compact(3).basis)


def test_protection_of_one_side_keeps_the_compact_basis_of_the_other() -> None:
    model = injected(0, compact(0))
    protect(model, output_memory={"0": compact(4, n=66)})
    for manifold, expected in zip((model[0].left_manifold, model[0].right_manifold), (4, 0), strict=True):
        assert torch.equal(manifold.packed_complement(), compact(expected, n=66 if expected else 70).packed)


def test_a_state_of_a_peft_model_keeps_compact_bases(tmp_path: Path) -> None:
    model, again = (get_peft_model(llama(), config()) for _ in range(2))
    layers = {name: layer.get_base_layer() for name, layer in eblora_layers(model).items()}
    protect(model, {name: compact(5, n=one.in_features, k=3) for name, one in layers.items()})
    again.load_state_dict(model.state_dict())
    sizes = []
    for number, each in enumerate((model, again)):
        each.save_pretrained(tmp_path / str(number))
        sizes.append((tmp_path / str(number) / "adapter_model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]
