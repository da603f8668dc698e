"""Adapters go into a model and come out merged; failures leave it as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from manifold_cl import EBLoRALinear, adapters_of, inject_adapters, merge_adapters
from manifold_cl.adapters import Adapter, Factors, LoRALinear, keep_adapters
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.layers import target_linears


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x + torch.tanh(self.query(x)) + self.value(x))
        return normed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList([Block(8), Block(8)])
        self.subquery = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.subquery(x)
        return out


@pytest.fixture
def model() -> Model:
    torch_state = torch.Generator().manual_seed(3)
    model = Model()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch_state))
    return model


def plain(_: str, linear: nn.Linear) -> Adapter:
    return LoRALinear(linear, 2, generator=torch.Generator().manual_seed(0))


def balanced(_: str, linear: nn.Linear) -> Adapter:
    return EBLoRALinear(linear, 2, initial_scale=0.5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], ["layers.0.query", "layers.1.query"]),
        (["value", "embed"], ["embed", "layers.0.value", "layers.1.value"]),
        (["1.value"], ["layers.1.value"]),
        (r"layers\.\d\.(query|value)", ["layers.0.query", "layers.0.value", "layers.1.query", "layers.1.value"]),
        (".*query", ["layers.0.query", "layers.1.query", "subquery"]),
    ],
)
def test_targets_are_suffixes_at_a_dot_or_one_expression_for_the_whole_name(
    model: Model, targets: str | list[str], expected: list[str]
) -> None:
    assert list(target_linears(model, targets)) == expected


@pytest.mark.parametrize("targets", [["quere"], ["query", "quere"]])
def test_a_target_that_hits_nothing_lists_the_nearest_names(model: Model, targets: list[str]) -> None:
    with pytest.raises(ValueError, match="no linear module matches target 'quere'; nearest: query, "):
        inject_adapters(model, targets, plain)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_bare_name_as_a_string_is_answered_with_the_way_to_write_it(model: Model) -> None:
    message = (
        r"matches target 'query'; nearest: query, subquery, .*\(a string is one regular expression for the whole name"
    )
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, "query", plain)


def test_no_targets_at_all_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="no targets given: name the linear modules to adapt, such as embed, query"):
        inject_adapters(model, [], plain)


def test_a_model_without_linear_modules_inside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model has no nn\.Linear modules to adapt"):
        inject_adapters(nn.Sequential(nn.Tanh()), ["0"], plain)
    with pytest.raises(ValueError, match=r"the model has no nn\.Linear modules to adapt"):
        inject_adapters(nn.Linear(3, 3), ".*", plain)  # there is nothing that could hold the adapter


@pytest.mark.parametrize("make", [plain, balanced])
def test_injection_freezes_exactly_the_rest(model: Model, make: Callable[[str, nn.Linear], Adapter]) -> None:
    adapters = inject_adapters(model, ["query", "subquery"], make)
    assert list(adapters) == ["layers.0.query", "layers.1.query", "subquery"]
    assert adapters_of(model) == adapters
    own = ("left", "right", "scale") if make is balanced else ("left", "right")
    expected = {f"{name}.{key}" for name in adapters for key in own}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert model.layers[0].query is adapters["layers.0.query"]
    model(torch.ones(2, 6)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected


def test_a_second_injection_is_refused(model: Model) -> None:
    inject_adapters(model, ["query"], plain)
    with pytest.raises(ValueError, match=r"the model already has 2 adapters: merge_adapters\(model\) first"):
        inject_adapters(model, ["value"], plain)
    assert isinstance(model.layers[0].value, nn.Linear)


def test_a_failure_half_way_leaves_the_model_as_it_was(model: Model) -> None:
    model.layers[0].value.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    output = model(torch.ones(2, 6))

    def make(name: str, linear: nn.Linear) -> Adapter:
        return LoRALinear(linear, 4)  # fits the embedding and the queries, not the three outputs of the last layer

    with pytest.raises(ValueError, match=r"rank 4 does not fit a weight of shape \(3, 8\)"):
        inject_adapters(model, ["embed", "query", "subquery"], make)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(torch.ones(2, 6)), output)


@pytest.mark.parametrize("make", [plain, balanced])
def test_merging_puts_the_plain_layers_back_with_the_update_added(
    model: Model, make: Callable[[str, nn.Linear], Adapter]
) -> None:
    layers = target_linears(model, ["query", "subquery"])
    weights = {name: linear.weight.detach().clone() for name, linear in layers.items()}
    adapters = inject_adapters(model, ["query", "subquery"], make)
    with torch.no_grad():
        for adapter in adapters.values():
            (adapter.scale if isinstance(adapter, EBLoRALinear) else adapter.left).add_(0.1)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    adapted = model(x).detach()
    added = merge_adapters(model)
    assert not adapters_of(model)
    assert {name: model.get_submodule(name) for name in layers} == layers  # the same objects
    for name, factors in added.items():
        assert factors.delta_weight().abs().max() > 0.01
        assert torch.equal(layers[name].weight, weights[name] + factors.delta_weight())
    assert float((model(x) - adapted).norm() / adapted.norm()) < 2e-6  # float32, through two normalised layers
    with torch.no_grad():
        adapters["subquery"].left.zero_()
    assert added["subquery"].left.abs().max() > 0  # what was added is a copy
    inject_adapters(model, ["query"], make)  # and the model takes adapters again


@pytest.mark.parametrize("take_out", [merge_adapters, keep_adapters])
def test_taking_out_adapters_twice_is_an_error(model: Model, take_out: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match=f"{take_out.__name__}: the model has no adapters"):
        take_out(model)
    inject_adapters(model, ["query"], plain)
    assert take_out(model)
    with pytest.raises(ValueError, match="no adapters, or they have been merged"):
        take_out(model)


def test_updates_for_another_model_are_refused_and_nothing_is_added(model: Model) -> None:
    def update(m: int, n: int) -> Factors:
        return Factors(torch.ones(m, 1), torch.ones(n, 1), torch.tensor(1.0))

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"names 'layers\.7\.query', which is no linear module of this model"):
        merge_factors(model, {"embed": update(8, 6), "layers.7.query": update(8, 8)})
    with pytest.raises(ValueError, match=r"subquery: the update is \(8, 3\), the weight \(3, 8\)"):
        merge_factors(model, {"embed": update(8, 6), "subquery": update(8, 3)})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merge_factors(model, {"embed": update(8, 6)})
    assert torch.equal(model.embed.weight, before["embed.weight"] + 1)


def test_a_module_used_in_two_places_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="a is one module in several places"):
        inject_adapters(model, ["a"], lambda _, linear: LoRALinear(linear, 2))
    assert list(inject_adapters(model, ["c"], lambda _, linear: LoRALinear(linear, 2))) == ["c"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.body = nn.Linear(4, 4)
        self.head.weight = self.embed.weight


def test_a_layer_whose_weight_another_module_shares_is_refused() -> None:
    model = Tied()
    with pytest.raises(ValueError, match="head shares its weight with embed, which a merged update would change too"):
        inject_adapters(model, ["head"], lambda _, linear: LoRALinear(linear, 2))
    assert all(p.requires_grad for p in model.parameters())
    update = Factors(torch.ones(7, 1), torch.ones(4, 1), torch.tensor(1.0))
    with pytest.raises(ValueError, match="head shares its weight"):
        merge_factors(model, {"head": update})
    assert list(inject_adapters(model, ["body"], lambda _, linear: LoRALinear(linear, 2))) == ["body"]


def test_layers_that_their_parent_reads_past_are_refused() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"out_proj is inside nn.MultiheadAttention, which multiplies by its weight"):
        inject_adapters(attention, ["out_proj"], lambda _, linear: LoRALinear(linear, 2))
    with pytest.raises(ValueError, match=r"out_proj is inside nn.MultiheadAttention.*leave it out of the targets"):
        target_linears(attention, ["out_proj"])
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"linear1 is inside nn.TransformerEncoderLayer.*set_fastpath_enabled"):
        inject_adapters(model, ["linear1"], lambda _, linear: LoRALinear(linear, 2))
    torch.backends.mha.set_fastpath_enabled(False)
    adapter = inject_adapters(model, ["linear1"], lambda _, linear: LoRALinear(linear, 2))["layers.0.linear1"]
    nn.init.ones_(adapter.left)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.eval()
        adapted = model(x)
        merge_adapters(model)
        torch.testing.assert_close(model(x), adapted)


def test_parents_may_look_at_the_layer_that_an_adapter_replaced() -> None:
    model = Model()
    inject_adapters(model, ["embed"], lambda _, linear: EBLoRALinear(linear, 2))
    assert isinstance(model.embed, Adapter)
    assert (model.embed.in_features, model.embed.out_features) == (6, 8)
    assert model.embed.weight is model.embed.base.weight
    assert model.embed.bias is model.embed.base.bias


def test_a_pattern_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"target 'query\(' is no regular expression \(missing \), unterminated"):
        target_linears(nn.ModuleDict({"query": nn.Linear(2, 2)}), "query(")
