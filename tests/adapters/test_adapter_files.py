"""Adapters on disk: bit for bit there and back, and a named refusal of everything else."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from manifold_cl import (
    EBLoRALinear,
    adapters_of,
    eblora_adapters,
    inject_adapters,
    load_adapters,
    merge_adapters,
    param_groups,
    save_adapters,
)
from manifold_cl.adapters import Adapter, LoRALinear, read_adapters
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.files import FileError
from manifold_cl.tensor_files import read_tensors, write_tensors

VERSION_1 = Path(__file__).parents[1] / "version_1"


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


def test_loaded_adapters_need_no_start_along_a_task(tmp_path: Path) -> None:
    model = build()
    save_adapters(model, tmp_path, task="nouns")
    other = nn.Sequential(*(adapter.base if isinstance(adapter, Adapter) else adapter for adapter in build(seed=1)))
    make = eblora_adapters(rank=3, alpha=4.5, start="task")
    inject_adapters(other, ["0", "2"], make)
    with pytest.raises(ValueError, match="no start yet"):
        param_groups(other, lr=0.1)
    load_adapters(other, tmp_path)
    assert param_groups(other, lr=0.1)
    assert factors_equal(other, tmp_path)


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


def test_the_file_is_what_the_record_format_documents(tmp_path: Path) -> None:
    save_adapters(build(), tmp_path, task="nouns")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
    tensors, manifest = read_tensors(tmp_path / "adapter.safetensors")
    assert sorted(manifest) == [
        "alpha", "digests", "format", "kind", "library", "model", "rank", "task", "version",
    ]  # fmt: skip
    assert (manifest["format"], manifest["version"]) == ("manifold_cl.adapter", 2)
    assert (manifest["kind"], manifest["task"]) == ("eblora", "nouns")
    assert (manifest["rank"], manifest["alpha"]) == (3, 4.5)
    assert manifest["model"]["name"] == "Sequential"
    assert {name: len(text.split()) for name, text in manifest["model"]["weights"].items()} == {"0": 17, "2": 17}
    assert sorted(tensors) == sorted(manifest["digests"])
    assert sorted(tensors) == ["0.left", "0.right", "0.scale", "2.left", "2.right", "2.scale"]


def test_one_file_holds_one_kind_rank_and_alpha(tmp_path: Path) -> None:
    model = build()
    model.get_submodule("2").alpha = 9.0  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the model has \[\('eblora', 3, 4\.5\), \('eblora', 3, 9\.0\)\]"):
        save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_changes_nothing_in_the_model(tmp_path: Path) -> None:
    save_adapters(build(), tmp_path)
    path = tmp_path / "adapter.safetensors"
    content = path.read_bytes()
    model = build(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), content[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"adapter\.safetensors"):
            load_adapters(model, tmp_path)
    path.unlink()
    with pytest.raises(FileError, match=r"adapter\.safetensors does not exist"):
        load_adapters(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_adapters_of_version_1_are_loaded_and_saved_as_version_2(tmp_path: Path) -> None:
    shutil.copytree(VERSION_1 / "full_core", tmp_path / "old")
    assert read_tensors(tmp_path / "old" / "adapter.safetensors")[1]["version"] == 2  # a core of r × r numbers
    expected = read_adapters(tmp_path / "old")
    (layer,) = adapters_of(one_layer()).values()
    model, other = one_layer(), one_layer(seed=1)
    load_adapters(model, tmp_path / "old")
    save_adapters(model, tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["adapter.safetensors"]
    (found,) = read_adapters(tmp_path / "old").values()
    (read,) = expected.values()
    assert torch.equal(found.delta_weight(), read.delta_weight())
    assert not torch.equal(layer.factors().delta_weight(), read.delta_weight())
    with pytest.raises(FileError, match="inner: trained on another model"):
        load_adapters(other, VERSION_1 / "full_core")


def one_layer(seed: int = 7) -> nn.Module:
    """The first layer of the model that the adapters of version 1 belong to, by its seed."""
    model = nn.Sequential()
    model.add_module("inner", nn.Linear(24, 16))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.inner.weight.copy_(torch.randn(16, 24, generator=draw) / 24**0.5)
    inject_adapters(model, ["inner"], lambda _, linear: EBLoRALinear(linear, 3, core="full"))
    return model


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
    with pytest.raises(FileError, match=rf"adapter\.safetensors does not fit the model {message}"):
        load_adapters(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_file_with_more_layers_than_the_model_is_refused(tmp_path: Path) -> None:
    save_adapters(build(), tmp_path)
    with pytest.raises(FileError, match=r"\(3 differences\): not in the model: 2\.left"):
        load_adapters(build(layers="0"), tmp_path)


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    save_adapters(build(rank=2, alpha=9.0), tmp_path)
    with pytest.raises(FileError, match=r"\(6 differences\): .*; .*; .*; .*; .* and 1 more$"):
        load_adapters(build(), tmp_path)


def test_adapters_with_nan_are_not_written(tmp_path: Path) -> None:
    model = build("lora")
    with torch.no_grad():
        adapters_of(model)["2"].left[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.left has NaN or infinite entries"):
        save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, tensors: dict[str, torch.Tensor | None], **manifest: object) -> None:
    """The folder's adapters with other tensors or other entries of the manifest, checksums included."""
    found, described = read_tensors(folder / "adapter.safetensors")
    found = {name: tensor for name, tensor in {**found, **tensors}.items() if tensor is not None}
    write_tensors(folder / "adapter.safetensors", found, {**described, **manifest})


