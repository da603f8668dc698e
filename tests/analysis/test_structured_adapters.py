"""Updates of PEFT's methods besides LoRA equal what PEFT merges, computed densely in double precision."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis import AdapterSet, AdapterTables

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
ROUNDING = 1e-5
"""Relative error allowed for factors in single precision."""


class Model(nn.Module):
    """Linear layers of three shapes, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(12, 16), "v": nn.Linear(12, 8)}) for _ in range(2)])
        self.square = nn.Linear(16, 16)
        self.conv = nn.Conv2d(4, 6, 3)
        self.narrow = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(8, 6, 3)
        self.embed = nn.Embedding(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part["q"](x) + part["v"](x).sum(-1, keepdim=True) for part in self.h], -1)


def save_base(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def saved(folder: Path, config: Any, model: nn.Module | None = None) -> tuple[dict[str, Tensor], Path]:
    """Weights after PEFT's merge less those before it, both in float64, and the base checkpoint."""
    torch.manual_seed(0)
    model = model or Model()
    base = save_base(folder.parent / f"{folder.name}-base", model)
    with warnings.catch_warnings():  # PEFT has no CUDA kernels here, and adjusts sizes
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    prefix = adapted.base_model.prefix
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if prefix in name and "ranknum" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    before = {name: value.double() for name, value in adapted.get_base_model().state_dict().items()}
    after = adapted.double().merge_and_unload().state_dict()
    changes = {}
    for name, value in after.items():
        own = name.replace(".weight", ".base_layer.weight")
        if name.endswith(".weight") and own in before:
            changes[name.removesuffix(".weight")] = (value - before[own]).flatten(1)
    return changes, base


def check(adapters: AdapterSet, changes: dict[str, Tensor], flipped: tuple[str, ...] = ()) -> None:
    assert set(adapters.layers) == set(changes)
    for task, layer, left, right in adapters:
        exact = changes[layer].mT if layer in flipped else changes[layer]
        m, n, r = adapters.shape(task, layer)
        assert (left.shape, right.shape, exact.shape) == ((m, r), (n, r), (m, n))
        assert left.dtype == right.dtype == torch.float32
        error = torch.linalg.matrix_norm(left.double() @ right.double().mT - exact)
        assert error <= ROUNDING * torch.linalg.matrix_norm(exact), layer


ALL = ["q", "v", "square", "conv", "narrow"]
LINEAR = ["q", "v", "square"]
KERNELS = [*ALL, "line"]
WITHOUT_BASE: dict[str, Callable[[], Any]] = {
    "lokr": lambda: peft.LoKrConfig(
        r=2, alpha=5, target_modules=KERNELS, rank_pattern={"v": 1}, alpha_pattern={"q": 3}
    ),
    "lokr-both": lambda: peft.LoKrConfig(
        r=1, alpha=5, target_modules=ALL, decompose_both=True, use_effective_conv2d=True, decompose_factor=4
    ),
    "lokr-full": lambda: peft.LoKrConfig(r=8, alpha=5, target_modules=ALL),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=5, target_modules=ALL, rank_pattern={"v": 1, "square": 4}),
    "loha-tucker": lambda: peft.LoHaConfig(r=2, alpha=5, target_modules=KERNELS, use_effective_conv2d=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, target_modules=LINEAR),
    "delora": lambda: peft.DeloraConfig(r=3, delora_lambda=5, target_modules=LINEAR),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, alpha=5, target_modules=LINEAR),
    "gralora-hybrid": lambda: peft.GraloraConfig(r=4, gralora_k=4, hybrid_r=2, alpha=5, target_modules=LINEAR),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=LINEAR),
}
WITH_BASE: dict[str, Callable[[], Any]] = {
    "oft": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=[*ALL, "embed"], use_cayley_neumann=False),
    "oft-neumann": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ALL, num_cayley_neumann_terms=6),
    "oft-shared": lambda: peft.OFTConfig(oft_block_size=4, target_modules=[*ALL, "embed"], block_share=True),
    "oft-constrained": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=[*ALL, "embed"], coft=True, eps=0.3, use_cayley_neumann=False
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=[*LINEAR, "conv", "narrow"]),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=LINEAR),
    "ia3": lambda: peft.IA3Config(target_modules=[*LINEAR], feedforward_modules=["v"]),
    "ia3-kernels": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=["v", "conv"]),
    "ia3-pattern": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules="conv|.*rrow"),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=[*LINEAR, "conv"]),
    "hra-gs": lambda: peft.HRAConfig(r=4, target_modules=LINEAR, apply_GS=True),
    "road-1": lambda: peft.RoadConfig(group_size=8, target_modules=LINEAR),
    "road-2": lambda: peft.RoadConfig(variant="road_2", group_size=4, target_modules=LINEAR),
    "road-4": lambda: peft.RoadConfig(variant="road_4", group_size=8, target_modules=LINEAR),
    "hira": lambda: peft.HiraConfig(r=3, target_modules=LINEAR),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=LINEAR),
    "miss": lambda: peft.MissConfig(r=5, target_modules=LINEAR),
    "miss-mini": lambda: peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=LINEAR),
    "miss-bat": lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=LINEAR),
}


@pytest.mark.parametrize("name", WITHOUT_BASE)
def test_updates_without_a_base_are_what_peft_merges(tmp_path: Path, name: str) -> None:
    changes, _ = saved(tmp_path / "task", WITHOUT_BASE[name]())
    adapters = AdapterSet.load(tmp_path / "task")
    assert adapters.kinds == (name.partition("-")[0],)
    check(adapters, changes)


