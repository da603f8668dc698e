"""Changed updates are evaluated in place of the trained ones, and forgetting is divided among layers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from records import editable
from toy import toy_stream

from manifold_cl import ContinualRunner
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.causes.changed_updates import FinishedRun, added, evaluate_changes, summarise_updates
from manifold_cl.continual.causes.layer_forgetting import measure_layers
from manifold_cl.files import FileError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    runner_of(folder).run()
    return folder


def runner_of(folder: Path, seed: int = 0) -> ContinualRunner:
    method = make_method("sequential_merge", rank=4, alpha=8.0, lr=0.03)
    return ContinualRunner(toy_stream(), method, folder, training=Training(epochs=2, seed=seed))


def halved(task: str, update: Mapping[str, Factors]) -> dict[str, Factors]:
    return {name: Factors(f.left, f.right, 0.5 * f.magnitude) for name, f in update.items()}


def test_the_trained_update_gives_the_scores_of_the_record(run: Path, tmp_path: Path) -> None:
    runner = runner_of(run)
    content = evaluate_changes(runner, {}, tmp_path / "r.json", split="test")
    rows = FinishedRun(runner).record.accuracy["accuracy"]
    assert list(content["cells"]) == ["second", "third"]
    for index, task in ((1, "second"), (2, "third")):
        cells = content["cells"][task]
        assert cells["trained"]["score"] == rows[index][: index + 1]
        assert cells["before"]["score"] == rows[index - 1][: index + 1]
        assert all(len(cell["loss"]) == index + 1 for cell in cells.values())
    assert editable(tmp_path / "r.json") == content


def test_only_the_update_of_its_task_is_changed(run: Path, tmp_path: Path) -> None:
    runner = runner_of(run)
    content = evaluate_changes(runner, {"half": halved}, tmp_path / "r.json", split="test")
    run_ = FinishedRun(runner)
    for index, model in run_.models():
        if index == 2:
            with added(model, halved("third", run_.update(2))):
                expected = [task.measure(model, "test") for task in runner.stream.tasks]
    assert content["cells"]["third"]["half"]["score"] == [row["score"] for row in expected]
    assert content["cells"]["third"]["half"]["loss"] == [row["loss"] for row in expected]
    half, whole = (content["cells"]["third"][name]["spectrum"] for name in ("half", "trained"))
    assert half["entropy"] == pytest.approx(whole["entropy"])
    for norm in ("frobenius", "spectral", "nuclear"):
        assert half[norm] == pytest.approx(whole[norm] / 2)
    sigmas = [torch.linalg.svdvals(f.delta_weight())[:4].double() for f in FinishedRun(runner).update(2).values()]
    assert whole["frobenius"] == pytest.approx(float(sum(s.square().sum() for s in sigmas) / 2) ** 0.5, rel=1e-5)
    entropy = [torch.special.entr(s**2 / s.square().sum()).sum() / torch.tensor(4.0).log() for s in sigmas]
    assert whole["entropy"] == pytest.approx(float(sum(entropy) / 2), rel=1e-5)
    shares = torch.stack([s.square().sum() for s in sigmas])
    between = torch.special.entr(shares / shares.sum()).sum() / torch.tensor(2.0).log()
    assert whole["between_layers"] == pytest.approx(float(between), rel=1e-5)
    assert content["cells"]["third"]["before"]["spectrum"] == {}


def test_summaries_of_updates_are_those_of_the_evaluation(run: Path, tmp_path: Path) -> None:
    summaries = summarise_updates(runner_of(run), tmp_path / "s.json")["updates"]
    cells = evaluate_changes(runner_of(run), {}, tmp_path / "r.json")["cells"]
    assert list(summaries) == ["first", "second", "third"]
    for task in ("second", "third"):
        assert summaries[task] == cells[task]["trained"]["spectrum"]
    assert summarise_updates(runner_of(run), tmp_path / "s.json")["updates"] == summaries


def test_an_interrupted_evaluation_continues_and_new_changes_are_added(run: Path, tmp_path: Path) -> None:
    path, seen = tmp_path / "r.json", []

    class StopHereError(Exception):
        pass

    def stop(task: str, change: str) -> None:
        if len(seen) == 3:
            raise StopHereError
        seen.append((task, change))

    with pytest.raises(StopHereError):
        evaluate_changes(runner_of(run), {"half": halved}, path, on_cell=stop)
    assert len(json.loads(path.read_text())["cells"]["second"]) == 3
    again: list[tuple[str, str]] = []
    content = evaluate_changes(runner_of(run), {"half": halved}, path, on_cell=lambda *cell: again.append(cell))
    assert again == [("third", name) for name in ("before", "trained", "half")]
    straight = evaluate_changes(runner_of(run), {"half": halved}, tmp_path / "straight.json")
    assert content == straight
    more: list[tuple[str, str]] = []
    evaluate_changes(runner_of(run), {"half": halved, "again": halved}, path, on_cell=lambda *cell: more.append(cell))
    assert more == [("second", "again"), ("third", "again")]


def test_weights_come_back_bit_for_bit(run: Path) -> None:
    for index, model in FinishedRun(runner_of(run)).models():
        if index == 1:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with added(model, FinishedRun(runner_of(run)).update(1), 0.3):
                assert not torch.equal(model.state_dict()["inner.weight"], before["inner.weight"])
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("measure", [measure_layers, lambda *a, **k: evaluate_changes(a[0], {}, a[1], **k)])
def test_results_of_other_runs_and_incomplete_runs_are_refused(measure: Any, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    measure(runner_of(run), path)
    with pytest.raises(FileError, match=r"r\.json holds other results \(split: 'validation' there, 'test' here; "):
        measure(runner_of(run), path, split="test")
    record = editable(run / "record.json")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "record.json").write_text(json.dumps({**record, "status": "running"}))
    with pytest.raises(FileError, match="part is running: finish the run first"):
        measure(runner_of(tmp_path / "part"), tmp_path / "other.json")


def test_parts_of_layers_add_up_to_the_change_of_the_loss(run: Path, tmp_path: Path) -> None:
    content = measure_layers(runner_of(run), tmp_path / "l.json", split="test", batch_size=32)
    assert list(content["spectra"]) == ["first", "second", "third"]
    assert {task: list(pairs) for task, pairs in content["pairs"].items()} == {
        "second": ["first", "second"],
        "third": ["first", "second", "third"],
    }
    changes = evaluate_changes(runner_of(run), {}, tmp_path / "r.json", split="test")
    for task, pairs in content["pairs"].items():
        for position, pair in enumerate(pairs.values()):
            assert pair["before"] == pytest.approx(changes["cells"][task]["before"]["loss"][position], abs=1e-5)
            assert pair["after"] == pytest.approx(changes["cells"][task]["trained"]["loss"][position], abs=1e-5)
            parts = sum(row["effect"] for row in pair["layers"].values())
            assert parts == pytest.approx(pair["after"] - pair["before"], abs=0.02 + 0.05 * abs(parts))
            for row in pair["layers"].values():
                assert 0 <= row["overlap"] <= 1
                assert 0 <= row["overlap_inputs"] <= 1
                assert row["drift"] > 0


def test_the_measurements_of_a_layer_are_the_dense_ones(run: Path, tmp_path: Path) -> None:
    content = measure_layers(runner_of(run), tmp_path / "l.json", split="test")
    runner = runner_of(run)
    for index, model in FinishedRun(runner).models():
        if index == 1:
            (x, _), update = runner.stream.tasks[0]._data["test"], FinishedRun(runner).update(1)["inner"]  # type: ignore[attr-defined]
            delta, weight = update.delta_weight(), model.inner.weight.detach()  # type: ignore[union-attr]
            row = content["pairs"]["second"]["first"]["layers"]["inner"]
            drift = (x @ delta.T).square().sum() / (x @ weight.T).square().sum()
            assert row["drift"] == pytest.approx(float(drift), rel=1e-4)
            basis = torch.linalg.svd(delta)[2][:4].T
            assert row["overlap_inputs"] == pytest.approx(
                float((x @ basis).square().sum() / x.square().sum()), rel=1e-4
            )
            sigma = torch.linalg.svdvals(delta)[:4].tolist()
            assert content["spectra"]["second"]["inner"] == pytest.approx(sigma, rel=1e-4)