CONTRADICTIONS: list[tuple[dict[str, torch.Tensor | None], dict[str, object], str]] = [
    ({"0.left": torch.full((8, 3), torch.nan)}, {}, r"0\.left has NaN"),
    ({"2.scale": torch.tensor(torch.inf)}, {}, r"2\.scale has NaN or infinite"),
    ({"2.scale": torch.ones(4)}, {}, r"2\.scale has shape \(4,\), which does not fit rank 3"),
    ({"0.right": torch.ones(10, 3, dtype=torch.float16)}, {}, r"0\.right is torch\.float16"),
    ({"0.right": torch.ones(10, 2)}, {}, r"0\.right has shape \(10, 2\), which does not fit rank 3"),
    ({"0.right": None}, {}, r"lacks 0\.right"),
    ({"0.start_left": torch.ones(8, 3)}, {}, r"lacks 0\.start_right"),
    ({f"0.start_{key}": torch.ones(3, 3) for key in ("left", "right", "scale")}, {}, "start_left has another shape"),
    ({"0.gate": torch.ones(1)}, {}, r"0\.gate, which is no part of an update"),
    ({}, {"alpha": "4.5"}, "adapter"),
    ({}, {"alpha": True}, "alpha is True, a finite number"),
    ({}, {"alpha": 10**400}, "adapter"),
    ({}, {"rank": 0}, "rank is 0"),
    ({}, {"rank": 9}, r"has shape \(., 3\), which does not fit rank 9"),
    ({}, {"rank": None}, "adapter"),
    ({}, {"kind": ["eblora"]}, r"kind \['eblora'\]"),
]


@pytest.mark.parametrize(("tensors", "manifest", "message"), CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_by_name(
    tensors: dict[str, torch.Tensor | None], manifest: dict[str, object], message: str, tmp_path: Path
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


@pytest.mark.parametrize("text", ["nan " * 16 + "1e-7", "1e-7 " * 16 + "inf", "1e-7 " * 15 + "nan 1e-7", "a b", ""])
def test_a_fingerprint_that_is_no_list_of_numbers_fits_no_base(text: str, tmp_path: Path) -> None:
    save_adapters(build(), tmp_path)
    rewrite(tmp_path, {}, model={"name": "", "weights": {"0": text}})
    with pytest.raises(FileError, match="0: trained on another model, its fingerprint is not 17 numbers"):
        load_adapters(build(seed=1), tmp_path)


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


def test_a_model_without_adapters_is_told_to_inject_them(tmp_path: Path) -> None:
    bare = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"no adapters to save: call inject_adapters"):
        save_adapters(bare, tmp_path)
    save_adapters(build(), tmp_path)
    with pytest.raises(ValueError, match=r"call inject_adapters first, for 0, 2 \(kind eblora, rank 3, alpha 4\.5\)"):
        load_adapters(bare, tmp_path)
