"""Adapters on disk: bit for bit there and back, and a named refusal of everything else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from manifold_cl import (
    EBLoRALinear,
    LoRALinear,
    adapters_of,
    files,
    inject_adapters,
    load_adapters,
    merge_adapters,
    read_adapters,
    save_adapters,
)
from manifold_cl.adapters import Adapter
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.files import FileError, read_json, read_tensors, write_atomically, write_json, write_tensors

Make = Callable[..., nn.Module]


def build(kind: str = "eblora", *, seed: int = 0, rank: int = 3, alpha: float = 4.5, layers: str = "[02]") -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.Generator().manual_seed(99)  # the same base whatever the seed
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=weights))

    def make(_: str, linear: nn.Linear) -> Adapter:
        if kind == "eblora":
            return EBLoRALinear(linear, rank, initial_scale=-0.1 - seed, alpha=alpha, generator=draw)
        adapter = LoRALinear(linear, rank, alpha=alpha, generator=draw)
        nn.init.normal_(adapter.left, generator=draw)
        return adapter

    inject_adapters(model, layers, make)
    return model


def factors_equal(model: nn.Module, folder: Path) -> bool:
    saved = read_adapters(folder)
    return all(
        torch.equal(saved[name].left, adapter.left)
        and torch.equal(saved[name].right, adapter.right)
        and torch.equal(saved[name].magnitude, adapter.magnitude())
        for name, adapter in adapters_of(model).items()
    )


@pytest.mark.parametrize("kind", ["eblora", "lora"])
def test_adapters_come_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, other = build(kind), build(kind, seed=1)
    save_adapters(model, tmp_path / "deep" / "folder", task="nouns")
    folder = tmp_path / "deep" / "folder"
    assert list(read_adapters(folder)) == ["0", "2"]
    assert factors_equal(model, folder)
    assert not factors_equal(other, folder)
    load_adapters(other, folder)
    assert factors_equal(other, folder)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("kind", ["eblora", "lora"])
def test_adding_what_was_saved_is_merging_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, plain = build(kind), build(kind, seed=1)
    save_adapters(model, tmp_path)
    for adapter in adapters_of(plain).values():  # merging nothing gives the plain base back
        nn.init.zeros_(adapter.scale if kind == "eblora" else adapter.left)
    merge_adapters(plain)
    merge_factors(plain, read_adapters(tmp_path))
    merge_adapters(model)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert torch.equal(model[2].weight, plain[2].weight)


def test_the_manifest_says_what_the_record_format_promises(tmp_path: Path) -> None:
    save_adapters(build(), tmp_path, task="nouns")
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    assert sorted(manifest) == [
        "alpha", "base", "format", "kind", "layers", "library", "rank", "scaling", "sha256", "task", "version",
    ]  # fmt: skip
    assert (manifest["format"], manifest["version"]) == ("manifold_cl.adapter", 1)
    assert (manifest["kind"], manifest["task"]) == ("eblora", "nouns")
    assert (manifest["rank"], manifest["alpha"], manifest["scaling"]) == (3, 4.5, 1.5)
    assert manifest["layers"] == {"0": {"left": [8, 3], "right": [10, 3]}, "2": {"left": [6, 3], "right": [8, 3]}}
    assert sorted(read_tensors(tmp_path / "adapter", expected="manifold_cl.adapter")[0]) == [
        "0.left", "0.right", "0.scale", "2.left", "2.right", "2.scale",
    ]  # fmt: skip


def test_one_file_holds_one_kind_rank_and_alpha(tmp_path: Path) -> None:
    message = r"one file holds adapters of one kind, rank and alpha; the model has \[\]"
    with pytest.raises(ValueError, match=message):
        save_adapters(nn.Linear(2, 2), tmp_path)
    model = build()
    model.get_submodule("2").alpha = 9.0  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the model has \[\('eblora', 3, 4\.5\), \('eblora', 3, 9\.0\)\]"):
        save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())


def flip_a_byte(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def cut_tensors(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def cut_manifest(folder: Path) -> None:
    path = folder / "adapter.json"
    path.write_bytes(path.read_bytes()[:-20])


def binary_manifest(folder: Path) -> None:
    (folder / "adapter.json").write_bytes(b"\xff\xfe\x00")


def swap_with_another(folder: Path) -> None:
    save_adapters(build(seed=5), folder / "other")
    shutil.move(folder / "other" / "adapter.safetensors", folder / "adapter.safetensors")


def foreign_manifest(folder: Path) -> None:
    write_json(folder / "adapter.json", {"format": "manifold_cl.memory", "version": 1})


def list_manifest(folder: Path) -> None:
    (folder / "adapter.json").write_text("[1, 2]")


def newer_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "adapter.json").read_text())
    write_json(folder / "adapter.json", {**manifest, "version": 3})


def no_tensors(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()


def no_manifest(folder: Path) -> None:
    (folder / "adapter.json").unlink()


def not_safetensors(folder: Path) -> None:
    import hashlib

    (folder / "adapter.safetensors").write_bytes(b"no tensors")
    manifest = json.loads((folder / "adapter.json").read_text())
    write_json(folder / "adapter.json", {**manifest, "sha256": hashlib.sha256(b"no tensors").hexdigest()})


def lacking_layer(folder: Path) -> None:
    manifest = json.loads((folder / "adapter.json").read_text())
    manifest["layers"]["7"] = {"left": [1, 1], "right": [1, 1]}
    write_json(folder / "adapter.json", manifest)


DAMAGES = [
    (
        flip_a_byte,
        r"adapter\.safetensors does not match its manifest \(sha256 \w{12}….*changed, or its write was inter",
    ),
    (cut_tensors, r"adapter\.safetensors does not match its manifest"),
    (swap_with_another, r"adapter\.safetensors does not match its manifest"),
    (no_tensors, r"adapter\.safetensors does not exist, though its manifest does"),
    (not_safetensors, r"adapter\.safetensors is no safetensors file"),
    (cut_manifest, r"adapter\.json is damaged or truncated \(.*\): restore it, or delete its folder"),
    (binary_manifest, r"adapter\.json is damaged or truncated"),
    (no_manifest, r"adapter\.json does not exist"),
    (foreign_manifest, r"adapter\.json is not of format 'manifold_cl\.adapter' \(found 'manifold_cl\.memory'\)"),
    (list_manifest, r"adapter\.json is not of format 'manifold_cl\.adapter' \(found None\)"),
    (newer_manifest, r"adapter\.json has version 3, this library reads up to 2: update it"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[f.__name__ for f, _ in DAMAGES])
def test_a_file_that_is_not_what_was_written_is_refused_by_name(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save_adapters(build(), tmp_path)
    damage(tmp_path)
    model = build(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FileError, match=message):
        read_adapters(tmp_path)
    with pytest.raises(FileError, match=message):
        load_adapters(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_manifest_that_names_absent_layers_is_refused(tmp_path: Path) -> None:
    save_adapters(build(), tmp_path)
    lacking_layer(tmp_path)
    with pytest.raises(FileError, match=r"adapter\.json names tensors that adapter\.safetensors lacks: 7\.left"):
        read_adapters(tmp_path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (build(layers="0"), r"\(3 differences\): missing in the file: 2\.left; missing in the file: 2\.right; missing"),
        (
            build(rank=2, alpha=3.0),
            r"\(4 differences\): 0\.left: file \(8, 2\), model \(8, 3\); 0\.right: file \(10, 2",
        ),
        (build(alpha=9.0), r"\(2 differences\): 0: file eblora scaled by 3, model eblora scaled by 1\.5; 2: file"),
        (
            build("lora"),
            r"\(4 differences\): 0: file lora scaled by 1\.5, model eblora scaled by 1\.5; .*missing.*0\.sc",
        ),
    ],
    ids=["layers", "rank", "scaling", "kind"],
)
def test_adapters_that_do_not_fit_are_listed_and_none_is_loaded(saved: nn.Module, message: str, tmp_path: Path) -> None:
    save_adapters(saved, tmp_path)
    model = build(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FileError, match=rf"{tmp_path.name} does not fit the model {message}"):
        load_adapters(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_file_with_more_layers_than_the_model_is_refused(tmp_path: Path) -> None:
    save_adapters(build(), tmp_path)
    with pytest.raises(FileError, match=r"\(3 differences\): not in the model: 2\.left"):
        load_adapters(build(layers="0"), tmp_path)


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    save_adapters(build(rank=2, alpha=9.0), tmp_path)
    with pytest.raises(FileError, match=r"\(6 differences\): .*; .*; .*; .*; .* …$"):
        load_adapters(build(), tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"  # replaced, not written into: who has the old file open keeps it whole
    assert path.read_bytes() == b"new"


def test_a_write_that_stops_before_the_manifest_leaves_the_old_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    save_adapters(model, tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "json_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            save_adapters(build(seed=1), tmp_path)
    assert factors_equal(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_adapters_with_nan_are_not_written(tmp_path: Path) -> None:
    model = build("lora")
    with torch.no_grad():
        adapters_of(model)["2"].left[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.left has NaN or infinite entries"):
        save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **manifest: object) -> None:
    """The folder's adapters with other tensors or other entries of the manifest, checksum included."""
    found, described = read_tensors(folder / "adapter", expected="manifold_cl.adapter", version=2)
    write_tensors(folder / "adapter", {**found, **tensors}, {**described, **manifest})


