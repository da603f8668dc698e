"""What adapters may wrap: linear layers of both orientations, quantised ones without merging, never embeddings."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manifold_cl import (
    EBLoRALinear,
    adapters_of,
    eblora_adapters,
    inject_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from manifold_cl.adapters import Adapter, LoRALinear
from manifold_cl.adapters.identity import fingerprint, weight_difference
from manifold_cl.adapters.layers import target_linears
from manifold_cl.files import FileError


class Linear8bit(nn.Linear):
    """A real, if simple, quantised layer: int8 rows with a scale each, unpacked in the forward pass."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        size = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / size).round().to(torch.int8), requires_grad=False)
        self.bias.data = linear.bias.detach()
        self.register_buffer("size", size)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.size, self.bias)


def conv1d(generator: torch.Generator, m: int = 6, n: int = 9) -> Conv1D:
    layer = Conv1D(m, n)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n, m, generator=generator))
        layer.bias.copy_(torch.randn(m, generator=generator))
    return layer


@pytest.mark.parametrize("kind", ["eblora", "lora"])
def test_the_linear_layer_of_gpt2_is_adapted_and_merged(kind: str, generator: torch.Generator) -> None:
    layer = conv1d(generator)
    weight = layer.weight.detach().clone()
    adapter: Adapter
    if kind == "eblora":
        adapter = EBLoRALinear(layer, 3, initial_scale=0.5, start="pretrained", generator=generator)
        assert float((adapter.left.T @ weight.T @ adapter.right).detach().diagonal().min()) > 0.5  # W as (m, n)
    else:
        adapter = LoRALinear(layer, 3, generator=generator)
        nn.init.normal_(adapter.left, generator=generator)
    assert (adapter.left.shape, adapter.right.shape) == ((6, 3), (9, 3))
    x = torch.randn(4, 2, 9, generator=generator)
    delta = adapter.factors().delta_weight().double()
    expected = x.double() @ (weight.double() + delta.T) + layer.bias.detach().double()
    assert (adapter(x) - expected).norm() <= 1e-6 * expected.norm()  # float32
    adapter.merge()
    assert (adapter(x) - expected).norm() <= 1e-6 * expected.norm()
    adapter.unmerge()
    assert torch.equal(layer.weight, weight)
    model = nn.Sequential(layer)
    inject_adapters(model, ["0"], lambda _, base: EBLoRALinear(base, 2, initial_scale=1.0, generator=generator))
    before = model(x)
    merge_adapters(model)
    assert isinstance(model[0], Conv1D)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)  # sums of ten float32 terms near 5


def test_both_kinds_of_linear_layer_are_found(generator: torch.Generator) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": conv1d(generator)})
    assert list(target_linears(model, ["a"])) == ["a"]
    assert list(target_linears(model, ["b"])) == ["b"]
    assert list(target_linears(model, "all-linear")) == ["a", "b"]


@pytest.mark.parametrize("make", [lambda _, base: LoRALinear(base, 1), eblora_adapters(rank=1)])
def test_embeddings_are_refused_by_name(make: Any) -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    message = r"target embed_tokens: adapters wrap linear layers, got Embedding: .*modules_to_save"
    with pytest.raises(TypeError, match=message):
        inject_adapters(model, ["embed_tokens", "head"], make)
    with pytest.raises(TypeError, match=r"target embed_tokens: adapters wrap linear layers"):
        inject_adapters(model, ".*", make)
    with pytest.raises(TypeError, match="adapters wrap linear layers, got EmbeddingBag"):
        EBLoRALinear(nn.EmbeddingBag(5, 4), 1)
    assert list(inject_adapters(model, ["head"], make)) == ["head"]


