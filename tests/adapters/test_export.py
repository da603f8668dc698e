"""Export to plain LoRA is exact: stock PEFT, without this package, computes the same logits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from records import write_record
from safetensors.torch import load_file, save_file
from tiny_models import bert, gpt2, llama, tokens
from torch import Tensor, nn

from manifold_cl import (
    EBLoRALinear,
    adapters_of,
    eblora_adapters,
    export_lora,
    inject_adapters,
    merge_adapters,
    save_adapters,
)
from manifold_cl.adapters import LoRALinear, read_adapters
from manifold_cl.adapters.export import TASK_TYPES, sum_updates
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.cli import main
from manifold_cl.files import FileError

# PEFT asks transformers 5 for a property under its old name.

STOCK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from peft import PeftModel
from tiny_models import bert, gpt2, llama, tokens
for base, folder in {cases!r}:
    model = PeftModel.from_pretrained(eval(base), folder).eval()
    with torch.no_grad():
        torch.save(model(input_ids=tokens()).logits, folder + "/logits.pt")
assert not any(name.startswith("manifold_cl") for name in sys.modules)
"""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens()).logits
    return found


def stirred(model: nn.Module, **options: Any) -> nn.Module:
    """Our own adapters in the middle of training."""
    draw = torch.Generator().manual_seed(0)
    targets = options.pop("targets", ["q_proj", "down_proj"])
    inject_adapters(model, targets, eblora_adapters(rank=3, alpha=6.0, initial_scale=0.4, generator=draw, **options))
    for adapter in adapters_of(model).values():
        assert isinstance(adapter, EBLoRALinear)
        with torch.no_grad():
            adapter.scale.add_(0.3 * torch.randn(adapter.scale.shape, generator=draw))
            for _, frame, manifold in adapter.manifold_parameters():
                frame.copy_(manifold.random(*frame.shape, generator=draw))
    return model.eval()


def peft_model(base: nn.Module, **options: Any) -> Any:
    given = {"r": 3, "alpha": 6, "initial_scale": 0.4, "target_modules": ["q_proj", "down_proj"], **options}
    return get_peft_model(base, EBLoraConfig(**given)).eval()


@pytest.mark.slow
def test_stock_peft_reads_every_export_and_computes_the_same(tmp_path: Path) -> None:
    models = {
        "scalar": ("llama()", stirred(llama())),
        "diagonal": ("llama()", stirred(llama(), core="diagonal")),
        "full, compensated": ("llama()", stirred(llama(), core="full", compensate=True)),
        "conv1d": ("gpt2()", stirred(gpt2(), targets=["c_attn", "c_proj"])),
        "peft": ("llama()", peft_model(llama(), core="full", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7})),
        "head": (
            "bert()",
            peft_model(
                bert(), target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"], compensate=True
            ),
        ),
    }
    with torch.no_grad():
        models["head"][1].base_model.model.classifier.modules_to_save["default"].weight.mul_(-2.0)
    cases = []
    for name, (base, model) in models.items():
        export_lora(model, tmp_path / name)
        cases.append((base, str(tmp_path / name)))
    code = STOCK.format(tests=str(Path(__file__).parent), cases=cases)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name, (base, model) in models.items():
        found, expected = torch.load(tmp_path / name / "logits.pt"), logits(model)
        assert float((found - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max())), name
        plain = logits(eval(base))
        assert float((plain - expected).abs().max()) > 1e-3, name  # the adapter is no small part of it


def test_folders_export_as_the_models_do(tmp_path: Path) -> None:
    model = stirred(llama(), core="full")
    save_adapters(model, tmp_path / "ours")
    export_lora(model, tmp_path / "a")
    export_lora(tmp_path / "ours", tmp_path / "b")
    wrapped = peft_model(llama(), dropout=0.1)
    wrapped.save_pretrained(tmp_path / "theirs")
    export_lora(wrapped, tmp_path / "c", base_model="some/base", task_type="CAUSAL_LM")
    export_lora(tmp_path / "theirs", tmp_path / "d")
    for first, second in (("a", "b"), ("c", "d")):
        tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in (first, second)]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    content = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["task_type"]) == ("some/base", "CAUSAL_LM")
    assert (content["peft_type"], content["r"], content["lora_alpha"], content["lora_dropout"]) == ("LORA", 3, 3, 0.0)
    native = llama()
    native.add_adapter(EBLoraConfig(r=2, target_modules=["q_proj"], initial_scale=0.4))
    written = export_lora(native, tmp_path / "e")
    assert list(written) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def test_several_folders_add_up_as_merging_one_after_the_other_does(tmp_path: Path) -> None:
    model = llama()
    for task, core in enumerate(["scalar", "full", "diagonal"]):
        stirred(model, core=core, targets=["q_proj"] if task == 1 else ["q_proj", "down_proj"])
        save_adapters(model, tmp_path / "run" / "tasks" / f"0{task + 1}-task", task="task")
        merge_adapters(model)
    folders = sorted((tmp_path / "run" / "tasks").iterdir())
    written = export_lora(folders, tmp_path / "lora")
    assert {factors.rank for factors in written.values()} == {6, 9}
    write_record(tmp_path / "run", ["task"] * 3)
    assert export_lora(tmp_path / "run", tmp_path / "again").keys() == written.keys()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-6)  # float32, three roundings of a weight
    other = llama()
    merge_factors(other, written)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=2e-6)