LAYERS = {"0": {"left": [8, 3], "right": [10, 3]}, "2": {"left": [6, 3], "right": [8, 3]}}
CONTRADICTIONS: list[tuple[dict[str, torch.Tensor], dict[str, object], str]] = [
    ({"0.left": torch.full((8, 3), torch.nan)}, {}, r"0\.left has NaN"),
    ({"2.scale": torch.tensor(torch.inf)}, {}, r"2\.scale has NaN or infinite"),
    ({"2.scale": torch.ones(4)}, {}, r"2\.scale has shape \(4,\), which does not fit rank 3"),
    ({"0.right": torch.ones(10, 3, dtype=torch.int32)}, {}, r"0\.right is torch\.int32"),
    ({"0.right": torch.ones(10, 3, dtype=torch.float16)}, {}, r"0\.right is torch\.float16"),
    ({"0.right": torch.ones(10, 2)}, {}, r"0\.right has shape \(10, 2\), adapter\.json says \(10, 3\)"),
    ({"0.start_left": torch.ones(8, 3)}, {}, r"lacks 0\.start_right, 0\.start_scale"),
    ({"0.gate": torch.ones(1)}, {}, r"0\.gate, which is no part of an update"),
    ({}, {"scaling": -1.5}, r"adapter\.json: scaling -1\.5 is not alpha / rank, which is 4\.5 / 3"),
    ({}, {"scaling": 200}, "scaling 200 is not alpha / rank"),
    ({}, {"scaling": "1.5"}, r"scaling is '1\.5', a finite number is needed"),
    ({}, {"alpha": True, "scaling": 1 / 3}, "alpha is True, a finite number is needed"),
    ({}, {"rank": 0}, "scaling 1.5 is not alpha / rank"),
    ({}, {"rank": 9, "scaling": 0.5}, r"factors \(8, 3\) and \(10, 3\), rank 9"),
    ({}, {"rank": None}, "rank is None, a finite number"),
    ({}, {"kind": ["eblora"]}, r"kind \['eblora'\] is a word"),
    ({}, {"layers": {"0": LAYERS["0"]}}, r"tensors of layers that adapter\.json lacks: 2\.left"),
    ({}, {"layers": list(LAYERS)}, r"adapter\.json does not follow its format"),
    ({}, {"layers": {**LAYERS, "2": {"left": [6, 3]}}}, r"adapter\.json lacks the key 'right'"),
    ({}, {"layers": {**LAYERS, "2": {"left": 6, "right": 8}}}, r"adapter\.json does not follow its format"),
    ({}, {"version": "2"}, r"adapter\.json has version '2', a whole number"),
]


