"""Layers that an adapter cannot be merged into are refused where it enters, directly and in PEFT."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from tiny_models import llama
from torch import nn
from torch.nn.utils import parametrizations, prune

from manifold_cl import EBLoRALinear, eblora_adapters, inject_adapters, merge_adapters
from manifold_cl.adapters import Adapter, LoRALinear, eblora_layers
from manifold_cl.adapters.base_layers import shared_tensors
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.peft import EBLoraConfig

OLD = pytest.mark.filterwarnings("ignore:.*is deprecated")
COMPUTED: dict[str, Callable[..., nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "pruning at random": lambda layer: prune.random_unstructured(layer, "weight", amount=2),
}


class Two(nn.Module):
    """Two linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return out


@OLD
@pytest.mark.parametrize("wrap", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_is_computed_is_refused_where_the_adapter_enters(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Two()
    wrap(model.second)
    before = dict(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    for make in (eblora_adapters(rank=2), lambda _, layer: LoRALinear(layer, 2)):
        with pytest.raises(TypeError, match=r"^second: the weight of this \w*Linear is computed from .*remove_param"):
            inject_adapters(model, ["first", "second"], make)
    with pytest.raises(TypeError, match=r"is computed from"):
        EBLoRALinear(model.second, 2)
    with pytest.raises(TypeError, match=r"^second: .* is computed from"):
        get_peft_model(model, EBLoraConfig(r=2, target_modules=["first", "second"]))
    assert dict(model.named_modules()) == before  # the first layer was put back
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_weight_that_becomes_computed_later_is_refused_before_anything_is_merged() -> None:
    model = Two()
    adapters = inject_adapters(model, ["first", "second"], eblora_adapters(rank=2))
    weight = model.first.weight.clone()
    prune.l1_unstructured(adapters["second"].base, "weight", amount=0.5)
    with pytest.raises(TypeError, match="is computed from weight_orig"):
        merge_adapters(model)
    assert isinstance(model.first, Adapter)
    assert torch.equal(model.first.weight, weight)
    prune.remove(adapters["second"].base, "weight")
    merge_adapters(model)
    assert type(model.second) is nn.Linear


def tie(model: Two, how: str) -> None:
    if how == "one parameter":
        model.second.weight = model.first.weight
    elif how == "one storage":
        model.second.weight.data = model.first.weight.data
    elif how == "a view":
        model.second.weight.data = model.first.weight.data.T
    else:
        model.register_buffer("copy", model.second.weight.data[1:3])


@pytest.mark.parametrize("how", ["one parameter", "one storage", "a view", "a buffer"])
def test_a_weight_with_shared_memory_is_refused_by_both_names(how: str) -> None:
    model = Two()
    tie(model, how)
    other = "copy" if how == "a buffer" else "first"
    message = rf"second shares its weight with {other}, .*tie_word_embeddings=False"
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, ["second"], eblora_adapters(rank=2))
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, EBLoraConfig(r=2, target_modules=["second"]))
    update = EBLoRALinear(nn.Linear(6, 6), 2).factors()
    with pytest.raises(ValueError, match=message):
        merge_factors(model, {"second": update})
    assert type(model.second) is nn.Linear


def test_a_weight_that_is_tied_after_injection_is_refused_before_the_adapters_come_out() -> None:
    model = Two()
    adapters = inject_adapters(model, ["second"], eblora_adapters(rank=2))
    model.first.weight = adapters["second"].base.weight
    with pytest.raises(ValueError, match="second shares its weight with first"):
        merge_adapters(model)
    assert model.second is adapters["second"]
    wrapped = get_peft_model(Two(), EBLoraConfig(r=2, target_modules=["first", "second"]))
    layers = eblora_layers(wrapped)
    layers["first"].base_layer.weight = layers["second"].base_layer.weight
    before = layers["first"].base_layer.weight.clone()
    with pytest.raises(ValueError, match="shares its weight with"):
        wrapped.merge_and_unload()
    assert torch.equal(layers["first"].base_layer.weight, before)


def test_slices_of_one_fused_weight_are_no_tie() -> None:
    model = Two()
    fused = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    model.first.weight.data, model.second.weight.data = fused[:6], fused[6:]
    assert shared_tensors(model) == {}
    inject_adapters(model, ["first", "second"], eblora_adapters(rank=2))


def test_a_tied_head_leaves_the_model_as_it_was_in_peft() -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens"):
        get_peft_model(model, EBLoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert {name: type(module) for name, module in model.named_modules()} == kinds


@pytest.mark.parametrize("part", ["left", "right", "scale"])
def test_an_update_with_nan_is_refused_before_the_adapters_come_out(part: str) -> None:
    model = Two()
    adapters = inject_adapters(model, ["first", "second"], eblora_adapters(rank=2))
    getattr(adapters["second"], part).data.fill_(float("nan"))
    weight = model.first.weight.clone()
    with pytest.raises(ValueError, match=r"second[.:] ?(left|right|magnitude).* NaN"):
        merge_adapters(model)
    assert model.first is adapters["first"]
    assert torch.equal(model.first.weight, weight)


def test_the_time_of_injection_and_merge_grows_with_the_number_of_layers() -> None:
    """Counted, not timed: how often the model's parameters are walked."""
    counts = []
    for layers in (4, 32):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        walks = 0
        original = model.named_parameters

        def counted(*args: object, original=original, **kwargs: object):  # type: ignore[no-untyped-def]
            nonlocal walks
            walks += 1
            return original(*args, **kwargs)

        model.named_parameters = counted  # type: ignore[method-assign]
        inject_adapters(model, [str(i) for i in range(layers)], eblora_adapters(rank=1))
        merge_adapters(model)
        counts.append(walks)
    assert counts[0] == counts[1]
