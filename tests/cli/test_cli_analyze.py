"""``manifold-cl analyze`` as a user calls it: on adapters written by stock PEFT, with gates and every kind of table."""

import builtins
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command import Call
from safetensors.torch import save_file
from torch import Tensor, nn
from toy import toy_stream

from analysis import AdapterSet, Gate, interference_table, read_protected, spectrum_table, write_table
from manifold_cl import ContinualRunner
from manifold_cl.continual import make_method


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.h = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(10, 12)}) for _ in range(2)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.h[0]["q"](x)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA folders by stock PEFT, and a base checkpoint."""
    peft = pytest.importorskip("peft")
    place = tmp_path_factory.mktemp("peft")
    draw = torch.Generator().manual_seed(1)
    found = []
    for task in ("first", "second"):
        adapted = peft.get_peft_model(Model(), peft.LoraConfig(r=3, target_modules=["q"]))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, generator=draw)
        adapted.save_pretrained(place / task)
        found.append(place / task)
    (place / "base").mkdir()
    save_file({k: v.clone() for k, v in Model().state_dict().items()}, place / "base" / "model.safetensors")
    return [*found, place / "base"]


def test_two_peft_folders_give_tables_and_the_page(call: Call, folders: list[Path], tmp_path: Path) -> None:
    code, out, err = call("analyze", *folders[:2], "--out", tmp_path / "pages")
    assert (code, out.count("spectra.csv")) == (0, 1), err
    assert "first" in out
    assert "entropy / ln r" in out
    assert "beyond noise: first in 0 of 2 layers; second in 0 of 2 layers" in out
    assert set(pd.read_csv(tmp_path / "pages" / "noise.csv")["task"]) == {"first", "second"}
    rows = list(csv.DictReader((tmp_path / "pages" / "spectra.csv").read_text().splitlines()))
    exact = spectrum_table(AdapterSet.load(*folders[:2]))
    assert [float(row["value"]) for row in rows] == pytest.approx(exact["value"].tolist(), rel=1e-12)
    meetings = pd.read_csv(tmp_path / "pages" / "interference.csv")
    assert {"z", "p", "p_holm", "chance"} <= set(meetings.columns)
    assert (meetings[meetings["metric"] == "alignment"]["p"].between(0, 1)).all()
    assert {"backward_share", "forward_corruption"} <= set(pd.read_csv(tmp_path / "pages" / "components.csv").columns)
    assert (tmp_path / "pages" / "report.html").read_text().lower().startswith("<!doctype html")


def test_every_kind_of_table_and_the_base_model(call: Call, folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    code, out, err = call(
        *("analyze", *folders[:2], "--base", folders[2], "--out", tmp_path, "--json"),
        *("--format", "csv", "--format", "json", "--format", "parquet"),
    )
    assert code == 0, err
    written = json.loads(out)
    assert written["fail_if"] == []
    tables = {ending: written["paths"][f"spectra{ending}"] for ending in (".csv", ".json", ".parquet")}
    read = {
        ".csv": pd.read_csv(tables[".csv"]),
        ".json": pd.DataFrame(json.loads(Path(tables[".json"]).read_text())["rows"]),
        ".parquet": pd.read_parquet(tables[".parquet"]),
    }
    for frame in read.values():
        assert frame["value"].tolist() == pytest.approx(read[".parquet"]["value"].tolist(), rel=1e-12)
        assert {"norm_ratio", "intruder_dimensions"} <= set(frame["metric"])


@pytest.mark.slow
def test_gates_close_with_code_three_after_everything_is_written(
    call: Call, folders: list[Path], tmp_path: Path
) -> None:
    lowest = Gate.parse("entropy_min<0").value(spectrum_table(AdapterSet.load(*folders[:2])))
    gates = ("--fail-if", f"entropy_min<{lowest + 0.01}", "--fail-if", "overlap_max>=2")
    code, out, err = call("analyze", *folders[:2], "--out", tmp_path / "a", "--json", *gates)
    assert code == 3
    assert "gate closed: entropy_energy_normalized_min < " in err
    assert [item["holds"] for item in json.loads(out)["fail_if"]] == [True, False]
    assert json.loads(out)["fail_if"][0]["value"] == pytest.approx(lowest, rel=1e-12)
    assert (tmp_path / "a" / "report.html").exists()
    code, _, err = call("analyze", *folders[:2], "--out", tmp_path / "b", "--fail-if", f"entropy_min<{lowest - 0.01}")
    assert (code, "gate closed" in err) == (0, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fail-if", "entropy<0.5"), "error: a gate is METRIC_{min,max,mean,median} < > <= >= NUMBER, such as"),
        (("--fail-if", "beauty_min<0.5"), "error: unknown metric 'beauty' in 'beauty_min<0.5'"),
        (
            ("--memory-budget", "0"),
            "error: --memory-budget is a number of bytes above 0",
        ),
        (("--alpha", "much"), "error: --alpha is 'much': give a number, or rank"),
        (("--base", "nowhere"), "error: nowhere does not exist: give for --base a checkpoint"),
        (("--memory", "nowhere"), "error: nowhere does not exist: give for --memory a folder with memory.safetensors"),
        (("--device", "abacus"), "error: device 'abacus' is not available here"),
    ],
)
def test_bad_options_end_with_code_two(
    options: tuple[str, ...], message: str, call: Call, folders: list[Path], tmp_path: Path
) -> None:
    code, out, err = call("analyze", *folders[:2], "--out", tmp_path, *options, "--json")
    assert (code, out) == (2, "")
    assert message in err


def test_a_folder_without_adapters_says_what_was_looked_for(call: Call, tmp_path: Path) -> None:
    code, _, err = call("analyze", tmp_path, "--out", tmp_path / "pages")
    assert code == 2
    assert "holds no adapter: looked for record.json (a run), adapter.safetensors" in err
    assert not (tmp_path / "pages").exists()


def test_parquet_without_pyarrow_says_what_to_install(
    call: Call, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError("No module named 'pyarrow'")
        return whole(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = call("analyze", *folders[:2], "--out", tmp_path / "pages", "--format", "parquet")
    assert code == 2
    assert "Parquet needs pyarrow: pip install 'pyarrow>=18'" in err
    assert not (tmp_path / "pages").exists()


def test_tables_have_three_kinds_of_files(tmp_path: Path) -> None:
    table = pd.DataFrame({"metric": ["a", "b"], "value": [1.5, float("nan")]})
    content = json.loads(write_table(table, tmp_path / "new" / "t.json").read_text())
    assert content == {
        "schema": "analysis.table/1",
        "rows": [{"metric": "a", "value": 1.5}, {"metric": "b", "value": None}],
    }
    with pytest.raises(ValueError, match=r"t\.xlsx: tables are written as \.csv, \.json or \.parquet"):
        write_table(table, tmp_path / "t.xlsx")
    assert "openpyxl" not in sys.modules


def test_updates_that_are_zero_or_of_rank_one_are_told_and_the_rest_is_shown(
    call: Call, folders: list[Path], tmp_path: Path
) -> None:
    adapters = AdapterSet.load(folders[0])
    factors = {layer: adapters.factors("first", layer) for layer in adapters.layers}
    second = adapters.layers[1]
    left, right = factors[second]
    lines = {layer: (left[:, :1], right[:, :1]) for layer, (left, right) in factors.items()}
    AdapterSet.from_factors({"a": {**factors, second: (0 * left, right)}, "b": factors}).save(tmp_path / "zero")
    AdapterSet.from_factors({"a": lines, "b": lines}).save(tmp_path / "lines")
    code, out, err = call("analyze", tmp_path / "zero", "--out", tmp_path / "pages", "--json")
    assert (code, json.loads(out)["zero"]) == (0, [f"a, {second}", f"a, {second} (sum of all updates so far)"])
    assert f"zero, so without a spectrum: a, {second} and 1 more" in err
    code, out, _ = call("analyze", tmp_path / "lines", "--out", tmp_path / "thin")
    assert (code, "nan" in out) == (0, False)
    (row, _) = (line.split() for line in out.splitlines() if line.strip().startswith(("a ", "b ")))
    assert row[1] == "–"  # one direction has no entropy relative to ln 1


def test_what_is_not_read_is_printed_and_listed(call: Call, folders: list[Path], tmp_path: Path) -> None:
    task = tmp_path / "several[1]"
    shutil.copytree(folders[0], task)
    shutil.copytree(folders[1], task / "named")
    (task / "named" / "README.md").unlink(missing_ok=True)
    code, out, err = call("analyze", task, "--out", tmp_path / "pages", "--json")
    (notice,) = json.loads(out)["notices"]
    assert json.loads(out)["left_out"] == []  # a named adapter is read, as a task of its own
    assert (code, notice.rpartition(": ")[2]) == (0, "named")
    assert notice in err.replace("\n", " ")


def test_tensors_that_are_not_read_are_in_a_table(call: Call, folders: list[Path], tmp_path: Path) -> None:
    code, out, _ = call("analyze", folders[0], "--layers", "0.q", "--out", tmp_path / "pages", "--json")
    shown = json.loads(out)
    table = pd.read_csv(shown["paths"]["left_out"], keep_default_na=False).drop(columns="run")
    assert (code, table.to_dict("records")) == (
        0,
        [{k: v for k, v in row.items() if k != "run"} for row in shown["left_out"]],
    )
    assert len(table)
    assert set(table["reason"]) == {"not found by layers='0.q'"}
    assert all(
        f">{layer}</td>" in Path(shown["paths"]["report"]).read_text(encoding="utf-8") for layer in table["tensor"]
    )


def test_layers_are_renamed_on_the_command_line(call: Call, folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "pages"
    code, shown, err = call(
        "analyze", folders[0], "--map", "h=model.layers", "--base", folders[2], "--out", out, "--json"
    )
    assert code == 0, err
    table = pd.read_csv(json.loads(shown)["paths"]["spectra"])
    assert set(table["layer"]) == {"model.layers.0.q", "model.layers.1.q"}
    assert "norm_ratio" in set(table["metric"])  # the base's layers are renamed too
    for wrong, message in (("h", "--map h: OLD=NEW was expected"), ("0=1", "have the same name after --map")):
        code, _, err = call("analyze", folders[0], "--map", wrong, "--out", tmp_path / "none")
        assert (code, message in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "none").exists()


def test_an_address_on_the_hub_without_network_is_wrong_input(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = call("analyze", "hf://owner/absent", "--out", tmp_path / "pages")
    assert (code, "hf download owner/absent" in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "pages").exists()


def test_tasks_are_named_on_the_command_line(call: Call, folders: list[Path], tmp_path: Path) -> None:
    same = (folders[0], folders[0])
    code, _, err = call("analyze", *same, "--out", tmp_path)
    assert code == 2
    assert "task 'first' occurs twice" in err
    assert "--tasks" in err
    assert "tasks=" not in err
    code, _, err = call("analyze", *same, "--tasks", "before, after", "--out", tmp_path)
    assert code == 0, err
    assert set(pd.read_csv(tmp_path / "spectra.csv")["task"]) == {"before", "after"}
    code, _, err = call("analyze", *same, "--tasks", "one", "--out", tmp_path)
    assert code == 2
    assert "error: --tasks names 1 tasks, but the paths hold 2" in err


@pytest.mark.slow
def test_a_given_subspace_replaces_that_of_a_run(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"rank": 4, "alpha": 8.0, "lr": 0.03, "statistic_examples": 32}
    ContinualRunner(toy_stream(), make_method("eblora", **options), run).run()
    first = sorted((run / "tasks").iterdir())[0]
    for name, more in (("own", ()), ("given", ("--memory", first))):
        code, _, err = call("analyze", run, "--out", tmp_path / name, *more)
        assert code == 0, err
    own, given = (pd.read_csv(tmp_path / name / "interference.csv") for name in ("own", "given"))
    exact = interference_table(AdapterSet.load(run), protected=read_protected(first))
    leaks = [table[table["metric"] == "leakage"] for table in (own, given, exact)]
    assert set(leaks[0]["task_b"]) == {"second", "third"}  # nothing was protected before the first task
    assert set(leaks[1]["task_b"]) == {"first", "second", "third"}
    assert leaks[1]["value"].tolist() == pytest.approx(leaks[2]["value"].tolist(), rel=1e-12)
    code, _, err = call("analyze", run, "--tasks", "a,b,c", "--out", tmp_path / "own")
    assert code == 2
    assert "--tasks" in err


def test_a_gate_closes_where_a_value_is_unknown(call: Call, folders: list[Path], tmp_path: Path) -> None:
    """The summary of the other values would hide it: one layer of rank 1 has no entropy relative to ln r."""
    adapters = AdapterSet.load(folders[0])
    factors = {layer: adapters.factors("first", layer) for layer in adapters.layers}
    thin = adapters.layers[1]
    left, right = factors[thin]
    AdapterSet.from_factors({"a": {**factors, thin: (left[:, :1], right[:, :1])}}).save(tmp_path / "mixed")
    table = spectrum_table(AdapterSet.load(tmp_path / "mixed"))
    for text in ("entropy_min<0", "entropy_max>1", "entropy_mean>=2", "entropy_median<=-1"):
        gate = Gate.parse(text)
        assert (str(gate.value(table)), gate.fails(table), gate.unknown(table)) == ("nan", True, [f"a, {thin}"])
    gates = ("--fail-if", "entropy_min<0", "--fail-if", "stable_rank_max>1000")
    code, out, err = call("analyze", tmp_path / "mixed", "--out", tmp_path / "pages", "--json", *gates)
    assert code == 3
    assert [(item["value"] is None, item["holds"]) for item in json.loads(out)["fail_if"]] == [
        (True, True),
        (False, False),
    ]
    assert "gate closed: entropy_energy_normalized_min < 0, 1 values are unknown, the first is that of " in err
    assert f"a, {thin}" in err


@pytest.mark.slow
def test_a_gate_sees_updates_that_are_zero(call: Call, tmp_path: Path) -> None:
    """The table of spectra has no row of them, so a gate on small norms passed."""
    eye = torch.eye(6)
    AdapterSet.from_factors({"a": {"x": (eye, eye), "y": (0 * eye, eye)}}).save(tmp_path / "one")
    gates = ("--fail-if", "frobenius_min<1e-6", "--fail-if", "entropy_min<0.5")
    code, out, err = call("analyze", tmp_path / "one", "--out", tmp_path / "pages", "--json", *gates)
    assert code == 3
    found = [(each["value"], each["holds"]) for each in json.loads(out)["fail_if"]]
    assert found == [(0.0, True), (None, True)]  # an entropy of nothing is unknown
    assert "gate closed: frobenius_min < 1e-06, it is 0" in err
    assert set(pd.read_csv(tmp_path / "pages" / "spectra.csv")["layer"]) == {"x"}


def test_a_first_argument_that_is_no_command_is_a_path_of_the_report(
    call: Call, folders: list[Path], tmp_path: Path
) -> None:
    for words, place in ((("analyze",), "short"), (("analyze", "report"), "long")):
        code, _, err = call(*words, folders[0], "--out", tmp_path / place)
        assert code == 0, err
    assert (tmp_path / "short" / "spectra.csv").read_bytes() == (tmp_path / "long" / "spectra.csv").read_bytes()


def test_a_report_replaces_the_tables_of_an_earlier_one_and_an_error_leaves_them(
    call: Call, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("answers.csv", "spectra.parquet", "notes.csv"):
        (out / name).write_text("earlier")

    def fails(*_: object) -> Path:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("analysis.report.write_subjects_report", fails)
        assert call("analyze", folders[0], "--out", out)[0] == 2
        assert {path.read_text() for path in out.iterdir()} == {"earlier"}
        assert call("analyze", folders[0], "--out", tmp_path / "new")[0] == 2
        assert not (tmp_path / "new").exists()
    assert call("analyze", folders[0], "--out", out)[0] == 0
    names = {path.name for path in out.iterdir()}
    assert "answers.csv" not in names
    assert "spectra.parquet" not in names
    assert {"notes.csv", "spectra.csv", "report.html"} <= names
