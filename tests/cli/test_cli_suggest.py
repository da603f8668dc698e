"""``manifold-cl analyze suggest`` and ``mend`` as a user calls them, on an adapter written by stock PEFT."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command import Call
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import AdapterSet
from analysis.formats import carried_over
from manifold_cl.cli.analyze.evaluation import Evaluation, evaluated


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(10, 12)}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.h[0]["q"](x)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peft = pytest.importorskip("peft")
    draw = torch.Generator().manual_seed(1)
    adapted = peft.get_peft_model(Model(), peft.LoraConfig(r=4, target_modules=["q"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, generator=draw)
            if "lora_B" in name:
                parameter.data *= torch.logspace(0, -1, 4)
    adapted.save_pretrained(folder := tmp_path_factory.mktemp("peft") / "news")
    return folder


def kept_energy(before: Path, after: Path) -> list[float]:
    """Densely, per layer."""
    pair = [AdapterSet.load(path) for path in (before, after)]
    shares = []
    for layer in pair[0].layers:
        a, b = (left @ right.T for left, right in (each.factors(each.tasks[0], layer) for each in pair))
        shares.append(1.0 - float((a - b).square().sum() / a.square().sum()))
    return shares


def test_a_suggestion_writes_an_adapter_that_keeps_the_share(call: Call, adapter: Path, tmp_path: Path) -> None:
    code, out, err = call("analyze", "suggest", adapter, "--keep", "0.9", "--out", tmp_path / "new")
    assert code == 0, err
    assert "90.0%" in out
    ranks = pd.read_csv(tmp_path / "new" / "ranks.csv")
    written = AdapterSet.load(tmp_path / "new")
    assert [written.shape("new", layer)[2] for layer in ranks["layer"]] == ranks["rank"].tolist()
    assert kept_energy(adapter, tmp_path / "new") == pytest.approx(ranks["kept"].tolist(), abs=1e-5)
    assert min(kept_energy(adapter, tmp_path / "new")) >= 0.9
    changes = pd.read_csv(tmp_path / "new" / "changes.csv")
    assert {"rank", "relative_change", "cosine"} <= set(changes["metric"])
    page = (tmp_path / "new" / "report.html").read_text()
    assert page.lower().startswith("<!doctype html")
    assert 'alt=""' not in page
    code, _, err = call("analyze", "suggest", adapter, "--out", tmp_path / "new")
    assert (code, "is not empty" in err) == (2, True)


def test_a_head_that_is_copied_is_named(call: Call, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Headed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 3)

    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"], init_lora_weights=False)
    peft.get_peft_model(Headed(), config).save_pretrained(tmp_path / "ad")
    code, out, err = call("analyze", "suggest", tmp_path / "ad", "--out", tmp_path / "new", "--json")
    assert code == 0, err
    (notice,) = [each for each in json.loads(out)["notices"] if "copied into the new adapter" in each]
    assert "head.weight" in notice


def test_only_what_is_no_part_of_an_adapter_is_carried_over(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Headed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 3)

    options = {"r": 2, "target_modules": ["q"], "modules_to_save": ["head"], "init_lora_weights": False}
    save_file(Headed().state_dict(), tmp_path / "base.safetensors")
    for name, dora in (("lora", False), ("dora", True)):  # DoRA's magnitudes are read with the base, not as factors
        peft.get_peft_model(Headed(), peft.LoraConfig(**options, use_dora=dora)).save_pretrained(tmp_path / name)
        adapters = AdapterSet.load(tmp_path / name, base=tmp_path / "base.safetensors" if dora else None)
        carried = carried_over(adapters.sources[0])
        assert sorted(tensor.rpartition("model.")[2] for tensor in carried.tensors) == ["head.bias", "head.weight"]


def test_one_rank_for_all_layers_and_some_layers_only(call: Call, adapter: Path, tmp_path: Path) -> None:
    code, out, err = call(
        *("analyze", "suggest", adapter, "--uniform", "--keep", "0.9", "--layers", "0", "--json"),
        *("--out", tmp_path / "one", "--dtype", "bfloat16"),
    )
    assert code == 0, err
    found = json.loads(out)
    written = AdapterSet.load(tmp_path / "one")
    assert written.shape("one", "h.0.q")[2] == found["uniform_rank"]
    assert written.shape("one", "h.1.q")[2] == 4
    assert found["parameters"]["before"] == 4 * 22


SCORES = {"same": "[1, 2, 3, 4]", "worse": "[1, 2, 3, 4] if 'kept' in sys.argv[1] else [0.5, 1.4, 2.6, 3.5]"}


@pytest.mark.parametrize(("scores", "drop", "code"), [("same", 0, 0), ("worse", 0, 3), ("worse", 1, 0)])
def test_an_evaluation_compares_pairs_and_closes_the_gate(
    call: Call, adapter: Path, tmp_path: Path, scores: str, drop: float, code: int
) -> None:
    (tmp_path / "eval.py").write_text(f"import sys, json\nprint('loading')\nprint(json.dumps({SCORES[scores]}))\n")
    kept = tmp_path / "kept"
    kept.symlink_to(adapter)
    command = f"{sys.executable} {tmp_path / 'eval.py'} {{adapter}}"
    ended, out, err = call(
        *("analyze", "suggest", kept, "--out", tmp_path / "new", "--json"),
        *("--evaluate", command, "--max-drop", str(drop)),
    )
    assert ended == code, err
    found: dict[str, Any] = json.loads(out)["evaluation"]
    assert found == json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert found["passes"] is (code == 0)
    assert found["drop"] == pytest.approx(0.0 if scores == "same" else 0.5)
    assert found["ci_low"] <= found["drop"] <= found["ci_high"]
    assert ("gate closed" in err) is (code == 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "0"), "keep is 0.0"),
        (("--evaluate", "true"), "has no {adapter}"),
        (("--evaluate", "false {adapter}"), "ended with code 1"),
        (("--evaluate", "echo {adapter}"), "a number or a JSON list of numbers was expected"),
        (("--layers", "nothing"), "finds none of the 2"),
        (("--model", "somewhere"), "--model and --data belong together"),
        (("--max-drop", "1"), "--max-drop is for scores: give --evaluate"),
        (("--max-drop", "nan"), "--max-drop is nan"),
        (("--lower-is-better",), "--lower-is-better is for scores"),
        (("--level", "0.9"), "--level 0.9 is for the interval over examples"),
        (("--alpha", "much"), "--alpha is 'much'"),
    ],
)
def test_wrong_options_end_with_code_two_and_write_nothing(
    call: Call, adapter: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = call("analyze", "suggest", adapter, "--out", tmp_path / "new", *options)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_mending_writes_an_adapter_and_a_table_of_before_and_after(call: Call, adapter: Path, tmp_path: Path) -> None:
    code, out, err = call("analyze", "mend", adapter, "--apply", "flatten", "--out", tmp_path / "flat", "--json")
    assert code == 0, err
    assert json.loads(out)["applied"] == ["flatten=1"]
    after = AdapterSet.load(tmp_path / "flat")
    for _, _, left, right in after:
        values = torch.linalg.svdvals(left @ right.T)[:4]
        torch.testing.assert_close(values, values.mean().expand(4), rtol=1e-4, atol=0)
    changes = pd.read_csv(tmp_path / "flat" / "changes.csv").set_index(["layer", "metric"])
    assert changes.loc[("total", "frobenius"), "after"] == pytest.approx(changes.loc[("total", "frobenius"), "before"])
    assert "before" in (tmp_path / "flat" / "report.html").read_text()
    code, _, err = call(
        *("analyze", "mend", adapter, "--apply", "sharpen=0.2", "--apply", "truncate=2", "--layers", "0"),
        *("--out", tmp_path / "two"),
    )
    assert code == 0, err
    assert [AdapterSet.load(tmp_path / "two").shape("two", f"h.{i}.q")[2] for i in (0, 1)] == [2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--apply", "polish"), "--apply 'polish' is unknown: choose from flatten"),
        (("--apply", "truncate"), "--apply truncate needs a rank"),
        (("--apply", "truncate=1.5"), "a rank is a whole number"),
        (("--apply", "flatten=2"), "the strength lies between 0 and 1"),
        (("--apply", "flatten=x"), "'x' is no number"),
        (("--apply", "intruders"), "--apply intruders needs --base"),
        (("--apply", "project"), "--apply project needs --memory"),
        (("--apply", "sensitivity"), "--apply sensitivity needs --model and --data"),
        (("--apply", "project", "--memory", "nowhere"), "nowhere does not exist"),
    ],
)
def test_wrong_interventions_end_with_code_two(
    call: Call, adapter: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = call("analyze", "mend", adapter, "--out", tmp_path / "new", *options)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_the_upper_end_of_the_drop_decides_the_gate() -> None:
    values: dict[str, Any] = {"before": 0.9, "after": 0.89, "drop": 0.01, "examples": 50, "max_drop": 0.02}
    assert Evaluation(**values, ci_low=None, ci_high=None).passes
    assert Evaluation(**values, ci_low=0.0, ci_high=0.02).passes
    assert not Evaluation(**values, ci_low=-0.01, ci_high=0.03).passes


@pytest.mark.parametrize("command", [("suggest",), ("mend", "--apply", "flatten"), ("merge",)])
def test_a_folder_that_is_not_empty_is_refused_before_anything_is_read(
    call: Call, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (used := tmp_path / "used").mkdir()
    (used / "file").touch()
    (broken := tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    code, _, err = call("analyze", command[0], broken, broken, *command[1:], "--out", used)
    assert code == 2
    assert f"--out is {used}" in err
    assert [path.name for path in used.iterdir()] == ["file"]


def test_renamed_layers_are_written_under_their_new_names(call: Call, adapter: Path, tmp_path: Path) -> None:
    for command in (["suggest"], ["mend", "--apply", "flatten"]):
        out = tmp_path / command[0]
        code, _, err = call("analyze", command[0], adapter, *command[1:], "--map", "h=blocks", "--out", out)
        assert code == 0, err
        assert AdapterSet.load(out).layers == ("blocks.0.q", "blocks.1.q")


def test_the_drop_of_a_loss_is_its_rise(tmp_path: Path) -> None:
    for name, score in (("before", "1.0"), ("after", "1.5")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "score").write_text(score)
    paths = (tmp_path / "before", tmp_path / "after")
    command = f'"{sys.executable}" -c "print(open(\'{{adapter}}/score\').read())"'
    for lower_is_better, drop in ((True, 0.5), (False, -0.5)):
        found = evaluated(command, *paths, max_drop=0.2, lower_is_better=lower_is_better)
        assert found is not None
        assert (found.drop, found.passes) == (drop, drop < 0)


def test_rounding_below_the_share_is_refused(call: Call, adapter: Path, tmp_path: Path) -> None:
    options = ("--keep", "1.0", "--dtype", "bfloat16", "--out", tmp_path / "new")
    code, _, err = call("analyze", "suggest", adapter, *options)
    assert code == 2
    assert "--dtype float32" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", ["truncate=99", "flatten=0"])
def test_an_intervention_without_effect_is_named(call: Call, adapter: Path, tmp_path: Path, step: str) -> None:
    code, out, err = call("analyze", "mend", adapter, "--apply", step, "--out", tmp_path / "new")
    assert code == 0, err
    assert f"{step} changed nothing" in out
    assert f"{step} changed nothing" in (tmp_path / "new" / "report.html").read_text()
