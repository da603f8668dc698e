"""`start_from_task` gives adapters of PEFT and of `inject_adapters` the start of the method `EBLoRA`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from manifold_cl import (
    SubspaceMemory,
    adapters_of,
    eblora_adapters,
    grow_memory,
    inject_adapters,
    param_groups,
    protect,
    start_from_task,
    task_losses,
)
from manifold_cl.adapters import eblora_layers, target_linears
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.continual import Passes, make_method
from manifold_cl.continual.stage import Stage

TARGETS = ["q_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        return LlamaForCausalLM(config).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(50, (16, 9), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": part, "labels": part} for part in ids.split(8)]


class Given(Stage):
    """A stage whose examples are the batches of this file."""

    def losses(self, model: nn.Module, examples: int, purpose: str) -> Any:
        return task_losses(model, batches(), examples=examples)


def memory_of(model: Any) -> SubspaceMemory:
    layers = target_linears(model, TARGETS)
    losses = task_losses(model, batches(), examples=8)
    return grow_memory(SubspaceMemory.empty(layers), layers, losses, energy=0.5, rank=4)


def method_start(memory: SubspaceMemory | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    model = llama().requires_grad_(False)
    method = make_method("eblora", rank=4)
    method.memory = memory
    method.begin_task(model, Given(None, 0, TARGETS, 0, 8))  # type: ignore[arg-type]
    return {name: (a.left.detach(), a.right.detach()) for name, a in adapters_of(model).items()}


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of the projections: signs and rotations of equal singular values do not count."""
    return float((one @ one.mT - other @ other.mT).abs().max())


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("kind", ["peft", "injected"])
def test_the_start_is_that_of_the_method(kind: str, protected: bool) -> None:
    memory = memory_of(llama()) if protected else None
    expected = method_start(memory)
    model: Any = llama()
    if kind == "peft":
        model = get_peft_model(model, EBLoraConfig.recipe(r=4, alpha=8, target_modules=TARGETS))
        if memory:
            protect(model, memory)
    else:
        inject_adapters(model, TARGETS, eblora_adapters(rank=4, memory=memory, start="task"))
    stage = Given(None, 0, TARGETS, 0, 8)  # type: ignore[arg-type]
    scales = [p.detach().clone() for _, p in model.named_parameters() if p.numel() == 1]
    start_from_task(model, batches(), passes=Passes(seed=stage.derive_seed("sketch")))
    layers = eblora_layers(model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        (_, left, _), (_, right, _) = layer.points()
        assert gap(left.detach(), expected[name][0]) < 1e-5  # float32 gradients through two blocks
        assert gap(right.detach(), expected[name][1]) < 1e-5
    assert all(map(torch.equal, scales, [p for _, p in model.named_parameters() if p.numel() == 1]))


def test_training_without_the_start_is_refused_until_it_is_given() -> None:
    model = get_peft_model(llama(), EBLoraConfig(r=4, start="task", target_modules=TARGETS))
    with pytest.raises(ValueError, match="start_from_task"):
        param_groups(model, lr=1e-2)
    protect(model, memory_of(llama()))  # moves frames, but gives no start
    with pytest.raises(ValueError, match="start_from_task"):
        param_groups(model, lr=1e-2)
    (batch, _) = batches()
    assert torch.isfinite(model.eval()(**batch).loss)  # evaluation, and passes over the data, are free
    with pytest.raises(ValueError, match="start_from_task"):  # an optimizer over bare parameters asks nothing
        model.train()(**batch)
    start_from_task(model, batches())
    assert model.train()(**batch).loss.requires_grad
    assert param_groups(model, lr=1e-2)


def test_injected_adapters_refuse_to_train_before_their_start_too() -> None:
    model = llama()
    inject_adapters(model, TARGETS, eblora_adapters(rank=4, start="task"))
    (batch, _) = batches()
    with pytest.raises(ValueError, match="start_from_task"):
        model.train()(**batch)
    start_from_task(model, batches())
    assert model(**batch).loss.requires_grad


def test_a_saved_adapter_needs_no_start(tmp_path: Path) -> None:
    model = get_peft_model(llama(), EBLoraConfig(r=4, start="task", target_modules=TARGETS))
    start_from_task(model, batches())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert param_groups(again, lr=1e-2)


def test_ranks_by_pattern_and_compensation_start_too() -> None:
    config = EBLoraConfig(r=4, start="task", compensate=True, target_modules=TARGETS, rank_pattern={"q_proj": 2})
    model = get_peft_model(llama(), config)
    (batch, _) = batches()
    with torch.no_grad():
        before = llama()(**batch).loss
        start_from_task(model, batches())
        assert torch.equal(model(**batch).loss, before)  # a compensated start changes nothing, to the last bit


def test_a_model_without_adapters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no EBLoRA adapters"):
        start_from_task(llama(), batches())


def test_the_recipe_is_that_of_the_method() -> None:
    method, config = make_method("eblora").options(), EBLoraConfig.recipe(target_modules=TARGETS)
    given = (config.r, config.alpha, config.initial_scale)
    assert given == (method["rank"], method["alpha"], method["initial_scale"])
    assert config.start == "task"
    assert EBLoraConfig.recipe(r=4, target_modules=TARGETS).alpha == 8  # alpha / r stays 2
