"""Updates in files of LyCORIS equal what its modules add to the layers' outputs, in double precision."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import AdapterSet

lycoris = pytest.importorskip("lycoris")
ROUNDING = 1e-5
"""Relative error allowed for factors in single precision."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.ModuleDict({"q": nn.Linear(12, 16), "square": nn.Linear(16, 16)})
        self.unet["conv"] = nn.Conv2d(8, 16, 3)
        self.unet["narrow"] = nn.Conv2d(8, 16, 1)


def matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The layer's weight, as the outputs for unit inputs less those for zero, (outputs, inputs and positions)."""
    sides = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *layer.kernel_size)
    units = torch.eye(math.prod(sides), dtype=torch.float64).view(-1, *sides)
    with torch.no_grad():
        return (layer(units) - layer(0 * units)).flatten(1).mT


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path, dict[str, Tensor]]]:
    """Writes a file of LyCORIS; returns it, the base checkpoint, and what the modules add to each layer's weight."""

    def save(algo: str, *, dim: int = 2, modules: tuple[str, ...] = ("Linear", "Conv2d"), **options: Any) -> Any:
        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        monkeypatch.setattr(Tensor, "float", Tensor.double)  # LyCORIS inverts in single precision
        torch.manual_seed(0)
        model, path, base = Model(), tmp_path / "style.safetensors", tmp_path / "base.safetensors"
        save_file({name: value.clone() for name, value in model.state_dict().items()}, base)
        lycoris.LycorisNetwork.apply_preset({"target_module": list(modules), "target_name": []})
        network = lycoris.create_lycoris(model, 1.0, linear_dim=dim, linear_alpha=3, algo=algo, **options)
        layers = {lora.lora_name.removeprefix("lycoris_unet_"): lora for lora in network.loras}
        before = {name: matrix(model.double().unet[name]) for name in layers}
        model.float()
        network.apply_to()
        for name, parameter in network.named_parameters():
            drawn = 0.3 * torch.randn(parameter.shape)
            parameter.data = drawn.abs() + 0.5 if "dora_scale" in name or "rescale" in name else drawn
        network.save_weights(str(path), torch.float32, {})
        model.double(), network.double()
        changes = {f"lycoris_unet_{name}": matrix(model.unet[name]) - before[name] for name in layers}
        monkeypatch.undo()
        return path, base, changes

    return save


def check(adapters: AdapterSet, changes: dict[str, Tensor]) -> None:
    assert set(adapters.layers) == set(changes)
    for task, layer, left, right in adapters:
        m, n, r = adapters.shape(task, layer)
        assert (left.shape, right.shape, changes[layer].shape) == ((m, r), (n, r), (m, n))
        error = torch.linalg.matrix_norm(left.double() @ right.double().mT - changes[layer])
        assert error <= ROUNDING * torch.linalg.matrix_norm(changes[layer]), layer


@pytest.mark.parametrize(
    ("kind", "algo", "options"),
    [
        ("lokr", "lokr", {}),
        ("lokr", "lokr", {"dim": 1, "decompose_both": True}),
        ("lokr", "lokr", {"dim": 1, "decompose_both": True, "use_tucker": True, "use_scalar": True}),
        ("lokr", "lokr", {"full_matrix": True, "factor": 4, "unbalanced_factorization": True}),
        ("loha", "loha", {}),
        ("loha", "loha", {"dim": 4, "use_tucker": True, "use_scalar": True, "rs_lora": True}),
        ("locon", "lora", {"use_tucker": True}),
        ("full", "full", {}),
    ],
)
def test_updates_without_a_base_are_what_the_modules_add(
    kind: str, algo: str, options: dict[str, Any], saved: Callable[..., Any]
) -> None:
    path, _, changes = saved(algo, **options)
    adapters = AdapterSet.load(path)
    assert adapters.kinds == (kind,)
    check(adapters, changes)


@pytest.mark.parametrize(
    ("kind", "algo", "options"),
    [
        ("oft", "diag-oft", {"dim": 4}),
        ("oft", "diag-oft", {"dim": 4, "rescaled": True, "constraint": 0.01}),
        ("oft", "boft", {"dim": 4}),
        ("oft", "boft", {"dim": 2, "rescaled": True, "constraint": 0.02}),
        ("ia3", "ia3", {}),
        ("glora", "glora", {"modules": ("Linear",)}),
        ("lokr", "lokr", {"dim": 1, "dora_wd": True}),
        ("loha", "loha", {"dora_wd": True, "wd_on_output": False}),
        ("locon", "lora", {"dora_wd": True}),
    ],
)
def test_updates_of_the_base_are_what_the_modules_add(
    kind: str, algo: str, options: dict[str, Any], saved: Callable[..., Any]
) -> None:
    path, base, changes = saved(algo, **options)
    with pytest.raises(ValueError, match=r"update depends on the base weight: give the base checkpoint \(base=\)"):
        AdapterSet.load(path)
    adapters = AdapterSet.load(path, base=base)
    assert adapters.kinds == (kind,)
    check(adapters, changes)
