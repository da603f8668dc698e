"""transformers' own ``add_adapter``, ``save_pretrained`` and ``load_adapter`` keep protected subspaces, or say so."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft import config, logits, train
from tiny_models import llama
from torch import nn

from manifold_cl import ProtectedSubspace, param_groups, start_from_task
from manifold_cl.adapters import eblora_layers, protect


def protected(model: nn.Module, *, compact: bool = False) -> None:
    """Protect one subspace in all layers."""
    layers = eblora_layers(model)
    draw = torch.Generator().manual_seed(5)
    basis = ProtectedSubspace.from_directions(torch.randn(next(iter(layers.values())).in_features, 3, generator=draw))
    protect(model, dict.fromkeys(layers, basis.compacted() if compact else basis), strict=False)


def directions(model: nn.Module) -> list[int]:
    return [layer.manifolds("default")[1].k for layer in eblora_layers(model).values()]


def test_layers_with_one_basis_keep_it_through_transformers_own_files(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(config(target_modules=["q_proj", "v_proj"]))
    protected(model)
    model.save_pretrained(tmp_path)
    again, by_peft = llama(), PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    again.load_adapter(str(tmp_path), is_trainable=True)
    for other in (again, by_peft):
        assert set(directions(other)) == {3}
        assert param_groups(other, lr=1e-2)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


@pytest.mark.parametrize("compact", [False, True])
def test_protection_that_transformers_cannot_load_is_missed_before_training(compact: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"]))
    protected(model, compact=compact)
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    message = r"'default' was saved with protected subspaces, which are not loaded.*PeftModel.from_pretrained"
    with pytest.raises(ValueError, match=message):
        param_groups(again, lr=1e-2)
    with pytest.raises(ValueError, match=message):
        again.train()(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=message):
        again.save_pretrained(tmp_path / "again")
    protected(again)
    train(again, 1)
    assert set(directions(again)) == {3}


def test_a_start_that_transformers_has_loaded_is_not_to_be_made_again(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(target_modules=["q_proj"], start="task"))
    ids = torch.tensor([[1, 2, 3, 4]])
    start_from_task(model, [{"input_ids": ids, "labels": ids}])
    model.save_pretrained(tmp_path)
    assert param_groups(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True), lr=1e-2)
    again = llama()
    again.load_adapter(str(tmp_path), is_trainable=True)
    with pytest.raises(ValueError, match=r"no start yet.*was saved has its start.*PeftModel\.from_pretrained"):
        param_groups(again, lr=1e-2)


def test_a_configuration_that_was_saved_starts_another_adapter(tmp_path: Path) -> None:
    options = config(target_modules=["q_proj"])
    model = get_peft_model(llama(), options)
    protected(model)
    model.save_pretrained(tmp_path)
    train(get_peft_model(llama(), options), 1)