def test_a_quantised_base_is_adapted_but_not_merged(generator: torch.Generator, tmp_path) -> None:
    exact = nn.Linear(8, 6)
    model = nn.Sequential(Linear8bit(exact))
    inject_adapters(model, ["0"], eblora_adapters(rank=2, initial_scale=0.5, generator=generator))
    (adapter,) = adapters_of(model).values()
    x = torch.randn(5, 8, generator=generator)
    delta = adapter.factors().delta_weight()
    torch.testing.assert_close(model(x) - adapter.base(x), x @ delta.T, rtol=0, atol=1e-6)  # float32
    model(x).sum().backward()
    assert adapter.left.grad is not None
    packed = adapter.base.weight.clone()
    message = r"Linear8bit is quantised \(torch\.int8\): an adapter works on top of it, .* bfloat16 .*export"
    with pytest.raises(TypeError, match=message):
        merge_adapters(model)
    with pytest.raises(TypeError, match=message):
        adapter.merge()
    with pytest.raises(TypeError, match="no plain weight to take singular vectors of"):
        EBLoRALinear(Linear8bit(exact), 2, start="pretrained")
    assert list(adapters_of(model)) == ["0"]
    assert torch.equal(adapter.base.weight, packed)
    save_adapters(model, tmp_path)  # no fingerprint: there are no entries to tell it by
    load_adapters(model, tmp_path)


def test_a_fingerprint_knows_a_weight_again_in_another_precision(generator: torch.Generator) -> None:
    linear, other = nn.Linear(300, 200), nn.Linear(300, 200)
    text = fingerprint(linear)
    assert text is not None
    assert len(text.split()) == 17
    assert weight_difference(text, linear) is None
    assert weight_difference(text, copy.deepcopy(linear).to(torch.bfloat16)) is None
    narrow = fingerprint(copy.deepcopy(linear).half())
    assert narrow is not None
    assert weight_difference(narrow, linear) is None
    differs = weight_difference(text, other)
    assert differs is not None
    assert differs.startswith("its base weight differs by up to ")
    changed = copy.deepcopy(linear)
    with torch.no_grad():
        changed.weight.add_(1e-4 * torch.randn(200, 300, generator=generator))  # as small as a merged update
    assert weight_difference(text, changed) is not None
    assert weight_difference("1.0 two", linear) == "its fingerprint is not 17 numbers"
    assert fingerprint(nn.Linear(3, 3, device="meta")) is None
    with torch.no_grad():
        changed.weight.fill_(float("nan"))
    assert fingerprint(changed) is None


def test_adapters_of_another_model_are_refused_with_what_differs(generator: torch.Generator, tmp_path) -> None:
    model, other = nn.Sequential(nn.Linear(20, 12)), nn.Sequential(nn.Linear(20, 12))
    for each in (model, other):
        inject_adapters(each, ["0"], eblora_adapters(rank=2, generator=generator))
    save_adapters(model, tmp_path)
    before = other[0].left.detach().clone()
    message = (
        r"0: trained on another model, its base weight differs by up to \S+ in entries of up to \S+ \(any_base=True"
    )
    with pytest.raises(FileError, match=message):
        load_adapters(other, tmp_path)
    assert torch.equal(other[0].left, before)
    load_adapters(other, tmp_path, any_base=True)
    assert torch.equal(other[0].left, model[0].left)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_that_is_not_finite_is_not_the_base_of_a_fingerprint(value: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapters(model, ["0"], lambda _, base: EBLoRALinear(base, 2))
    save_adapters(model, tmp_path)
    with torch.no_grad():
        model[0].base.weight.fill_(value)
    with pytest.raises(FileError, match="0: trained on another model, its base weight has NaN or infinite entries"):
        load_adapters(model, tmp_path)
    load_adapters(model, tmp_path, any_base=True)


def test_a_fingerprint_is_the_same_in_both_layouts_of_a_weight() -> None:
    linear, conv = nn.Linear(7, 5), Conv1D(5, 7)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
    text = fingerprint(linear)
    assert text is not None
    assert fingerprint(conv) == text
    twin = nn.Linear(5, 7)
    with torch.no_grad():
        twin.weight.copy_(conv.weight)
    stored = fingerprint(twin)  # in the order of version 1
    assert stored is not None
    assert weight_difference(stored, conv) is None
    assert weight_difference(stored, linear) is not None