@pytest.mark.parametrize("name", WITH_BASE)
def test_updates_of_the_base_are_what_peft_merges(tmp_path: Path, name: str) -> None:
    changes, base = saved(tmp_path / "task", WITH_BASE[name]())
    with pytest.raises(ValueError, match=r"update depends on the base weight: give the base checkpoint \(base=\)"):
        AdapterSet.load(tmp_path / "task")
    adapters = AdapterSet.load(tmp_path / "task", base=base)
    assert adapters.kinds == (name.partition("-")[0],)
    check(adapters, changes, ("embed",))


@pytest.mark.parametrize("name", ["lokr-full", "loha", "oft"])
def test_a_rank_truncates_to_the_leading_directions(tmp_path: Path, name: str) -> None:
    changes, base = saved(tmp_path / "task", (WITHOUT_BASE | WITH_BASE)[name]())
    adapters = AdapterSet.load(tmp_path / "task", base=base, rank=3)
    assert adapters.notices == ()
    for task, layer, left, right in adapters:
        u, values, vt = torch.linalg.svd(changes[layer].mT if layer == "embed" else changes[layer])
        exact = (u[:, :3] * values[:3]) @ vt[:3]
        assert adapters.shape(task, layer)[2] == (1 if name == "loha" and layer.endswith(".v") else 3)
        error = torch.linalg.matrix_norm(left.double() @ right.double().mT - exact)
        assert error <= 10 * ROUNDING * values[0], layer  # a range finder in single precision
    (notice,) = AdapterSet.load(tmp_path / "task", base=base, rank=99).notices
    assert "rank is given as 99 and has no effect" in notice
    with pytest.raises(ValueError, match="rank is 0, at least 1"):
        AdapterSet.load(tmp_path / "task", base=base, rank=0)


def test_the_spectrum_of_a_kronecker_product_is_the_product_set(tmp_path: Path) -> None:
    changes, _ = saved(tmp_path / "task", WITHOUT_BASE["lokr-full"]())
    alone = AdapterSet.load(tmp_path / "task")
    twice = AdapterSet.load(tmp_path / "task", tmp_path / "task", tasks=["a", "b"])
    assert alone.sources[0].descending == set(alone.layers)
    tables = AdapterTables(alone), AdapterTables(twice)
    for layer, change in changes.items():
        exact = torch.linalg.svdvals(change)
        for table, task in zip(tables, ("task", "a"), strict=True):  # known without a decomposition, and decomposed
            frame = table.singular_values.query(f"layer == '{layer}' and task == '{task}' and update == 'task'")
            assert frame["value"].to_numpy() == pytest.approx(exact.numpy(), abs=1e-6 * exact[0].item())
    first, second = (table.components for table in tables)
    own = second.query("task == 'a'").reset_index()
    assert first["energy_share"].to_numpy() == pytest.approx(own["energy_share"].to_numpy(), abs=1e-6)
    leaks = [AdapterTables(alone, protected={"square": torch.eye(16)[:, :5]}).interference]
    frame = leaks[0].query("metric == 'leakage' and layer == 'square'")
    energy = changes["square"][:, :5].square().sum() / changes["square"].square().sum()
    assert frame["value"].item() == pytest.approx(energy.item(), rel=1e-5)


def test_several_butterflies_are_what_peft_multiplies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT multiplies several factors with a CUDA kernel only; the kernel stands for blocks on a diagonal."""
    layer = pytest.importorskip("peft.tuners.boft.layer")
    blocks = type("Blocks", (), {"apply": staticmethod(lambda x: torch.stack([torch.block_diag(*each) for each in x]))})
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", blocks)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["square"])
    changes, base = saved(tmp_path / "task", config)
    check(AdapterSet.load(tmp_path / "task", base=base), changes)


class Transposed(nn.Module):
    """Layers of GPT-2's kind, whose weights are stored inputs times outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = pytorch_utils.Conv1D(16, 12), pytorch_utils.Conv1D(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


@pytest.mark.parametrize("name", ["vera", "ia3", "hira"])
def test_weights_stored_transposed_are_turned(tmp_path: Path, name: str) -> None:
    options = {"feedforward_modules": ["c_proj"]} if name == "ia3" else {"r": 3}
    kinds = {"vera": peft.VeraConfig, "ia3": peft.IA3Config, "hira": peft.HiraConfig}
    config = kinds[name](target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **options)
    changes, base = saved(tmp_path / "task", config, Transposed())
    adapters = AdapterSet.load(tmp_path / "task", base=base)
    assert adapters.transposed == {"c_attn", "c_proj"}
    check(adapters, changes, ("c_attn", "c_proj"))


def test_layers_that_adalora_pruned_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "task", WITHOUT_BASE["adalora"]())
    path = tmp_path / "task" / "adapter_model.safetensors"
    stored = load_file(path)
    for part, tensor in {"A": torch.ones(0, 12), "B": torch.ones(16, 0), "E": torch.ones(0, 1)}.items():
        stored[f"base_model.model.h.0.q.lora_{part}"] = tensor
    save_file(stored, path)
    adapters = AdapterSet.load(tmp_path / "task")
    assert "h.0.q" not in adapters.layers
    assert "pruned to rank 0, so without an update: h.0.q" in adapters.notices[0]
    assert [(each.tensor, each.reason) for each in adapters.left_out] == [("h.0.q", "pruned to rank 0")]
