"""The update read from a PEFT folder is the update that PEFT itself merges."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import AdapterSet, Checkpoint, flattened, interference_table
from analysis.tables import intruder_dimensions, relation_to_base

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(10, 12), "v": nn.Linear(10, 7)}) for _ in range(2)])
        self.head = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class TransposedModel(nn.Module):
    def __init__(self, outputs: int = 12) -> None:
        super().__init__()
        self.c_attn = pytorch_utils.Conv1D(outputs, 10)  # its weight is stored (in, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("weight")}


def train(model: nn.Module) -> None:
    """Any non-zero factors will do; PEFT starts with B = 0."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rank_stabilisation_are_those_of_peft(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    model = Model()
    before = weights(model)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q", "v", "head"],
        use_rslora=rslora,
        rank_pattern={"layers.1.q": 2, "v": 3},
        alpha_pattern={r"layers\.\d\.q": 5, "head": 1},
    )
    adapted = peft.get_peft_model(model, config)
    train(adapted)
    adapted.save_pretrained(tmp_path / "task")
    after = weights(adapted.merge_and_unload())
    adapters = AdapterSet.load(tmp_path / "task")
    assert adapters.layers == ("head", "layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
    assert [adapters.shape("task", layer)[2] for layer in adapters.layers] == [4, 4, 3, 2, 3]
    for _, layer, left, right in adapters:
        # merging rounds W + ΔW to float32, entries of a few units: 1e-6 is two roundings
        torch.testing.assert_close(
            left @ right.T, after[f"{layer}.weight"] - before[f"{layer}.weight"], rtol=0, atol=3e-6
        )


def test_weights_stored_transposed_give_updates_as_out_times_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TransposedModel()
    before = weights(model)["c_attn.weight"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, config)
    train(adapted)
    adapted.save_pretrained(tmp_path / "task")
    after = weights(adapted.merge_and_unload())["c_attn.weight"]
    left, right = AdapterSet.load(tmp_path / "task").factors("task", "c_attn")
    assert (left.shape, right.shape) == ((12, 3), (10, 3))
    torch.testing.assert_close((left @ right.T).T, after - before, rtol=0, atol=3e-6)  # rounding, as above


def test_square_weights_stored_transposed_are_turned_before_they_meet_updates(tmp_path: Path) -> None:
    """The base's left singular vectors are axes, its right ones are not: the wrong way round, all are intruders."""
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(10, 10, generator=draw)).Q
    weight = torch.diag(torch.linspace(2.0, 1.0, 10)) @ turn.T  # outputs times inputs
    for task in ("one", "two"):
        model = TransposedModel(10)
        with torch.no_grad():
            model.c_attn.weight.copy_(weight.T)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(30 * torch.eye(10, 2) if "lora_B" in name else torch.randn(2, 10, generator=draw))
        adapted.save_pretrained(tmp_path / task)
    save_file({"c_attn.weight": weight.T.contiguous()}, tmp_path / "base.safetensors")
    base = Checkpoint.load(tmp_path / "base.safetensors")
    paths = (tmp_path / "one", tmp_path / "two")
    loaded = AdapterSet.load(*paths)
    again = AdapterSet.load(flattened(loaded, 0.0).save(tmp_path / "saved"))
    moment = torch.diag(torch.linspace(5.0, 0.01, 10))
    for adapters in (loaded, again, AdapterSet.load(*paths, tasks=["one", "two"], common=True)):
        assert adapters.transposed == {"c_attn"}
        changes = {task: left @ right.T for task, _, left, right in adapters}
        table = relation_to_base(adapters, base)
        found = table[(table["metric"] == "intruder_dimensions") & (table["update"] == "task")]["value"].tolist()
        assert found == [intruder_dimensions(weight, change) for change in changes.values()]
        assert max(found) < min(intruder_dimensions(weight.T, change) for change in changes.values())
        drift = interference_table(adapters, covariances={"one": {"c_attn": moment}}, base=base)
        rows = drift[(drift["metric"] == "activation_drift_relative") & (drift["layer"] == "c_attn")]
        change = changes["two"]
        exact = (change @ moment @ change.T).trace() / (weight @ moment @ weight.T).trace()
        assert rows["value"].item() == pytest.approx(exact.item(), rel=1e-5)  # traces in float32 here
    straight = AdapterSet.load(*paths, transposed="^other$")  # the pattern decides where it is given
    assert straight.transposed == frozenset()


def test_the_shape_decides_where_it_can(tmp_path: Path) -> None:
    """One flag stands for all of a model's layers, also for those that are stored the usual way."""
    weights_ = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(3, 4)}
    save_file(weights_, tmp_path / "base.safetensors")
    base = Checkpoint.load(tmp_path / "base.safetensors")
    for transposed in (True, False):
        torch.testing.assert_close(base.weight("a", (4, 3), transposed=transposed), weights_["a.weight"])
        torch.testing.assert_close(base.weight("b", (4, 3), transposed=transposed), weights_["b.weight"].T)
