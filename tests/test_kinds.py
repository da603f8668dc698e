"""True and false are no numbers, in options and in files, although Python counts a bool as an int."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.formats.own import read_bases
from analysis.formats.quantised import four_bit_state
from manifold_cl import RiemannianSGD, SubspaceMemory
from manifold_cl.continual.rates import width_of
from manifold_cl.continual.subspaces.capacity import LayerGrowth
from manifold_cl.continual.subspaces.layer_columns import Columns
from manifold_cl.files import FileError, parse_json
from manifold_cl.kinds import is_number, is_whole
from manifold_cl.streams.captions import read_captions
from manifold_cl.streams.causal_tasks import causal_lm_tasks
from manifold_cl.study.validation import validate_kinds
from manifold_cl.tensor_files import read_tensors, write_tensors

GROWTH = {"task": "a", "n": 4, "k": 1, "rank": 1, "threshold": 0.9, "added": 1, "dropped": 0, "before": 0.0}
GROWTH |= {"explained": 0.9, "captured": 1.0, "pace": 1.0}


def test_bools_are_no_numbers() -> None:
    assert [is_whole(value) for value in (0, True, np.bool_(True), 1.0, "1", None)] == [True] + [False] * 5
    assert [is_number(value) for value in (0, 1.5, False, "1", 1j)] == [True] * 2 + [False] * 3


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: parse_json(Path("f.json"), '{"format": "x", "version": true}', "x"), "version True"),
        (lambda: LayerGrowth.from_dict({**GROWTH, "added": True}), "added is True"),
        (lambda: Columns.from_dict({"energies": [True], "tasks": [0]}, tasks=1, k=1), "1 energies"),
        (lambda: Columns.from_dict({"energies": [0.5], "tasks": [False]}, tasks=1, k=1), "among the 1"),
        (lambda: width_of(True), "True"),
        (lambda: RiemannianSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, polish_every=True), "got True"),
        (lambda: causal_lm_tasks({"one": [{"text": "red"}] * 8}, object(), examples=True), "got True"),
        (lambda: validate_kinds({"rank": True}), "got True"),
        (lambda: validate_kinds({"cpus": True}), "got True"),
    ],
)
def test_a_bool_in_the_place_of_a_number_is_refused(read: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read()
    LayerGrowth.from_dict(GROWTH)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "entry"), [("images", {"id": True}), ("annotations", {"image_id": True})])
def test_a_caption_file_with_a_bool_for_an_image(key: str, entry: dict[str, Any], tmp_path: Path) -> None:
    annotation = {"image_id": 1, "caption": "a box"}
    content: dict[str, Any] = {"images": [{"id": 1}], "annotations": [annotation]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert read_captions(tmp_path / "captions.json") == [("a box",)]
    content[key] = [{**content[key][0], **entry}]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"captions\.json"):
        read_captions(tmp_path / "captions.json")


@pytest.mark.parametrize("rows", [True, "8"])
def test_a_packed_basis_with_another_kind_of_number_of_rows(rows: object, tmp_path: Path) -> None:
    memory = SubspaceMemory.empty({"q": 8}, compact=True).extended({"q": torch.eye(8)}, energy=0.1, rank=4)
    memory.save(tmp_path)
    tensors, manifest = read_tensors(tmp_path / "memory.safetensors")
    assert manifest["rows"] == {"q": 8}
    kept = {key: value for key, value in manifest.items() if key not in ("format", "version", "library", "digests")}
    write_tensors(tmp_path / "memory.safetensors", tensors, {**kept, "rows": {"q": rows}})
    with pytest.raises(FileError, match=f"rows of q is {rows!r}"):
        SubspaceMemory.load(tmp_path)
    with pytest.raises(ValueError, match="no number of rows for q"):
        read_bases(tmp_path)


def test_a_quantisation_state_with_a_bool_for_a_size() -> None:
    content = {"shape": [64, 1], "blocksize": 64, "quant_type": "nf4"}

    def state(**changes: Any) -> torch.Tensor:
        return torch.tensor(list(json.dumps({**content, **changes}).encode()), dtype=torch.uint8)

    assert four_bit_state(Path("f"), "w", state())["blocksize"] == 64
    with pytest.raises(ValueError, match=r"sizes are \[64, True, 64, 1\]"):
        four_bit_state(Path("f"), "w", state(shape=[64, True]))
