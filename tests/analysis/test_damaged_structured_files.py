"""Damaged and hostile files of every method are errors that name the file, or updates of the shapes that they state."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from old_versions import STORES_COMPLEX
from safetensors.torch import save_file
from torch import Tensor

from analysis import AdapterSet

STEM = "base_model.model.h.0.q."
Shapes = dict[str, tuple[int, ...]]
NEUMANN = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
PEFT: dict[str, tuple[Shapes, dict[str, Any]]] = {  # of a layer with 8 outputs and 12 inputs
    "ADALORA": ({"lora_A": (3, 12), "lora_B": (8, 3), "lora_E": (3, 1)}, {"lora_alpha": 5, "init_r": 3}),
    "BOFT": ({"boft_R": (2, 2, 6, 6), "boft_s": (8, 1)}, {}),
    "C3A": ({"c3a_kernel": (2, 3, 4)}, {}),
    "DELORA": ({"delora_A": (3, 12), "delora_B": (8, 3), "delora_lambda": (1,), "delora_w_norm": (12,)}, {}),
    "GRALORA": ({"gralora_A": (2, 6, 4), "gralora_B": (2, 4, 4)}, {"r": 4, "hybrid_r": 0}),
    "HIRA": ({"hira_A": (3, 12), "hira_B": (8, 3)}, {}),
    "HRA": ({"hra_u": (12, 3)}, {"apply_GS": False}),
    "IA3": ({"ia3_l": (8, 1)}, {}),
    "LOHA": ({f"hada_w{i}_{side}": (8, 2) if side == "a" else (2, 12) for i in "12" for side in "ab"}, {"r": 2}),
    "LOKR": ({"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2": (4, 4)}, {"r": 2}),
    "MISS": ({"miss_block": (4, 8)}, {"init_weights": True}),
    "OFT": ({"oft_R.weight": (3, 6)}, NEUMANN),
    "RANDLORA": ({"randlora_lambda": (3, 3), "randlora_gamma": (3, 8)}, {"r": 3, "randlora_alpha": 4}),
    "ROAD": ({"road_theta": (4,), "road_alpha": (4,)}, {"variant": "road_1", "group_size": 4}),
    "VERA": ({"vera_lambda_b": (8,), "vera_lambda_d": (3,)}, {}),
}
LYCORIS: dict[str, Shapes] = {
    "lokr": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": (), "dora_scale": (8, 1)},
    "lokr-core": {"lokr_w1": (2, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 2), "lokr_t2": (2, 2, 1, 2), "alpha": ()},
    "loha": {**PEFT["LOHA"][0], "alpha": ()},
    "locon": {"lora_up.weight": (8, 2), "lora_down.weight": (3, 6), "lora_mid.weight": (2, 3, 1, 2), "alpha": ()},
    "oft": {"oft_blocks": (2, 4, 4), "rescale": (8, 1), "alpha": ()},
    "boft": {"oft_blocks": (2, 4, 2, 2), "alpha": ()},
    "ia3": {"weight": (12,), "on_input": ()},
    "glora": {"a1.weight": (12, 2), "a2.weight": (2, 12), "b1.weight": (8, 2), "b2.weight": (2, 12), "alpha": ()},
    "full": {"diff": (8, 12)},
}
SHARED: dict[str, Shapes] = {
    "VERA": {"base_model.vera_A": (3, 12), "base_model.vera_B": (8, 3)},
    "RANDLORA": {"base_model.randlora_A": (3, 1, 12), "base_model.randlora_B": (12, 4, 3)},
}
ODD = (None, True, "x", -1, 0, 2.5, 10**400, float("nan"), [], {}, [1])
VALUES = {
    "nan": lambda shape: torch.full(shape, torch.nan),
    "huge": lambda shape: torch.full(shape, 3e38),
    "zero": torch.zeros,
    "whole": lambda shape: torch.ones(shape, dtype=torch.int64),
    **({"complex": lambda shape: torch.ones(shape, dtype=torch.complex64)} if STORES_COMPLEX else {}),
    "half": lambda shape: torch.ones(shape, dtype=torch.float16),
}


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def read_or_refused(path: Path, base: Path) -> None:
    """Whatever is read has the shapes stated; whatever is not names the file or the base."""
    try:
        adapters = AdapterSet.load(path, base=base, alpha="rank")
        for task, layer, left, right in adapters:
            m, n, r = adapters.shape(task, layer)
            assert (left.shape, right.shape) == ((m, r), (n, r))
            assert torch.isfinite(left).all()
            assert torch.isfinite(right).all()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        return
    assert str(path) in message or str(base) in message


def damaged(data: st.DataObject, shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes, one of them missing, of another shape, of other values, or beside one more."""
    tensors = drawn(shapes)
    name = data.draw(st.sampled_from(sorted(tensors)))
    damage = data.draw(st.sampled_from(["missing", "shape", "more", *VALUES]))
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.ones(data.draw(st.lists(st.integers(0, 12), max_size=5)))
    elif damage == "more":
        more = sorted({part for each in (*LYCORIS.values(), *(method[0] for method in PEFT.values())) for part in each})
        shape = data.draw(st.lists(st.integers(1, 8), max_size=4))
        tensors[data.draw(st.sampled_from(more))] = torch.ones(shape)
    else:
        tensors[name] = VALUES[damage](tensors[name].shape)
    return tensors


def base_of(folder: Path) -> Path:
    path = folder / "base.safetensors"
    save_file({"h.0.q.weight": torch.randn(8, 12, generator=torch.Generator().manual_seed(1))}, path)
    return path


def peft_folder(folder: Path, method: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    named = {name if name.startswith("base_model") else STEM + name: tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    described = {"peft_type": method, "alpha": 4, **PEFT[method][1], **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("method", PEFT)
def test_the_files_to_be_damaged_are_read(tmp_path: Path, method: str) -> None:
    shapes = PEFT[method][0] | SHARED.get(method, {})
    folder = peft_folder(tmp_path / "task", method, drawn(shapes), {})
    assert AdapterSet.load(folder, base=base_of(tmp_path)).shape("task", "h.0.q")[:2] == (8, 12)


@pytest.mark.parametrize("kind", LYCORIS)
def test_the_lycoris_files_to_be_damaged_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "style.safetensors"
    save_file({f"lycoris_h_0_q.{part}": tensor.abs() for part, tensor in drawn(LYCORIS[kind]).items()}, path)
    adapters = AdapterSet.load(path, base=base_of(tmp_path))
    assert adapters.shape("style", "lycoris_h_0_q")[:2] == (8, 12)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_peft_folders_are_refused_or_read_as_stated(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(PEFT)))
    shapes, config = PEFT[method]
    tensors = damaged(data, shapes | SHARED.get(method, {}))
    options: dict[str, Any] = {}
    if data.draw(st.booleans()):
        keys = [*config, "alpha", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "coft", "eps", "block_share"]
        options[data.draw(st.sampled_from(keys))] = data.draw(st.sampled_from(ODD))
    with tempfile.TemporaryDirectory() as place:
        folder = peft_folder(Path(place) / "task", method, tensors, options)
        read_or_refused(folder, base_of(Path(place)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_lycoris_files_are_refused_or_read_as_stated(data: st.DataObject) -> None:
    tensors = damaged(data, LYCORIS[data.draw(st.sampled_from(sorted(LYCORIS)))])
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "style.safetensors"
        save_file({f"lycoris_h_0_q.{part}": tensor for part, tensor in tensors.items()}, path)
        read_or_refused(path, base_of(Path(place)))