def test_plain_lora_of_ours_exports_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapters(model, ["0"], lambda _, base: LoRALinear(base, 2, alpha=8.0))
    nn.init.normal_(model[0].left, generator=torch.Generator().manual_seed(0))
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    delta = tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
    torch.testing.assert_close(delta, model[0].factors().delta_weight(), rtol=1e-6, atol=1e-6)  # float32


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def no_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def bad_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": ')


def listed_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")


def other_method(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


def lost_factor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if not k.endswith("0.self_attn.q_proj.eblora_right")}, path)


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def configured(**entries: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return damage


def nan_scale(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(key for key in tensors if key.endswith("eblora_scale"))].fill_(float("nan"))
    save_file(tensors, path)


def pipe(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


DAMAGES = [
    (configured(alpha="8"), r"adapter_config\.json does not follow its format"),
    (configured(alpha=float("nan")), r"adapter_config\.json does not follow its format \(alpha of .* is nan"),
    (configured(alpha_pattern=["q_proj"]), r"adapter_config\.json does not follow its format"),
    (configured(alpha_pattern={"q_proj(": 3}), r"adapter_config\.json does not follow its format"),
    (nan_scale, r"eblora_scale has NaN or infinite entries"),
    (pipe, r"adapter_config\.json is not a regular file"),
    (cut, r"adapter_model\.safetensors has \d+ bytes instead of the \d+"),
    (no_tensors, r"adapter_model\.safetensors does not exist, though its configuration does"),
    (bad_json, r"adapter_config\.json is damaged or truncated"),
    (listed_json, r"adapter_config\.json is no configuration: a JSON object was expected"),
    (other_method, r"holds a PEFT adapter of type 'IA3', not EBLORA"),
    (
        lost_factor,
        r"adapter_model\.safetensors lacks base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.eblora_right",
    ),
    (
        nothing,
        r"holds no adapter: looked for adapter\.safetensors \(save_adapters\), adapter_config\.json \(PEFT\)",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[f.__name__ for f, _ in DAMAGES])
def test_a_folder_that_is_not_what_was_written_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    peft_model(llama()).save_pretrained(tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no adapters to export: inject_adapters, or pass the folder"):
        export_lora(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="no adapter 'two' in this model: it has default"):
        export_lora(peft_model(llama()), tmp_path, adapter="two")
    write_record(tmp_path, ["a"], learned=0, status="running")
    with pytest.raises(FileError, match="is a run without a finished task: nothing to export yet"):
        export_lora(tmp_path, tmp_path / "out")
    for size in (4, 5):
        model = nn.Sequential(nn.Linear(size, 5))
        inject_adapters(model, ["0"], eblora_adapters(rank=2))
        save_adapters(model, tmp_path / str(size))
    message = r"0 has different shapes in the folders: \(5, 4\), \(5, 5\)"
    with pytest.raises(ValueError, match=message):
        export_lora([tmp_path / "4", tmp_path / "5"], tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        sum_updates([read_adapters(tmp_path / "4"), read_adapters(tmp_path / "5")])


def test_the_command_exports_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft_model(llama(), rank_pattern={"q_proj": 2}).save_pretrained(tmp_path / "in")
    main(["export", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--base-model", "b", "--json"])
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "out"), "layers": 4, "ranks": [2, 3]}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "b"
    monkeypatch.chdir(tmp_path)
    main(["export", "in"])
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "nowhere")])
    assert ended.value.code == 2


def test_a_task_type_that_peft_would_refuse_is_not_written(tmp_path: Path) -> None:
    assert sorted(TASK_TYPES) == sorted(each.value for each in TaskType)
    model = nn.Sequential(EBLoRALinear(nn.Linear(6, 4), 2))
    with pytest.raises(ValueError, match=r"task_type=CAUSAL is none of PEFT's: give .*CAUSAL_LM"):
        export_lora(model, tmp_path / "lora", task_type="CAUSAL")
    assert not (tmp_path / "lora").exists()
