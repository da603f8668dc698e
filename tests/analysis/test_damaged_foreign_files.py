"""Whatever is wrong with files of others is an error that names the file, in time, and never a number."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from old_versions import needs_stored_complex
from safetensors.torch import save_file
from torch import Tensor

from analysis import AdapterSet, Checkpoint, Record
from analysis.files import replacing
from analysis.formats.patterns import first_suffix_matches, matching_names

STEM = "base_model.model.h.0.q"


def lora(folder: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    factors = {f"{STEM}.lora_A.weight": torch.ones(2, 5), f"{STEM}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors | dict(tensors or {}), folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": float("nan")}, "'lora_alpha' is nan, a finite number was expected"),
        ({"lora_alpha": float("inf")}, "'lora_alpha' is inf, a finite number"),
        ({"lora_alpha": True}, "'lora_alpha' is True, a finite number"),
        ({"lora_alpha": "16"}, "'lora_alpha' is '16', a finite number"),
        ({"lora_alpha": 10**400}, "'lora_alpha' is 1000"),
        ({"lora_alpha": 1e39}, "h.0.q, factor times scale .* is beyond float32"),
        ({"r": 0}, "'r' is 0, a rank of at least 1"),
        ({"r": -2}, "'r' is -2, a rank of at least 1"),
        ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\], only"),
        ({"base_model_name_or_path": ["x"]}, "'base_model_name_or_path' is .*, text was expected"),
        ({"use_rslora": "false"}, "'use_rslora' is 'false', true or false was expected"),
        ({"fan_in_fan_out": 1}, "'fan_in_fan_out' is 1, true or false"),
        ({"alpha_pattern": {"(": 1}}, r"'alpha_pattern': '\(' is no regular expression"),
        ({"alpha_pattern": {"*q": 1}}, r"'\*q' is no regular expression"),
        ({"alpha_pattern": {"q": None}}, "'alpha_pattern: q' is None, a finite number"),
        ({"alpha_pattern": {"q": float("nan")}}, "'alpha_pattern: q' is nan, a finite number"),
        ({"rank_pattern": [1]}, r"'rank_pattern' is \[1\], an object"),
        ({"rank_pattern": "q"}, "'rank_pattern' is 'q', an object"),
        ({"rank_pattern": {"(" * 20_000: 2}}, "is no regular expression"),
        ({"rank_pattern": {"q{99999999999}": 2}}, "is no regular expression: the repetition number is too large"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = lora(tmp_path / "task", **config)
    with pytest.raises(ValueError, match=message) as caught:
        list(AdapterSet.load(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.slow
def test_patterns_that_never_end_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.formats.patterns.SECONDS", 1.0)
    layer = "a" * 40
    tensors = {f"base_model.model.{layer}.lora_{key}.weight": torch.ones(2, 2) for key in "AB"}
    folder = lora(tmp_path / "task", tensors, alpha_pattern={"(a+)+b": 1.0})
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"'alpha_pattern': matching '\(a\+\)\+b' against 2 layer names does not end"):
        AdapterSet.load(folder)
    plain = lora(tmp_path / "plain", tensors)
    for option in ("layers", "transposed"):
        with pytest.raises(ValueError, match="does not end within 1 s"):
            AdapterSet.load(plain, **{option: "(a+)+b"})
    assert time.monotonic() - begun < 60  # three seconds, on a machine that does other things


NAMES = ["h.0.q", "h.10.q", "q", "model.h.0.q", "h.0.qq", "hx0.q", "h.0.k"]
PATTERNS = ["q", "h.0.q", r"h\.0\.q", r"^h\.0\.q", "^q", r"h\.\d+\.q", "(h.0.)?k", ".*q", "h.0", r"0.q|k", ""]


@pytest.mark.parametrize("turn", range(len(PATTERNS)))
def test_patterns_match_as_peft_matches_them(turn: int) -> None:
    other = pytest.importorskip("peft.utils.other")
    patterns = PATTERNS[turn:] + PATTERNS[:turn]
    expected = [other.get_pattern_key(patterns, name) for name in NAMES]
    found = first_suffix_matches(patterns, NAMES)
    assert [NAMES[i] if match is None else patterns[match] for i, match in enumerate(found)] == expected


def test_matching_many_plain_patterns_takes_time_with_their_number() -> None:
    names = [f"model.layers.{number}.self_attn.{part}_proj" for number in range(500) for part in "qv"]
    begun = time.process_time()
    assert first_suffix_matches(names, names) == list(range(1000))
    assert time.process_time() - begun < 1  # milliseconds; a million matches of expressions take several seconds
    assert matching_names("(?i)Q|V", ["h.q", "h.k"]) == ["h.q"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deep"),
        ('{"r": 2, "r": 4}', "key 'r' occurs twice"),
        ("[]", "holds a list, not an object"),
        ('"text"', "holds a str, not an object"),
        ("", "truncated or not JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a pointer of Git LFS"),
        ('{"x": "\\ud800"}', "unpaired surrogate"),
    ],
)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.json", "record.json", "tasks.json"])
def test_json_that_is_not_what_was_expected_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    lora(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "adapter.safetensors")
    (tmp_path / name).write_text(text)
    if name != "adapter.json":
        (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        AdapterSet.load(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling", "empty", "pointer", "text"])
def test_odd_kinds_of_files_are_named(tmp_path: Path, name: str, kind: str) -> None:
    if name.startswith("adapter"):
        lora(tmp_path)
        (tmp_path / name).unlink()
    path = tmp_path / name
    message = "is truncated or not a safetensors file"
    if kind == "folder":
        path.mkdir()
        message = "is a folder, a file was expected"
    elif kind == "pipe":
        os.mkfifo(path)
        message = "is a pipe, a socket or a device"
    elif kind in ("loop", "dangling"):
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
        message = "is a link that leads nowhere or to itself"
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        message = "is a pointer of Git LFS, its contents were not downloaded: run git lfs pull"
    else:
        path.write_text("" if kind == "empty" else "hello " * 99)
    load = AdapterSet.load if name.startswith("adapter") else Checkpoint.load
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        load(tmp_path)
    if kind not in ("folder", "dangling"):
        with pytest.raises(ValueError, match=rf"{name} {message}"):
            load(path)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "x" * 300 + "/y"])
def test_names_that_no_file_system_holds_are_no_files(path: str) -> None:
    for load in (AdapterSet.load, Checkpoint.load):
        with pytest.raises(FileNotFoundError, match=r"is not a folder or file|holds no checkpoint"):
            load(path)


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../secret.safetensors", "inner/a.safetensors", "..", "", 3, None, ["a"], "a\\b"]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, shard: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"q.weight": shard}}))
    with pytest.raises(ValueError, match=r"index\.json: q\.weight is said to be in .*: the name of a file beside"):
        Checkpoint.load(tmp_path)


def test_an_index_and_its_shards_agree(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for name in "ab":
        save_file({"q.weight": torch.ones(2, 2), f"{name}.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    places = {"a.weight": "a.safetensors", "b.weight": "b.safetensors", "q.weight": "a.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"q\.weight is in .*a\.safetensors and in b\.safetensors"):
        Checkpoint.load(tmp_path)
    save_file({"b.weight": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    assert sorted(Checkpoint.load(index).shapes) == ["a.weight", "b.weight", "q.weight"]
    index.write_text(json.dumps({"weight_map": places | {"c.weight": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"b\.safetensors lacks c\.weight"):
        Checkpoint.load(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {"c.weight": "x" * 300}}))
    with pytest.raises(FileNotFoundError, match="does not exist, though model"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{STEM}.lora_A.weight": torch.ones(0, 5), f"{STEM}.lora_B.weight": torch.ones(4, 0)},
            r"\(4, 5, 0\)",
        ),
        ({f"{STEM}.lora_A.weight": torch.ones(2, 0)}, r"\(4, 0, 2\): at least 1"),
        ({f"{STEM}.lora_A.weight": torch.ones(())}, r"lora_A\.weight has shape \(\), a matrix"),
        ({f"{STEM}.lora_A.weight": torch.ones(2, 5, 3, 3)}, r"lora_A\.weight has shape \(2, 5, 3, 3\), a matrix"),
        ({f"{STEM}.lora_A.weight": torch.full((2, 5), torch.inf)}, "contains NaN or infinite"),
        ({f"{STEM}.lora_A.weight": torch.full((2, 5), 1e39, dtype=torch.float64)}, "contains NaN or infinite"),
        pytest.param(
            {f"{STEM}.lora_A.weight": torch.ones(2, 5, dtype=torch.complex64)},
            "is stored as complex64",
            marks=needs_stored_complex,
        ),
        ({f"{STEM}.lora_embedding_A": torch.ones(2, 5)}, "has factors of an embedding and of a linear layer"),
        ({"base_model.model.x.lora_C.weight": torch.ones(2, 5)}, r"lora_C\.weight is not supported"),
    ],
)
def test_odd_tensors_are_named(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    folder = lora(tmp_path / "task", tensors)
    with pytest.raises(ValueError, match=message):
        list(AdapterSet.load(folder))


def test_what_lies_beside_the_factors_is_named(tmp_path: Path) -> None:
    more = {f"base_model.model.{name}": torch.ones(3, 4) for name in ("score.weight", "h.0.q.base_layer.bias")}
    folder = lora(tmp_path / "task", more, use_new_trick=True, use_old_trick=False)
    (folder / "adapter_model.bin").write_bytes(b"old")
    saved, other, options = AdapterSet.load(folder).notices
    assert other == "task: adapter_model.bin is there too and was not read, adapter_model.safetensors was"
    assert saved.startswith("task: saved in full beside the factors, so not part of the update: ")
    assert all(name in saved for name in more)
    assert options.endswith("not read: use_new_trick")
    two = lora(tmp_path / "two", {f"base_model.model.k.lora_{key}.weight": torch.ones(2, 2) for key in "AB"})
    (notice,) = AdapterSet.load(lora(tmp_path / "one"), two, common=True).notices
    assert notice == "two: 1 layers are not those of all tasks, so left out: k"


def test_a_manifest_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    described = {"format": "analysis.tasks", "version": 1, "tasks": [{"name": "x", "path": "."}]}
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="names a folder that leads back to itself"):
        AdapterSet.load(tmp_path)
    lora(tmp_path.with_name("out"))
    for path in ("../out", str(tmp_path.with_name("out")), "in/../../out", "..", "a\0b"):
        (tmp_path / "tasks.json").write_text(json.dumps({**described, "tasks": [{"name": "x", "path": path}]}))
        with pytest.raises(ValueError, match=r"tasks\.json: the path .* of a task leaves the folder"):
            AdapterSet.load(tmp_path)
    lora(tmp_path / "in")
    described["tasks"] = [{"name": ["x"], "path": "in"}]
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"the name of a task is \['x'\], text was expected"):
        AdapterSet.load(tmp_path)


def test_a_torch_file_holds_dense_tensors_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for stored, message in (
        ({3: torch.ones(2)}, "3 is no name of a tensor"),
        ({"q.weight": torch.eye(3).to_sparse()}, r"q\.weight is stored as torch\.sparse_coo"),
        ({"q.weight": torch.ones(2, 2, device="meta")}, "on meta, a dense tensor was expected"),
        ({"state_dict": {"q.weight": torch.ones(2, 2)}}, "holds a dict, a mapping from names to tensors"),
    ):
        torch.save(stored, path)
        with pytest.raises(ValueError, match=message):
            Checkpoint.load(path)
    torch.save({"q.weight": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    for damaged in (
        whole[:100],
        whole[: len(whole) // 2],
        whole.replace(b"q.weight", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.bin"):
            Checkpoint.load(path)


def test_a_configuration_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    folder = lora(tmp_path / "task")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("nowhere.json")
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match=r"adapter_config\.json is a link that leads nowhere"):
            AdapterSet.load(path, alpha="rank")


def test_records_that_are_odd_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    with pytest.raises(ValueError, match=r"record\.json is a folder"):
        Record.load(tmp_path)


def test_a_disk_without_room_is_named_by_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left.*t\.csv"), replacing(tmp_path / "t.csv"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
