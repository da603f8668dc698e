"""Interventions that need a base or a model do to an update what a dense computation says."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import AdapterSet, Checkpoint, flattened, projected_off, truncated
from analysis.activations import component_effects
from analysis.changes import effect_table, for_layers, intruders_shrunk, reweighted
from analysis.numerics.decomposition import triples


def one(seed: int, m: int = 12, n: int = 10, r: int = 3, scale: float = 1.0) -> AdapterSet:
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, r, generator=draw), torch.randn(n, r, generator=draw)
    return AdapterSet.from_factors({"a": {"x": (scale * left, right)}})


def dense(adapters: AdapterSet, layer: str = "x") -> Tensor:
    left, right = adapters.factors("a", layer)
    return left.double() @ right.double().T


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_intruders_lose_their_share_as_a_dense_computation_says(tmp_path: Path, share: float) -> None:
    adapters = one(0, scale=3.0)
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(9)) * torch.logspace(1, -1, 10)
    save_file({"x.weight": weight}, tmp_path / "base.safetensors")
    after = intruders_shrunk(adapters, Checkpoint.load(tmp_path / "base.safetensors"), share, top=5, threshold=0.6)
    known = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    u, sigma, vt = torch.linalg.svd(weight.double() + dense(adapters), full_matrices=False)
    expected, count = dense(adapters), 0
    for j in range(5):
        if float((known.T @ u[:, j]).abs().max()) < 0.6:
            expected, count = expected - share * sigma[j] * torch.outer(u[:, j], vt[j]), count + 1
    assert count > 0
    torch.testing.assert_close(dense(after), expected, rtol=0, atol=1e-5)
    assert after.shape("a", "x")[2] <= 3 + count


def test_peft_reduces_the_same_intruders_where_the_rank_suffices(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12, bias=False))
    weight = model[0].weight.detach().clone()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=10, lora_alpha=10, target_modules=["0"]))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    layer = tuned.base_model.model[0]
    factors = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach().T
    adapters = AdapterSet.from_factors({"a": {"0": factors}})
    reduce_intruder_dimension(tuned, mitigation_lambda=0.75, logging_sink=None)
    save_file({"0.weight": weight}, tmp_path / "base.safetensors")
    after = intruders_shrunk(adapters, Checkpoint.load(tmp_path / "base.safetensors"), 0.25)
    changed = dense(after, "0").float()
    assert not torch.allclose(changed, dense(adapters, "0").float(), atol=0.01)
    torch.testing.assert_close(changed, layer.get_delta_weight("intruder_reduced"), rtol=1e-3, atol=1e-3)


def test_a_truncated_update_keeps_its_norm_and_directions() -> None:
    adapters = one(1)
    u, sigma, vt = torch.linalg.svd(dense(adapters), full_matrices=False)
    expected = (u[:, :2] * sigma[:2]) @ vt[:2]
    torch.testing.assert_close(dense(truncated(adapters, 2, same_norm=False)), expected, rtol=0, atol=1e-5)
    scaled = expected * sigma[:3].norm() / sigma[:2].norm()
    torch.testing.assert_close(dense(truncated(adapters, 2)), scaled, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="rank is 0"):
        truncated(adapters, 0)


def test_a_projected_update_does_nothing_on_protected_inputs() -> None:
    adapters = one(2)
    basis = torch.linalg.qr(torch.randn(10, 4, generator=torch.Generator().manual_seed(3))).Q
    projector = (basis @ basis.T).double()
    for share in (0.0, 0.5, 1.0):
        after = projected_off(adapters, {"x": basis}, share)
        expected = dense(adapters) @ (torch.eye(10).double() - share * projector)
        torch.testing.assert_close(dense(after), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not orthonormal"):
        projected_off(adapters, {"x": 2 * basis})


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(10, 12)
        self.y = nn.Linear(12, 4)

    def forward(self, inputs: Tensor) -> Any:
        class Output:
            logits = self.y(torch.tanh(self.x(inputs)))

        return Output


def batches(count: int, examples: int = 6) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return [
        {
            "inputs": torch.randn(examples, 10, generator=draw),
            "labels": torch.randint(4, (examples,), generator=draw),
        }
        for _ in range(count)
    ]


def test_effects_are_the_derivatives_of_the_loss_of_each_example() -> None:
    torch.manual_seed(0)
    model, adapters = Classifier().requires_grad_(False), one(5, scale=0.3)
    found = component_effects(model, adapters, "a", batches(2))["x"]
    assert found.shape == (12, 3)
    left, right = adapters.factors("a", "x")
    update = triples(left.double()[None], right.double()[None])
    kept, step = model.x.weight.clone(), 1e-3
    data = batches(2)
    inputs, labels = (torch.cat([batch[key] for batch in data]) for key in ("inputs", "labels"))
    for component in range(3):
        losses = []
        for sign in (1, -1):
            sigma = update.values[0].clone()
            sigma[component] *= 1 + sign * step
            twin = Classifier().double()
            twin.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
            twin.x.weight.data += (update.left[0] * sigma) @ update.right[0].T
            logits = twin(inputs.double()).logits
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(found[:, component], slope, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.x.weight, kept)
    assert not model.x._forward_hooks


def test_components_beyond_chance_shrink_or_grow_at_the_same_norm() -> None:
    adapters = one(6)
    draw = np.random.default_rng(0)
    effects = torch.tensor(draw.normal(size=(40, 3))) + torch.tensor([2.0, 0.0, -2.0])
    table = effect_table({"a": {"x": effects}})
    assert (table["p_holm"] < 0.05).tolist() == [True, False, True]
    after = reweighted(adapters, table, 0.5)
    sigma = torch.linalg.svdvals(dense(adapters))[:3]
    expected = sigma * torch.tensor([0.5, 1.0, 1.5])
    expected = expected * sigma.norm() / expected.norm()
    values = torch.linalg.svdvals(dense(after))[:3]
    torch.testing.assert_close(values, expected.sort(descending=True).values, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2 examples are too few"):
        effect_table({"a": {"x": effects[:2]}})
    with pytest.raises(ValueError, match=r"gamma is 1\.0"):
        reweighted(adapters, table, 1.0)


def test_components_that_only_their_own_p_marks_keep_their_size() -> None:
    adapters = one(6)
    rows = {"task": "a", "layer": "x", "component": [1, 2, 3], "effect": [1.0, 1.0, -1.0]}
    table = pd.DataFrame({**rows, "p": [0.03, 0.2, 0.04], "p_holm": [0.09, 0.2, 0.09]})
    torch.testing.assert_close(dense(reweighted(adapters, table, 0.5)), dense(adapters))


def test_effects_by_chance_are_called_effects_in_at_most_five_percent() -> None:
    draw = np.random.default_rng(1)
    alarms = [
        bool((effect_table({"a": {"x": torch.tensor(draw.normal(size=(16, 8)))}})["p_holm"] < 0.05).any())
        for _ in range(200)
    ]
    assert np.mean(alarms) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5  # three standard errors


def test_only_the_chosen_layers_change() -> None:
    pair = {"h.0": one(7).factors("a", "x"), "h.1": one(8).factors("a", "x")}
    adapters = AdapterSet.from_factors({"a": pair})
    after = for_layers(adapters, lambda part: flattened(part, 1.0), ["h.1"])
    assert torch.equal(after.factors("a", "h.0")[0], adapters.factors("a", "h.0")[0])
    values = torch.linalg.svdvals(dense(after, "h.1"))[:3]
    torch.testing.assert_close(values, values.mean().expand(3), rtol=1e-5, atol=0)


def test_batches_without_labels_or_without_a_layer_are_refused() -> None:
    model = Classifier()
    with pytest.raises(ValueError, match="no 'labels'"):
        component_effects(model, one(0), "a", [{"inputs": torch.randn(2, 10)}])
    with pytest.raises(ValueError, match="no batches"):
        component_effects(model, one(0), "a", [])
    other = AdapterSet.from_factors({"a": {"z": one(0).factors("a", "x")}})
    with pytest.raises(ValueError, match="1 of 1 layers are no modules of the model, such as z"):
        component_effects(model, other, "a", batches(1))
    assert isinstance(effect_table({"a": {"x": torch.randn(5, 2)}}), pd.DataFrame)
    layer = one(0).factors("a", "x")
    partly = AdapterSet.from_factors({"a": {"x": layer, "z": layer}})
    with pytest.raises(ValueError, match="1 of 2 layers are no modules of the model, such as z"):
        component_effects(model, partly, "a", [{"inputs": torch.randn(2, 10), "labels": torch.zeros(2).long()}])
