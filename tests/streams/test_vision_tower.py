"""The reader of the vision tower's weights, against a small tower written as ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manifold_cl.streams.archives import FetchError
from manifold_cl.streams.vision_tower import RENAMED, backbone_weights, load_tower, load_weights, normalised
from tests.streams import tiny_vision as tiny

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - only where it is installed


def written(tower: nn.Module) -> Any:
    """The graph of ``tower`` as the archive has it: products by node name, positions in two parts."""
    nodes, stored = [], []

    def store(name: str, tensor: torch.Tensor) -> str:
        stored.append(numpy_helper.from_array(tensor.numpy(), name))
        return name

    for name, tensor in tower.state_dict().items():
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            nodes.append(helper.make_node("Concat", [store("onnx::Concat_1", tensor[:, :1])], ["a"]))
            nodes.append(helper.make_node("Reshape", [store("onnx::Reshape_2", tensor[:, 1:])], ["b"]))
            continue
        for old, new in RENAMED.items():
            name = name.replace(f".{new}.", f".{old}.")
        if tensor.ndim == 2:
            number = store(f"onnx::MatMul_{len(stored)}", tensor.T.contiguous())
            path = "/backbone/" + name.removesuffix(".weight").replace("encoder.layer.", "encoder/layer*")
            path = path.replace(".", "/").replace("layer*", "layer.")
            nodes.append(helper.make_node("MatMul", ["x", number], ["y"], name=f"{path}/MatMul"))
        else:
            store(f"backbone.{name}", tensor)
    stored.append(numpy_helper.from_array(np.zeros((1, 2, 3), np.float32), "decoder.final_conv.weight"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    return helper.make_graph(nodes, "tower", [x], [x], stored)


def test_a_tower_read_from_onnx_gives_the_same_features():
    saved, other = tiny.tower(seed=1), tiny.tower(seed=2)
    pictures = normalised(torch.stack([item.picture.pixels for item in tiny.questions(2)]))
    assert not torch.allclose(saved(pictures).last_hidden_state, other(pictures).last_hidden_state)
    load_weights(other, backbone_weights(written(saved)))
    assert torch.equal(saved(pictures).last_hidden_state, other(pictures).last_hidden_state)


def test_weights_that_do_not_fit_are_named():
    weights = backbone_weights(written(tiny.tower()))
    weights["layernorm.weight"] = torch.zeros(3)
    with pytest.raises(FetchError, match=r"1 weights.*layernorm\.weight \(3,\), expected \(16,\)"):
        load_weights(tiny.tower(), weights)
    del weights["layernorm.weight"]
    with pytest.raises(FetchError, match=r"layernorm\.weight"):
        load_weights(tiny.tower(), weights)


def test_pixels_are_normalised_per_channel():
    white = normalised(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    torch.testing.assert_close(white[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), rtol=0, atol=1e-4)


@pytest.mark.stream
@pytest.mark.slow
def test_the_real_tower_agrees_with_its_onnx_weights():
    tower = load_tower()
    assert sum(p.numel() for p in tower.parameters()) == 22_056_576
    assert onnx.__version__
    with torch.no_grad():
        states = tower(torch.zeros(1, 3, 84, 84)).last_hidden_state
    assert states.shape == (1, 37, 384)
    assert states.isfinite().all()
