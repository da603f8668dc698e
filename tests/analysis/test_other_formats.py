"""The update read from other tools' files is the one that those tools add to the weight."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis import AdapterSet, Checkpoint, read_protected

peft = pytest.importorskip("peft")
LAYERS = ("h.0.q", "h.0.v", "h.1.q", "h.1.v")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.h = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(10, 12), "v": nn.Linear(10, 7)}) for _ in range(2)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part["q"](x) + part["v"](x).sum(-1, keepdim=True) for part in self.h], -1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("weight")}


def save_base(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def stir(model: nn.Module, part: str, seed: int = 1) -> None:
    """Trained values: PEFT starts with an update of zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


def saved(folder: Path, config: Any, part: str, **options: Any) -> tuple[dict[str, Tensor], Path]:
    """What PEFT's own merge adds to the weights, and the base checkpoint."""
    model = Model()
    before, base = weights(model), save_base(folder.parent / f"{folder.name}-base", model)
    adapted = peft.get_peft_model(model, config)
    stir(adapted, part)
    adapted.save_pretrained(folder, **options)
    after = weights(adapted.merge_and_unload())
    return {name.removesuffix(".weight"): after[name] - before[name] for name in before}, base


def check(adapters: AdapterSet, changes: dict[str, Tensor]) -> None:
    assert adapters.layers == LAYERS
    for _, layer, left, right in adapters:
        # merging rounds W + ΔW of a few units to float32, and so does what is subtracted: 1e-6 is two roundings
        torch.testing.assert_close(left @ right.T, changes[layer], rtol=0, atol=6e-6)


def test_dora_is_what_peft_merges_and_needs_the_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"], use_dora=True)
    changes, base = saved(tmp_path / "task", config, "lora_")
    with pytest.raises(ValueError, match="DoRA's update depends on the base weight: give the base checkpoint"):
        AdapterSet.load(tmp_path / "task")
    adapters = AdapterSet.load(tmp_path / "task", base=base)
    assert adapters.kinds == ("dora",)
    assert adapters.shape("task", "h.0.v") == (7, 10, 7)  # rescaled rows of W have full rank
    check(adapters, changes)


def test_osf_is_the_difference_of_its_low_parts(tmp_path: Path) -> None:
    config = peft.OSFConfig(effective_rank=4, target_modules=["q", "v"])
    changes, base = saved(tmp_path / "task", config, "svd_params")
    with pytest.raises(ValueError, match="OSF's update depends on the base weight"):
        AdapterSet.load(tmp_path / "task")
    adapters = AdapterSet.load(tmp_path / "task", base=base)
    assert adapters.shape("task", "h.0.q") == (12, 10, 12)  # 2 (10 − 4)
    check(adapters, changes)


