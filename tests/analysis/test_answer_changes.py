"""Changed answers on examples: equal to changed weights, and blind to padding."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis import AdapterSet, AdapterTables, bootstrap_interval, functional_drift
from analysis.activations import answer_changes, answer_intervals, input_drift, input_moments
from analysis.report import Subject, find


class Conv1D(nn.Module):
    """transformers' linear layer with a weight (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Decoder(nn.Module):
    """Tokens to logits, position by position."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix, self.conv = nn.Linear(width, width), Conv1D(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.conv(torch.tanh(self.mix(self.embed(input_ids))))))


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def updates(tasks: str = "ab", size: float = 0.5) -> AdapterSet:
    draw = torch.Generator().manual_seed(1)
    shapes = {"embed": (6, 11), "mix": (6, 6), "conv": (6, 6), "head": (11, 6)}

    def pair(m: int, n: int) -> tuple[Tensor, Tensor]:
        return size * torch.randn(m, 2, generator=draw), torch.randn(n, 2, generator=draw)

    return AdapterSet.from_factors({task: {name: pair(*shape) for name, shape in shapes.items()} for task in tasks})


def batch(seed: int, examples: int = 4, length: int = 7) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (examples, length), generator=draw)
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def merged(model: Decoder, adapters: AdapterSet, count: int) -> Decoder:
    """A copy of the model with the first updates in its weights: the dense twin."""
    torch.manual_seed(0)
    twin = Decoder()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for task in adapters.tasks[:count]:
            for _, layer, left, right in adapters.read(task, adapters.layers):
                change = left @ right.mT
                weight = twin.get_submodule(layer).get_parameter("weight")
                weight += change if layer in ("mix", "head") else change.mT
    return twin.double()


def dense(before: nn.Module, after: nn.Module, batch: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """The metrics of each example, one at a time and without its padding."""
    rows = []
    for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        tokens = tokens[mask.bool()]
        old, new = (net(tokens[None])[0, :-1].log_softmax(-1) for net in (before, after))
        rows.append(
            {
                "kl": (old.exp() * (old - new)).sum(-1).mean().item(),
                "top1_change": (old.argmax(-1) != new.argmax(-1)).double().mean().item(),
                "loss_before": nn.functional.nll_loss(old, tokens[1:]).item(),
                "loss_after": nn.functional.nll_loss(new, tokens[1:]).item(),
            }
        )
    return rows


def test_answers_equal_those_of_changed_weights(model: Decoder) -> None:
    adapters = updates("abc")
    table = answer_changes(model, adapters, {"a": [batch(0), batch(1)], "b": [batch(2)], "other": [batch(3)]})
    stages = list(dict.fromkeys(zip(table["data"], table["task_a"], table["task_b"], strict=True)))
    assert stages == [
        *(("a", "", "a"), ("a", "a", "b"), ("a", "a", "c"), ("b", "", "b"), ("b", "b", "c")),
        *(("other", "", "a"), ("other", "", "b"), ("other", "", "c")),
    ]
    seeds = {"a": (0, 1), "b": (2,), "other": (3,)}
    nets = {name: merged(model, adapters, count) for count, name in enumerate(["", "a", "b", "c"])}
    with torch.no_grad():
        for (data, before, after), rows in table.groupby(["data", "task_a", "task_b"]):
            expected = [row for seed in seeds[data] for row in dense(nets[before], nets[after], batch(seed))]
            assert rows["example"].nunique() == len(expected)
            for row in rows.itertuples():
                assert row.value == pytest.approx(expected[row.example][row.metric], rel=1e-4, abs=1e-6)


def test_the_model_is_as_it_was(model: Decoder) -> None:
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(batch(0)["input_ids"])
    answer_changes(model, updates(), {"a": [batch(0)]})
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(batch(0)["input_ids"]), before)


def test_labels_choose_the_positions_and_padding_does_not_count(model: Decoder) -> None:
    adapters, given = updates(), batch(0)
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, 3] = given["input_ids"][:, 3]  # one answer token per example, predicted at position 2
    table = answer_changes(model, adapters, {"a": [{**given, "labels": labels}]})
    nets = [merged(model, adapters, count) for count in (1, 2)]
    rows = table[(table["task_b"] == "b") & (table["metric"] == "loss_after")]["value"]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(nets[1](given["input_ids"])[:, 2], labels[:, 3], reduction="none")
    assert rows.to_numpy() == pytest.approx(expected.numpy(), rel=1e-4)
    given = {key: value for key, value in given.items() if key != "labels"}
    other = {**given, "input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 3)}
    plain, padded = (answer_changes(model, adapters, {"a": [one]}) for one in (given, other))
    assert set(plain["metric"]) == {"kl", "top1_change"}  # without labels there is no loss
    assert (plain["value"].to_numpy() == padded["value"].to_numpy()).all()


def test_classifiers_and_drift_of_weights_agree() -> None:
    torch.manual_seed(0)
    model, draw = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.Generator().manual_seed(2)
    pair = {"0": (torch.randn(8, 2, generator=draw), torch.randn(5, 2, generator=draw))}
    adapters, x = AdapterSet.from_factors({"a": pair}), torch.randn(16, 5, generator=draw)
    table = answer_changes(model, adapters, {"data": [x[:10], x[10:]]})
    drift = functional_drift(model, adapters, {"data": [x]}).set_index("metric")["value"]
    means = table.groupby("metric")["value"].mean()
    assert means["kl"] == pytest.approx(drift["kl"], rel=1e-5)
    assert means["top1_change"] == drift["top1_change"]
    assert set(means.index) == {"kl", "top1_change"}  # no labels: no loss


def test_intervals_are_over_examples(model: Decoder) -> None:
    table = answer_changes(model, updates(), {"a": [batch(seed) for seed in range(4)]})
    result = answer_intervals(table).set_index(["task_b", "metric"])
    rows = table[table["task_b"] == "b"].pivot(index="example", columns="metric", values="value")
    change = (rows["loss_after"] - rows["loss_before"]).to_numpy()
    row = result.loc[("b", "loss_change")]
    assert row["value"] == pytest.approx(change.mean(), rel=1e-12)
    assert (row["ci_low"], row["ci_high"]) == bootstrap_interval(change, samples=2000)
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert row["examples"] == 16


def test_two_updates_at_chance_that_destroy_answers_lead_the_page() -> None:
    """The case of the issue: no overlap beyond chance, and the first task is lost all the same."""
    draw = torch.Generator().manual_seed(0)
    n, classes = 64, 4
    model = nn.Sequential(nn.Linear(n, classes, bias=False))
    nn.init.zeros_(model[0].weight)
    centres = torch.linalg.qr(torch.randn(n, classes, generator=draw)).Q
    noise = torch.linalg.qr(torch.randn(n, classes, generator=draw)).Q
    a = (10 * torch.eye(classes), centres)  # reads the class off its direction
    b = (300 * torch.linalg.qr(torch.randn(classes, classes, generator=draw)).Q, noise)  # large, random directions
    adapters = AdapterSet.from_factors({"a": {"0": a}, "b": {"0": b}})
    labels = torch.arange(400) % classes
    x = centres.T[labels] + 0.05 * torch.randn(400, n, generator=draw)
    batches = [{"x": x[i : i + 100], "labels": labels[i : i + 100]} for i in range(0, 400, 100)]

    def forward(net: nn.Module, given: Any) -> Tensor:
        logits = net(given["x"])
        assert isinstance(logits, Tensor)
        return logits

    intervals = answer_intervals(answer_changes(model, adapters, {"a": batches}, forward=forward))
    tables = AdapterTables(adapters)
    first, *others = find([Subject("mine", None, tables, intervals)])
    rows = intervals[intervals["task_b"] == "b"].set_index("metric")
    assert rows.loc["loss_before", "value"] < 0.1
    assert rows.loc["loss_change", "ci_low"] > 0.5
    assert (first.kind, first.level) == ("answers", "act")
    assert (
        f"from {rows.loc['loss_before', 'value']:.2f} to {rows.loc['loss_after', 'value']:.2f} nats" in first.headline
    )
    kinds = {one.kind: one.level for one in others}
    assert kinds["relations"] == "fine"  # what would have reassured
    assert "unknown" not in kinds


def test_bad_input_is_named(model: Decoder) -> None:
    with pytest.raises(ValueError, match=r"1 of 4 layers .* the first is mix"):
        answer_changes(nn.ModuleDict({k: v for k, v in model.named_children() if k != "mix"}), updates(), {"a": [0]})
    model.mix = nn.Linear(5, 6)
    with pytest.raises(ValueError, match=r"mix: the update has 6 inputs and 6 outputs, .* Linear with 5 inputs"):
        answer_changes(model, updates(), {"a": [batch(0)]})
    model.mix = nn.Bilinear(6, 6, 6)
    with pytest.raises(ValueError, match=r"mix: .* a Bilinear"):
        answer_changes(model, updates(), {"a": [batch(0)]})


def test_data_without_examples_or_tokens_is_named(model: Decoder) -> None:
    with pytest.raises(ValueError, match="'mine' has no batches"):
        answer_changes(model, updates(), {"a": [batch(0)], "mine": []})
    one = {key: value[:, :1] for key, value in batch(0).items()}  # nothing comes before its only token
    with pytest.raises(ValueError, match="'a': an example has no position"):
        answer_changes(model, updates(), {"a": [one]})
    inner = AdapterSet.from_factors({"a": {"inner.mix": (torch.ones(6, 1), torch.ones(6, 1))}})
    with pytest.raises(TypeError, match="returned a dict"):
        answer_changes(Wrapped(model), inner, {"a": [batch(0)]})


class Wrapped(nn.Module):
    """Returns a mapping, as no model of transformers does by default."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"scores": self.inner(**inputs)}


