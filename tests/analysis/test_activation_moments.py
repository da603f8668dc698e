"""Moments of layers' inputs in the coordinates of updates, against dense sums over the same tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis import AdapterSet, input_covariances
from analysis.activations import input_moments


class Model(nn.Module):
    """Embedding, two linear layers, and a head that reads the first position."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.words = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.head = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(6)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=draw)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.norm(self.down(self.up(self.words(input_ids)).tanh()))
        head: Tensor = self.head(hidden[:, 0])
        return head


SHAPES = {"words": (6, 11), "up": (9, 6), "down": (6, 9), "head": (4, 6)}


def adapters(*ranks: int, shapes: dict[str, tuple[int, int]] = SHAPES) -> AdapterSet:
    draw = torch.Generator().manual_seed(4)
    return AdapterSet.from_factors(
        {
            f"t{rank}": {
                layer: (torch.randn(m, rank, generator=draw), torch.randn(n, rank, generator=draw))
                for layer, (m, n) in shapes.items()
            }
            for rank in ranks
        }
    )


def batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    ids = [torch.randint(11, (3, 5), generator=draw), torch.randint(11, (2, 4), generator=draw)]
    masks = [torch.ones(3, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])]
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def dense(model: Model, layer: str) -> tuple[list[Tensor], list[Tensor]]:
    """Per example: the layer's inputs (tokens, n) and its outputs without the bias, without padding, one at a time."""
    inputs, outputs = [], []
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()][None]
            words = model.words(ids)[0]
            up = model.up(words)
            down = model.down(up.tanh())
            x = {
                "words": nn.functional.one_hot(ids[0], 11).float(),
                "up": words,
                "down": up.tanh(),
                "head": model.norm(down)[:1],
            }[layer]
            module: Any = getattr(model, layer)
            inputs.append(x.double())
            outputs.append(x.double() @ (module.weight if layer == "words" else module.weight.mT).double())
    return inputs, outputs


@pytest.mark.parametrize("layer", SHAPES)
@torch.no_grad()
def test_moments_are_sums_over_the_tokens_of_each_example(layer: str) -> None:
    model, updates = Model(), adapters(2, 3)
    moments = input_moments(model, updates, batches())
    inputs, outputs = dense(model, layer)
    (left, a), (_, b) = (tuple(each.double() for each in updates.factors(task, layer)) for task in updates.tasks)
    for task, right in (("t2", a), ("t3", b)):
        twin = torch.stack([(x @ right).mT @ (x @ right) for x in inputs])
        torch.testing.assert_close(moments.block(layer, task), twin, rtol=1e-5, atol=1e-6)
    crossed = torch.stack([(x @ a).mT @ (x @ b) for x in inputs])
    torch.testing.assert_close(moments.block(layer, "t2", "t3"), crossed, rtol=1e-5, atol=1e-5)
    change = torch.stack([(x @ a @ left.mT).square().sum() for x in inputs])
    torch.testing.assert_close(moments.change(layer, "t2", left), change, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        moments.energies[layer], torch.stack([x.square().sum() for x in inputs]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        moments.outputs[layer], torch.stack([y.square().sum() for y in outputs]), rtol=1e-5, atol=0
    )
    assert moments.counts[layer].tolist() == [len(x) for x in inputs]


def test_groups_divide_the_examples_and_sum_to_the_same() -> None:
    alone, grouped = (input_moments(Model(), adapters(2), batches(), groups=groups) for groups in (32, 2))
    assert (alone.blocks["up"].shape[0], grouped.blocks["up"].shape[0]) == (5, 2)
    torch.testing.assert_close(grouped.blocks["up"][0], alone.blocks["up"][[0, 2, 4]].sum(0))
    torch.testing.assert_close(grouped.blocks["up"][1], alone.blocks["up"][[1, 3]].sum(0))


def test_moments_agree_with_covariances_of_the_same_inputs() -> None:
    model, updates = Model(), adapters(2)
    x = [{"input_ids": batch["input_ids"]} for batch in batches()]
    moments = input_moments(model, updates, x)
    covariance = input_covariances(model, ["up"], x)["up"]
    right = updates.factors("t2", "up")[1].double()
    twin = right.mT @ covariance @ right * moments.counts["up"].sum()
    torch.testing.assert_close(moments.block("up", "t2").sum(0), twin, rtol=1e-5, atol=1e-6)


def test_layers_without_inputs_are_named_with_a_reason() -> None:
    shapes = {"up": (9, 6), "norm": (6, 6), "other": (3, 3)}
    moments = input_moments(Model(), adapters(2, shapes=shapes), batches())
    assert moments.layers == ("up",)
    assert set(moments.left_out) == {"norm", "other"}
    assert "LayerNorm" in moments.left_out["norm"]
    with pytest.raises(ValueError, match="none of 1 layers has inputs to measure; other"):
        input_moments(Model(), adapters(2, shapes={"other": (3, 3)}), batches())
    with pytest.raises(ValueError, match="none of 4 layers has inputs to measure; down: no batch"):
        input_moments(Model(), adapters(2), [])


def test_names_of_another_version_of_the_model_are_found() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = nn.ModuleDict({"model": nn.ModuleDict({"up": nn.Linear(6, 9)})})

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.language_model["model"]["up"](x)  # type: ignore[index, operator]
            return out

    updates = adapters(2, shapes={"model.language_model.up": (9, 6)})
    assert input_moments(Wrapped(), updates, [torch.ones(2, 6)]).layers == ("model.language_model.up",)


def test_rearranged_rows_count_as_one_example_and_padding_among_them_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 9)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.up(x.flatten(0, 1)[:7])
            return out

    updates, x = adapters(2, shapes={"up": (9, 6)}), torch.randn(2, 4, 6)
    mask = torch.ones(2, 4)
    moments = input_moments(Experts(), updates, [{"x": x, "attention_mask": mask}])
    assert moments.counts["up"].tolist() == [7.0]
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="up receives 7 rows for 2 examples"):
        input_moments(Experts(), updates, [{"x": x, "attention_mask": mask}])


def test_an_update_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="up has inputs of width 6, its update has 5"):
        input_moments(Model(), adapters(2, shapes={"up": (9, 5)}), batches())
    with pytest.raises(ValueError, match="groups is 0"):
        input_moments(Model(), adapters(2), batches(), groups=0)
