"""Adapters are found wherever tools put them, all of them, or what is not read is named."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis import AdapterSet, Checkpoint, flattened, read_protected
from analysis.many import AdapterCollection

DRAW = torch.Generator().manual_seed(0)


def pair(stem: str = "base_model.model.q", r: int = 2) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_A.weight": torch.randn(r, 5, generator=DRAW),
        f"{stem}.lora_B.weight": torch.randn(4, r, generator=DRAW),
    }


def lora(folder: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors or pair()), folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def test_named_adapters_are_tasks_and_snapshots_are_named_only(tmp_path: Path) -> None:
    folder = lora(tmp_path / "first")
    (folder / "README.md").write_text("one for all adapters")
    for name in ("task_10", "task_2"):
        lora(folder / name)
    (lora(folder / "checkpoint-5") / "trainer_state.json").write_text("{}")
    adapters = AdapterSet.load(folder)
    assert adapters.tasks == ("first", "task_2", "task_10")
    several, alone = adapters.notices
    assert several.endswith("read as tasks in the order of their names: task_2, task_10")
    assert alone.endswith("which are not read: checkpoint-5")
    for path in (folder / "adapter_model.safetensors", folder / "adapter_config.json"):
        named = AdapterSet.load(path)  # a file of the folder stands for its adapter alone
        assert (named.tasks, len(named.notices)) == (("first",), 2)


def test_folders_of_one_name_are_named_with_those_around_them(tmp_path: Path) -> None:
    for place in ("a/task1/final", "a/task2/final", "b/task1/final"):
        lora(tmp_path / place)
    assert AdapterSet.load(tmp_path / "a").tasks == ("task1/final", "task2/final")
    paths = [tmp_path / place for place in ("a/task1/final", "b/task1/final", "a/task2/final")]
    assert AdapterSet.load(*paths).tasks == ("a/task1/final", "b/task1/final", "a/task2/final")
    with pytest.raises(ValueError, match="task 'final' occurs twice"):
        AdapterSet.load(paths[0], paths[0])


def test_runs_of_the_same_tasks_are_no_sequence(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="task 'news' occurs twice"):
        AdapterSet.load(write_run(tmp_path / "a"), write_run(tmp_path / "b"))


def test_folders_of_other_runs_are_refused(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run")
    os.rename(run / "tasks" / "02-nouns", run / "tasks" / "keep")
    stale = write_run(tmp_path / "other", tasks=["news", "verbs", "films"]) / "tasks" / "02-verbs"
    os.rename(stale, run / "tasks" / "02-verbs")
    with pytest.raises(ValueError, match=r"adapter of 'verbs', .*record\.json says that task 2 is 'nouns'"):
        AdapterSet.load(run)
    os.rename(run / "tasks" / "keep", run / "tasks" / "02-nouns")
    with pytest.raises(ValueError, match="02-nouns and 02-verbs are both task 2"):
        AdapterSet.load(run)


def test_an_adapter_that_names_another_task_than_its_folder_is_named(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    run = write_run(tmp_path / "run")
    manifest = run / "tasks" / "02-nouns" / "adapter.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "task": "verbs"}))
    adapters = AdapterSet.load(run)
    assert adapters.tasks[1] == "verbs"
    (notice,) = adapters.notices
    assert re.search(r"02-nouns holds an adapter of 'verbs', .*task 2 is 'nouns'", notice)


def test_one_file_of_factors_is_read_with_its_configuration_or_alpha(tmp_path: Path) -> None:
    folder = lora(tmp_path / "task")
    left, right = AdapterSet.load(folder).factors("task", "q")
    alone = tmp_path / "alone.safetensors"
    save_file(load_file(folder / "adapter_model.safetensors"), alone)
    with pytest.raises(ValueError, match=r"alpha is missing for 1 of 1 layers, the first is base_model\.model\.q"):
        AdapterSet.load(alone)
    again = AdapterSet.load(alone, alpha=4)
    assert (again.kinds, again.layers) == (("lora",), ("q",))
    torch.testing.assert_close(again.factors("alone", "q"), (left, right), rtol=0, atol=0)


@pytest.mark.parametrize("stable", [False, True])
def test_the_header_of_diffusers_says_alpha(tmp_path: Path, stable: bool) -> None:
    tensors = pair("unet.mid.to_q") | pair("unet.up.to_q", 4) | pair("text_encoder.q_proj")
    described = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.rank_pattern": {"up.to_q": 4},
        "unet.use_rslora": stable,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 1,
    }
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(described)})
    adapters = AdapterSet.load(tmp_path)
    power = 0.5 if stable else 1.0
    for layer, scaling in (("unet.mid.to_q", 6 / 2**power), ("unet.up.to_q", 6 / 4**power)):
        left, _ = adapters.factors(tmp_path.name, layer)
        torch.testing.assert_close(left, tensors[f"{layer}.lora_B.weight"] * scaling, rtol=1e-6, atol=0)
    left, _ = adapters.factors(tmp_path.name, "text_encoder.q_proj")
    torch.testing.assert_close(left, tensors["text_encoder.q_proj.lora_B.weight"] * 0.5, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("c.hada_w1_a", "the factors of a LoHa"),
        ("lora_unet_c.lokr_w1", "the factors of a LoKr"),
        ("c.oft_blocks", "the factors of an OFT"),
        ("base_model.model.c.vera_lambda_b", "the factors of a VeRA"),
        ("lora_unet_c.dora_scale", "the magnitudes of a DoRA"),
        ("unet.to_q_lora.down.weight", "the factors of a LoRA"),
        ("unet.to_q.lora.up.weight", "the factors of a LoRA"),
    ],
)
def test_factors_are_never_weights(tmp_path: Path, part: str, kind: str) -> None:
    path = tmp_path / "style.safetensors"
    save_file({part: torch.ones(4, 4)}, path)
    base = tmp_path / "base.safetensors"
    save_file({"c.weight": torch.ones(4, 4)}, base)
    for place in (path, tmp_path / "style.safetensors"):
        with pytest.raises(ValueError, match=rf"holds {kind}.*: not supported: {part}|no \w+.* beside {part}"):
            AdapterSet.load(place, base=base)
    with pytest.raises(ValueError, match=f"holds {kind}.*not the weights of a model"):
        Checkpoint.load(path)


def test_files_of_our_own_are_no_checkpoints(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    folder = write_run(tmp_path / "run") / "tasks" / "02-nouns"
    for name in ("adapter.safetensors", "adapter.json"):
        assert AdapterSet.load(folder / name).tasks == ("nouns",)
        with pytest.raises(ValueError, match=r"holds no weights|truncated or not a safetensors"):
            Checkpoint.load(folder / name)
    assert AdapterSet.load(tmp_path / "run" / "record.json").tasks == ("news", "nouns", "films")


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embed_tokens, self.q = nn.Embedding(20, 6), nn.Linear(6, 4, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.embed_tokens(x))


@pytest.mark.parametrize("dora", [False, True])
def test_factors_of_an_embedding_are_what_peft_merges(tmp_path: Path, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    model, base = Words(), tmp_path / "base.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(before, base)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["embed_tokens", "q"], init_lora_weights=False, use_dora=dora
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "task", save_embedding_layers=False)
    merged = adapted.merge_and_unload().state_dict()
    adapters = AdapterSet.load(tmp_path / "task", base=base)
    assert (adapters.embeddings, adapters.transposed) == ({"embed_tokens"}, {"embed_tokens"})
    for layer in ("embed_tokens", "q"):
        left, right = adapters.factors("task", layer)
        change = merged[f"{layer}.weight"] - before[f"{layer}.weight"]
        change = change.T if layer == "embed_tokens" else change  # inputs are one-hot, so they are the columns
        torch.testing.assert_close(left @ right.T, change, rtol=0, atol=3e-6)  # rounding of W + ΔW, a few units
    assert AdapterSet.load(tmp_path / "task", base=base, layers="q$").layers == ("q",)
    with pytest.raises(ValueError, match=r"layers='k\$' finds none of 2 layers, such as embed_tokens, q"):
        AdapterSet.load(tmp_path / "task", base=base, layers="k$")


@pytest.mark.parametrize("transposed", [None, "embed"])
def test_saved_embeddings_load_into_peft(tmp_path: Path, transposed: str | None) -> None:
    peft = pytest.importorskip("peft")
    model = Words()
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=DRAW) for name, tensor in before.items()}
    save_file(before, tmp_path / "before" / "model.safetensors")
    save_file(after, tmp_path / "after" / "model.safetensors")
    adapters = AdapterSet.load(tmp_path / "after", base=tmp_path / "before", transposed=transposed)
    assert "whether the model ties it to embed_tokens" in adapters.notices[-1]
    for found, place in ((adapters, "saved"), (flattened(adapters, 0.0), "changed")):
        with pytest.warns(UserWarning, match="whether the model ties it to embed_tokens"):
            folder = found.save(tmp_path / place) / "01-after"
        merged = peft.PeftModel.from_pretrained(Words(), folder).merge_and_unload().state_dict()
        for name, tensor in after.items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)  # float32 SVD of the second
        assert AdapterSet.load(folder).embeddings == {"embed_tokens"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "before", "changed", "saved"]


@pytest.mark.parametrize(
    ("config", "more", "tied"),
    [
        ({"tie_word_embeddings": True}, {}, True),
        ({"architectures": ["LlamaForCausalLM"]}, {}, True),  # it generates, and no output layer is stored
        ({"architectures": ["BertModel"], "tie_word_embeddings": False}, {}, False),
        ({"architectures": ["LlamaForCausalLM"]}, {"lm_head.weight": torch.ones(20, 6)}, False),
    ],
)
def test_tied_embeddings_are_not_saved(
    tmp_path: Path, config: dict[str, Any], more: dict[str, Tensor], tied: bool
) -> None:
    for name, value in (("before", 0.0), ("after", 1.0)):
        (tmp_path / name).mkdir()
        weights = {"model.embed_tokens.weight": torch.full((20, 6), value), **more}
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    adapters = AdapterSet.load(tmp_path / "after", base=tmp_path / "before")
    assert adapters.notices == ()
    if not tied:
        adapters.save(tmp_path / "saved")
        return
    for found in (adapters, flattened(adapters, 0.0)):
        with pytest.raises(ValueError, match=r"model\.embed_tokens is the model's output too"):
            found.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_changes_that_lora_cannot_hold_are_named_when_saving(tmp_path: Path) -> None:
    for name, value in (("before", 0.0), ("after", 1.0)):
        (tmp_path / name).mkdir()
        weights = {"embed.weight": torch.full((7, 4), value), "norm.weight": torch.full((4,), value)}
        save_file(weights | {"q.bias": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    adapters = AdapterSet.load(tmp_path / "after", base=tmp_path / "before")
    with pytest.warns(UserWarning, match=r"no matrices, so not part of the update: norm\.weight, q\.bias"):
        saved = adapters.save(tmp_path / "saved")
    AdapterSet.load(saved).save(tmp_path / "again")  # nothing beside the factors: no warning


@pytest.mark.parametrize(("inside", "path"), [("final", "."), ("final", "./"), ("final/deeper", ".."), ("", "final/.")])
def test_a_path_of_dots_has_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, path: str
) -> None:
    lora(tmp_path / "final")
    (tmp_path / "final" / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / inside)
    assert AdapterSet.load(path).tasks == ("final",)
    lora(tmp_path / "a" / "final")
    assert AdapterSet.load(path, tmp_path / "a" / "final").tasks == (f"{tmp_path.name}/final", "a/final")


def test_options_without_effect_are_named(tmp_path: Path) -> None:
    folder = lora(tmp_path / "task")
    assert AdapterSet.load(folder, layers="q").notices == ()
    alpha, rank = AdapterSet.load(folder, alpha=3, rank=1).notices
    assert alpha.startswith("alpha is given as 3 and has no effect")
    assert rank.startswith("rank is given as 1 and has no effect")
    single = tmp_path / "style.safetensors"
    save_file({"x.lora_down.weight": torch.ones(2, 5), "x.lora_up.weight": torch.ones(4, 2)}, single)
    assert AdapterSet.load(single, alpha=3).notices == (
        "style: alpha is missing for 1 of 1 layers and taken to be 3",
    )  # it has an effect
    save_file({**load_file(single), "x.alpha": torch.tensor(4.0)}, single)
    (alpha,) = AdapterSet.load(single, alpha=3).notices
    assert alpha.startswith("alpha is given as 3 and has no effect")


def test_an_unfinished_save_leaves_nothing(tmp_path: Path) -> None:
    folder = lora(tmp_path / "task", pair() | {"base_model.model.v.lora_A.weight": torch.full((2, 5), torch.nan)})
    save_file(pair("base_model.model.q") | pair("base_model.model.v"), folder / "adapter_model.safetensors")
    adapters = AdapterSet.load(folder)
    broken = pair("base_model.model.q") | {**pair("base_model.model.v")}
    broken["base_model.model.v.lora_A.weight"].fill_(torch.nan)
    save_file(broken, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="contains NaN"):
        adapters.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
    name = "x" * 300 + "\n/.."
    long = AdapterSet.from_factors({name: {"q": (torch.ones(4, 1), torch.ones(5, 1))}})
    assert AdapterSet.load(long.save(tmp_path / "saved")).tasks == (name,)


def test_shards_of_an_adapter_are_one_adapter(tmp_path: Path) -> None:
    first, second = pair("base_model.model.h.0.q"), pair("base_model.model.h.1.q")
    folder = lora(tmp_path / "task", first | second)
    whole = AdapterSet.load(folder)
    factors = [tuple(whole.factors("task", layer)) for layer in whole.layers]
    (folder / "adapter_model.safetensors").unlink()
    places = {}
    for number, tensors in enumerate((first, second), start=1):
        name = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
    with pytest.raises(FileNotFoundError, match=r"holds shards without an index, adapter_model-00001-of-00002"):
        AdapterSet.load(folder)
    for index in ("adapter_model.safetensors.index.json", "model.safetensors.index.json"):
        (folder / index).write_text(json.dumps({"weight_map": places}))
        for path in (folder, folder / index):
            found = AdapterSet.load(path)
            assert found.layers == whole.layers
            for layer, expected in zip(found.layers, factors, strict=True):
                torch.testing.assert_close(tuple(found.factors("task", layer)), expected, rtol=0, atol=0)
        (folder / index).unlink()


@dataclass
class Update:
    """An update as methods of continual learning return it."""

    left: Tensor
    right: Tensor
    magnitude: Tensor


@pytest.mark.parametrize("m", [3, 7])
def test_a_full_core_stands_between_the_factors(m: int) -> None:
    left, right = torch.randn(m, 3, generator=DRAW), torch.randn(5, 3, generator=DRAW)
    for core in (torch.randn(3, 3, generator=DRAW), torch.randn(3, generator=DRAW), torch.tensor(2.0)):
        matrix = core if core.ndim == 2 else core * torch.eye(3)
        found = AdapterSet.from_factors({"a": {"x": Update(left, right, core)}}).factors("a", "x")
        torch.testing.assert_close(found[0] @ found[1].T, left @ matrix @ right.T, rtol=1e-5, atol=1e-5)  # float32


def test_a_memory_is_opened_once(
    tmp_path: Path, write_memory: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header lists all layers: opening it per layer takes the square of their number."""
    write_memory(tmp_path, "one", {f"h.{layer}": torch.eye(4)[:, :1] for layer in range(50)})
    opened = []

    def counting(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework=framework)

    from safetensors import safe_open

    monkeypatch.setattr("analysis.formats.files.safe_open", counting)
    assert len(read_protected(tmp_path)) == 50
    assert len(opened) == 2  # shapes, and bases


@pytest.mark.parametrize("kind", [AdapterSet, AdapterCollection])
def test_a_list_of_paths_is_answered_with_the_way_to_give_them(kind: Any, tmp_path: Path) -> None:
    name = kind.__name__
    with pytest.raises(TypeError, match=rf"^{name}\.load: .* got a list: .* {name}\.load\(\*paths\)$"):
        kind.load([tmp_path, tmp_path])