@pytest.mark.parametrize(("tensors", "manifest", "message"), CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_by_name(
    tensors: dict[str, torch.Tensor], manifest: dict[str, object], message: str, tmp_path: Path
) -> None:
    model, other = build(), build(seed=1)
    save_adapters(model, tmp_path)
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    rewrite(tmp_path, tensors, **manifest)
    with pytest.raises(FileError, match=message):
        read_adapters(tmp_path)
    with pytest.raises(FileError):
        load_adapters(other, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_a_manifest_with_numbers_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    for text in ("NaN", "Infinity", "1" + "0" * 400):
        save_adapters(build(), tmp_path)
        path = tmp_path / "adapter.json"
        path.write_text(path.read_text().replace('"scaling": 1.5', f'"scaling": {text}'))
        with pytest.raises(FileError, match=r"adapter\.json"):
            read_adapters(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(FileError, match=r"adapter\.json is damaged or truncated"):
        read_adapters(tmp_path)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_refused_by_name(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    save_adapters(build(), tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(FileError, match=rf"{name} is not a regular file"):
        read_adapters(tmp_path)
    with pytest.raises(OSError, match=rf"{name} is not a regular file"):
        save_adapters(build(), tmp_path)


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "t", {"a": wide, "same": wide, "part": wide[1:]}, {"format": "f"})
    tensors, _ = read_tensors(tmp_path / "t", expected="f")
    assert torch.equal(tensors["a"], wide)
    assert torch.equal(tensors["same"], wide)
    assert torch.equal(tensors["part"], wide[1:])


@pytest.mark.parametrize("text", ["nan " * 16 + "1e-7", "1e-7 " * 16 + "inf", "1e-7 " * 15 + "nan 1e-7", "a b", ""])
def test_a_fingerprint_that_is_no_list_of_numbers_fits_no_base(text: str, tmp_path: Path) -> None:
    save_adapters(build(), tmp_path)
    rewrite(tmp_path, {}, base={"0": text})
    with pytest.raises(FileError, match="0: trained on another model, its fingerprint is not 17 numbers"):
        load_adapters(build(seed=1), tmp_path)


def test_unknown_numbers_must_be_null_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", {"format": "f", "x": None})
    assert read_json(tmp_path / "a.json", expected="f") == {"format": "f", "x": None}


def test_slices_and_views_are_written_as_they_read(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "t", {"slice": wide[:, 1:3], "transpose": wide.T}, {"format": "f"})
    tensors, manifest = read_tensors(tmp_path / "t", expected="f")
    assert torch.equal(tensors["slice"], wide[:, 1:3])
    assert torch.equal(tensors["transpose"], wide.T)
    assert len(manifest["sha256"]) == 64


def test_frames_that_reach_into_what_the_model_protects_are_not_loaded(tmp_path, generator):
    def model(complement):
        net = nn.Sequential(nn.Linear(12, 8))
        inject_adapters(net, ["0"], lambda _, linear: EBLoRALinear(linear, 3, complement=complement))
        return net

    free, bound = model(None), model(torch.randn(12, 4, generator=generator))
    save_adapters(free, tmp_path)
    before = bound[0].right.detach().clone()
    with pytest.raises(FileError, match=r"0.right: off the model's manifold \(orthonormality .*, protection"):
        load_adapters(bound, tmp_path)
    assert torch.equal(bound[0].right, before)


def test_tensors_that_were_read_lie_where_fresh_ones_do(tmp_path):
    write_tensors(tmp_path / "odd", {"a": torch.ones(3), "b": torch.ones(5, 7)}, {"format": "test", "version": 1})
    tensors, _ = read_tensors(tmp_path / "odd", expected="test")
    # 64 bytes is what torch aligns its own memory to; MKL promises equal bits for equal alignment only.
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in tensors.values())
