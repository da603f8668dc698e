import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis import AdapterSet, component_table, interference_table, noise_table, spectrum_table

LAYER = "model.layer.0.query"


def test_a_run_folder_expands_into_its_tasks_in_order(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    adapters = AdapterSet.load(write_run(tmp_path / "run"))
    assert adapters.tasks == ("news", "nouns", "films")
    # natural order: blocks by number, 10 after 0
    assert adapters.layers == ("model.layer.0.mlp", LAYER, "model.layer.10.query")
    assert adapters.kinds == ("eblora",) * 3
    assert len(adapters) == 9
    seen = [(task, layer) for task, layer, _, _ in adapters]
    assert seen == [(task, layer) for task in adapters.tasks for layer in adapters.layers]
    assert repr(adapters) == "AdapterSet(tasks=news, nouns, films; 3 layers)"


def test_all_scale_is_in_left(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run")
    stored = load_file(run / "tasks" / "02-nouns" / "adapter.safetensors")
    left, right = AdapterSet.load(run).factors("nouns", LAYER)
    # scaling 0.5 of the manifest times the stored scale 2
    torch.testing.assert_close(left, stored[f"{LAYER}.left"] * 0.5 * 2.0, rtol=0, atol=0)
    torch.testing.assert_close(right, stored[f"{LAYER}.right"], rtol=0, atol=0)


def test_a_missing_scale_is_one_and_half_precision_is_widened(
    tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    left, right = torch.randn(4, 2).bfloat16(), torch.randn(5, 2).bfloat16()
    folder = write_adapter(tmp_path / "a", "one", {"x.left": left, "x.right": right}, alpha=6.0)
    read, other = AdapterSet.load(folder).factors("one", "x")
    assert read.dtype == other.dtype == torch.float32
    torch.testing.assert_close(read, left.float() * 3, rtol=0, atol=0)


def test_the_subspace_protected_during_a_task_is_the_one_saved_before_it(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    adapters = AdapterSet.load(write_run(tmp_path / "run"))
    assert adapters.protected("news", LAYER) is None
    films = adapters.protected("films", LAYER)
    assert films is not None
    torch.testing.assert_close(films, torch.eye(10)[:, :2], rtol=0, atol=0)
    bare = AdapterSet.load(write_run(tmp_path / "bare", memory=False))
    assert bare.protected("films", LAYER) is None


def test_folders_are_taken_one_by_one_and_may_be_renamed(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run")
    folders = [run / "tasks" / "03-films", run / "tasks" / "01-news"]
    assert AdapterSet.load(*folders).tasks == ("films", "news")
    assert AdapterSet.load(*folders, tasks=["a", "b"]).tasks == ("a", "b")
    with pytest.raises(ValueError, match="names 1 tasks, but the paths hold 2"):
        AdapterSet.load(*folders, tasks=["a"])
    with pytest.raises(ValueError, match="task 'films' occurs twice"):
        AdapterSet.load(folders[0], folders[0])


def test_factors_in_memory_make_a_set() -> None:
    pair = (torch.randn(4, 2), torch.randn(5, 2))
    adapters = AdapterSet.from_factors({"one": {"h.10": pair, "h.9": pair}})
    assert adapters.layers == ("h.9", "h.10")
    assert adapters.shape("one", "h.9") == (4, 5, 2)
    with pytest.raises(ValueError, match=r"one, h: factors need shapes \(m, r\) and \(n, r\), got \(4, 2\)"):
        AdapterSet.from_factors({"one": {"h": (torch.randn(4, 2), torch.randn(5, 3))}})
    with pytest.raises(ValueError, match="needs at least one task"):
        AdapterSet.from_factors({})
    with pytest.raises(ValueError, match="no layer 'q' among 2"):
        adapters.factors("one", "q")
    with pytest.raises(ValueError, match="no task 'two'; the tasks are one"):
        adapters.factors("two", "h.9")


def test_layers_must_agree_between_tasks() -> None:
    pair = (torch.randn(4, 2), torch.randn(5, 2))
    with pytest.raises(
        ValueError, match=r"adapt different layers, 2 differ: y is in 'two' only; z is in 'two' only \("
    ):
        AdapterSet.from_factors({"one": {"x": pair}, "two": {"y": pair, "x": pair, "z": pair}})
    with pytest.raises(ValueError, match="x is 4 × 5 in 'one' and 5 × 4 in 'two'"):
        AdapterSet.from_factors({"one": {"x": pair}, "two": {"x": pair[::-1]}})


def test_missing_folders_and_formats_say_what_was_looked_for(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="at least one path"):
        AdapterSet.load()
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        AdapterSet.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked for record\.json.*adapter\.safetensors.*adapter_config\.json"):
        AdapterSet.load(tmp_path)
    run = write_run(tmp_path / "run")
    for file in (run / "tasks" / "02-nouns").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter of task 2 \(nouns\) is missing"):
        AdapterSet.load(run)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "record.json").write_bytes((run / "record.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="empty holds no adapters"):
        AdapterSet.load(empty)


def test_damaged_files_are_named(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    folder = write_run(tmp_path / "run") / "tasks" / "01-news"
    tensors, manifest = folder / "adapter.safetensors", folder / "adapter.json"
    whole, described = tensors.read_bytes(), json.loads(manifest.read_text())

    tensors.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"adapter\.safetensors is truncated"):
        AdapterSet.load(folder)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors does not exist"):
        AdapterSet.load(folder)
    tensors.write_bytes(whole)

    def load_with(**changes: Any) -> None:
        manifest.write_text(json.dumps({**described, **changes}))
        AdapterSet.load(folder)

    with pytest.raises(ValueError, match=r"adapter\.json: format is 'other', 'manifold_cl\.adapter' was expected"):
        load_with(format="other")
    with pytest.raises(ValueError, match=r"version 3 of manifold_cl\.adapter .*versions 1 to 2"):
        load_with(version=3)
    with pytest.raises(ValueError, match="'alpha' is None, a finite number"):
        load_with(alpha=None)
    with pytest.raises(ValueError, match=r"adapter\.safetensors was changed or damaged"):
        load_with(sha256="0" * 64)
    manifest.write_text('{"format": "manifold_cl.ada')
    with pytest.raises(ValueError, match=r"adapter\.json is truncated or not JSON"):
        AdapterSet.load(folder)


def test_a_damaged_memory_is_named(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run")
    path = run / "tasks" / "02-nouns" / "memory.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"02-nouns.memory\.safetensors is truncated"):
        AdapterSet.load(run)


def test_a_memory_of_another_model_is_refused(
    tmp_path: Path, write_run: Callable[..., Path], write_memory: Callable[..., None]
) -> None:
    run = write_run(tmp_path / "run")
    write_memory(run / "tasks" / "01-news", "news", {LAYER: torch.eye(7)[:, :2]})
    with pytest.raises(ValueError, match=r"query has a basis in R\^7, its adapter has 10 inputs"):
        AdapterSet.load(run)


def test_ranks_of_left_and_right_must_agree(tmp_path: Path, write_adapter: Callable[..., Path]) -> None:
    folder = write_adapter(tmp_path / "a", "one", {"x.left": torch.randn(4, 2), "x.right": torch.randn(5, 3)})
    with pytest.raises(ValueError, match=r"x\.left has rank 2, x\.right has rank 3"):
        AdapterSet.load(folder)


def test_diverged_factors_are_refused_when_read(tmp_path: Path, write_adapter: Callable[..., Path]) -> None:
    left = torch.full((4, 2), torch.nan)
    adapters = AdapterSet.load(write_adapter(tmp_path / "a", "one", {"x.left": left, "x.right": torch.ones(5, 2)}))
    with pytest.raises(ValueError, match=r"x\.left contains NaN or infinite"):
        adapters.factors("one", "x")


def peft_folder(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir()
    stem = "base_model.model.x"
    tensors = tensors or {f"{stem}.lora_A.weight": torch.ones(2, 5), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def test_whole_parameters_beside_a_lora_are_skipped(tmp_path: Path) -> None:
    stem = "base_model.model.x"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 5), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    folder = peft_folder(tmp_path / "task", {**tensors, "base_model.model.classifier.weight": torch.ones(3, 4)})
    adapters = AdapterSet.load(folder)
    assert (adapters.tasks, adapters.layers) == (("task",), ("x",))
    left, _ = adapters.factors("task", "x")
    torch.testing.assert_close(left, torch.full((4, 2), 3.0), rtol=0, atol=0)  # alpha / r = 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "FOURIERFT"}, "peft_type is 'FOURIERFT', only 'ADALORA', 'BOFT'"),
        ({"use_dora": True}, "use_dora is set, but x has no lora_magnitude_vector"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is set and not supported"),
        ({"target_parameters": "experts"}, "'target_parameters' is 'experts'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base weights"),
        ({"r": None}, "'r' is None, a finite number was expected"),
        ({"r": 4}, "x has rank 2, adapter_config.json says 4"),
    ],
)
def test_unsupported_peft_options_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSet.load(peft_folder(tmp_path / "task", **config))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x.lora_embedding_A", (2, 5), r"no left factor beside .*x\.lora_embedding_A"),
        ("x.lora_E", (2, 1), r"x\.lora_E is not supported"),
        ("x.lora_A.weight", (2, 5), r"no left factor beside .*x\.lora_A"),
        ("classifier.weight", (2, 5), "holds no lora_A and lora_B tensors"),
    ],
)
def test_unsupported_peft_tensors_are_refused_by_name(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    folder = peft_folder(tmp_path / "task", {f"base_model.model.{name}": torch.ones(shape)})
    with pytest.raises(ValueError, match=message):
        AdapterSet.load(folder)


def test_peft_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "task")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or not a safetensors file"):
        AdapterSet.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist"):
        AdapterSet.load(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is truncated, or a pickle of the old kind"):
        AdapterSet.load(folder)


@pytest.mark.parametrize("table", [spectrum_table, component_table, noise_table, interference_table])
def test_a_path_in_place_of_a_set_is_refused_with_the_call_that_loads_it(table: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=r"is an AdapterSet, got str: give AdapterSet\.load\('runs/a'\)"):
        table("runs/a")
