"""``manifold-cl streams run`` on the tiny model: from folder and layout to a report, and on again after a kill."""

import json
from pathlib import Path

import pytest

from manifold_cl.cli import main
from manifold_cl.streams import read_layout

pytest.importorskip("transformers")


def run(tiny: Path, out: Path, *more: str) -> None:
    main(
        [
            *("streams", "run", str(tiny / "data"), "--layout", str(tiny / "ucit.toml"), "--preset", "tiny"),
            *("--model", str(tiny / "model"), "--device", "cpu", "--dtype", "float32", "--out", str(out), *more),
        ]
    )


@pytest.mark.slow
def test_a_preset_runs_from_a_folder_to_a_report(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, tmp_path, "--json", "--tasks", "IconQA", "--train-projector", "--batch-size", "2", "--test-examples", "4")
    (figures,) = json.loads(capsys.readouterr().out)
    assert (figures["status"], figures["tasks"]) == ("complete", ["IconQA"])
    record = json.loads((tmp_path / "tiny-ucit-tiny-seed0/record.json").read_text())
    assert (record["config"]["batch_size"], record["config"]["accumulation"], record["config"]["rank"]) == (2, 4, 4)
    assert record["provenance"]["projector"] == "trained"
    assert record["provenance"]["sizes"] == {"IconQA": {"train": 16, "test": 4}}
    assert list(tmp_path.glob("report-*.html"))
    with pytest.raises(SystemExit) as ended:
        run(tiny, tmp_path, "--tasks", "IconQA", "--train-projector", "--batch-size", "2", "--test-examples", "4")
    assert ended.value.code == 2
    assert "holds a run already (complete): resume it" in capsys.readouterr().err.replace("\n", " ")


def test_the_default_device_is_asked_for_before_anything_is_read(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["streams", "run", str(tmp_path), "--layout", str(tiny / "ucit.toml"), "--device", "nowhere"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "unknown preset 'published' (have: tiny)" in said.replace("\n", " ")
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, "--device", "nowhere")
    assert "device 'nowhere' is not available here" in capsys.readouterr().err.replace("\n", " ")


def test_the_layout_file_can_be_taken_and_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["streams", "layout", "--stream", "mllm-dcl"])
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out.replace('name = "RS"', 'name = "Remote"'))
    assert read_layout(path).tasks[0].name == "Remote"