def test_drift_of_layers_equals_dense_products(model: Decoder) -> None:
    adapters, given = updates(), [batch(0), batch(1)]
    moments = {"a": input_moments(model, adapters, given, groups=8)}
    table = input_drift(adapters, moments).set_index(["task", "layer"])
    tokens = torch.cat([one["input_ids"][one["attention_mask"].bool()] for one in given])
    with torch.no_grad():
        hidden = model.embed(tokens)
        inputs = {
            "embed": nn.functional.one_hot(tokens, 11).float(),
            "mix": hidden,
            "conv": torch.tanh(model.mix(hidden)),
        }
        inputs["head"] = torch.tanh(model.conv(inputs["conv"]))
        sums = {}
        for task, layer, left, right in adapters:
            weight = model.get_submodule(layer).get_parameter("weight")
            weight = weight if layer in ("mix", "head") else weight.T
            x, change = inputs[layer], left @ right.T
            top, bottom = (x @ change.T).square().sum(), (x @ weight.T).square().sum()
            random = change.square().sum() * x.square().sum() / x.shape[1]
            assert table.loc[(task, layer), "value"] == pytest.approx((top / bottom).item(), rel=1e-4)
            assert table.loc[(task, layer), "over_random"] == pytest.approx((top / random).item(), rel=1e-4)
            assert table.loc[(task, layer), "ci_low"] < (top / bottom).item() < table.loc[(task, layer), "ci_high"]
            sums.setdefault(task, []).append((top.item(), bottom.item()))
    for task, parts in sums.items():
        total = sum(top for top, _ in parts) / sum(bottom for _, bottom in parts)
        assert table.loc[(task, "total"), "value"] == pytest.approx(total, rel=1e-4)


def test_the_interval_of_drift_covers_new_data(model: Decoder) -> None:
    """Held-out batches lie inside: at least 90 of 100 for 95 %, with 32 groups."""
    adapters = updates("a")
    whole = input_moments(model, adapters, [batch(10_000, examples=4000)], groups=32)
    truth = input_drift(adapters, {"a": whole}).set_index("layer")["value"]["total"]
    inside = 0
    for seed in range(100):
        table = input_drift(adapters, {"a": input_moments(model, adapters, [batch(seed, examples=64)], groups=32)})
        row = table.set_index("layer").loc["total"]
        inside += row["ci_low"] <= truth <= row["ci_high"]
    assert 88 <= inside <= 100