def test_a_bin_file_of_tensors_is_read_without_unpickling(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"])
    changes, _ = saved(tmp_path / "task", config, "lora_", safe_serialization=False)
    if not (tmp_path / "task" / "adapter_model.bin").exists():  # PEFT has given up writing these
        stored = tmp_path / "task" / "adapter_model.safetensors"
        torch.save(load_file(stored), tmp_path / "task" / "adapter_model.bin")
        stored.unlink()
    check(AdapterSet.load(tmp_path / "task"), changes)


class Trap:
    """What a hostile file holds: unpickling it would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_unpickled(tmp_path: Path, old: bool) -> None:
    folder, trap = tmp_path / "task", tmp_path / "sprung"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if old:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": Trap(trap)}))
    else:
        torch.save({"x": Trap(trap)}, folder / "adapter_model.bin")
    said = "a pickle of the old kind" if old else "a pickle of more than tensors, which is refused unread"
    with pytest.raises(ValueError, match=f"adapter_model.bin is .*{said}"):
        AdapterSet.load(folder)
    assert not trap.exists()
    torch.save([torch.ones(2)], folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds a list, a mapping from names to tensors was expected"):
        AdapterSet.load(folder)


def stella(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    named = {f"base_model.model.h.0.q.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    described = {"peft_type": "STELLA", "r": 3, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(("core", "wide"), [((3, 3), True), ((3,), False)])
def test_stella_is_u_s_v_times_alpha_over_r(tmp_path: Path, core: tuple[int, ...], wide: bool) -> None:
    u, s, v = torch.randn(12, 3), torch.randn(core), torch.randn(10, 3)
    parts = {"stella_U": u, "stella_S": s, ("stella_Vt" if wide else "stella_V"): v.T if wide else v}
    left, right = AdapterSet.load(stella(tmp_path / "task", parts)).factors("task", "h.0.q")
    middle = s if s.ndim == 2 else torch.diag(s)
    torch.testing.assert_close(left @ right.T, 2 * u @ middle @ v.T, rtol=1e-5, atol=1e-5)  # products of three


def test_stella_folders_that_lack_a_part_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"h\.0\.q needs stella_U, stella_S and stella_V"):
        AdapterSet.load(stella(tmp_path / "a", {"stella_U": torch.ones(4, 3), "stella_S": torch.ones(3)}))
    with pytest.raises(ValueError, match="holds no stella_U, stella_S and stella_V"):
        AdapterSet.load(stella(tmp_path / "b", {"x": torch.ones(3)}))
    odd = {"stella_U": torch.ones(4, 3), "stella_S": torch.ones(2), "stella_V": torch.ones(5, 3)}
    with pytest.raises(ValueError, match=r"stella_S has shape \(2,\), expected a number, \(3,\) or \(3, 3\)"):
        AdapterSet.load(stella(tmp_path / "c", odd))


def shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint in two files with an index."""
    folder.mkdir()
    names = list(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in files.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in files.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_dense_checkpoints_follow_upon_each_other(tmp_path: Path) -> None:
    start = weights(Model()) | {"norm.weight": torch.ones(5)}
    draw = torch.Generator().manual_seed(2)
    first = start | {"h.0.q.weight": start["h.0.q.weight"] + torch.randn(12, 2, generator=draw) @ torch.randn(2, 10)}
    second = first | {"h.0.q.weight": first["h.0.q.weight"] + 1.0}
    base = shards(tmp_path / "base", start)
    paths = [shards(tmp_path / "one", first), shards(tmp_path / "two", second)]
    adapters = AdapterSet.load(*paths, base=base)
    assert (adapters.tasks, adapters.layers) == (("one", "two"), ("h.0.q",))  # what did not change is left out
    for task, (after, before) in {"one": (first, start), "two": (second, first)}.items():
        left, right = adapters.factors(task, "h.0.q")
        exact = after["h.0.q.weight"] - before["h.0.q.weight"]
        torch.testing.assert_close(left @ right.T, exact, rtol=0, atol=0)
    low = AdapterSet.load(*paths, base=base, rank=2)
    assert low.shape("one", "h.0.q") == (12, 10, 2)
    left, right = low.factors("one", "h.0.q")
    exact = first["h.0.q.weight"] - start["h.0.q.weight"]
    torch.testing.assert_close(left @ right.T, exact, rtol=0, atol=1e-5)  # rank 2 but for the rounding of the sum
    with pytest.raises(
        ValueError, match=r"complete checkpoint: its update is the difference to another one: give the base"
    ):
        AdapterSet.load(paths[0])
    with pytest.raises(ValueError, match="no matrix differs between"):
        AdapterSet.load(base, base=base)
    with pytest.raises(ValueError, match="rank is 0, at least 1"):
        AdapterSet.load(paths[0], base=base, rank=0)
    for option in ("layers", "transposed"):
        with pytest.raises(ValueError, match=rf"{option}='.q': .* is no regular expression: nothing to repeat"):
            AdapterSet.load(paths[0], base=base, **{option: "*q"})  # type: ignore[arg-type]


def test_matrices_that_a_checkpoint_stores_as_inputs_by_outputs_are_turned(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(5)
    start = {"h.0.c_attn.weight": torch.randn(8, 24, generator=draw), "head.weight": torch.randn(5, 8, generator=draw)}
    change = torch.randn(8, 2, generator=draw) @ torch.randn(2, 24, generator=draw)
    tuned = {"h.0.c_attn.weight": start["h.0.c_attn.weight"] + change, "head.weight": start["head.weight"] + 1.0}
    base, after = shards(tmp_path / "base", start), shards(tmp_path / "tuned", tuned)
    plain = AdapterSet.load(after, base=base)
    assert (plain.shape("tuned", "h.0.c_attn")[:2], plain.transposed) == ((8, 24), frozenset())
    turned = AdapterSet.load(after, base=base, transposed=r"c_attn$")
    assert turned.shape("tuned", "h.0.c_attn") == (24, 8, 8)  # outputs, inputs
    assert turned.shape("tuned", "head")[:2] == (5, 8)
    assert turned.transposed == {"h.0.c_attn"}
    for cut in (None, 2):
        left, right = AdapterSet.load(after, base=base, transposed=r"c_attn$", rank=cut).factors("tuned", "h.0.c_attn")
        torch.testing.assert_close(left @ right.T, change.T, rtol=0, atol=1e-5)  # rounding of W + ΔW, as above


def test_checkpoints_that_are_not_whole_are_named(tmp_path: Path) -> None:
    base = shards(tmp_path / "base", weights(Model()))
    with pytest.raises(ValueError, match=r"has no weight for layer h\.0\.k; it has h\.\d\.[qv]\.weight, "):
        Checkpoint.load(base).name_of("h.0.k")
    assert Checkpoint.load(base).name_of("model.h.0.q") == "h.0.q.weight"
    with pytest.raises(ValueError, match=r"h\.0\.q\.weight has shape \(12, 10\), the update needs \(3, 4\)"):
        Checkpoint.load(base).weight("h.0.q", (3, 4))
    (base / "b.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"b\.safetensors does not exist, though model\.safetensors\.index\.json"
    ):
        Checkpoint.load(base)
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="key 'weight_map' is missing"):
        Checkpoint.load(base)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: looked for model\.safetensors"):
        Checkpoint.load(tmp_path)


def test_what_is_saved_loads_into_stock_peft_and_merges_to_the_same(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    ranks = {"h.0.q": 2, "h.0.v": 3, "h.1.q": 2, "h.1.v": 2}
    updates = {
        task: {
            layer: (torch.randn(12 if layer[-1] == "q" else 7, r, generator=draw), torch.randn(10, r, generator=draw))
            for layer, r in ranks.items()
        }
        for task in ("first task", "second")
    }
    adapters = AdapterSet.from_factors(updates)
    folder = adapters.save(tmp_path / "saved")
    assert [p.name for p in sorted(folder.iterdir())] == ["01-first_task", "02-second", "tasks.json"]
    assert len({p.stat().st_mode for p in folder.rglob("*") if p.is_file()}) == 1  # tensors as readable as the rest
    again = AdapterSet.load(folder)
    assert again.tasks == ("first task", "second")
    for mine, theirs in zip(adapters, again, strict=True):
        torch.testing.assert_close(mine.left, theirs.left, rtol=0, atol=0)
        torch.testing.assert_close(mine.right, theirs.right, rtol=0, atol=0)
    model = Model()
    before = weights(model)
    merged = weights(peft.PeftModel.from_pretrained(model, str(folder / "01-first_task")).merge_and_unload())
    for layer, (left, right) in updates["first task"].items():
        change = merged[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(change, left @ right.T, rtol=0, atol=6e-6)  # rounding of sums, as above
    with pytest.raises(FileExistsError, match="is not empty: adapters are written into a new folder"):
        adapters.save(folder)


def test_a_folder_of_folders_and_a_manifest_are_tasks_in_order(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q", "v"])
    (tmp_path / "all").mkdir()
    for number in (1, 2, 10):
        saved(tmp_path / "all" / f"task-{number}", config, "lora_")
    for base in (tmp_path / "all").glob("*-base"):
        base.rename(tmp_path / base.name)
    assert AdapterSet.load(tmp_path / "all").tasks == ("task-1", "task-2", "task-10")
    tasks = [{"name": "last", "path": "task-10"}, {"path": "task-1"}]
    manifest = tmp_path / "all" / "tasks.json"
    manifest.write_text(json.dumps({"format": "analysis.tasks", "version": 1, "tasks": tasks}))
    assert AdapterSet.load(tmp_path / "all").tasks == AdapterSet.load(manifest).tasks == ("last", "task-1")
    manifest.write_text(json.dumps({"format": "analysis.tasks", "version": 1, "tasks": [{"name": "x"}]}))
    with pytest.raises(ValueError, match="a task has no 'path'"):
        AdapterSet.load(manifest)
    manifest.write_text(json.dumps({"format": "analysis.tasks", "version": 1, "tasks": "x"}))
    with pytest.raises(ValueError, match="key 'tasks' is a list of objects"):
        AdapterSet.load(manifest)


def test_layers_that_differ_are_listed_and_left_out_only_when_asked(tmp_path: Path) -> None:
    saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=["q", "v"]), "lora_")
    saved(tmp_path / "b", peft.LoraConfig(r=2, target_modules=["q"]), "lora_")
    with pytest.raises(ValueError, match=r"2 differ: h\.0\.v is in 'a' only; h\.1\.v is in 'a' only \(common=True"):
        AdapterSet.load(tmp_path / "a", tmp_path / "b")
    shared = AdapterSet.load(tmp_path / "a", tmp_path / "b", common=True)
    assert shared.layers == ("h.0.q", "h.1.q")
    assert len(list(shared)) == 4
    saved(tmp_path / "c", peft.LoraConfig(r=2, target_modules=["v"]), "lora_")
    with pytest.raises(ValueError, match="no layer is shared by all of b, c"):
        AdapterSet.load(tmp_path / "b", tmp_path / "c", common=True)
    for name in "ac":
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": f"org/{name}"}))
    with pytest.raises(ValueError, match="different base models: 'a' on org/a; 'c' on org/c"):
        AdapterSet.load(tmp_path / "a", tmp_path / "c")
    assert AdapterSet.load(tmp_path / "a", tmp_path / "c", common=True).layers == ("h.0.v", "h.1.v")


def test_factors_of_merge_adapters_go_in_as_they_are() -> None:
    from manifold_cl import inject_adapters, merge_adapters
    from manifold_cl.adapters import LoRALinear

    model = Model()
    before = weights(model)
    inject_adapters(model, ["q"], lambda _, linear: LoRALinear(linear, 3, alpha=6.0))
    stir(model, "left")
    stir(model, "right")
    adapters = AdapterSet.from_factors({"task": merge_adapters(model)})
    after = weights(model)
    for _, layer, left, right in adapters:
        change = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(left @ right.T, change, rtol=0, atol=6e-6)
    with pytest.raises(ValueError, match="task, x: factors contain NaN or infinite numbers"):
        AdapterSet.from_factors({"task": {"x": (torch.full((2, 1), torch.nan), torch.ones(2, 1))}})


def test_a_memory_is_read_by_itself(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run")
    last = read_protected(run)  # that of the last task
    torch.testing.assert_close(last["model.layer.0.query"], torch.eye(10)[:, :3], rtol=0, atol=0)
    first = read_protected(run / "tasks" / "01-news" / "memory.json")
    assert first["model.layer.0.query"].shape == (10, 1)
    with pytest.raises(FileNotFoundError, match=r"holds no memory: looked for memory\.safetensors"):
        read_protected(tmp_path)
    for old, new in (("02-nouns", "99-nouns"), ("03-films", "100-films")):
        (run / "tasks" / old).rename(run / "tasks" / new)
    assert read_protected(run)["model.layer.0.query"].shape == (10, 3)  # task 100, not task 99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda basis: 2 * basis, r"x\.basis is no orthonormal basis: .*by 3\.0e\+00"),
        (lambda basis: basis * 0, r"by 1\.0e\+00"),
        (lambda basis: basis.clone(memory_format=torch.contiguous_format).fill_diagonal_(1e38), r"by 1\.0e\+76"),
        (lambda basis: basis.clone(memory_format=torch.contiguous_format).fill_diagonal_(torch.nan), r"contains NaN"),
        (lambda basis: basis[:0], r"by 1\.0e\+00"),
        (lambda basis: basis.mT, r"x\.basis is no orthonormal basis"),
        (lambda basis: torch.cat([basis, basis[:, :1]], 1), r"by 1\.0e\+00"),
        (lambda basis: basis.to(torch.float8_e4m3fn), r"x\.basis is no orthonormal basis"),
        (lambda basis: basis.bfloat16(), r"x\.basis is no orthonormal basis"),
    ],
)
def test_a_memory_that_is_no_orthonormal_basis_is_refused(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path, write_memory: Callable[..., None]
) -> None:
    basis = torch.linalg.qr(torch.randn(9, 2, generator=torch.Generator().manual_seed(0))).Q
    write_memory(tmp_path / "good", "one", {"x": basis, "none": basis[:, :0]})
    assert torch.equal(read_protected(tmp_path / "good")["x"], basis)
    write_memory(tmp_path / "bad", "one", {"x": change(basis)})
    with pytest.raises(ValueError, match=message):
        read_protected(tmp_path / "bad")


def test_a_run_whose_memory_is_no_orthonormal_basis_is_refused(
    tmp_path: Path, write_run: Callable[..., Path], write_memory: Callable[..., None]
) -> None:
    run = write_run(tmp_path / "run")
    write_memory(run / "tasks" / "01-news", "news", {"model.layer.0.query": 1.001 * torch.eye(10)[:, :1]})
    with pytest.raises(ValueError, match=r"01-news/memory\.safetensors: model\.layer\.0\.query\.basis is no"):
        AdapterSet.load(run).protected("nouns", "model.layer.0.query")
