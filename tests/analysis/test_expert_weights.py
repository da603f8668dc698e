"""LoRA on bare parameters (PEFT's ``target_parameters``): one update per expert, the one that PEFT merges."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis import AdapterSet, Checkpoint, flattened, spectrum_table
from analysis.adapters.merging import merged

peft = pytest.importorskip("peft")
EXPERTS, HIDDEN, INNER = 3, 6, 4


class Experts(nn.Module):
    """As in transformers: weights (experts, outputs, inputs), or (experts, inputs, outputs) if transposed."""

    def __init__(self, transposed: bool, marked: bool, names: tuple[str, str]) -> None:
        super().__init__()
        if marked:
            self.is_transposed = transposed
        self.transposed = transposed
        for name, (m, n) in zip(names, ((2 * INNER, HIDDEN), (HIDDEN, INNER)), strict=True):
            size = (EXPERTS, n, m) if transposed else (EXPERTS, m, n)
            setattr(self, name, nn.Parameter(torch.randn(*size)))


class Block(nn.Module):
    def __init__(self, *options: object) -> None:
        super().__init__()
        self.experts = Experts(*options)
        self.router = nn.Linear(HIDDEN, EXPERTS)


class Model(nn.Module):
    def __init__(
        self, transposed: bool = False, marked: bool = True, names: tuple[str, str] = ("gate_up_proj", "down_proj")
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(transposed, marked, names) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x


def saved(folder: Path, model: nn.Module, **options: object) -> dict[str, Tensor]:
    """A folder by PEFT, and the change of every parameter by merging."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    after = adapted.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before}


def assert_updates(adapters: AdapterSet, changes: dict[str, Tensor], *, transposed: bool = False) -> None:
    for task, layer, left, right in adapters:
        dense = left.double() @ right.double().mT
        start, _, name = layer.rpartition(".")
        if start.rpartition(".")[2].isdecimal() and ".experts." in layer:
            module, _, index = start.rpartition(".")
            change = changes[f"{module}.{name}"][int(index)]
            change = change.mT if transposed else change
        else:
            change = changes[f"{layer}.weight"]
        # merging rounds W + ΔW to float32, entries of a few units: 3e-6 is two roundings
        torch.testing.assert_close(dense, change.double(), rtol=0, atol=3e-6, msg=f"{task} {layer}")


BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT looks at modules only
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], ["layers.1.experts.down_proj"]])
@pytest.mark.parametrize("transposed", [False, True])
def test_updates_of_experts_are_those_that_peft_merges(tmp_path: Path, targets: list[str], transposed: bool) -> None:
    torch.manual_seed(0)
    model = Model(transposed)
    options = {"target_modules": ["router"], "target_parameters": targets, "rank_pattern": {"0.experts.down_proj": 1}}
    changes = saved(tmp_path / "task", model, **options)
    adapters = AdapterSet.load(tmp_path / "task")
    experts = {
        f"layers.{block}.experts.{index}.{target.rpartition('.')[2]}"
        for target in targets
        for index in range(EXPERTS)
        for block in range(2)
        if not target.startswith("layers") or target.startswith(f"layers.{block}")
    }
    assert set(adapters.layers) == experts | {"layers.0.router", "layers.1.router"}
    assert_updates(adapters, changes, transposed=transposed)
    for layer in experts:
        m, n, r = adapters.shape("task", layer)
        assert (m, n) == ((2 * INNER, HIDDEN) if "gate_up" in layer else (HIDDEN, INNER))
        assert r == (1 if layer.startswith("layers.0") and "down" in layer else 2)
    assert len(spectrum_table(adapters))


def test_experts_that_peft_takes_for_transposed_are_outputs_by_inputs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    changes = saved(tmp_path / "task", Model(True, marked=False), target_modules=[], target_parameters=BOTH)
    adapters = AdapterSet.load(tmp_path / "task")
    assert_updates(adapters, changes, transposed=True)
    assert adapters.shape("task", "layers.0.experts.2.gate_up_proj") == (2 * INNER, HIDDEN, 2)


def test_parameters_of_unknown_names_need_the_base(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Model(names=("w1", "w2"))
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    changes = saved(tmp_path / "task", model, target_modules=[], target_parameters=["experts.w1", "experts.w2"])
    with pytest.raises(ValueError, match=r"layers\.0\.experts has 2 pairs of factors for w1, w2 .*give the base"):
        AdapterSet.load(tmp_path / "task")
    assert_updates(AdapterSet.load(tmp_path / "task", base=tmp_path / "base.safetensors"), changes)


def test_the_base_weight_of_an_expert_is_its_matrix(tmp_path: Path) -> None:
    model = Model()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    weight = Checkpoint.load(tmp_path / "base.safetensors").weight("layers.1.experts.2.down_proj", (HIDDEN, INNER))
    assert torch.equal(weight, model.layers[1].experts.down_proj[2])
    with pytest.raises(ValueError, match=r"layers\.1\.experts\.3\.down_proj"):
        Checkpoint.load(tmp_path / "base.safetensors").weight("layers.1.experts.3.down_proj", (HIDDEN, INNER))


@pytest.mark.parametrize("changes", [{"r": 4}, {"target_parameters": "experts.down_proj"}, {"target_parameters": [3]}])
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    saved(tmp_path / "task", Model(), target_modules=[], target_parameters=BOTH)
    path = tmp_path / "task" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="no multiple of the rank 4" if "r" in changes else "target_parameters"):
        AdapterSet.load(tmp_path / "task")


@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]])
@pytest.mark.parametrize("transposed", [False, True])
def test_saved_updates_of_experts_load_into_peft(tmp_path: Path, targets: list[str], transposed: bool) -> None:
    torch.manual_seed(3)
    model = Model(transposed, marked=transposed)
    again = Model(transposed, marked=transposed)
    again.load_state_dict(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changes = saved(tmp_path / "task", model, target_modules=["router"], target_parameters=targets)
    adapters = AdapterSet.load(tmp_path / "task", layers="experts|layers.0.router")
    folder = adapters.save(tmp_path / "saved") / "01-task"
    assert "layers.1.router" not in str(sorted(load_file(folder / "adapter_model.safetensors")))
    after = peft.PeftModel.from_pretrained(again, folder).merge_and_unload().state_dict()
    for name, change in changes.items():
        expected = torch.zeros_like(change) if name.startswith("layers.1.router") else change
        torch.testing.assert_close(after[name] - before[name], expected, rtol=0, atol=5e-6, msg=name)


def test_changed_and_merged_experts_stay_parameters(tmp_path: Path) -> None:
    torch.manual_seed(4)
    for task in ("one", "two"):
        saved(tmp_path / task, Model(), target_modules=[], target_parameters=BOTH)
    adapters = AdapterSet.load(tmp_path / "one", tmp_path / "two")
    both = merged(adapters, {"sum": {"one": 1.0, "two": 1.0}}).adapters
    for changed in (flattened(adapters, 1.0), both):
        folder = next(changed.save(tmp_path / f"saved-{len(changed.tasks)}").glob("01-*"))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert sorted(config["target_parameters"])[0] == "layers.0.experts.down_proj"
        assert config["target_modules"] == []
        again = AdapterSet.load(folder)
        for _, layer, left, right in again:
            torch.testing.assert_close(left @ right.T, torch.matmul(*_factors(changed, layer)), rtol=1e-4, atol=1e-4)


def _factors(adapters: AdapterSet, layer: str) -> tuple[Tensor, Tensor]:
    left, right = adapters.factors(adapters.tasks[0], layer)
    return left, right.T
