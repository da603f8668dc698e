"""``manifold-cl run``, ``compare`` and ``analyze`` as a user calls them, on the toy stream."""

import base64
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from blank_figures import figures
from command import Call
from records import editable
from toy import ToyTask, toy_stream

from manifold_cl import RunRecord, TaskStream, cli
from manifold_cl.cli import durations
from manifold_cl.continual import Training
from manifold_cl.streams import STREAMS

OPTIONS = ("--set", "rank=4", "--set", "lr=0.03", "--set", "statistic_examples=32")


@pytest.fixture(autouse=True)
def builders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., TaskStream]]:
    """The registry of streams: the toy under three names."""
    streams: dict[str, Callable[..., TaskStream]] = {
        name: lambda name=name, **cut: toy_stream(name=name, **cut) for name in ("toy", "text-six", "text-three")
    }
    monkeypatch.setattr(STREAMS, "_entries", streams)
    return streams


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``manifold-cl run`` leaves with its default methods; not to be written to."""
    out = tmp_path_factory.mktemp("cli") / "runs"
    with pytest.MonkeyPatch.context() as patch, figures(drawn=True):
        patch.setattr(STREAMS, "_entries", {"text-six": lambda **cut: toy_stream(name="text-six", **cut)})
        cli.main(["run", "--out", str(out), *OPTIONS])
    return out


@pytest.fixture
def content(runs: Path) -> Callable[[], dict[Path, bytes]]:
    return lambda: {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}


def test_the_default_run_learns_with_both_methods_and_writes_the_report(runs: Path) -> None:
    names = ["text-six-sequential_merge-seed0", "text-six-eblora-seed0"]
    assert sorted(p.name for p in runs.iterdir()) == sorted([*names, "report-text-six-seed0.html"])
    for name, method in zip(names, ("sequential_merge", "eblora"), strict=True):
        record = RunRecord.load(runs / name)
        assert (record.status, record.method, record.name) == ("complete", method, name)
        assert (record.config["rank"], record.config["lr"], record.config["examples"]) == (4, 0.03, 96)
    assert "statistic_examples" not in RunRecord.load(runs / names[0]).config  # for the method that has it
    assert RunRecord.load(runs / names[1]).config["statistic_examples"] == 32
    page = (runs / "report-text-six-seed0.html").read_text()
    assert "text-six-eblora-seed0" in page
    drawings = [base64.b64decode(each).decode() for each in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]
    assert len(drawings) > 10
    assert all("<path" in drawing and drawing.rstrip().endswith("</svg>") for drawing in drawings)


def test_the_table_shows_the_figures_of_the_records(call: Call, runs: Path) -> None:
    ended = call("compare", runs / "text-six-sequential_merge-seed0", runs / "text-six-eblora-seed0")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].strip() == "text-six: accuracy in percent"
    for name in ("text-six-sequential_merge-seed0", "text-six-eblora-seed0"):
        (line,) = [line for line in lines if name in line]
        metrics = RunRecord.load(runs / name).metrics
        numbers = re.findall(r"-?\d+\.\d", line)
        assert numbers[:6] == [f"{metrics[k]:.1f}" for k in ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")]
    assert all(word in ended.out for word in ("ZERO-SHOT", "MFT", "MFN", "MAA", "BWT", "FWT", "minutes", "peak MB"))


def test_joint_training_is_shown_without_forward_transfer(call: Call, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "text-six-eblora-seed0", tmp_path / "joint")
    path = tmp_path / "joint/record.json"
    content = editable(path)
    path.write_text(json.dumps({**content, "method": "joint", "name": "at-once"}))
    ended = call("compare", tmp_path / "joint", runs / "text-six-eblora-seed0")
    (row,) = [line.split() for line in ended.out.splitlines() if "at-once" in line]
    assert [place for place, cell in enumerate(row) if cell == "–"] == [6]  # run, zero-shot, MFT, MFN, MAA, BWT, FWT


@pytest.mark.slow
def test_json_is_all_there_is_on_standard_output(call: Call, runs: Path) -> None:
    ended = call("run", "--out", runs, "--resume", "--json", *OPTIONS)
    assert ended.code == 0
    shown = json.loads(ended.out)
    assert [item["method"] for item in shown] == ["sequential_merge", "eblora"]
    for item in shown:
        record = RunRecord.load(runs / item["name"])
        assert item["metrics"] == record.metrics
        assert (item["status"], item["tasks"]) == ("complete", ["first", "second", "third"])
    assert re.search(r"report: \S+report-text-six-seed0\.html", ended.err)


@pytest.mark.slow
def test_the_path_of_the_report_is_on_standard_output(call: Call, runs: Path) -> None:
    ended = call("run", "--out", runs, "--resume", *OPTIONS)
    assert f"report: {runs / 'report-text-six-seed0.html'}" in ended.out.splitlines()
    assert "report" not in ended.err


@pytest.mark.slow
def test_the_first_line_names_stream_methods_and_expected_time(call: Call, runs: Path) -> None:
    expected = durations.expected_seconds("text-six", ["sequential_merge", "eblora"])
    assert expected is not None
    start = f"text-six: sequential_merge, eblora; about {durations.in_words(expected)} on "
    assert call("run", "--out", runs, "--resume", *OPTIONS).err.startswith(start)
    ended = call("run", "--stream", "toy", "--method", "zero_shot", "--tasks", "first", "--out", runs / "none")
    assert ended.err.startswith("toy (first): zero_shot; the time is not known yet")


@pytest.mark.slow
def test_one_method_on_some_tasks_with_few_examples(call: Call, tmp_path: Path) -> None:
    command = ("run", "--method", "eblora", "--stream", "toy", "--tasks", "third, first", "--examples", 32)
    ended = call(*command, "--seed", 3, "--out", tmp_path, "--json", *OPTIONS)
    assert ended.code == 0, ended.err
    (shown,) = json.loads(ended.out)
    assert shown["name"] == "toy-eblora-seed3"
    record = RunRecord.load(tmp_path / "toy-eblora-seed3")
    assert record.tasks == ["third", "first"]
    assert [timing["steps"] for timing in record.timings] == [2, 2]
    assert (record.config["seed"], record.config["examples"]) == (3, 32)
    assert (tmp_path / "report-toy-seed3.html").exists()
    again = call(*command, "--seed", 3, "--out", tmp_path, "--resume", "--json", "--set", "rank=2")
    assert (again.code, again.out) == (2, "")


def test_epochs_are_passes_over_each_task(call: Call, tmp_path: Path) -> None:
    command = ("run", "--method", "sequential_merge", "--stream", "toy", "--tasks", "first", "--out", tmp_path)
    assert call(*command, "--epochs", 2, "--examples", 32, "--json").code == 0
    record = RunRecord.load(tmp_path / "toy-sequential_merge-seed0")
    assert record.config["epochs"] == 2
    assert [timing["steps"] for timing in record.timings] == [4]


def test_a_method_given_twice_runs_once_and_json_has_null_for_unknown(call: Call, tmp_path: Path) -> None:
    command = ("run", "--method", "zero_shot", "--method", "zero_shot", "--tasks", "first", "--out", tmp_path)
    ended = call(*command, "--quick", "--json")
    assert ended.code == 0, ended.err
    (shown,) = json.loads(ended.out)
    assert (shown["stream"], shown["name"]) == ("text-three", "text-three-zero_shot-seed0")
    assert shown["metrics"]["bwt"] is None  # one task has no transfer
    assert shown["metrics"]["mfn"] == shown["metrics"]["zero_shot"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "ebora"), r"error: unknown method 'ebora', did you mean eblora or e2lora\? \(have: "),
        (("--set", "enrgy=1"), r"error: unknown option of sequential_merge and eblora 'enrgy', did you mean energy?"),
        (("--method", "EBLoRA"), r"error: unknown method 'EBLoRA', did you mean eblora\? \(have: "),
        (("--method", "LoRA"), r"error: unknown method 'LoRA': plain LoRA is sequential_merge"),
        (("--method", "eblora,gpm"), r"unknown method 'eblora,gpm': give .* --method eblora --method gpm"),
        (("--scale-lr", "1"), r"No such option:? '?--scale-lr'?\. .*give --set scale_lr=VALUE"),
        (("--method", "eblora", "--set", "enrgy=1"), "error: unknown option of eblora 'enrgy', did you mean energy?"),
        (("--set", "rank"), "error: --set takes name=value, got 'rank'"),
        (("--set", "rank=many"), "error: sequential_merge: rank is a whole number, got 'many'"),
        (("--stream", "text-sex"), "error: unknown stream 'text-sex', did you mean text-six"),
        (
            ("--quick", "--stream", "toy"),
            "error: --quick means text-three for text-six, lm-two for lm-four, vlm-two for vlm-three, got --stream toy",
        ),
        (("--device", "cuda:99"), "error: device 'cuda:99' is not available here: "),
        (("--device", "abacus"), "error: device 'abacus' is not available here: "),
        (("--sed", "1"), r"No such option:? '?--sed"),
        (("--seed", "one"), "Invalid value for '--seed': .*valid integer"),
        (("--seed", "-1"), "Invalid value for '--seed': it is at least 0, got -1"),
        (("--set", "epochs=3"), "error: epochs is an option of training, not of a method: give --epochs"),
        (("--set", "warmup=0"), r"error: warmup is an option of training.*\[training\] of a study"),
        (("--epochs", "0"), "Invalid value for '--epochs'"),
        (("--set", "rank=20"), r"error: inner: rank 20 does not fit a weight of shape \(16, 24\): choose 1 to 16"),
    ],
)
def test_bad_input_ends_with_code_two_and_says_what_to_do(
    arguments: tuple[str, ...], message: str, call: Call, tmp_path: Path
) -> None:
    ended = call("run", "--out", tmp_path / "runs", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert re.search(message.replace("energy?", r"energy\?"), ended.err), ended.err
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "noun"), "error: stream 'text-six': unknown task 'noun', did you mean nouns"),
        (("--tasks", "nouns,"), "error: a name in the list 'nouns,' is empty"),
        (("--examples", "0"), "'--examples': it is at least 1, got 0"),
    ],
)
def test_bad_cuts_of_a_real_stream_are_refused_before_anything_is_fetched(
    arguments: tuple[str, ...], message: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # the real registry; what fails here fails before it needs data
    monkeypatch.setenv("COLUMNS", "200")
    ended = call("run", "--out", tmp_path / "runs", *arguments)
    assert ended.code == 2
    assert re.search(message, ended.err), ended.err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_bad_input(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = call("run", "--method", "zero_shot", "--out", tmp_path / "file")
    assert ended.code == 2
    assert re.search(r"error: --out is \S+/file, but \S+/file is a file", ended.err), ended.err


def test_an_existing_run_is_not_written_over(call: Call, runs: Path, content: Callable[[], Any]) -> None:
    before = content()
    ended = call("run", "--out", runs, *OPTIONS)
    assert ended.code == 2
    assert "text-six-sequential_merge-seed0 holds a run already (complete): resume it, or choose another" in ended.err
    assert content() == before


def test_a_run_of_another_configuration_is_not_continued(call: Call, runs: Path, content: Callable[[], Any]) -> None:
    before = content()
    ended = call("run", "--out", runs, "--resume", *OPTIONS, "--set", "rank=2", "--set", "energy=0.5")
    assert ended.code == 2
    assert "text-six-sequential_merge-seed0 holds a run of another configuration: rank: 4 there, 2 here" in ended.err
    ended = call("run", "--out", runs, "--resume", *OPTIONS, "--set", "energy=0.5")  # the first method still fits
    assert ended.code == 2
    assert "text-six-eblora-seed0 holds a run of another configuration: energy: 0.97 there, 0.5 here" in ended.err
    assert content() == before


def test_a_truncated_record_is_refused_and_left_alone(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "text-six-eblora-seed0" / "record.json"  # of the second method
    path.parent.mkdir()
    path.write_text('{"format": "manifold_cl.record", "ver')
    for arguments in (("run", "--resume", "--out", tmp_path), ("compare", path.parent)):
        ended = call(*arguments)
        assert (ended.code, ended.out) == (2, "")
        assert "text-six-eblora-seed0/record.json is damaged or truncated" in ended.err
        assert "restore it, or delete its folder" in ended.err
    assert path.read_text() == '{"format": "manifold_cl.record", "ver'
    assert not (
        tmp_path / "text-six-sequential_merge-seed0"
    ).exists()  # all folders are checked before the first run starts


class Stopped(ToyTask):
    """Raises at the given call of its loss."""

    def __init__(self, like: ToyTask, at: int, error: BaseException | None) -> None:
        self.__dict__.update(like.__dict__)
        self.left, self.error = at, error

    def loss(self, model: torch.nn.Module, batch: toy.Batch) -> torch.Tensor:
        self.left -= 1
        if self.left == 0 and self.error is not None:
            raise self.error
        loss = super().loss(model, batch)
        return loss if self.left > 0 or self.error is not None else loss * math.nan


def stopping(at: int, error: BaseException | None) -> Callable[..., TaskStream]:
    def build(**cut: Any) -> TaskStream:
        stream = toy_stream(name="text-six", **cut)
        second = stream.tasks[1]
        assert isinstance(second, ToyTask)
        tasks = (stream.tasks[0], Stopped(second, at, error), stream.tasks[2])
        return TaskStream(stream.name, tasks, stream.make_model, stream.targets, stream.provenance)

    return build


def test_an_interrupted_command_goes_on_with_resume(
    call: Call, builders: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    whole = builders["text-six"]
    builders["text-six"] = stopping(4, KeyboardInterrupt())  # in the second task of the first method
    command = ("run", "--out", tmp_path, *OPTIONS)
    ended = call(*command)
    assert ended.code == 130
    assert "interrupted: finished tasks are kept; the same command with --resume goes on from there" in ended.err
    assert ended.out == ""
    assert RunRecord.load(tmp_path / "text-six-sequential_merge-seed0").done == 1
    assert not (tmp_path / "text-six-eblora-seed0").exists()
    compared = call("compare", tmp_path / "text-six-sequential_merge-seed0")
    assert compared.code == 0
    assert "text-six-sequential_merge-seed0 (1 of 3 tasks)" in compared.out
    builders["text-six"] = whole
    assert call(*command, "--resume").code == 0
    for name in ("text-six-sequential_merge-seed0", "text-six-eblora-seed0"):
        found, expected = RunRecord.load(tmp_path / name), RunRecord.load(runs / name)
        assert (found.accuracy, found.losses, found.metrics) == (expected.accuracy, expected.losses, expected.metrics)


def test_a_diverging_run_ends_with_code_one(call: Call, builders: dict[str, Any], tmp_path: Path) -> None:
    builders["text-six"] = stopping(2, None)
    ended = call("run", "--method", "sequential_merge", "--out", tmp_path, *OPTIONS[:4])
    assert ended.code == 1
    assert "diverged: the loss of second became nan at step 2: lower the learning rate" in ended.err
    assert RunRecord.load(tmp_path / "text-six-sequential_merge-seed0").done == 1


def test_compare_puts_runs_beside_each_other(call: Call, runs: Path) -> None:
    folders = [runs / "text-six-eblora-seed0", runs / "text-six-sequential_merge-seed0"]
    ended = call("compare", *folders)
    assert ended.code == 0
    assert ended.out.index("text-six-eblora-seed0") < ended.out.index(
        "text-six-sequential_merge-seed0"
    )  # as they were given
    assert "do not compare" not in ended.err
    ended = call("compare", *folders, "--json")
    assert [item["method"] for item in json.loads(ended.out)] == ["eblora", "sequential_merge"]
    constraint = max(e for errors in RunRecord.load(folders[0]).constraints for e in errors.values())
    assert f"{constraint:.0e}" in call("compare", folders[0]).out


def test_compare_warns_where_the_streams_differ(call: Call, runs: Path, tmp_path: Path) -> None:
    assert call("run", "--method", "zero_shot", "--stream", "toy", "--out", tmp_path).code == 0
    ended = call("compare", runs / "text-six-eblora-seed0", tmp_path / "toy-zero_shot-seed0")
    assert ended.code == 0
    assert "these runs learned different streams: their figures do not compare" in ended.err
    assert ended.out.splitlines()[0].strip() == "accuracy in percent"


def test_compare_needs_runs(call: Call, tmp_path: Path) -> None:
    ended = call("compare", tmp_path)
    assert ended.code == 2
    assert "holds neither a record.json (a run) nor a study.json (a study)" in ended.err
    assert call("compare").code == 2


def test_analyze_writes_tables_and_a_report(call: Call, runs: Path, tmp_path: Path) -> None:
    ended = call(
        "analyze", runs / "text-six-eblora-seed0", "--out", tmp_path / "deep" / "pages", "--json", "--format", "json"
    )
    assert ended.code == 0, ended.err
    shown = json.loads(ended.out)
    assert [shown.pop(key) for key in ("fail_if", "zero", "notices", "left_out")] == [[], [], [], []]
    assert shown.pop("findings")[0]["kind"] == "scores"
    written = {name: Path(path) for name, path in shown["paths"].items()}
    assert set(written) == {"report", "spectra", "interference", "components", "noise", "left_out"}
    rows = json.loads(written["spectra"].read_text())["rows"]
    shown = [r for r in rows if (r["update"], r["metric"]) == ("task", "effective_rank_energy")]
    assert [r["task"] for r in shown[::2]] == ["first", "second", "third"]
    ranks = [float(r["value"]) for r in shown]
    assert ranks == pytest.approx([4.0] * 6, rel=1e-5)  # balanced: two layers, three tasks, rank 4, in float32
    assert len(json.loads(written["interference"].read_text())["rows"]) > 6
    assert written["report"].read_text().lstrip().lower().startswith("<!doctype html")


@pytest.mark.parametrize("arguments", [("nowhere",), (".", "--device", "abacus")])
def test_analyze_refuses_what_it_cannot_read(arguments: tuple[str, ...], call: Call, tmp_path: Path) -> None:
    folder = tmp_path / arguments[0]
    ended = call("analyze", folder, *arguments[1:], "--out", tmp_path / "pages")
    assert (ended.code, ended.out) == (2, "")
    assert re.search("nowhere|device 'abacus' is not available here", ended.err)
    assert not (tmp_path / "pages").exists()


def test_the_defaults_of_the_command_are_those_of_the_library(runs: Path) -> None:
    config = RunRecord.load(runs / "text-six-sequential_merge-seed0").config
    defaults = Training()
    for name in ("epochs", "batch_size", "warmup", "seed", "evaluate_on"):
        assert config[name] == getattr(defaults, name)
