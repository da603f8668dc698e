"""One layer has one name: whatever wraps a module, and whichever version of transformers named it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis import AdapterSet, Checkpoint, interference_table, read_protected
from analysis.tables import relation_to_base


def lora(folder: Path, *layers: str, seed: int = 0, prefix: str = "base_model.model.") -> Path:
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors[f"{prefix}{layer}.lora_A.weight"] = torch.randn(2, 5, generator=draw)
        tensors[f"{prefix}{layer}.lora_B.weight"] = torch.randn(4, 2, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model._orig_mod.h.0.q",
        "_orig_mod.base_model.model.h.0.q",
        "base_model.model.module.h.0.q",
        "module.base_model.model.h.0.q",
        "base_model.model.h._fsdp_wrapped_module.0._checkpoint_wrapped_module.q",
    ],
)
def test_wrappers_are_no_part_of_a_name(tmp_path: Path, name: str) -> None:
    wrapped, plain = lora(tmp_path / "wrapped", name, prefix=""), lora(tmp_path / "plain", "h.0.q", seed=1)
    adapters = AdapterSet.load(wrapped, plain)
    assert (adapters.layers, adapters.notices) == (("h.0.q",), ())
    save_file({f"{name}.weight": torch.ones(4, 5)}, tmp_path / "base.safetensors")
    assert Checkpoint.load(tmp_path / "base.safetensors").name_of("h.0.q") == "h.0.q.weight"
    with pytest.raises(ValueError, match=r"are the same layer"):
        AdapterSet.load(lora(tmp_path / "both", "h.0.q", f"_orig_mod.{name}"))


def test_a_memory_of_a_wrapped_model_belongs_to_the_same_layers(
    tmp_path: Path, write_memory: Callable[..., None], write_adapter: Callable[..., Path]
) -> None:
    write_memory(tmp_path, "one", {"_orig_mod.h.0.q": torch.eye(5)[:, :2]})
    assert list(read_protected(tmp_path)) == ["h.0.q"]
    tensors = {"_orig_mod.h.0.q.left": torch.ones(4, 2), "_orig_mod.h.0.q.right": torch.ones(5, 2)}
    assert AdapterSet.load(write_adapter(tmp_path / "a", "one", tensors)).layers == ("h.0.q",)


LANGUAGE = ("model.language_model.layers.0.q", "language_model.model.layers.0.q", "model.layers.0.q")
VISION = ("model.vision_tower.encoder.0.q", "vision_tower.vision_model.encoder.0.q")


@pytest.mark.parametrize("stored", LANGUAGE)
@pytest.mark.parametrize("layer", LANGUAGE)
def test_parts_of_vision_language_models_are_found_by_any_name(tmp_path: Path, layer: str, stored: str) -> None:
    weights = {f"{stored}.weight": torch.full((4, 5), 2.0), f"{VISION[1]}.weight": torch.ones(4, 5)}
    save_file(weights, tmp_path / "base.safetensors")
    base = Checkpoint.load(tmp_path / "base.safetensors")
    assert base.name_of(layer) == f"{stored}.weight"
    assert base.name_of(VISION[0]) == f"{VISION[1]}.weight"
    adapters = AdapterSet.load(lora(tmp_path / "task", layer, VISION[0]))
    table = relation_to_base(adapters, base)
    ratio = table[(table["metric"] == "norm_ratio") & (table["layer"] == layer) & (table["update"] == "task")]
    left, right = adapters.factors("task", layer)
    exact = (torch.linalg.matrix_norm(left @ right.T) / (2 * 20**0.5)).item()
    assert ratio["value"].item() == pytest.approx(exact, rel=1e-5)  # float32 norms


def test_a_name_that_fits_two_weights_is_refused(tmp_path: Path) -> None:
    save_file({f"{name}.weight": torch.ones(4, 5) for name in LANGUAGE[1:]}, tmp_path / "base.safetensors")
    base = Checkpoint.load(tmp_path / "base.safetensors")
    assert base.name_of(LANGUAGE[2]) == f"{LANGUAGE[2]}.weight"  # its own name comes first
    with pytest.raises(ValueError, match="has several weights for layer"):
        base.name_of(LANGUAGE[0])


def test_tasks_of_old_and_new_names_compare(tmp_path: Path) -> None:
    new = lora(tmp_path / "new", "lm_head", LANGUAGE[0], VISION[0])
    old = lora(tmp_path / "old", "language_model.lm_head", LANGUAGE[1], VISION[1], seed=1)
    adapters = AdapterSet.load(new, old)
    assert adapters.layers == ("lm_head", LANGUAGE[0], VISION[0])
    alone = AdapterSet.load(old)
    for ours, theirs in ((LANGUAGE[0], LANGUAGE[1]), (VISION[0], VISION[1])):
        torch.testing.assert_close(adapters.factors("old", ours), alone.factors("old", theirs), rtol=0, atol=0)
    (notice,) = adapters.notices
    assert notice.startswith("old: layers have other names than in the first task, such as language_model.lm_head")
    with pytest.raises(ValueError, match="2 differ"):  # another tower is another layer
        AdapterSet.load(lora(tmp_path / "text", LANGUAGE[0]), lora(tmp_path / "vision", VISION[1]))


def test_subspaces_of_old_names_protect_layers_of_new_ones(tmp_path: Path) -> None:
    adapters = AdapterSet.load(lora(tmp_path / "a", *LANGUAGE[:1]), lora(tmp_path / "b", *LANGUAGE[:1], seed=1))
    tables = [interference_table(adapters, protected={name: torch.eye(5)[:, :2]}) for name in LANGUAGE]
    leakage = [table[table["metric"] == "leakage"]["value"].tolist() for table in tables]
    assert leakage[0] == leakage[1] == leakage[2]
    with pytest.raises(ValueError, match="none of the 1 protected layers is adapted"):
        interference_table(adapters, protected={VISION[0]: torch.eye(5)[:, :2]})


def test_checkpoints_of_old_and_new_names_compare(tmp_path: Path) -> None:
    for name, layer, value in (("base", LANGUAGE[1], 0.0), ("one", LANGUAGE[0], 1.0), ("two", LANGUAGE[1], 3.0)):
        (tmp_path / name).mkdir()
        weights = {f"{layer}.weight": torch.full((4, 5), value), "other.bias": torch.full((3,), value)}
        save_file(weights, tmp_path / name / "model.safetensors")
    adapters = AdapterSet.load(tmp_path / "one", tmp_path / "two", base=tmp_path / "base")
    assert adapters.layers == (LANGUAGE[0],)
    changes = [left @ right.T for _, _, left, right in adapters]
    assert [change[0, 0].item() for change in changes] == [1.0, 2.0]
    assert adapters.notices[0] == "one: differ and are no matrices, so not part of the update: other.bias"


def test_checkpoints_without_common_names_say_so(tmp_path: Path) -> None:
    for name, layer in (("base", "encoder.q"), ("tuned", "bert.encoder.q")):
        (tmp_path / name).mkdir()
        save_file({f"{layer}.weight": torch.ones(4, 5)}, tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of the names are in .*tuned only: bert\.encoder\.q\.weight"):
        AdapterSet.load(tmp_path / "tuned", base=tmp_path / "base")


def test_what_is_in_one_checkpoint_only_is_named(tmp_path: Path) -> None:
    for name, more in (("base", "head.weight"), ("tuned", "score.weight")):
        (tmp_path / name).mkdir()
        weights = {"h.0.q.weight": torch.full((4, 5), float(len(name))), more: torch.ones(2, 5)}
        save_file(weights, tmp_path / name / "model.safetensors")
    notices = AdapterSet.load(tmp_path / "tuned", base=tmp_path / "base").notices
    assert [notice.rpartition(": ")[2] for notice in notices] == ["score.weight", "head.weight"]
    assert AdapterSet.load(tmp_path / "tuned", base=tmp_path / "base", layers="q$").notices == ()


def test_renames_apply_to_adapters_and_base(tmp_path: Path) -> None:
    save_file({"encoder.block.0.q.weight": torch.full((4, 5), 2.0)}, tmp_path / "base.safetensors")
    first, second = lora(tmp_path / "first", "decoder.h.0.q"), lora(tmp_path / "second", "net.layers.0.q", seed=1)
    rename = {"encoder.block": "net.layers", "decoder.h": "net.layers", "missing": "other"}
    base = tmp_path / "base.safetensors"
    adapters = AdapterSet.load(first, second, base=base, rename=rename)
    assert adapters.layers == ("net.layers.0.q",)
    shown, unused = adapters.notices
    assert "first: layers are renamed, such as decoder.h.0.q for net.layers.0.q" in shown
    assert "missing=other has no effect" in unused
    plain = AdapterSet.load(first)
    torch.testing.assert_close(adapters.factors("first", "net.layers.0.q"), plain.factors("first", "decoder.h.0.q"))
    checkpoint = Checkpoint.load(base).renamed(rename)
    for layer in ("net.layers.0.q", "decoder.h.0.q", "encoder.block.0.q"):  # a name before or after the rename
        assert checkpoint.weight(layer, (4, 5)).sum() == 40
    table = relation_to_base(adapters, checkpoint)
    assert set(table["layer"]) == {"net.layers.0.q"}


def test_renames_of_checkpoints_and_memories(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    for name, layer, value in (("before", "old.0.q", 0.0), ("after", "new.0.q", 1.0)):
        save_file({f"{layer}.weight": torch.full((4, 5), value)}, tmp_path / f"{name}.safetensors")
    after, base = tmp_path / "after.safetensors", tmp_path / "before.safetensors"
    adapters = AdapterSet.load(after, base=base, rename={"old": "new"})
    assert (adapters.layers, adapters.notices) == (("new.0.q",), ())
    run = AdapterSet.load(write_run(tmp_path / "run"), rename={"model.layer": "h"})
    assert "h.0.query" in run.layers
    assert run.protected("nouns", "h.0.query") is not None


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"0": "1"}, r"h\.0\.q and h\.1\.q have the same name after rename"),
        ({"": "h"}, "rename==h"),
        ({"h.": "g"}, "h.=g"),
    ],
)
def test_renames_that_make_no_sense_are_refused(tmp_path: Path, rename: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSet.load(lora(tmp_path / "task", "h.0.q", "h.1.q"), rename=rename)


def test_layers_of_kohya_and_of_diffusers_are_the_same(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, generator=draw), torch.randn(4, 2, generator=draw)
    pairs = {"lora_unet_mid_block_attn_to_q": "unet.mid_block.attn.to_q", "lora_te1_h_0_fc1": "text_encoder.h.0.fc1"}
    kohya = {
        f"{stem}.{part}": value.clone()
        for stem in pairs
        for part, value in (("lora_down.weight", a), ("lora_up.weight", b), ("alpha", torch.tensor(2.0)))
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(
        {
            f"{stem}.{part}.weight": value.clone()
            for stem in pairs.values()
            for part, value in (("lora_A", a), ("lora_B", b))
        },
        tmp_path / "diffusers.safetensors",
    )
    paths = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    for order in (paths, paths[::-1]):
        adapters = AdapterSet.load(*order)
        assert set(adapters.layers) == set(pairs if "kohya" in order[0].name else pairs.values())
        table = interference_table(adapters)
        assert table[table["metric"] == "alignment"]["value"].tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize(("fused", "parts"), [("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("qkv", ("q", "k", "v"))])
def test_queries_keys_and_values_are_split_where_another_task_has_them_split(
    tmp_path: Path, fused: str, parts: tuple[str, str, str]
) -> None:
    whole, split = (
        lora(tmp_path / "whole", f"h.0.{fused}", "h.0.o"),
        lora(tmp_path / "split", *(f"h.0.{p}" for p in parts), "h.0.o"),
    )
    path = whole / "adapter_model.safetensors"
    tensors = load_file(path)
    draw = torch.Generator().manual_seed(2)
    b = tensors[f"base_model.model.h.0.{fused}.lora_B.weight"] = torch.randn(12, 2, generator=draw)
    a = tensors[f"base_model.model.h.0.{fused}.lora_A.weight"]
    save_file(tensors, path)
    adapters = AdapterSet.load(whole, split)
    assert set(adapters.layers) == {"h.0.o", *(f"h.0.{part}" for part in parts)}
    (notice,) = adapters.notices
    assert f"h.0.{fused} into h.0.{parts[0]}" in notice
    for number, part in enumerate(parts):
        left, right = adapters.factors("whole", f"h.0.{part}")
        torch.testing.assert_close(left @ right.T, 2 * b[4 * number : 4 * number + 4] @ a)
    assert AdapterSet.load(whole).layers == ("h.0.o", f"h.0.{fused}")  # alone it stays as it is
    tensors[f"base_model.model.h.0.{fused}.lora_B.weight"] = torch.ones(11, 2)  # sizes that do not fit
    save_file(tensors, path)
    with pytest.raises(ValueError, match="adapt different layers"):
        AdapterSet.load(whole, split)
